#include "replication/write_behind.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <deque>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/fs/fake_executor.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

using test::Answer;
using test::FakeExecutor;
using test::request_of;

constexpr std::uint64_t kMount = 1;
constexpr InodeId kFile = 50, kOther = 51;
constexpr std::uint64_t kHandle = 5, kOtherHandle = 6;
using std::chrono::milliseconds;

class WriteBehindTest : public testing::Test {
 protected:
  WriteBehindTest() {
    owner_.late = true;
    owner_.result = [this](const pb::Request& request) {
      pb::Outcome outcome;
      outcome.set_error(static_cast<std::uint32_t>(error_));
      if (request.has_write() && error_ == 0) {
        outcome.set_count(request.write().size());
        if (request.write().wants_lease()) outcome.set_lease(lease_);
        outcome.set_promise(++stamp_);
      }
      if (request.has_lookup()) {
        outcome.mutable_attr()->set_id(kFile);
        outcome.mutable_attr()->set_nlink(1);
        outcome.set_promise(++stamp_);
      }
      return outcome;
    };
    begin();
  }
  void begin() {
    behind_.reset();
    behind_.emplace(owner_, WriteBehind::Options{
                                .journal = directory_.path() / "journal",
                                .unwritten = directory_.path() / "unwritten",
                                .trusted_for = [this] { return trusted_; },
                                .round_trip = [] { return milliseconds(0); },
                                .performed = [this](InodeId id, std::uint64_t) { performed_.push_back(id); },
                                .drop_pages = [this](InodeId id) { dropped_.push_back(id); },
                                .handles =
                                    [](InodeId) {
                                      return std::vector<std::uint64_t>{kHandle, kOtherHandle};
                                    },
                            });
  }
  Answer& ask(const pb::Request& request, std::string_view data = {}) {
    Answer& answer = answers_.emplace_back();
    behind_->execute(request, as_bytes(data), answer.reply());
    return answer;
  }
  Answer& write(InodeId id = kFile, std::uint64_t offset = 0, std::string_view data = "data") {
    pb::Request request = test::write_of(kMount, ++seq_, id, offset, static_cast<std::uint32_t>(data.size()));
    request.mutable_write()->set_handle(kHandle);
    return ask(request, data);
  }
  template <class Fill>
  Answer& ask_op(const Fill& fill) {
    pb::Request request = request_of(kMount, ++seq_);
    fill(request);
    return ask(request);
  }
  Answer& getattr(InodeId id = kFile) {
    return ask_op([id](pb::Request& request) { request.mutable_getattr()->set_id(id); });
  }
  Answer& flush(std::uint64_t handle = kHandle) {
    return ask_op([handle](pb::Request& request) {
      request.mutable_flush()->set_id(kFile);
      request.mutable_flush()->set_handle(handle);
    });
  }
  Answer& fsync(std::uint64_t handle = kHandle) {
    return ask_op([handle](pb::Request& request) {
      request.mutable_sync()->set_id(kFile);
      request.mutable_sync()->set_handle(handle);
    });
  }
  Answer& release(std::uint64_t handle = kHandle) {
    return ask_op([handle](pb::Request& request) {
      request.mutable_release()->set_id(kFile);
      request.mutable_release()->set_handle(handle);
    });
  }
  // The owner answers what it has been asked and not answered.
  void answer_all() {
    while (answered_ < owner_.calls.size()) owner_.answer(answered_++);
  }
  void get_lease(InodeId id = kFile) {
    write(id);
    write(id);
    answer_all();
  }

  TemporaryDirectory directory_;
  FakeExecutor owner_;
  std::size_t answered_ = 0;
  int error_ = 0;
  std::uint64_t lease_ = 77, stamp_ = 0, seq_ = 0;
  Reactor::Clock::duration trusted_ = std::chrono::seconds(2);
  std::vector<InodeId> performed_, dropped_;
  std::deque<Answer> answers_;
  std::optional<WriteBehind> behind_;
};

TEST_F(WriteBehindTest, WithoutALeaseAWriteWaits) {
  EXPECT_FALSE(write().given());
  EXPECT_FALSE(owner_.calls.back().request.write().wants_lease());
  EXPECT_FALSE(write().given());
  EXPECT_TRUE(owner_.calls.back().request.write().wants_lease());
}

TEST_F(WriteBehindTest, WithOneItDoesNot) {
  get_lease();
  Answer& early = write(kFile, 100, "abc");
  ASSERT_TRUE(early.given());
  EXPECT_EQ(early.outcome.count(), 3U);
  EXPECT_TRUE(early.outcome.ahead());
  const auto& sent = owner_.calls.back();
  EXPECT_EQ(sent.request.write().lease(), lease_);
  EXPECT_GE(sent.request.seq(), kAheadSeqBit);
  EXPECT_EQ(sent.data, "abc");
  EXPECT_FALSE(write(kOther).given()) << "a lease of another inode";
}

TEST_F(WriteBehindTest, WhatElseIsAskedOfTheInodeWaits) {
  get_lease();
  write();
  const auto sent = owner_.calls.size();
  Answer& look = getattr();
  Answer& closing = flush();
  Answer& other = getattr(kOther);
  EXPECT_EQ(owner_.calls.size(), sent + 1) << "only what is asked of another inode is sent";
  answer_all();
  EXPECT_TRUE(look.given() && other.given());
  EXPECT_TRUE(closing.given()) << "no lock is given up, so the owner is not asked";
  EXPECT_EQ(performed_, std::vector<InodeId>{kFile});
}

// Or who waits would wait for as long as somebody writes.
TEST_F(WriteBehindTest, NothingGoesAheadOfWhoWaits) {
  get_lease();
  write();
  getattr();
  EXPECT_FALSE(write().given());
}

TEST_F(WriteBehindTest, ALookAtNamesIsAskedAgain) {
  get_lease();
  get_lease(kOther);
  write();
  write(kOther);
  Answer& look = ask_op([](pb::Request& request) { request.mutable_lookup()->set_name("f"); });
  const auto asked = owner_.calls.size();
  owner_.answer(asked - 1);  // it overtakes the write, and tells what was before
  EXPECT_FALSE(look.given());
  owner_.answer(asked - 3);
  ASSERT_EQ(owner_.calls.size(), asked + 1) << "it is asked again behind the write";
  EXPECT_FALSE(write().given()) << "nothing goes ahead of it";
  owner_.answer(asked);
  EXPECT_TRUE(look.given());
  EXPECT_TRUE(write().given()) << "and now it may";
}

TEST_F(WriteBehindTest, AListingIsAnsweredWithoutTheAttributes) {
  get_lease();
  write();
  Answer& listing = ask_op([](pb::Request& request) { request.mutable_readdir()->set_plus(true); });
  owner_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    for (const InodeId id : {kFile, kOther}) {
      auto& entry = *outcome.add_entries();
      entry.set_name(id == kFile ? "f" : "g");
      entry.mutable_attr()->set_id(id);
      entry.mutable_attr()->set_nlink(1);
    }
    return outcome;
  };
  owner_.answer(owner_.calls.size() - 1);
  ASSERT_TRUE(listing.given());
  EXPECT_EQ(listing.outcome.entries(0).attr().nlink(), 0U);
  EXPECT_EQ(listing.outcome.entries(0).attr().id(), kFile);
  EXPECT_EQ(listing.outcome.entries(1).attr().nlink(), 1U);
}

TEST_F(WriteBehindTest, ARecallWaitsForWhatWasAcknowledged) {
  get_lease();
  write();
  bool returned = false;
  behind_->recall(kFile, lease_, [&] { returned = true; });
  EXPECT_FALSE(returned);
  EXPECT_FALSE(write().given()) << "the lease is gone";
  answer_all();
  EXPECT_TRUE(returned);
  returned = false;
  behind_->recall(kOther, 1, [&] { returned = true; });
  EXPECT_TRUE(returned);
}

TEST_F(WriteBehindTest, NothingIsAcknowledgedWhileTheOwnerIsNotHeard) {
  get_lease();
  trusted_ = trusted_.zero();
  EXPECT_FALSE(write().given());
}

TEST_F(WriteBehindTest, AConnectionThatBrokeEndsLeasesAlsoThoseOnTheirWay) {
  get_lease();
  behind_->distrust();
  Answer& asking = write();
  EXPECT_FALSE(asking.given());
  behind_->distrust();
  answer_all();
  EXPECT_TRUE(asking.given());
  EXPECT_FALSE(write().given()) << "what was granted before may have been taken back since";
}

TEST_F(WriteBehindTest, ItStopsWhenTheOldestIsOld) {
  get_lease();
  ASSERT_TRUE(write().given());
  std::this_thread::sleep_for(WriteBehind::kLongest + milliseconds(20));
  EXPECT_FALSE(write().given());
}

TEST_F(WriteBehindTest, AndWhenThereIsMuchOfIt) {
  get_lease();
  const std::string large(1 << 20, 'x');
  std::size_t early = 0;
  while (write(kFile, early << 20, large).given() && early < 100) ++early;
  EXPECT_GT(early, 2U);
  EXPECT_LE(early, WriteBehind::kMostBytes >> 20);
}

TEST_F(WriteBehindTest, AnErrorIsToldOnceToEachOpenFile) {
  get_lease();
  write();
  error_ = EDQUOT;
  answer_all();
  EXPECT_FALSE(write().given()) << "the next one is told at once";
  answer_all();
  error_ = 0;
  EXPECT_TRUE(behind_->must_flush(kFile, kHandle));
  EXPECT_EQ(flush().error(), EDQUOT);
  EXPECT_FALSE(behind_->must_flush(kFile, kHandle));
  EXPECT_EQ(flush().error(), 0);
  Answer& synced = fsync(kOtherHandle);
  answer_all();
  EXPECT_EQ(synced.error(), EDQUOT) << "another file that is open was not told";
  Answer& again = fsync(kOtherHandle);
  answer_all();
  EXPECT_EQ(again.error(), 0);
  EXPECT_EQ(dropped_, std::vector<InodeId>{kFile});
  EXPECT_FALSE(std::filesystem::is_empty(directory_.path() / "unwritten"));
}

// The owner ends it when nobody has the file open.
TEST_F(WriteBehindTest, ALeaseEndsWithTheHandle) {
  get_lease();
  write();
  error_ = EIO;  // what is remembered of it does not keep the lease
  answer_all();
  error_ = 0;
  get_lease();
  Answer& closing = release();
  answer_all();
  ASSERT_TRUE(closing.given());
  EXPECT_FALSE(write().given());
}

// The answer comes when the file was closed, and opened again.
TEST_F(WriteBehindTest, ALeaseOfBeforeTheCloseDoesNotCount) {
  write();
  write();
  const auto asked = owner_.calls.size();
  release();
  write();
  owner_.answer(asked - 1);
  EXPECT_FALSE(write().given());
}

TEST_F(WriteBehindTest, WhatIsSynchronousOrAppendsIsNotEarly) {
  get_lease();
  const auto is_early = [this](const auto& change) {
    pb::Request request = test::write_of(kMount, ++seq_, kFile, 0, 4);
    change(*request.mutable_write());
    return ask(request, "data").given();
  };
  EXPECT_TRUE(is_early([](pb::Write&) {}));
  EXPECT_FALSE(is_early([](pb::Write& write) { write.set_sync(true); }));
  EXPECT_FALSE(is_early([](pb::Write& write) { write.set_append(true); }));
  EXPECT_FALSE(is_early([](pb::Write& write) { write.set_writeback(true); }));
  EXPECT_FALSE(is_early([](pb::Write& write) { write.set_kill_suidgid(true); }));
}

TEST_F(WriteBehindTest, AnotherProcessSendsWhatWasLeft) {
  get_lease();
  write(kFile, 0, "one");
  write(kFile, 3, "two");
  const auto before = owner_.calls.size();
  const auto seq = owner_.calls.back().request.seq();
  begin();
  bool sent = false;
  behind_->replay([&] { sent = true; });
  ASSERT_EQ(owner_.calls.size(), before + 2);
  EXPECT_EQ(owner_.calls.back().data, "two");
  EXPECT_EQ(owner_.calls.back().request.seq(), seq) << "performed once";
  EXPECT_EQ(owner_.calls.back().request.client(), kMount);
  owner_.answer(before);
  owner_.answer(before + 1);
  EXPECT_FALSE(sent);
  ASSERT_EQ(owner_.calls.size(), before + 3);
  EXPECT_TRUE(owner_.calls.back().request.has_detach());
  owner_.answer(before + 2);
  EXPECT_TRUE(sent);
  begin();
  sent = false;
  behind_->replay([&] { sent = true; });
  EXPECT_TRUE(sent) << "it is sent once";
}

TEST_F(WriteBehindTest, WhatIsNotWrittenIsKept) {
  get_lease();
  write(kFile, 0, "precious");
  begin();
  answered_ = owner_.calls.size();
  behind_->replay([] {});
  error_ = ESTALE;
  answer_all();
  std::vector<std::filesystem::path> kept;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() / "unwritten"))
    kept.push_back(entry.path());
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(std::filesystem::file_size(kept[0]), 8U);
  EXPECT_FALSE(behind_->must_flush(kFile, kHandle)) << "no handle of this process";
}

TEST_F(WriteBehindTest, WhoIsKilledDoesNotWait) {
  get_lease();
  write();
  Answer& look = getattr();
  ask_op([this](pb::Request& request) { request.mutable_cancel()->set_seq(seq_ - 1); });
  EXPECT_EQ(look.error(), EINTR);
  const auto sent = owner_.calls.size();
  answer_all();
  EXPECT_EQ(owner_.calls.size(), sent) << "it is not asked any more";
}

}  // namespace
}  // namespace sharefs
