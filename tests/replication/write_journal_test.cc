#include "replication/write_journal.h"

#include <gtest/gtest.h>

#include <deque>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

constexpr std::uint64_t kPower = 7;

class WriteJournalTest : public testing::Test {
 protected:
  static pb::Request write_of(std::uint64_t seq) {
    pb::Request request;
    request.set_client(1);
    request.set_seq(seq);
    request.mutable_write()->set_id(50);
    request.mutable_write()->set_offset(seq * 100);
    request.mutable_write()->set_lease(9);
    return request;
  }
  struct Left {
    std::uint64_t seq;
    std::string data;
    bool operator==(const Left&) const = default;
  };
  std::vector<Left> left(const WriteJournal& journal) {
    std::vector<Left> all;
    journal.for_each([&](WriteJournal::Position, const pb::Request& request, Bytes data) {
      all.push_back({request.seq(), std::string(as_text(data))});
    });
    return all;
  }

  TemporaryDirectory directory_;
  const std::filesystem::path file_ = directory_.path() / "writes.journal";
};

TEST_F(WriteJournalTest, WhatIsNotDoneIsFoundByTheNextProcess) {
  {
    WriteJournal journal(file_, kPower);
    const auto first = journal.append(write_of(1), as_bytes("one"));
    ASSERT_TRUE(journal.append(write_of(2), as_bytes("two")));
    const auto third = journal.append(write_of(3), as_bytes("three"));
    journal.done(*third);
    EXPECT_EQ(left(journal).size(), 2U);
    journal.done(*first);
  }
  const WriteJournal next(file_, kPower);
  EXPECT_EQ(left(next), (std::vector<Left>{{2, "two"}, {3, "three"}}));  // only the oldest ones go for good
}

TEST_F(WriteJournalTest, NothingIsAddedBeforeWhatWasLeftIsDone) {
  { ASSERT_TRUE(WriteJournal(file_, kPower).append(write_of(1), as_bytes("one"))); }
  {
    WriteJournal next(file_, kPower);
    EXPECT_FALSE(next.append(write_of(2), as_bytes("two")));
    next.for_each([&](WriteJournal::Position at, const pb::Request&, Bytes) { next.done(at); });
    ASSERT_TRUE(next.append(write_of(2), as_bytes("two")));
  }
  EXPECT_EQ(left(WriteJournal(file_, kPower)), (std::vector<Left>{{2, "two"}}));
}

TEST_F(WriteJournalTest, NothingCountsAfterAPowerCut) {
  { ASSERT_TRUE(WriteJournal(file_, kPower).append(write_of(1), as_bytes("one"))); }
  WriteJournal next(file_, kPower + 1);
  EXPECT_TRUE(next.empty());
  ASSERT_TRUE(next.append(write_of(2), as_bytes("two")));
}

// The first page may be lost with the power, and the file be there.
TEST_F(WriteJournalTest, AFileThatIsNoJournalBecomesOne) {
  { ASSERT_TRUE(WriteJournal(file_, kPower).append(write_of(1), as_bytes("one"))); }
  {
    std::fstream file(file_, std::ios::in | std::ios::out | std::ios::binary);
    file.write(std::string(4096, '\0').data(), 4096);
  }
  { ASSERT_TRUE(WriteJournal(file_, kPower).append(write_of(2), as_bytes("two"))); }
  EXPECT_EQ(left(WriteJournal(file_, kPower)), (std::vector<Left>{{2, "two"}}));
}

TEST_F(WriteJournalTest, TheRingIsUsedOverAndOver) {
  const std::string data(3 << 20, 'x');
  std::uint64_t seq = 0;
  {
    WriteJournal journal(file_, kPower);
    std::deque<WriteJournal::Position> open;
    for (int turn = 0; turn < 100; ++turn) {
      while (const auto at = journal.append(write_of(++seq), as_bytes(data))) open.push_back(*at);
      --seq;
      ASSERT_GE(open.size(), 8U) << "the ring is not used";
      ASSERT_LE(open.size(), WriteJournal::kCapacity / data.size());
      for (int i = 0; i < 1 + turn % 5; ++i) {
        journal.done(open.front());
        open.pop_front();
      }
    }
    ASSERT_EQ(left(journal).size(), open.size());
    EXPECT_EQ(journal.data(open.front()).size(), data.size());
  }
  const auto found = left(WriteJournal(file_, kPower));
  ASSERT_FALSE(found.empty());
  EXPECT_EQ(found.back().seq, seq);
  for (std::size_t i = 1; i < found.size(); ++i) EXPECT_EQ(found[i].seq, found[i - 1].seq + 1);
}

TEST_F(WriteJournalTest, AnEntryThatIsNotWholeEndsWhatIsLeft) {
  WriteJournal::Position second = 0;
  {
    WriteJournal journal(file_, kPower);
    ASSERT_TRUE(journal.append(write_of(1), as_bytes("one")));
    second = *journal.append(write_of(2), as_bytes("two"));
    ASSERT_TRUE(journal.append(write_of(3), as_bytes("three")));
  }
  std::fstream file(file_, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(4096 + second % WriteJournal::kCapacity + 40));
  file.put('!');
  file.close();
  EXPECT_EQ(left(WriteJournal(file_, kPower)), (std::vector<Left>{{1, "one"}}));
}

// What an application has written stands in the ring, where the next turn's entries are looked for.
TEST_F(WriteJournalTest, BytesOfAnApplicationAreNoEntry) {
  std::string copy;
  {
    WriteJournal other(directory_.path() / "other", kPower);
    ASSERT_TRUE(other.append(write_of(99), as_bytes("forged")));
  }
  {
    std::ifstream file(directory_.path() / "other", std::ios::binary);
    file.seekg(4096);
    copy.resize(4096);
    file.read(copy.data(), 4096);
  }
  { ASSERT_TRUE(WriteJournal(file_, kPower).append(write_of(1), as_bytes("one"))); }
  {
    std::fstream file(file_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096);
    file.write(copy.data(), static_cast<std::streamsize>(copy.size()));
  }
  EXPECT_TRUE(left(WriteJournal(file_, kPower)).empty());
}

}  // namespace
}  // namespace sharefs
