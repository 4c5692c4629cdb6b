// Comparison of two copies by their digests.

#include "replication/verify.h"

#include <sys/stat.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "tests/replication/image_sites.h"

namespace sharefs {
namespace {

void write_file(const std::filesystem::path& path, const std::string& data) {
  std::ofstream(path, std::ios::binary) << data;
}

class VerifyTest : public testing::Test {
 protected:
  VerifyTest() {
    reactor_.run([&] {
      a_ = std::make_unique<Copy>(*reactor_, directory_.path() / "a", true, true);
      b_ = std::make_unique<Copy>(*reactor_, directory_.path() / "b", false, true);
    });
    std::filesystem::create_directories(a("d/e"));
    for (int i = 0; i < 30; ++i) write_file(a("d/f" + std::to_string(i)), std::string(1000, 'x'));
    write_file(a("d/e/g"), "g");
    std::filesystem::create_symlink("there", a("s"));
    Attempt attempt(reactor_, *a_, *b_, false);
    attempt.image();
    attempt.round(true);
    attempt.end();
  }
  ~VerifyTest() override { reactor_.stop(); }

  std::filesystem::path a(const std::string& name) const { return a_->store_path() / name; }
  std::filesystem::path b(const std::string& name) const { return b_->tree() / name; }

  static inline std::atomic<bool> ending_{false};

  VerifyResult compare(std::uint32_t page = 7) {
    identify_all(*a_->inodes, ending_);
    DigestComparison comparison;
    int pages = 0;
    while (!comparison.done() && ++pages < 1000) {
      pb::VerifyAsk ask;
      ask.set_count(page);
      if (comparison.owner_wanted()) {
        ask.set_after(comparison.owner_next());
        comparison.owner_page(digest(*a_, ask));
      }
      if (comparison.other_wanted()) {
        ask.set_after(comparison.other_next());
        comparison.other_page(digest(*b_, ask));
      }
    }
    EXPECT_TRUE(comparison.done());
    return comparison.result();
  }
  static pb::VerifyReply digest(Copy& copy, const pb::VerifyAsk& ask) {
    auto reply = digest_inodes(*copy.inodes, *copy.store, copy.home / "state.db", ask, ending_);
    EXPECT_EQ(reply.error(), "");
    return reply;
  }

  // Changes the file and hides it from ctime, as a bad disk would.
  void damage(const std::function<void()>& change, const std::filesystem::path& path) {
    const Backing before = *stat_name(AT_FDCWD, path.string());
    const InodeId id = *b_->inodes->find(before);
    const std::int64_t ctime = b_->inodes->presented_ctime(id, before);
    change();
    b_->inodes->import_ctime(id, ctime, *stat_name(AT_FDCWD, path.string()));
  }

  TemporaryDirectory directory_;
  RunningReactor reactor_;
  std::unique_ptr<Copy> a_, b_;
};

TEST_F(VerifyTest, ASiteThatEndsDoesNotReadItAll) {
  const std::atomic<bool> ending{true};
  EXPECT_THROW(identify_all(*a_->inodes, ending), std::runtime_error);
  identify_all(*a_->inodes, ending_);
  pb::VerifyAsk ask;
  ask.set_count(7);
  EXPECT_NE(digest_inodes(*a_->inodes, *a_->store, a_->home / "state.db", ask, ending).error(), "");
}

TEST_F(VerifyTest, EqualCopiesAreEqualWhateverThePages) {
  for (const std::uint32_t page : {1u, 7u, 1000u}) {
    const auto result = compare(page);
    EXPECT_TRUE(result.differences.empty()) << result.differences.front();
    EXPECT_EQ(result.compared, 35u);
    EXPECT_EQ(result.changed_since, 0u);
  }
}

TEST_F(VerifyTest, DamageIsFound) {
  damage([&] { write_file(b("d/f3"), std::string(1000, 'y')); }, b("d/f3"));
  damage([&] { ::chmod(b("d/e/g").c_str(), 0777); }, b("d/e/g"));
  const auto result = compare();
  EXPECT_EQ(result.differences.size(), 3u);  // f3: content and mtime
}

TEST_F(VerifyTest, WhatIsWrittenWhileItIsReadIsNoDifference) {
  write_file(a("d/large"), "");
  std::filesystem::resize_file(a("d/large"), 1ULL << 29);  // takes long to read
  Attempt attempt(reactor_, *a_, *b_, false);
  attempt.image();
  attempt.round(true);
  attempt.end();
  std::jthread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::ofstream file(a("d/large"), std::ios::in | std::ios::ate);
    file.seekp((1LL << 29) - 1);
    file << 'x';
  });
  const auto result = compare();
  EXPECT_TRUE(result.differences.empty()) << result.differences.front();
}

TEST_F(VerifyTest, ALostFileIsFound) {
  std::filesystem::remove(b("d/f3"));
  const auto result = compare();
  EXPECT_FALSE(result.differences.empty());
}

TEST_F(VerifyTest, ChangesSinceAreCountedOnly) {
  write_file(a("d/new"), "new");
  write_file(a("d/f1"), "changed");
  std::filesystem::remove(a("d/f2"));
  const auto result = compare();
  EXPECT_TRUE(result.differences.empty()) << result.differences.front();
  EXPECT_EQ(result.changed_since, 4u);  // new, f1, f2, d
}

TEST_F(VerifyTest, AFailureIsToldInTheReply) {
  pb::VerifyAsk ask;
  const auto reply =
      digest_inodes(*a_->inodes, *a_->store, directory_.path() / "none" / "state.db", ask, ending_);
  EXPECT_NE(reply.error(), "");
}

}  // namespace
}  // namespace sharefs
