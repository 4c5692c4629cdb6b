// Who is attached, what is open and locked, and when an orphan goes.
#include "fs/coherence.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <vector>

#include "tests/fs/coherence_fixture.h"

namespace sharefs {
namespace {

using namespace test;  // the words of the fixture

// ---- attach and detach

TEST_F(CoherenceTest, a_client_is_of_one_site) {
  attach(kA);
  pb::Request request = request_of(kA, 1'000);
  request.mutable_attach()->set_site("another");
  Answer answer;
  coherence_.execute(request, {}, answer.reply());
  EXPECT_EQ(answer.error(), EPERM);
  EXPECT_EQ(opens_.clients().at(kA), "site" + std::to_string(kA));
}

TEST_F(CoherenceTest, TheFirstClientIsAttachedAtOnceAndToldThatItIsAlone) {
  EXPECT_TRUE(attach(kA).given());
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(orders_[0].what.client, kA);
  EXPECT_EQ(orders_[0].what.sole, true);
}

TEST_F(CoherenceTest, TheSecondAttachWaitsUntilTheFirstOnesPromisesHaveRunOut) {
  attach(kA);
  orders_.clear();
  Answer& second = attach(kB);
  Answer& third = attach(kC);
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(orders_[0].what.sole, false);
  pass_time(milliseconds(10));
  follow(kA);
  EXPECT_FALSE(second.given());
  pass_time(milliseconds(10));
  EXPECT_FALSE(second.given()) << "entries told before are still valid";
  pass_time(milliseconds(150));
  EXPECT_TRUE(second.given());
  EXPECT_TRUE(third.given());
  EXPECT_EQ(opens_.clients().size(), 3U);
  EXPECT_TRUE(orders_.empty());
  detach(kA);
  EXPECT_TRUE(orders_.empty());
  detach(kC);
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(orders_[0].what.client, kB);
  EXPECT_EQ(orders_[0].what.sole, true);
}

TEST_F(CoherenceTest, ASilentFirstClientDelaysTheSecondByALease) {
  attach(kA);
  Answer& second = attach(kB);
  pass_time(milliseconds(220));
  EXPECT_FALSE(second.given());
  pass_time(milliseconds(150));
  EXPECT_TRUE(second.given());
}

TEST_F(CoherenceTest, AFirstClientThatIsHeardAndMayNotHaveBeenToldIsWaitedFor) {
  attach(kA);
  behind_ = {kA};
  Answer& second = attach(kB);
  pass_time(milliseconds(400));
  EXPECT_FALSE(second.given()) << "it still shows what it was allowed to cache alone";
  behind_.clear();
  pass_time(milliseconds(250));
  EXPECT_TRUE(second.given()) << "it has been told, and does not follow";
}

TEST_F(CoherenceTest, TheSecondIsAttachedAtOnceWhenTheFirstLeaves) {
  attach(kA);
  Answer& second = attach(kB);
  orders_.clear();
  detach(kA);
  EXPECT_TRUE(second.given());
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(orders_[0].what.client, kB);
  EXPECT_EQ(orders_[0].what.sole, true);
  pass_time(milliseconds(350));
  EXPECT_EQ(second.times, 1);
}

TEST_F(CoherenceTest, DetachReleasesHandlesAndLocks) {
  attach_all({kA, kB, kC});
  opened(kA);
  opens_.open({kA, 1, kRootInode, 0, true});
  lock(kA, 7, pb::LockRange::EXCLUSIVE, false);
  Answer& waiting = lock(kB, 7, pb::LockRange::EXCLUSIVE, true);
  EXPECT_FALSE(waiting.given());
  EXPECT_TRUE(detach(kA).given());
  EXPECT_TRUE(waiting.given());
  EXPECT_EQ(waiting.error(), 0);
  EXPECT_FALSE(opens_.is_open(kFile));
  auto ops = store_.ops();
  std::sort(ops.begin(), ops.end());
  EXPECT_EQ(ops, (std::vector<pb::Request::OpCase>{pb::Request::kRelease, pb::Request::kReleasedir}));
}

// As on a local disk.
TEST_F(CoherenceTest, WhatCouldNotBeWrittenBackIsToldToEveryOpenFileOnce) {
  follow_at_once_ = true;
  attach_all({kA, kB, kC});
  for (const ClientId client : {kA, kB, kC}) opened(client);
  opened(kB, kOther);
  const auto sync = [&](ClientId client, InodeId id, int error) {
    store_.result = [error](const pb::Request&) {
      pb::Outcome outcome;
      outcome.set_error(static_cast<std::uint32_t>(error));
      outcome.set_write_lost(error != 0);
      return outcome;
    };
    pb::Request request = request_of(client, ++seq_);
    request.mutable_sync()->set_id(id);
    request.mutable_sync()->set_handle(id * 10);
    return ask(request).error();
  };
  const auto write = [&](ClientId client, int error) {
    store_.result = [error](const pb::Request&) {
      pb::Outcome outcome;
      outcome.set_error(static_cast<std::uint32_t>(error));
      outcome.set_write_lost(error == EIO);
      return outcome;
    };
    pb::Request request = test::write_of(client, ++seq_, kFile, 0, 1);
    request.mutable_write()->set_handle(kFile * 10);
    request.mutable_write()->set_sync(true);
    return ask(request).error();
  };
  EXPECT_EQ(sync(kA, kFile, EIO), EIO);
  store_.result = [](const pb::Request&) { return pb::Outcome(); };
  release(kC);
  opened(kC);
  EXPECT_EQ(sync(kA, kFile, 0), 0) << "it was told";
  EXPECT_EQ(sync(kB, kOther, 0), 0) << "of another file";
  EXPECT_EQ(sync(kC, kFile, 0), 0) << "opened since";
  EXPECT_EQ(sync(kB, kFile, 0), EIO);
  EXPECT_EQ(sync(kB, kFile, 0), 0);
  EXPECT_EQ(write(kA, ENOSPC), ENOSPC);
  EXPECT_EQ(sync(kB, kFile, 0), 0) << "that was refused, and nothing is lost";
  EXPECT_EQ(write(kA, EIO), EIO) << "it was to be synced, which has told of what was lost before";
  EXPECT_EQ(sync(kA, kFile, 0), 0);
  EXPECT_EQ(write(kC, ENOSPC), ENOSPC) << "which tells nothing of that";
  EXPECT_EQ(write(kC, 0), EIO);
  EXPECT_EQ(sync(kB, kFile, 0), EIO);
  EXPECT_EQ(sync(kB, kFile, 0), 0);
}

TEST_F(CoherenceTest, AnExpiredSiteIsDetachedWithAllItsClients) {
  opens_.attach(kA, "gone");
  opens_.attach(kB, "gone");
  opens_.attach(kC, "here");
  opened(kA);
  coherence_.expire_site("gone");
  EXPECT_EQ(opens_.clients().size(), 1U);
  EXPECT_FALSE(opens_.is_open(kFile));
}

// ---- open, release, locks

TEST_F(CoherenceTest, OpenIsNotedOnlyIfTheStoreAllowsIt) {
  attach_all({kA});
  pb::Request open = request_of(kA, ++seq_);
  open.mutable_open()->set_id(kFile);
  open.mutable_open()->set_handle(3);
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.set_error(EACCES);
    return outcome;
  };
  EXPECT_EQ(ask(open).error(), EACCES);
  EXPECT_FALSE(opens_.is_open(kFile));
  store_.result = [](const pb::Request&) { return pb::Outcome(); };
  EXPECT_EQ(ask(open).error(), 0);
  ASSERT_NE(opens_.find(kA, 3), nullptr);
  EXPECT_EQ(opens_.find(kA, 3)->id, kFile);
}

TEST_F(CoherenceTest, CreateWithAHandleOpensWhatWasMade) {
  attach_all({kA});
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.mutable_attr()->set_id(kOther);
    return outcome;
  };
  pb::Request create = request_of(kA, ++seq_);
  create.mutable_create()->set_name("f");
  EXPECT_TRUE(ask(create).given());
  EXPECT_FALSE(opens_.is_open(kOther)) << "mknod opens nothing";
  create.mutable_create()->set_handle(4);
  create.mutable_create()->set_flags(O_RDWR);
  EXPECT_TRUE(ask(create).given());
  ASSERT_NE(opens_.find(kA, 4), nullptr);
  EXPECT_EQ(opens_.find(kA, 4)->id, kOther);
}

TEST_F(CoherenceTest, ReleaseAndFlushDropTheLocksOfTheirOwner) {
  attach_all({kA, kB});
  opened(kA);
  EXPECT_EQ(lock(kA, 7, pb::LockRange::EXCLUSIVE, false).error(), 0);
  EXPECT_EQ(lock(kA, 7, pb::LockRange::EXCLUSIVE, false, true).error(), 0);
  EXPECT_EQ(lock(kB, 1, pb::LockRange::SHARED, false).error(), EAGAIN);
  pb::Request flush = request_of(kA, ++seq_);
  flush.mutable_flush()->set_id(kFile);
  flush.mutable_flush()->set_lock_owner(7);
  EXPECT_TRUE(ask(flush).given());
  EXPECT_EQ(lock(kB, 1, pb::LockRange::SHARED, false).error(), 0);
  EXPECT_EQ(lock(kB, 1, pb::LockRange::SHARED, false, true).error(), EAGAIN)
      << "flock stays until the last close";
  EXPECT_TRUE(release(kA).given());
  EXPECT_EQ(lock(kB, 1, pb::LockRange::SHARED, false, true).error(), 0);
}

TEST_F(CoherenceTest, GetLockNamesTheConflict) {
  lock(kA, 7, pb::LockRange::EXCLUSIVE, false);
  pb::Request get = request_of(kB, ++seq_);
  get.mutable_getlock()->set_id(kFile);
  get.mutable_getlock()->mutable_range()->set_type(pb::LockRange::SHARED);
  get.mutable_getlock()->mutable_range()->set_start(5);
  get.mutable_getlock()->mutable_range()->set_end(20);
  EXPECT_EQ(ask(get).outcome.lock().end(), 9U);
  get.mutable_getlock()->mutable_range()->set_start(10);
  EXPECT_EQ(ask(get).outcome.lock().type(), pb::LockRange::UNLOCKED);
  get.mutable_getlock()->mutable_range()->set_start(30);
  EXPECT_EQ(ask(get).error(), EINVAL);
}

TEST_F(CoherenceTest, CancelEndsAWaitingLock) {
  lock(kA, 7, pb::LockRange::EXCLUSIVE, false);
  Answer& waiting = lock(kB, 7, pb::LockRange::EXCLUSIVE, true);
  pb::Request cancel = request_of(kB, seq_ + 1);
  cancel.mutable_cancel()->set_seq(seq_);
  EXPECT_EQ(ask(cancel).error(), 0);
  EXPECT_EQ(waiting.error(), EINTR);
}

// ---- orphans

TEST_F(CoherenceTest, AnOrphanGoesWhenNobodyRefersToIt) {
  attach_all({kA, kB});
  EXPECT_TRUE(unlink_last(kA, kFile).given()) << "the caller does not wait for the holders";
  EXPECT_EQ(ordered(), Clients{kB}) << "the caller's mount says by itself when it refers to it no more";
  EXPECT_TRUE(orders_[0].what.orphan);
  forget(kA, kFile);
  EXPECT_EQ(coherence_.orphans().at(kFile), (std::set<ClientId>{kB}));
  follow(kB, true);
  EXPECT_TRUE(freed().empty());
  EXPECT_TRUE(forget(kB, kFile).given());
  EXPECT_EQ(freed(), (std::vector<InodeId>{kFile}));
  EXPECT_TRUE(coherence_.orphans().empty());
}

TEST_F(CoherenceTest, AnOpenOrphanLivesUntilItsLastRelease) {
  attach_all({kA, kB});
  opened(kB);
  follow_at_once_ = true;
  unlink_last(kA, kFile);
  forget(kA, kFile);
  EXPECT_TRUE(freed().empty());
  release(kB);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kFile}));
  EXPECT_EQ(store_.ops().back(), pb::Request::kForget) << "after the release";
}

TEST_F(CoherenceTest, ASilentHolderKeepsAnOrphanUntilItDetaches) {
  attach_all({kA, kB});
  opened(kB);
  unlink_last(kA, kFile);
  forget(kA, kFile);
  pass_time(milliseconds(250));
  EXPECT_TRUE(freed().empty());
  coherence_.expire_site("site2");
  EXPECT_EQ(freed(), (std::vector<InodeId>{kFile}));
}

TEST_F(CoherenceTest, AnOrphanOfNobodyGoesAtOnce) {
  unlink_last(kA, kFile);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kFile}));
}

TEST_F(CoherenceTest, RestoredOrphansAreAskedForAgain) {
  attach_all({kA, kB});
  coherence_.restore_orphans({{kFile, {kA, kB}}, {kOther, {}}});
  EXPECT_TRUE(orders_.empty());
  pass_time(milliseconds(5));
  EXPECT_EQ(freed(), (std::vector<InodeId>{kOther}));
  follow(kA);
  follow(kB);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kOther, kFile}));
}

TEST_F(CoherenceTest, ANewOwnerAsksTheSitesThatTheOldOneHadNotHeard) {
  attach_all({kA, kC});
  coherence_.restore_orphans({{kFile, {0}}}, {"site2"});
  pass_time(milliseconds(5));
  ASSERT_EQ(orders_.size(), 3U);
  EXPECT_TRUE(orders_.front().what.client == 0 && orders_.front().what.all_names);
  for (const std::size_t one : {1, 2})
    EXPECT_EQ(orders_[one].what.sole, false) << "one may not know of the other";
  follow(0);
  EXPECT_EQ(coherence_.unheard(), std::set<SiteName>{"site2"}) << "and says so at the next handoff";
  coherence_.reassert(kB, "site2", {}, {});
  EXPECT_TRUE(coherence_.unheard().empty());
  pass_time(milliseconds(5));
  EXPECT_TRUE(freed().empty());
  while (!orders_.empty()) follow(orders_.front().what.client);
  EXPECT_EQ(freed(), std::vector<InodeId>{kFile});
}

TEST_F(CoherenceTest, AnOrphanIsNotFreedBeforeItsHolderIsLetIn) {
  coherence_.recover({kFile}, {"site2"});
  attach(kA);
  coherence_.recovered();
  follow(kA);  // it is the only mount
  coherence_.reassert(kB, "site2", {{0, kFile * 10, kFile, O_RDWR, false}}, {});
  pass_time(milliseconds(5));
  while (!orders_.empty()) follow(orders_.front().what.client);
  EXPECT_TRUE(freed().empty());
  pass_time(milliseconds(150));
  while (!orders_.empty()) follow(orders_.front().what.client);
  EXPECT_TRUE(freed().empty()) << "the second mount has it open";
  release(kB);
  EXPECT_EQ(freed(), std::vector<InodeId>{kFile});
}

TEST_F(CoherenceTest, LateAnswersAfterTheOwnerMovedChangeNothing) {
  attach_all({kA, kB});
  unlink_last(kA, kFile);
  coherence_.clear();
  coherence_.restore_orphans({{kFile, {kB}}});
  follow(kB);
  EXPECT_EQ(coherence_.orphans().at(kFile).size(), 1U);
  EXPECT_TRUE(freed().empty());
}

// ---- after a restart of the owner

TEST_F(CoherenceTest, WhoeverIsNotLetInYetIsServedLater) {
  attach(kA);
  follow(kA);
  const Answer& attached = attach(kB);
  const Answer& written = write(kB);
  EXPECT_EQ(writes_performed(), 0U) << "the only mount may still answer by itself";
  EXPECT_TRUE(coherence_.letting_in());
  follow(kA);
  pass_time(milliseconds(150));
  EXPECT_FALSE(coherence_.letting_in());
  EXPECT_TRUE(attached.given() && written.given());
  EXPECT_EQ(writes_performed(), 1U);
}

TEST_F(CoherenceTest, AMountEndsWhatAnEarlierOneOfItsSiteHad) {
  attach_all({kA, kB});
  opened(kB);
  lock(kB, 1, pb::LockRange::EXCLUSIVE, false);
  pb::Request again = request_of(kC, ++seq_);
  again.mutable_attach()->set_site("site" + std::to_string(kB));
  ask(again);
  EXPECT_FALSE(opens_.clients().contains(kB));
  EXPECT_FALSE(opens_.is_open(kFile));
  EXPECT_EQ(lock(kA, 1, pb::LockRange::EXCLUSIVE, false).error(), 0);
}

TEST_F(CoherenceTest, WhatGivesUpALockDoesNotOvertakeIt) {
  coherence_.recover({}, {"site2"});
  attach(kA);
  attach(kB);
  const Answer& flushed = lock(kA, 1, pb::LockRange::EXCLUSIVE, false);
  pb::Request flush = request_of(kA, ++seq_);
  flush.mutable_flush()->set_id(kFile);
  flush.mutable_flush()->set_lock_owner(1);
  EXPECT_TRUE(ask(flush).given()) << "closing a file waits for nobody";
  const Answer& unlocked = lock(kA, 2, pb::LockRange::SHARED, false);
  EXPECT_TRUE(lock(kA, 2, pb::LockRange::UNLOCKED, false).given());
  const Answer& whole = lock(kA, 3, pb::LockRange::EXCLUSIVE, false, true);
  pb::Request close = request_of(kA, ++seq_);
  close.mutable_release()->set_id(kFile);
  close.mutable_release()->set_lock_owner(3);
  close.mutable_release()->set_unlock_flock(true);
  EXPECT_TRUE(ask(close).given());
  pb::Request get = request_of(kB, ++seq_);
  get.mutable_getlock()->set_id(kFile);
  get.mutable_getlock()->mutable_range()->set_type(pb::LockRange::EXCLUSIVE);
  const Answer& asked = ask(get);
  EXPECT_FALSE(asked.given()) << "who holds it may not have been heard";
  coherence_.recovered();
  for (const Answer* answer : {&flushed, &unlocked, &whole}) EXPECT_EQ(answer->error(), 0);
  EXPECT_EQ(asked.outcome.lock().type(), pb::LockRange::UNLOCKED);
  EXPECT_TRUE(locks_.held().empty());
}

// Its Attach may come before its word of what it holds, and what it closes and unlocks between them and its
// being let in.
TEST_F(CoherenceTest, WhatIsGivenUpBeforeOneIsLetInIsNotHeldBehindIt) {
  coherence_.recover({}, {"site2"});
  attach(kA);
  coherence_.recovered();
  follow(kA);  // it is the only mount
  attach(kB);
  pb::LockRange range;
  range.set_type(pb::LockRange::EXCLUSIVE);
  range.set_end(9);
  coherence_.reassert(kB, "site2", {{0, kFile * 10, kFile, O_RDWR, false}}, {{0, 7, kFile, range, false}});
  const Answer& unlocked = lock(kB, 7, pb::LockRange::UNLOCKED, false);
  const Answer& closed = release(kB);
  follow(kA);
  pass_time(milliseconds(150));
  EXPECT_TRUE(unlocked.given() && closed.given());
  EXPECT_TRUE(locks_.held().empty());
  EXPECT_TRUE(opens_.openers(kFile, kA, false).empty());
}

// Of a caller that was killed: what gives it up may have been performed by an owner before this one.
TEST_F(CoherenceTest, ALockThatIsGivenUpIsNotGrantedToWhoWouldNotHaveWaited) {
  attach_all({kA});
  pb::Request request = request_of(kA, ++seq_);
  request.mutable_setlock()->set_id(kFile);
  request.mutable_setlock()->mutable_range()->set_type(pb::LockRange::EXCLUSIVE);
  request.set_given_up(true);
  EXPECT_EQ(ask(request).error(), EINTR);
  EXPECT_TRUE(locks_.held().empty());
}

TEST_F(CoherenceTest, LocksWaitUntilSitesHaveSaidWhatTheyHold) {
  coherence_.recover({}, {"site2"});
  attach(kA);
  EXPECT_TRUE(orders_.empty()) << "nobody is told yet that it is the only mount";
  const Answer& wanted = lock(kA, 1, pb::LockRange::EXCLUSIVE, false);
  const Answer& waiting = lock(kA, 1, pb::LockRange::EXCLUSIVE, true);
  EXPECT_FALSE(wanted.given());
  pb::LockRange range;
  range.set_type(pb::LockRange::EXCLUSIVE);
  range.set_end(5);
  coherence_.reassert(kB, "site2", {{0, kFile * 10, kFile, O_RDWR, false}}, {{0, 8, kFile, range, false}});
  EXPECT_EQ(ordered(), Clients{kB}) << "its pages may be wrong";
  EXPECT_FALSE(wanted.given());
  coherence_.recovered();
  EXPECT_EQ(wanted.error(), EAGAIN);
  EXPECT_FALSE(waiting.given());
  EXPECT_EQ(opens_.openers(kFile, kA, false), Clients{kB});
  detach(kB);
  EXPECT_TRUE(waiting.given());
}

TEST_F(CoherenceTest, OrphansThatAreFoundStayUntilEverySiteIsHeard) {
  coherence_.recover({kFile, kOther}, {"site2", "site3"});
  attach(kA);
  coherence_.reassert(kB, "site2", {{0, kFile * 10, kFile, O_RDWR, false}}, {});
  follow(kB);  // its pages
  coherence_.recovered();
  pass_time(milliseconds(20));
  EXPECT_TRUE(freed().empty()) << "the third site may refer to them";
  coherence_.reassert(0, "site3", {}, {});
  pass_time(milliseconds(20));
  while (!orders_.empty()) follow(orders_.front().what.client);
  EXPECT_EQ(freed(), std::vector<InodeId>{kOther});
  release(kB);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kOther, kFile}));
}

TEST_F(CoherenceTest, ASiteThatIsAwayKeepsOnlyWhatItHasOpen) {
  attach_all({kA, kB});
  opened(kB);
  unlink_last(kA, kFile);
  unlink_last(kA, kOther);
  forget(kA, kFile);
  forget(kA, kOther);
  EXPECT_TRUE(freed().empty());
  coherence_.away("site2");
  EXPECT_EQ(freed(), std::vector<InodeId>{kOther});
  unlink_last(kA, 52);
  forget(kA, 52);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kOther, 52}));
  coherence_.back("site2");
  unlink_last(kA, 53);
  forget(kA, 53);
  release(kB);
  EXPECT_EQ(freed(), (std::vector<InodeId>{kOther, 52, kFile}));
}

}  // namespace
}  // namespace sharefs
