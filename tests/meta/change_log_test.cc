#include "meta/change_log.h"

#include <gtest/gtest.h>
#include <sys/fsuid.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "meta/caller.h"
#include "scratch.h"

namespace sharefs {
namespace {

using Kind = Change::Kind;

Change extent(InodeId id, std::uint64_t offset, std::uint64_t length) {
  return {.kind = Kind::extent, .id = id, .offset = offset, .length = length};
}

class ChangeLogTest : public testing::Test {
 protected:
  std::vector<Change> read(std::uint64_t after, std::uint64_t through) {
    std::vector<Change> all;
    const auto count =
        read_changes(reader_, after, through, [&](const Change& change) { all.push_back(change); });
    EXPECT_EQ(count, all.size());
    return all;
  }
  std::vector<Change> rows() { return read(0, std::numeric_limits<std::int64_t>::max()); }
  void run(std::chrono::milliseconds time) {
    reactor_.after(time, [this] { reactor_.stop(); });
    reactor_.run();
  }
  bool is_swept(std::size_t but = 0) {
    for (int i = 0; i < 1000 && rows().size() > but; ++i) run(std::chrono::milliseconds(10));
    return rows().size() == but;
  }

  Scratch scratch_;
  Reactor reactor_;
  Database database_{scratch_ / "state.db"};
  Database reader_{scratch_ / "state.db"};
  ChangeLog log_{database_, reactor_};
};

TEST_F(ChangeLogTest, notes_nothing_before_start_and_after_stop) {
  log_.changing(extent(2, 0, 10));
  EXPECT_FALSE(log_.active());
  EXPECT_EQ(log_.entries(), 0U);
  log_.start();
  log_.changing(extent(2, 0, 10));
  log_.flush();
  log_.changing(extent(3, 0, 10));
  EXPECT_EQ(rows().size(), 1U);
  log_.stop();
  log_.changing(extent(4, 0, 10));
  EXPECT_EQ(log_.unshipped_bytes(), 0U);
  log_.flush();
  EXPECT_TRUE(is_swept());
}

TEST_F(ChangeLogTest, what_a_crashed_attempt_left_is_not_read_and_goes) {
  database_.execute("INSERT INTO change_log(seq, kind, inode) VALUES(1, 'freed', 9), (77, 'freed', 9)");
  ChangeLog log(database_, reactor_);
  const auto first = log.start();
  log.changing({.kind = Kind::freed, .id = 3});
  const auto changes = read(first, log.flush());
  ASSERT_EQ(changes.size(), 1U);
  EXPECT_EQ(changes[0].id, 3U);
  EXPECT_TRUE(is_swept(1));
}

TEST_F(ChangeLogTest, what_is_not_needed_goes_little_by_little_and_waits_for_nobody) {
  log_.start();
  for (InodeId id = 1; id <= 3000; ++id) log_.changing({.kind = Kind::freed, .id = id});
  log_.flush();
  log_.stop();
  EXPECT_EQ(rows().size(), 3000U);
  const auto first = log_.start();
  log_.changing({.kind = Kind::freed, .id = 1});
  const auto cut = log_.flush();
  {
    Transaction other(reader_);
    const auto start = Reactor::Clock::now();
    run(std::chrono::milliseconds(50));
    EXPECT_LT(Reactor::Clock::now() - start, std::chrono::seconds(5));
  }
  EXPECT_EQ(rows().size(), 3001U);
  EXPECT_TRUE(is_swept(1));
  EXPECT_EQ(read(first, cut).size(), 1U);
}

TEST_F(ChangeLogTest, every_kind_comes_back_as_it_went_in) {
  const std::string name("\xff\0/x", 4);
  log_.start();
  log_.changing({.kind = Kind::entry, .id = 1, .name = name});
  log_.changing({.kind = Kind::attributes, .id = 2});
  log_.changing(extent(3, 1ULL << 40, 5));
  log_.changing({.kind = Kind::freed, .id = ~0ULL});
  log_.flush();
  const auto changes = rows();
  ASSERT_EQ(changes.size(), 4U);
  EXPECT_EQ(changes[0].kind, Kind::entry);
  EXPECT_EQ(changes[0].name, name);
  EXPECT_EQ(changes[1].kind, Kind::attributes);
  EXPECT_EQ(changes[1].id, 2U);
  EXPECT_EQ(changes[2].kind, Kind::extent);
  EXPECT_EQ(changes[2].offset, 1ULL << 40);
  EXPECT_EQ(changes[2].length, 5U);
  EXPECT_EQ(changes[3].kind, Kind::freed);
  EXPECT_EQ(changes[3].id, ~0ULL);
}

TEST_F(ChangeLogTest, touching_extents_of_one_inode_become_one_entry) {
  log_.start();
  for (std::uint64_t i = 0; i < 100; ++i) {  // as a sequential writer does, two files side by side
    for (InodeId id : {2, 3}) {
      log_.changing(extent(id, i * 10, 10));
      log_.changing({.kind = Kind::attributes, .id = id});
    }
  }
  log_.changing(extent(2, 990, 20));   // overlaps the end
  log_.changing(extent(3, 2000, 10));  // does not touch
  EXPECT_EQ(log_.entries(), 5U);
  EXPECT_EQ(log_.unshipped_bytes(), 1000U + 1000U + 10U + 10U);
  log_.flush();
  const auto changes = rows();
  ASSERT_EQ(changes.size(), 5U);
  EXPECT_EQ(changes[0].offset, 0U);
  EXPECT_EQ(changes[0].length, 1010U);
  EXPECT_EQ(changes[4].offset, 2000U);
}

TEST_F(ChangeLogTest, rewriting_the_same_block_costs_its_bytes_once) {
  log_.start();
  for (int i = 0; i < 50; ++i) log_.changing(extent(2, 4096, 4096));
  EXPECT_EQ(log_.entries(), 1U);
  EXPECT_EQ(log_.unshipped_bytes(), 4096U);
}

TEST_F(ChangeLogTest, blocks_that_are_rewritten_over_and_over_are_noted_once_per_cut) {
  log_.start();
  const auto rewrite = [&] {
    for (std::uint64_t i = 0; i < 50'000; ++i) {
      log_.changing(extent(2, i * 7919 % 1000 * 8192, 4096));  // none touches another one
      log_.changing({.kind = Kind::attributes, .id = 2});
    }
  };
  rewrite();
  // Where two cells push each other out they are noted again.
  EXPECT_LT(log_.entries(), 5000U);
  const auto cut = log_.flush();
  const auto before = log_.entries();
  rewrite();
  EXPECT_GE(log_.entries() - before, 1001U) << "what a reader may have seen covers nothing";
  EXPECT_GE(read(cut, log_.flush()).size(), 1001U);
}

// The invariant that the target's copy rests on: whatever was changed after a cut is read behind it.
TEST_F(ChangeLogTest, all_that_was_changed_between_two_cuts_is_in_the_entries_between_them) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const auto below = [&random](std::uint64_t end) { return random() % end; };
  std::uint64_t cut = log_.start();
  for (int round = 0; round < 30; ++round) {
    std::vector<Change> made;
    for (std::uint64_t i = below(3000); i > 0; --i) {
      const InodeId id = 2 + below(3);
      made.push_back(below(4) == 0 ? Change{.kind = Kind::attributes, .id = id}
                                   : extent(id, below(500) * 4096, 1 + below(3) * 2048));
      log_.changing(made.back());
    }
    const auto next = log_.flush();
    const auto noted = read(cut, next);
    cut = next;
    for (const Change& change : made) {
      EXPECT_TRUE(std::ranges::any_of(noted,
                                      [&change](const Change& entry) {
                                        return entry.kind == change.kind && entry.id == change.id &&
                                               entry.offset <= change.offset &&
                                               entry.offset + entry.length >= change.offset + change.length;
                                      }))
          << change.id << ' ' << change.offset;
    }
  }
}

TEST_F(ChangeLogTest, an_extent_to_the_very_end_does_not_overflow) {
  constexpr auto kMax = std::numeric_limits<std::uint64_t>::max();
  log_.start();
  log_.changing(extent(2, 100, kMax));
  log_.changing(extent(2, 50, 50));
  log_.changing(extent(3, 0, kMax));
  EXPECT_EQ(log_.unshipped_bytes(), kMax);
  log_.flush();
  const auto changes = rows();
  ASSERT_EQ(changes.size(), 2U);
  EXPECT_EQ(changes[0].offset, 50U);
  EXPECT_EQ(changes[0].length, kMax - 50);
}

TEST_F(ChangeLogTest, an_entry_after_a_cut_is_never_merged_into_one_before_it) {
  log_.start();
  log_.changing(extent(2, 0, 10));
  const auto first = log_.flush();
  EXPECT_EQ(log_.unshipped_bytes(), 0U);
  log_.changing(extent(2, 0, 10));
  const auto second = log_.flush();
  EXPECT_EQ(second, first + 1);
  EXPECT_EQ(read(0, first).size(), 1U);
  EXPECT_EQ(read(first, second).size(), 1U);
  EXPECT_EQ(log_.flush(), second) << "nothing new: the same cut";
}

TEST_F(ChangeLogTest, what_is_not_flushed_is_not_within_any_cut) {
  log_.start();
  const auto cut = log_.flush();
  for (InodeId id = 1; id <= 1000; ++id) log_.changing({.kind = Kind::freed, .id = id});
  EXPECT_TRUE(read(0, cut).empty());
  EXPECT_EQ(log_.entries(), 1000U);
  const auto all = read(cut, log_.flush());
  ASSERT_EQ(all.size(), 1000U);
  for (InodeId id = 1; id <= 1000; ++id) EXPECT_EQ(all[id - 1].id, id);
}

TEST_F(ChangeLogTest, numbers_of_an_abandoned_attempt_are_not_used_again) {
  log_.start();
  log_.changing({.kind = Kind::freed, .id = 1});
  const auto cut = log_.flush();
  log_.stop();
  log_.start();
  log_.changing({.kind = Kind::freed, .id = 2});
  EXPECT_GT(log_.flush(), cut);
  EXPECT_TRUE(is_swept(1));
  EXPECT_TRUE(read(0, cut).empty());
}

TEST_F(ChangeLogTest, a_log_that_cannot_be_written_hinders_nobody_and_is_never_taken_for_whole) {
  log_.start();
  database_.execute(
      "CREATE TRIGGER full BEFORE INSERT ON change_log BEGIN SELECT RAISE(ABORT, 'disk full'); END");
  for (InodeId id = 1; id <= 10'000; ++id) log_.changing({.kind = Kind::freed, .id = id});
  EXPECT_THROW(log_.flush(), DatabaseError);
  database_.execute("DROP TRIGGER full");
  log_.changing({.kind = Kind::freed, .id = 1});
  EXPECT_THROW(log_.flush(), DatabaseError) << "entries are missing";
  const auto first = log_.start();
  log_.changing({.kind = Kind::freed, .id = 1});
  EXPECT_EQ(read(first, log_.flush()).size(), 1U);
}

// In the middle of what somebody asked: the rest of it is not done in the name of root.
TEST_F(ChangeLogTest, who_changes_files_stays_who_it_was) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root acts for others";
  std::thread([this] {
    log_.start();
    become_caller(1234, 1234);
    for (InodeId id = 1; id <= 10'000; ++id) log_.changing({.kind = Kind::freed, .id = id});
    EXPECT_FALSE(rows().empty()) << "a part of it has been written";
    EXPECT_EQ(::setfsuid(static_cast<uid_t>(-1)), 1234) << "says who it is";
  }).join();
}

}  // namespace
}  // namespace sharefs
