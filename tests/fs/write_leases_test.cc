#include "fs/write_leases.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <deque>
#include <map>
#include <optional>
#include <string>

#include "tests/fs/fake_executor.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

using std::chrono::milliseconds;
using test::Answer;
using test::FakeExecutor;
using test::request_of;

constexpr ClientId kA = 1, kB = 2, kOwn = 9;
constexpr InodeId kFile = 50, kOther = 51;

class NoLog final : public ChangeObserver {
 public:
  void changing(const Change& /*change*/) override {}
};

// A writes; B, and the owner's own mount, look.
class WriteLeasesTest : public testing::Test {
 protected:
  struct Order {
    RecallOrder what;
    std::function<void(bool)> done;
  };

  WriteLeasesTest() {
    store_.result = [this](const pb::Request& request) {
      pb::Outcome outcome;
      if (request.has_write()) outcome.set_count(request.write().size());
      if (request.has_lookup() || request.has_getattr()) {
        const InodeId id = request.has_getattr() ? request.getattr().id() : names_[request.lookup().name()];
        if (id == 0)
          outcome.set_error(ENOENT);
        else
          outcome.mutable_attr()->set_id(id);
      }
      if (request.has_readdir())
        for (const auto& [name, id] : names_) {
          auto& entry = *outcome.add_entries();
          entry.set_name(name);
          entry.mutable_attr()->set_id(id);
          entry.mutable_attr()->set_mode(S_IFREG | 0644);
          entry.mutable_attr()->set_nlink(1);
        }
      return outcome;
    };
    opens_.attach(kOwn, "alpha");
    opens_.attach(kA, "beta");
    opens_.attach(kB, "gamma");
    opens_.open({kA, 5, kFile, O_RDWR, false});
    opens_.open({kA, 6, kOther, O_RDWR, false});
    begin();
  }
  void begin() {
    leases_.reset();
    leases_.emplace(
        store_, look_, opens_, promises_, reactor_,
        WriteLeases::Options{.file = directory_.path() / "leases",
                             .recall =
                                 [this](const RecallOrder& order, std::function<void(bool)> done) {
                                   orders_.push_back({order, done});
                                 },
                             .timing = {.lease = milliseconds(150)},
                             .room = [this] { return room_; },
                             .recovering = [this] { return recovering_; },
                             .letting_in = [this] { return letting_in_; },
                             .silent = [this](const SiteName&) { return silent_; },
                             .performed = [this](const pb::Request&) { return performed_; },
                             .returned = [this](ClientId client) { returned_ = client; },
                             .own = kOwn});
  }
  void pass_time(milliseconds time) {
    reactor_.after(time, [this] { reactor_.stop(); });
    reactor_.run();
  }
  Answer& ask(const pb::Request& request) {
    Answer& answer = answers_.emplace_back();
    leases_->execute(request, as_bytes("data"), answer.reply());
    return answer;
  }
  template <class Fill>
  Answer& ask_op(ClientId client, const Fill& fill) {
    pb::Request request = request_of(client, ++seq_);
    fill(request);
    return ask(request);
  }
  Answer& write(ClientId client, InodeId id, bool wants, std::uint64_t lease = 0) {
    pb::Request request = test::write_of(client, ++seq_, id, 0, 4);
    request.mutable_write()->set_wants_lease(wants);
    request.mutable_write()->set_lease(lease);
    return ask(request);
  }
  std::uint64_t grant(InodeId id = kFile) { return write(kA, id, true).outcome.lease(); }
  Answer& getattr(ClientId client, InodeId id = kFile) {
    return ask_op(client, [id](pb::Request& request) { request.mutable_getattr()->set_id(id); });
  }
  Answer& truncate(ClientId client, InodeId id = kFile) {
    return ask_op(client, [id](pb::Request& request) {
      request.mutable_setattr()->set_id(id);
      request.mutable_setattr()->set_size(0);
    });
  }

  TemporaryDirectory directory_;
  Reactor reactor_;
  FakeExecutor store_;
  FakeExecutor& look_ = store_;
  OpenTable opens_;
  NoLog log_;
  Promises promises_{store_, log_, opens_, kOwn, reactor_, [](const RecallOrder&, auto) {}};
  std::map<std::string, InodeId> names_{{"f", kFile}, {"g", kOther}};
  bool silent_ = false, room_ = true, recovering_ = false, letting_in_ = false, performed_ = false;
  ClientId returned_ = 0;
  std::uint64_t seq_ = 0;
  std::deque<Answer> answers_;
  std::deque<Order> orders_;
  std::optional<WriteLeases> leases_;
};

TEST_F(WriteLeasesTest, GivenToWhoAloneHasTheFileOpen) {
  EXPECT_EQ(write(kA, kFile, false).outcome.lease(), 0U);
  const auto number = grant();
  EXPECT_NE(number, 0U);
  EXPECT_EQ(grant(), number) << "it has it already";
  opens_.open({kB, 7, kOther, O_RDONLY, false});
  EXPECT_EQ(grant(kOther), 0U);
}

TEST_F(WriteLeasesTest, NotGivenWhereItCannotBeKept) {
  room_ = false;
  EXPECT_EQ(grant(), 0U);
  room_ = true;
  recovering_ = true;
  EXPECT_EQ(grant(), 0U);
  recovering_ = false;
  letting_in_ = true;
  EXPECT_EQ(grant(), 0U) << "what a mount that is being let in has asked waits below";
  letting_in_ = false;
  leases_->hold(true);
  EXPECT_EQ(grant(), 0U) << "a handoff is about to close the gate";
  leases_->hold(false);
  EXPECT_NE(grant(), 0U);
}

TEST_F(WriteLeasesTest, EveryLookWaitsUntilItIsReturned) {
  const auto number = grant();
  Answer& by_number = getattr(kB);
  Answer& by_name = ask_op(kOwn, [](pb::Request& request) { request.mutable_lookup()->set_name("f"); });
  Answer& opening = ask_op(kB, [](pb::Request& request) { request.mutable_open()->set_id(kFile); });
  Answer& removing = ask_op(kB, [](pb::Request& request) { request.mutable_unlink()->set_name("f"); });
  Answer& other = getattr(kB, kOther);
  EXPECT_TRUE(other.given());
  EXPECT_FALSE(by_number.given() || by_name.given() || opening.given() || removing.given());
  ASSERT_EQ(orders_.size(), 1U) << "it is called back once";
  EXPECT_EQ(orders_[0].what.client, kA);
  EXPECT_EQ(orders_[0].what.lease, number);
  EXPECT_TRUE(write(kA, kFile, false, number).given()) << "what was acknowledged does not wait";
  EXPECT_EQ(grant(), 0U) << "nor is there another one before the look";
  orders_[0].done(true);
  EXPECT_TRUE(by_number.given() && by_name.given() && opening.given() && removing.given());
  EXPECT_EQ(returned_, kA);
  EXPECT_TRUE(leases_->none());
}

TEST_F(WriteLeasesTest, TheClientItselfDoesNotWait) {
  grant();
  EXPECT_TRUE(getattr(kA).given());
  EXPECT_TRUE(truncate(kA).given());
}

// Beside two writers that never stop one of two leases would always be out.
TEST_F(WriteLeasesTest, AListingDoesNotWaitAndTellsNothing) {
  grant();
  Answer& listing = ask_op(kB, [](pb::Request& request) { request.mutable_readdir()->set_plus(true); });
  ASSERT_TRUE(listing.given());
  ASSERT_EQ(listing.outcome.entries_size(), 2);
  EXPECT_FALSE(tells_inode(listing.outcome.entries(0)));
  EXPECT_EQ(listing.outcome.entries(0).attr().id(), kFile);
  EXPECT_EQ(listing.outcome.entries(0).attr().mode(), static_cast<unsigned>(S_IFREG));
  EXPECT_TRUE(tells_inode(listing.outcome.entries(1)));
}

TEST_F(WriteLeasesTest, WhoNamesTwoLeasedFilesGetsBoth) {
  const auto first = grant(), second = grant(kOther);
  ASSERT_TRUE(first != 0 && second != 0);
  Answer& renaming = ask_op(kB, [](pb::Request& request) {
    request.mutable_rename()->set_name("f");
    request.mutable_rename()->set_new_name("g");
  });
  ASSERT_EQ(orders_.size(), 1U);
  orders_[0].done(true);
  EXPECT_FALSE(renaming.given());
  EXPECT_EQ(grant(), 0U) << "the first one is not given again before";
  ASSERT_EQ(orders_.size(), 2U);
  orders_[1].done(true);
  EXPECT_TRUE(renaming.given());
}

TEST_F(WriteLeasesTest, AWritebackDoesNotWait) {
  grant();
  pb::Request request = test::write_of(kB, ++seq_, kFile, 0, 4, true);
  EXPECT_TRUE(ask(request).given()) << "the lease's client may be waiting for that page";
  EXPECT_EQ(orders_.size(), 1U);
}

// Its file is being truncated, and will be open.
TEST_F(WriteLeasesTest, NotGivenBesideAChangeOfSomebodyElseUnderWay) {
  store_.late = true;
  Answer& opening = ask_op(kB, [](pb::Request& request) {
    request.mutable_open()->set_id(kFile);
    request.mutable_open()->set_flags(O_WRONLY | O_TRUNC);
  });
  Answer& writing = write(kA, kFile, true);
  store_.answer(store_.calls.size() - 1);
  ASSERT_TRUE(writing.given());
  EXPECT_EQ(writing.outcome.lease(), 0U);
  store_.answer(store_.calls.size() - 2);
  EXPECT_TRUE(opening.given());
  store_.late = false;
  EXPECT_NE(grant(), 0U);
}

TEST_F(WriteLeasesTest, ASilentClientIsNotWaitedForAndItsWritesComeLate) {
  const auto number = grant();
  Answer& look = getattr(kB);
  pass_time(milliseconds(250));
  EXPECT_TRUE(look.given());
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0);
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0) << "each of them, though the first one is a change";
  EXPECT_EQ(write(kA, kFile, false, number + 1).error(), ESTALE);
}

TEST_F(WriteLeasesTest, WhoLooksAtManyFilesOfASilentClientWaitsOnce) {
  ASSERT_TRUE(grant() != 0 && grant(kOther) != 0);
  getattr(kB);
  pass_time(milliseconds(250));
  EXPECT_FALSE(getattr(kB, kOther).given()) << "it is heard, and may go on with this one";
  pass_time(milliseconds(250));
  ASSERT_TRUE(grant() != 0 && grant(kOther) != 0);
  silent_ = true;
  getattr(kB);
  pass_time(milliseconds(250));
  EXPECT_TRUE(getattr(kB, kOther).given());
}

TEST_F(WriteLeasesTest, WhatOthersHaveChangedMeanwhileIsNotUndone) {
  const auto number = grant();
  Answer& change = truncate(kB);
  pass_time(milliseconds(250));
  ASSERT_TRUE(change.given());
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE);
  performed_ = true;
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0) << "it had been performed, only its answer was lost";
  performed_ = false;
  begin();
  recovering_ = true;
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE) << "also at another process";
  recovering_ = false;
  EXPECT_NE(grant(), 0U) << "asked for behind all that";
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0) << "its client alone has the file";
}

TEST_F(WriteLeasesTest, WhatAMappingHasStoredMeanwhileIsNotUndone) {
  const auto number = grant();
  getattr(kB);
  pass_time(milliseconds(250));
  ask(test::write_of(kB, ++seq_, kFile, 0, 4, true));
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE);
  const auto broken = leases_->broken();
  ASSERT_EQ(broken.size(), 1U);
  leases_->adopt({.id = kFile, .site = "beta", .client = kA, .number = number, .changed = false});
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE) << "known from before a kill";
}

TEST_F(WriteLeasesTest, ANewOwnerKnowsWhatWasBroken) {
  const auto number = grant();
  getattr(kB);
  const auto other = grant(kOther);
  EXPECT_EQ(other, 0U) << "somebody waits";
  pass_time(milliseconds(250));
  const auto broken = leases_->broken();
  ASSERT_EQ(broken.size(), 1U);
  leases_->clear();
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE);
  for (const auto& one : broken) leases_->adopt(one);
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0);
  pb::Request record = request_of(kB, ++seq_);
  record.mutable_setattr()->set_id(kFile);
  record.mutable_setattr()->set_size(0);
  leases_->note_change(record);
  EXPECT_EQ(write(kA, kFile, false, number).error(), ESTALE);
}

TEST_F(WriteLeasesTest, AnotherProcessOfTheOwnerWaitsForIt) {
  const auto number = grant();
  opens_.clear();
  begin();
  recovering_ = true;
  opens_.attach(kB, "gamma");
  Answer& look = getattr(kB);
  EXPECT_FALSE(look.given());
  EXPECT_TRUE(orders_.empty()) << "its client is not known yet";
  opens_.attach(kA, "beta");
  pass_time(milliseconds(50));
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0);
  orders_[0].done(true);
  EXPECT_TRUE(look.given());
}

TEST_F(WriteLeasesTest, AfterAPowerCutItIsTakenOnFromWhoHasIt) {
  const auto number = grant();
  leases_->clear();  // the file was not on the disk
  recovering_ = true;
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0);
  EXPECT_FALSE(getattr(kB).given());
}

TEST_F(WriteLeasesTest, AKilledMountIsWaitedForUntilItsNextOneAttaches) {
  const auto number = grant();
  opens_.detach(kA);
  Answer& look = getattr(kB);
  EXPECT_FALSE(look.given());
  opens_.attach(kA, "beta");  // by its next process, for what it had left
  EXPECT_EQ(write(kA, kFile, false, number).error(), 0);
  ask_op(kA, [](pb::Request& request) { request.mutable_detach(); });
  EXPECT_TRUE(look.given());
  opens_.open({kA, 6, kOther, O_RDWR, false});
  ASSERT_NE(grant(kOther), 0U);
  ask_op(kA + 100, [](pb::Request& request) { request.mutable_attach()->set_site("beta"); });
  EXPECT_TRUE(leases_->none());
}

TEST_F(WriteLeasesTest, EndsWhenTheFileIsClosed) {
  grant();
  opens_.close(kA, 5);
  ask_op(kA, [](pb::Request& request) {
    request.mutable_release()->set_id(kFile);
    request.mutable_release()->set_handle(5);
  });
  EXPECT_TRUE(leases_->none());
}

TEST_F(WriteLeasesTest, WhoIsKilledOrGoneDoesNotWait) {
  grant();
  Answer& killed = truncate(kB);
  ask_op(kB, [this](pb::Request& request) { request.mutable_cancel()->set_seq(seq_ - 1); });
  EXPECT_EQ(killed.error(), EINTR);
  Answer& gone = truncate(kB);
  leases_->expire("gamma", 0);
  EXPECT_EQ(gone.error(), ESTALE);
  const auto performed = store_.calls.size();
  orders_[0].done(true);
  EXPECT_EQ(store_.calls.size(), performed) << "neither is performed";
}

TEST_F(WriteLeasesTest, AHandoffCallsAllBack) {
  grant();
  grant(kOther);
  leases_->hold(true);
  ASSERT_EQ(orders_.size(), 2U);
  orders_[0].done(true);
  EXPECT_FALSE(leases_->none());
  pass_time(milliseconds(250));
  EXPECT_TRUE(leases_->none()) << "a silent one does not hold it up";
}

TEST_F(WriteLeasesTest, OneThatFillsTheDiskIsCalledBack) {
  const auto number = grant();
  room_ = false;
  pb::Request request = test::write_of(kA, ++seq_, kFile, 0, 16 << 20);
  request.mutable_write()->set_lease(number);
  ask(request);
  EXPECT_EQ(orders_.size(), 1U);
}

}  // namespace
}  // namespace sharefs
