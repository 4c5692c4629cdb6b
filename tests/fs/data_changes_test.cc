// Who is recalled for a change to data, who is not waited for, and the deadlock rules.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <vector>

#include "fs/coherence.h"
#include "fs/gate.h"
#include "tests/fs/coherence_fixture.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

using namespace test;  // the words of the fixture

class DataChangesTest : public CoherenceTest {};

TEST_F(DataChangesTest, AFileThatNobodyElseHasOpenIsWrittenStraight) {
  attach_all({kA, kB});
  opened(kA);
  EXPECT_TRUE(write(kA).given());
  EXPECT_TRUE(orders_.empty());
}

TEST_F(DataChangesTest, ReadersDropTheirPagesBeforeTheWriteIsAcknowledged) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB, kFile, O_RDONLY);
  opened(kC, kFile, O_RDONLY);
  Answer& answer = write(kA);
  EXPECT_EQ(writes_performed(), 1U) << "nobody can have dirty pages";
  EXPECT_FALSE(answer.given());
  ASSERT_EQ(ordered(), (Clients{kB, kC}));
  EXPECT_EQ(orders_[0].what.id, kFile);
  EXPECT_EQ(orders_[0].what.offset, 100U);
  EXPECT_EQ(orders_[0].what.length, 4U);
  follow(kC);
  EXPECT_FALSE(answer.given());
  follow(kB);
  EXPECT_TRUE(answer.given());
  EXPECT_FALSE(answer.outcome.invalidate());
}

TEST_F(DataChangesTest, DirtyPagesAreWrittenBackBeforeTheWriteIsPerformed) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer& answer = write(kA);
  EXPECT_EQ(writes_performed(), 0U);
  ASSERT_EQ(ordered(), (Clients{kB}));
  EXPECT_TRUE(ask(write_of(kB, ++seq_, kFile, 0, 4096, true)).given()) << "the writeback passes at once";
  EXPECT_EQ(writes_performed(), 1U);
  follow(kB);
  EXPECT_EQ(writes_performed(), 2U);
  EXPECT_EQ(store_.calls[1].data, "data");
  EXPECT_FALSE(answer.given()) << "B may have read pages again";
  follow(kB);
  EXPECT_TRUE(answer.given());
}

TEST_F(DataChangesTest, OrdersThatAreFollowedAtOnceCostNoWait) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  follow_at_once_ = true;
  EXPECT_TRUE(write(kA).given());
}

TEST_F(DataChangesTest, QueriesAndAttributesRecallNobody) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer& pending = write(kA);
  pb::Request read = request_of(kB, ++seq_);
  read.mutable_read()->set_id(kFile);
  EXPECT_TRUE(ask(read).given());
  pb::Request chmod = request_of(kB, ++seq_);
  chmod.mutable_setattr()->set_id(kFile);
  chmod.mutable_setattr()->set_mode(0600);
  EXPECT_TRUE(ask(chmod).given());
  EXPECT_FALSE(pending.given());
  EXPECT_EQ(orders_.size(), 1U);
}

TEST_F(DataChangesTest, EveryKindOfDataChangeRecalls) {
  attach_all({kA, kB});
  opened(kB, kFile, O_RDONLY);
  std::vector<pb::Request> requests(5, request_of(kA, 1));
  requests[0].mutable_setattr()->set_id(kFile);
  requests[0].mutable_setattr()->set_size(10);
  requests[1].mutable_fallocate()->set_id(kFile);
  requests[1].mutable_fallocate()->set_length(10);
  requests[2].mutable_copy_file_range()->set_id_in(kOther);
  requests[2].mutable_copy_file_range()->set_id_out(kFile);
  requests[3].mutable_open()->set_id(kFile);
  requests[3].mutable_open()->set_flags(O_WRONLY | O_TRUNC);
  requests[4].mutable_create()->set_handle(9);
  requests[4].mutable_create()->set_flags(O_CREAT | O_WRONLY | O_TRUNC);
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.mutable_attr()->set_id(kFile);
    return outcome;
  };
  for (const pb::Request& request : requests) {
    Answer& answer = ask(request);
    ASSERT_EQ(ordered(), (Clients{kB})) << request.ShortDebugString();
    EXPECT_FALSE(answer.given());
    follow(kB);
    EXPECT_TRUE(answer.given());
  }
}

// What another site has stored in a mapping would be written back behind the truncation, and be there again.
TEST_F(DataChangesTest, ACreateThatTruncatesWhatExistsHasDirtyPagesWrittenBackFirst) {
  attach_all({kA, kB});
  opened(kB);
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.mutable_attr()->set_id(kFile);
    return outcome;
  };
  const auto created = [this] {
    const auto ops = store_.ops();
    return std::count(ops.begin(), ops.end(), pb::Request::kCreate);
  };
  pb::Request create = request_of(kA, ++seq_);
  create.mutable_create()->set_handle(9);
  create.mutable_create()->set_flags(O_CREAT | O_WRONLY | O_TRUNC);
  Answer& answer = ask(create);
  ASSERT_EQ(ordered(), (Clients{kB}));
  EXPECT_EQ(created(), 0);
  ask(write_of(kB, ++seq_, kFile, 0, 4, /*writeback=*/true), "data");
  follow(kB);
  EXPECT_EQ(created(), 1);
  EXPECT_FALSE(answer.given()) << "its pages are dropped first";
  while (!orders_.empty()) follow(kB);
  EXPECT_TRUE(answer.given());
}

TEST_F(DataChangesTest, AnAppendRecallsFromWhereItWasWritten) {
  attach_all({kA, kB});
  opened(kB, kFile, O_RDONLY);
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.set_count(4);
    outcome.mutable_attr()->set_size(1000);
    return outcome;
  };
  pb::Request append = write_of(kA, ++seq_, kFile, 7, 4);
  append.mutable_write()->set_append(true);
  ask(append);
  ASSERT_EQ(orders_.size(), 1U);
  EXPECT_EQ(orders_[0].what.offset, 996U);
}

pb::Outcome is_full(const pb::Request&) {
  pb::Outcome outcome;
  outcome.set_error(ENOSPC);
  return outcome;
}

TEST_F(DataChangesTest, AFailedChangeRecallsNoReaders) {
  attach_all({kA, kB});
  opened(kB, kFile, O_RDONLY);
  store_.result = is_full;
  Answer& answer = write(kA);
  EXPECT_EQ(answer.error(), ENOSPC);
  EXPECT_TRUE(orders_.empty());
}

TEST_F(DataChangesTest, WhatAWorkerHasBegunIsRecalledThoughItFails) {
  attach_all({kA, kB});
  opened(kB, kFile, O_RDONLY);
  store_.result = is_full;
  pb::Request allocate = request_of(kA, ++seq_);
  allocate.mutable_fallocate()->set_id(kFile);
  allocate.mutable_fallocate()->set_length(10);
  Answer& answer = ask(allocate);
  EXPECT_FALSE(answer.given());
  follow(kB);
  EXPECT_EQ(answer.error(), ENOSPC);
  EXPECT_TRUE(answer.outcome.invalidate()) << "its kernel takes it for one without an effect";
}

TEST_F(DataChangesTest, AClientThatOpensWhileAWorkerPerformsIsRecalled) {
  attach_all({kA, kB});
  opened(kA);
  store_.late = true;
  pb::Request allocate = request_of(kA, ++seq_);
  allocate.mutable_fallocate()->set_id(kFile);
  allocate.mutable_fallocate()->set_length(10);
  Answer& answer = ask(allocate);
  opened(kB, kFile, O_RDONLY);
  store_.answer(0);
  EXPECT_FALSE(answer.given());
  follow(kB);
  EXPECT_TRUE(answer.given());
}

// ---- deadlock rules

TEST_F(DataChangesTest, TwoWritersOnEachOthersOpenFileDoNotWaitForEachOther) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer& first = write(kA);
  ASSERT_EQ(ordered(), (Clients{kB}));
  // B's write arrives while its pages are recalled: its kernel holds them until the write is answered.
  Answer& second = write(kB);
  EXPECT_TRUE(first.given()) << "B has an unanswered change, so A does not wait for B any more";
  EXPECT_EQ(writes_performed(), 1U);
  // A has no unanswered change now, so B's recalls A as usual.
  follow(kA);
  EXPECT_EQ(writes_performed(), 2U);
  EXPECT_FALSE(second.given());
  follow(kA);
  EXPECT_TRUE(second.given());
  EXPECT_TRUE(second.outcome.invalidate()) << "B drops its pages with the reply";
  // The order to B is followed last: nobody waits for it any more.
  follow(kB);
  EXPECT_EQ(first.times, 1);
  EXPECT_EQ(second.times, 1);
}

TEST_F(DataChangesTest, NobodyWaitsForAClientWhoseChangeWaitsElsewhere) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB);
  opened(kC);
  Answer& first = write(kA);  // recalls B and C
  ASSERT_EQ(ordered(), (Clients{kB, kC}));
  Answer& second = write(kB);  // A has an unanswered change: recalls C only
  EXPECT_EQ(ordered(), (Clients{kB, kC, kC}));
  EXPECT_FALSE(first.given());
  EXPECT_EQ(writes_performed(), 0U);
  follow(kC);  // for A's change, which B is not waited for: performed; only C is recalled again
  EXPECT_EQ(writes_performed(), 1U);
  EXPECT_FALSE(first.given());
  EXPECT_EQ(ordered(), (Clients{kB, kC, kC}));
  orders_.pop_front();  // B's kernel cannot follow: it waits for the reply to its write
  follow(kC);           // for B's change: performed; A and C
  EXPECT_EQ(writes_performed(), 2U);
  follow(kC);
  EXPECT_TRUE(first.given());
  EXPECT_TRUE(first.outcome.invalidate());
  follow(kC);
  EXPECT_TRUE(second.given());
  EXPECT_TRUE(second.outcome.invalidate());
  EXPECT_TRUE(orders_.empty());
}

TEST_F(DataChangesTest, WritersOfDifferentFilesStillWait) {
  attach_all({kA, kB});
  opened(kA, kOther);
  opened(kB, kOther);
  opened(kA);
  opened(kB);
  Answer& first = write(kA, kFile);
  Answer& second = write(kB, kOther);
  EXPECT_EQ(ordered(), (Clients{kB, kA}));
  follow(kB);
  follow(kB);
  EXPECT_TRUE(first.given());
  EXPECT_FALSE(second.given());
}

TEST_F(DataChangesTest, AChangeThatTheGateHoldsIsNotWaitedFor) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer& answer = write(kA);
  ASSERT_FALSE(answer.given());
  coherence_.held(write_of(kB, 900, kFile, 0, 4));
  EXPECT_TRUE(answer.given());
  EXPECT_EQ(orders_.size(), 2U) << "B is told all the same, and follows when its write has been answered";
  Answer& late = ask(write_of(kB, 900, kFile, 0, 4), "data");
  follow(kA);
  follow(kA);
  EXPECT_TRUE(late.given());
}

TEST_F(DataChangesTest, OfSeveralHeldChangesTheLastIsNotWaitedForEither) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  coherence_.held(write_of(kB, 900, kFile, 0, 4));
  coherence_.held(write_of(kB, 901, kFile, 0, 4));
  Answer& first = ask(write_of(kB, 900, kFile, 0, 4), "data");
  follow(kA);
  follow(kA);
  ASSERT_TRUE(first.given());
  EXPECT_TRUE(write(kA).given());
}

TEST_F(DataChangesTest, AwaitsTheWritebacksOfRecalledPages) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  const pb::Request writeback = write_of(kB, 900, kFile, 0, 4, true);
  EXPECT_FALSE(coherence_.awaits(writeback));
  write(kA);
  EXPECT_TRUE(coherence_.awaits(writeback));
  EXPECT_FALSE(coherence_.awaits(write_of(kA, 900, kFile, 0, 4, true)));
  follow(kB);
  follow(kB);
  EXPECT_FALSE(coherence_.awaits(writeback));
}

TEST_F(DataChangesTest, AWritebackIsPerformedAtOnceAndAcknowledgedWhenOthersHaveDroppedTheirPages) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB, kFile, O_RDONLY);
  opened(kC);
  Answer& answer = ask(write_of(kA, 900, kFile, 4096, 4096, true));
  EXPECT_EQ(writes_performed(), 1U);
  EXPECT_FALSE(answer.given());
  ASSERT_EQ(ordered(), (Clients{kB, kC}));
  EXPECT_EQ(orders_[0].what.offset, 4096U);
  EXPECT_EQ(orders_[0].what.length, 4096U);
  follow(kB);
  EXPECT_FALSE(answer.given());
  follow(kC);
  EXPECT_TRUE(answer.given());
}

// Each kernel drops a page only when it has written it back.
TEST_F(DataChangesTest, TwoThatWriteBackTheSamePageDoNotWaitForEachOther) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer& first = ask(write_of(kA, 900, kFile, 0, 4096, true));
  ASSERT_EQ(ordered(), (Clients{kB}));
  Answer& second = ask(write_of(kB, 901, kFile, 0, 4096, true));
  EXPECT_TRUE(second.given());
  EXPECT_EQ(writes_performed(), 2U);
  EXPECT_FALSE(first.given()) << "B may have other dirty pages";
  follow(kB);
  EXPECT_TRUE(first.given());
  EXPECT_TRUE(first.outcome.invalidate()) << "its pages are not those of the second";
}

TEST_F(DataChangesTest, AChangeWaitsForThePagesOfWhoeverIsWritingBack) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB);
  opened(kC, kFile, O_RDONLY);
  Answer& back = ask(write_of(kB, 900, kFile, 0, 4096, true));
  ASSERT_EQ(ordered(), (Clients{kA, kC}));
  Answer& change = write(kA);
  EXPECT_EQ(writes_performed(), 1U) << "B may have more dirty pages than that one";
  EXPECT_FALSE(back.given());
  follow(kC);
  EXPECT_TRUE(back.given()) << "A's kernel has locked its pages";
  follow(kB);
  EXPECT_EQ(writes_performed(), 2U);
  follow(kB);
  follow(kC);
  EXPECT_TRUE(change.given());
}

TEST_F(DataChangesTest, WhoIsHeardAndMayNotHaveBeenToldIsWaitedFor) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB, kFile, O_RDONLY);
  opened(kC, kFile, O_RDONLY);
  behind_ = {kB};
  Answer& change = write(kA);
  pass_time(milliseconds(300));
  EXPECT_FALSE(change.given());
  follow(kB);
  EXPECT_TRUE(change.given()) << "nobody waits for the other one any more";
  Answer& again = write(kA);
  pass_time(milliseconds(300));
  EXPECT_FALSE(again.given());
  behind_.clear();
  pass_time(milliseconds(100));
  EXPECT_TRUE(again.given()) << "it has been told, and does not follow";
}

TEST_F(DataChangesTest, ASilentClientIsWaitedForOneLeaseAndToldLater) {
  attach_all({kA, kB});
  opened(kA);
  opened(kB, kFile, O_RDONLY);
  Answer& first = write(kA);
  pass_time(milliseconds(30));
  EXPECT_FALSE(first.given());
  pass_time(milliseconds(250));
  EXPECT_TRUE(first.given());
  orders_.clear();
  EXPECT_TRUE(write(kA).given()) << "no second lease for a client that is gone";
  EXPECT_TRUE(orders_.empty());
  pb::Request stat = request_of(kB, ++seq_);
  stat.mutable_getattr()->set_id(kFile);
  ask(stat);
  ASSERT_EQ(ordered(), (Clients{kB})) << "it is back and hears what it missed";
  EXPECT_EQ(orders_[0].what.length, 0U);
  follow(kB);
  EXPECT_FALSE(write(kA).given()) << "and is waited for again";
}

TEST_F(DataChangesTest, ASilentClientIsToldWhatItMissedBeforeItIsGrantedALock) {
  for (const bool granted : {true, false}) {
    attach_all({kA, kB});
    opened(kA, kOther);
    opened(kB, kOther, O_RDONLY);
    lock(kA, 7, pb::LockRange::EXCLUSIVE, false);
    Answer& waiting = lock(kB, 7, pb::LockRange::EXCLUSIVE, true);
    write(kA, kOther);
    pass_time(milliseconds(250));
    EXPECT_TRUE(write(kA, kOther).given()) << "it is not waited for any more";
    orders_.clear();
    if (granted) {
      std::size_t ordered_before = 0;
      waiting.then = [&] { ordered_before = orders_.size(); };
      lock(kA, 7, pb::LockRange::UNLOCKED, false);
      EXPECT_TRUE(waiting.given());
      EXPECT_EQ(ordered_before, 1U);
      EXPECT_TRUE(write(kA, kOther).given()) << "a grant is no sign of life";
    } else {
      coherence_.back("site" + std::to_string(kB));
    }
    EXPECT_EQ(ordered(), (Clients{kB}));
    detach(kB);
    detach(kA);
    orders_.clear();
  }
}

TEST_F(DataChangesTest, WhoChangesWhatOthersChangedMeanwhileHearsOfThatWithALock) {
  attach_all({kA, kB});
  opened(kA, kOther);
  opened(kB, kOther, O_RDONLY);
  const auto granted = [&] { return lock(kA, 7, pb::LockRange::EXCLUSIVE, false).outcome; };
  store_.late = true;
  Answer& mine = write(kA, kOther);
  EXPECT_FALSE(granted().changes_met()) << "nobody has changed anything";
  Answer& theirs = write(kB, kOther);
  store_.answer(1);
  EXPECT_TRUE(theirs.given()) << "it does not wait for whoever changes the inode";
  EXPECT_TRUE(granted().changes_met());
  store_.answer(0);
  follow(kB);
  EXPECT_TRUE(mine.given());
  EXPECT_TRUE(mine.outcome.invalidate());
  EXPECT_FALSE(granted().changes_met()) << "it has heard";
}

TEST_F(DataChangesTest, WhatWasOrderedIsMissedUntilItIsFollowed) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB, kFile, O_RDONLY);
  opened(kC, kFile, O_RDONLY);
  const auto missing = [](ClientId client) {
    return std::map<ClientId, std::set<InodeId>>{{client, {kFile}}};
  };
  coherence_.held(write_of(kB, ++seq_, kFile, 100, 4));
  Answer& change = write(kA);
  follow(kC);
  EXPECT_TRUE(change.given()) << "the gate holds what the other one writes";
  EXPECT_EQ(coherence_.missed(), missing(kB)) << "whether it has dropped its pages is not known";
  follow(kB);
  EXPECT_TRUE(coherence_.missed().empty());
  coherence_.tell_missed(kC, {kFile});  // the owner before has ordered it in vain
  pass_time(milliseconds(1));
  EXPECT_EQ(coherence_.missed(), missing(kC)) << "the next owner has to order it again";
  follow(kC);
  EXPECT_TRUE(coherence_.missed().empty());
}

TEST_F(DataChangesTest, AChangeThatWaitsIsNotPerformedForAKilledCaller) {
  attach_all({kA, kB, kC});
  for (const ClientId client : {kA, kB, kC}) opened(client);
  Answer& killed = write(kA);
  const auto cancel = [this](std::uint64_t seq) {
    pb::Request request = request_of(kA, ++seq_);
    request.mutable_cancel()->set_seq(seq);
    EXPECT_TRUE(ask(request).given());
  };
  cancel(seq_);
  EXPECT_EQ(killed.error(), EINTR);
  EXPECT_EQ(writes_performed(), 0U);
  follow(kB);
  follow(kC);
  EXPECT_EQ(writes_performed(), 0U) << "what others have written meanwhile stays";
  Answer& performed = write(kA);
  const std::uint64_t seq = seq_;
  follow(kB);
  follow(kC);
  EXPECT_EQ(writes_performed(), 1U);
  cancel(seq);
  EXPECT_FALSE(performed.given()) << "too late";
}

TEST_F(DataChangesTest, AClientThatDetachesIsNotWaitedFor) {
  attach_all({kA, kB, kC});
  opened(kA);
  opened(kB);
  Answer& answer = write(kA);
  EXPECT_FALSE(answer.given());
  detach(kB);
  EXPECT_TRUE(answer.given());
  EXPECT_EQ(writes_performed(), 1U);
}

// The gate drains although a held write keeps its kernel from following a recall.
TEST_F(DataChangesTest, AClosedGateDrainsWhileWritersMeet) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  Gate gate(coherence_, database);
  Gate::Hooks hooks;
  hooks.held = [this](const pb::Request& request) { coherence_.held(request); };
  hooks.awaited = [this](const pb::Request& request) { return coherence_.awaits(request); };
  hooks.opened = [this] { coherence_.none_held(); };
  gate.set_hooks(hooks);
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  Answer first, second;
  gate.execute(write_of(kA, 1, kFile, 0, 4), as_bytes("data"), first.reply());
  bool drained = false;
  gate.close(1, [&] { drained = true; });
  EXPECT_FALSE(drained);
  gate.execute(write_of(kB, 2, kFile, 0, 4), as_bytes("data"), second.reply());
  EXPECT_TRUE(drained);
  EXPECT_TRUE(first.given());
  EXPECT_FALSE(second.given());
  follow_at_once_ = true;
  gate.open();
  EXPECT_TRUE(second.given());
}

TEST_F(DataChangesTest, WhoseHeldWriteIsCancelledIsWaitedFor) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  Gate gate(coherence_, database);
  Gate::Hooks hooks;
  hooks.held = [this](const pb::Request& request) { coherence_.held(request); };
  hooks.dropped = [this](const pb::Request& request) { coherence_.dropped(request); };
  hooks.opened = [this] { coherence_.none_held(); };
  gate.set_hooks(hooks);
  attach_all({kA, kB});
  opened(kA);
  opened(kB);
  gate.close(1, [] {});
  Answer changed, killed, cancelled;
  gate.execute(write_of(kB, 1, kFile, 0, 4), as_bytes("data"), killed.reply());
  gate.execute(write_of(kA, 1, kFile, 0, 4), as_bytes("data"), changed.reply());
  pb::Request cancel = request_of(kB, 2);
  cancel.mutable_cancel()->set_seq(1);
  gate.execute(cancel, {}, cancelled.reply());
  EXPECT_TRUE(killed.given());
  gate.open();
  EXPECT_FALSE(changed.given()) << "others may look at the pages of the killed one's kernel";
  follow(kB);
  follow(kB);
  EXPECT_TRUE(changed.given());
}

// Its file was opened at once, and has been read already when the Open is performed.
TEST_F(DataChangesTest, AnOpenThatIsHeldCountsForAChangeBeforeIt) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  Gate gate(coherence_, database);
  Gate::Hooks hooks;
  hooks.held = [this](const pb::Request& request) { coherence_.held(request); };
  hooks.opened = [this] { coherence_.none_held(); };
  gate.set_hooks(hooks);
  attach_all({kA, kB});
  opened(kA);
  gate.close(1, [] {});
  Answer changed, opening;
  gate.execute(write_of(kA, 1, kFile, 0, 4), as_bytes("data"), changed.reply());
  pb::Request open = request_of(kB, 2);
  open.mutable_open()->set_id(kFile);
  open.mutable_open()->set_handle(7);
  open.set_lazy(true);
  gate.execute(open, {}, opening.reply());
  gate.open();
  EXPECT_TRUE(opening.given());
  EXPECT_FALSE(changed.given());
  follow(kB);
  EXPECT_TRUE(changed.given());
}

}  // namespace
}  // namespace sharefs
