#include "fs/gate.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/fs/fake_executor.h"

namespace sharefs {
namespace {

using test::Answer;
using test::FakeExecutor;
using test::request_of;
using test::write_of;
using Seqs = std::vector<std::uint64_t>;

constexpr std::uint64_t kAttempt = 77;
constexpr std::uint64_t kClient = 1;

class GateTest : public ::testing::Test {
 protected:
  GateTest()
      : folder_(make_folder()),
        database_(folder_ / "state.db"),
        state_(database_),
        gate_(store_, database_) {}
  ~GateTest() override { std::filesystem::remove_all(folder_); }

  static std::filesystem::path make_folder() {
    std::string name = ::testing::TempDir() + "sharefs-gate-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    return name;
  }

  static pb::Request lookup(std::uint64_t seq) {
    pb::Request request = request_of(kClient, seq);
    request.mutable_lookup()->set_parent(kRootInode);
    return request;
  }
  static pb::Request lock(std::uint64_t seq, bool wait) {
    pb::Request request = request_of(kClient, seq);
    request.mutable_setlock()->set_wait(wait);
    return request;
  }
  static pb::Request cancel(std::uint64_t client, std::uint64_t seq, std::uint64_t which) {
    pb::Request request = request_of(client, seq);
    request.mutable_cancel()->set_seq(which);
    return request;
  }
  void ask(const pb::Request& request, Answer& answer, std::string_view data = {}) {
    gate_.execute(request, as_bytes(data), answer.reply());
  }
  void write(std::uint64_t seq, Answer& answer) {
    ask(write_of(kClient, seq, 5, seq * 10, 4), answer, "data");
  }
  std::function<void()> note(bool& drained) {
    return [&drained] { drained = true; };
  }
  Seqs stored_seqs() {
    Seqs seqs;
    for (const auto& record : state_.records(kAttempt)) {
      EXPECT_EQ(record.number, seqs.size() + 1);
      pb::Request request;
      EXPECT_TRUE(request.ParseFromString(record.request));
      seqs.push_back(request.seq());
    }
    return seqs;
  }

  std::filesystem::path folder_;
  Database database_;
  State state_;
  FakeExecutor store_;
  Gate gate_;
};

TEST_F(GateTest, OpenPassesEverythingAndCountsItOnce) {
  Answer first, second;
  write(1, first);
  EXPECT_TRUE(first.given());
  EXPECT_EQ(gate_.in_flight(), 0U);
  store_.late = true;
  write(2, second);
  EXPECT_EQ(gate_.in_flight(), 1U);
  const Reply again = store_.calls[1].reply;
  store_.answer(1);
  EXPECT_EQ(gate_.in_flight(), 0U);
  again(pb::Outcome(), {});  // against the contract, and harmless
  EXPECT_EQ(gate_.in_flight(), 0U);
  EXPECT_TRUE(second.given());
}

TEST_F(GateTest, ClosedHoldsChangesAndPassesQueries) {
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  EXPECT_TRUE(drained) << "nothing was in flight";
  Answer mutation, query;
  write(1, mutation);
  ask(lookup(2), query);
  EXPECT_FALSE(mutation.given());
  EXPECT_TRUE(query.given());
  EXPECT_EQ(gate_.held(), 1U);
}

TEST_F(GateTest, WhatChangesFilesIsRefusedHeldOrNotOnceItIsToBe) {
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  Answer held, later, query, opened;
  write(1, held);
  gate_.refuse_changes();
  EXPECT_FALSE(held.given());
  gate_.open();
  write(2, later);
  ask(lookup(3), query);
  ask(lock(4, false), opened);
  EXPECT_EQ(held.error(), EROFS);
  EXPECT_EQ(later.error(), EROFS);
  EXPECT_EQ(query.error(), 0);
  EXPECT_EQ(opened.error(), 0);
  EXPECT_TRUE(held.given() && later.given() && query.given() && opened.given());
}

TEST_F(GateTest, DrainsWhenTheLastLateReplyIsGiven) {
  store_.late = true;
  Answer first, second;
  write(1, first);
  write(2, second);
  bool drained = false;
  gate_.close(kAttempt, [&] {
    drained = true;
    EXPECT_TRUE(first.given() && second.given()) << "replies come before the drain is reported";
  });
  store_.answer(1);
  EXPECT_FALSE(drained);
  store_.answer(0);
  EXPECT_TRUE(drained);
}

TEST_F(GateTest, WritebacksPassUntilTheDrainIsFinished) {
  store_.late = true;
  Answer change, writeback, later;
  write(1, change);
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  ask(write_of(kClient, 2, 5, 0, 4, true), writeback);
  ASSERT_EQ(store_.seqs(), (Seqs{1, 2}));
  store_.answer(0);
  EXPECT_FALSE(drained) << "the writeback is in flight too";
  store_.answer(1);
  EXPECT_TRUE(drained);
  ask(write_of(kClient, 3, 5, 0, 4, true), later);
  EXPECT_EQ(gate_.held(), 1U);
}

TEST_F(GateTest, AWritebackThatARecallWaitsForPassesEvenThen) {
  Gate::Hooks hooks;
  hooks.awaited = [](const pb::Request& request) { return request.write().id() == 5; };
  gate_.set_hooks(hooks);
  gate_.hold_everything();
  Answer awaited, other;
  ask(write_of(kClient, 1, 5, 0, 4, true), awaited);
  ask(write_of(kClient, 2, 6, 0, 4, true), other);
  EXPECT_TRUE(awaited.given());
  EXPECT_FALSE(other.given());
}

TEST_F(GateTest, AWritebackIsHeldBeforeTheChangesOfItsInodeThatRecallIt) {
  Answer answers[5];
  gate_.close(kAttempt, nullptr);
  ask(lookup(1), answers[0]);  // passes
  ask(write_of(kClient, 2, 6, 0, 4), answers[1], "data");
  write(3, answers[2]);  // of inode 5
  gate_.make_durable();
  auto back = write_of(kClient + 1, 4, 5, 0, 4);
  back.mutable_write()->set_writeback(true);
  ask(back, answers[3], "page");
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{2, 4, 3}));
  back.set_seq(5);
  ask(back, answers[4], "page");
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{2, 4, 5, 3}));
  gate_.block_queries([] {});
  const auto records = gate_.surrender();
  ASSERT_EQ(records.size(), 4U);
  for (std::size_t i = 0; i < records.size(); ++i) EXPECT_EQ(records[i].number, i + 1);
  EXPECT_EQ(records[1].data, "page");
  EXPECT_EQ(records[3].request.seq(), 3U);
}

TEST_F(GateTest, ANewOwnerAnswersQueriesBeforeItHasPerformedItsRecords) {
  gate_.hold_changes();
  Answer change, look, back;
  write(1, change);
  ask(lookup(2), look);
  ask(write_of(kClient, 3, 5, 0, 4096, true), back);
  EXPECT_TRUE(look.given() && back.given()) << "a record may wait for the page that is read or written back";
  EXPECT_FALSE(change.given());
  gate_.make_durable();
  EXPECT_TRUE(stored_seqs().empty());
  gate_.open();
  EXPECT_TRUE(change.given());
}

TEST_F(GateTest, QueriesOnWorkersAreDrainedBeforeTheCommit) {
  store_.late = true;
  Answer slow, held;
  ask(lookup(1), slow);
  bool changes = false, all = false;
  gate_.close(kAttempt, note(changes));
  EXPECT_TRUE(changes) << "a query does not keep the changes from draining";
  gate_.block_queries(note(all));
  EXPECT_FALSE(all);
  ask(lookup(2), held);
  EXPECT_EQ(gate_.held(), 1U);
  store_.answer(0);
  EXPECT_TRUE(all);
}

TEST_F(GateTest, ALockThatWaitsDoesNotKeepTheGateFromDraining) {
  store_.late = true;
  Answer waiting;
  ask(lock(1, true), waiting);
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  EXPECT_TRUE(drained);
  store_.answer(0);
  EXPECT_TRUE(waiting.given());
}

TEST_F(GateTest, RecordsArePerformedInOrderAndNobodyOvertakes) {
  gate_.close(kAttempt, nullptr);
  Answer answers[4];
  write(1, answers[0]);
  write(2, answers[1]);
  // The reply of a record brings in a new request while the others still wait.
  gate_.execute(write_of(kClient, 3, 5, 0, 4), as_bytes("data"), [&](const pb::Outcome&, Bytes) {
    write(5, answers[3]);
    EXPECT_FALSE(answers[3].given());
  });
  write(4, answers[2]);
  gate_.open();
  EXPECT_EQ(store_.seqs(), (Seqs{1, 2, 3, 4, 5}));
  EXPECT_EQ(store_.calls[0].data, "data");
  for (const Answer& answer : answers) EXPECT_TRUE(answer.given());
  EXPECT_FALSE(gate_.closed());
}

TEST_F(GateTest, WhatWasAskedBeforeIsPerformedBeforeWhatIsHeld) {
  gate_.hold_changes();
  Answer answers[3];
  write(2, answers[0]);
  gate_.open([&](Executor& passing) {
    passing.execute(write_of(kClient, 1, 5, 0, 4), {},
                    [&](const pb::Outcome&, Bytes) { write(3, answers[1]); });
    EXPECT_FALSE(answers[1].given());
  });
  EXPECT_EQ(store_.seqs(), (Seqs{1, 2, 3}));
  EXPECT_TRUE(answers[1].given());
}

TEST_F(GateTest, RecordsAreDurableWhenAskedForAndGoneAfterReopening) {
  gate_.close(kAttempt, nullptr);
  Answer answers[3];
  write(1, answers[0]);
  write(2, answers[1]);
  EXPECT_TRUE(stored_seqs().empty());
  gate_.make_durable();
  write(3, answers[2]);
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{1, 2, 3}));
  EXPECT_EQ(state_.records(kAttempt)[0].data, "data");
  gate_.open();
  EXPECT_TRUE(stored_seqs().empty());
  gate_.close(kAttempt, nullptr);
  write(4, answers[0]);
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{4}));
}

TEST_F(GateTest, WhatArrivesWithinAReplyWhileDurableRecordsArePerformedIsPerformedBehindThem) {
  gate_.close(kAttempt, nullptr);
  Answer second, arrived;
  gate_.execute(write_of(kClient, 1, 5, 0, 4), as_bytes("data"),
                [&](const pb::Outcome&, Bytes) { write(3, arrived); });
  write(2, second);
  gate_.make_durable();
  gate_.open();
  EXPECT_EQ(store_.seqs(), (Seqs{1, 2, 3}));
  EXPECT_TRUE(second.given());
  EXPECT_TRUE(arrived.given());
  EXPECT_TRUE(stored_seqs().empty());
}

TEST_F(GateTest, WhatMovesRecordsNeedsNoSpaceBeforeTheyAreMadeDurableAgain) {
  Answer answers[3];
  gate_.close(kAttempt, nullptr);
  write(1, answers[0]);
  write(2, answers[1]);
  gate_.make_durable();
  Statement(database_, "ALTER TABLE record RENAME TO away").run();  // as good as a full disk
  auto back = write_of(kClient + 1, 3, 5, 0, 4);
  back.mutable_write()->set_writeback(true);
  EXPECT_NO_THROW(ask(back, answers[2], "page"));
  EXPECT_THROW(gate_.make_durable(), DatabaseError) << "and this ends the attempt";
  Statement(database_, "ALTER TABLE away RENAME TO record").run();
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{3, 1, 2}));
}

TEST_F(GateTest, ItReopensAlsoWhenItsRowsCannotBeDropped) {
  gate_.close(kAttempt, nullptr);
  Answer answer;
  write(1, answer);
  gate_.make_durable();
  Statement(database_, "DROP TABLE record").run();  // as good as a full disk
  gate_.open();
  EXPECT_TRUE(answer.given());
  EXPECT_FALSE(gate_.closed());
}

TEST_F(GateTest, AnInterruptedLockThatIsHeldEndsAndItsRecordGoes) {
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  Answer first, waiting, last, cancelled, foreign;
  write(1, first);
  ask(lock(2, true), waiting);
  write(3, last);
  gate_.make_durable();
  Answer unwritten;
  write(4, unwritten);
  ask(cancel(kClient + 1, 9, 2), foreign);
  EXPECT_FALSE(waiting.given()) << "another client's cancel means another request";
  ask(cancel(kClient, 10, 2), cancelled);
  EXPECT_TRUE(cancelled.given());
  EXPECT_EQ(waiting.error(), EINTR);
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{1, 3, 4, 9}));
  gate_.open();
  EXPECT_EQ(store_.seqs(), (Seqs{1, 3, 4, 9}));
}

TEST_F(GateTest, WhatIsHeldForACallerThatWaitsNoLongerIsNotPerformed) {
  gate_.close(kAttempt, nullptr);
  Answer first, killed, last, cancelled, late;
  write(1, first);
  write(2, killed);
  write(3, last);
  gate_.make_durable();
  ask(cancel(kClient, 9, 2), cancelled);
  EXPECT_TRUE(cancelled.given());
  EXPECT_EQ(killed.error(), EINTR);
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{1, 3}));
  gate_.block_queries([] {});
  ask(cancel(kClient, 10, 3), late);
  EXPECT_EQ(last.error(), EINTR) << "nobody else performs it before it is surrendered";
  gate_.make_durable();
  EXPECT_EQ(stored_seqs(), (Seqs{1}));
  gate_.open();
  EXPECT_EQ(store_.seqs(), (Seqs{1}));
}

TEST_F(GateTest, CancelOfAWaitingLockPassesDuringTheDrainAndIsARecordAfterIt) {
  store_.late = true;
  Answer change, during, after;
  write(1, change);
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  ask(cancel(kClient, 3, 2), during);
  ASSERT_EQ(store_.seqs(), (Seqs{1, 3}));
  store_.answer(1);
  store_.answer(0);
  ASSERT_TRUE(drained);
  ask(cancel(kClient, 4, 2), after);
  EXPECT_EQ(gate_.held(), 1U) << "the waiting locks have been read for the new owner";
}

TEST_F(GateTest, SurrenderedRecordsAreNotPerformedAndLateRequestsGoOn) {
  FakeExecutor elsewhere;
  gate_.close(kAttempt, nullptr);
  Answer answers[4];
  write(1, answers[0]);
  gate_.block_queries([] {});
  write(2, answers[1]);
  const auto records = gate_.surrender();
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[1].number, 2U);
  EXPECT_EQ(records[1].request.seq(), 2U);
  write(3, answers[2]);
  EXPECT_FALSE(answers[2].given()) << "waits until it is known where to go";
  gate_.pass_to(elsewhere);
  write(4, answers[3]);
  EXPECT_EQ(elsewhere.seqs(), (Seqs{3, 4}));
  EXPECT_TRUE(store_.calls.empty());
  EXPECT_TRUE(gate_.closed());
  records[0].reply(pb::Outcome(), {});
  EXPECT_TRUE(answers[0].given());

  gate_.hold_everything();  // owner again
  Answer back;
  write(5, back);
  gate_.make_durable();
  EXPECT_TRUE(stored_seqs().empty());
  gate_.open();
  EXPECT_EQ(store_.seqs(), (Seqs{5}));
}

TEST_F(GateTest, WhatWasAnsweredAsARecordIsNotPerformedAgain) {
  Gate::Hooks hooks;
  hooks.answered = [](const Gate::Record& record) {
    if (record.request.seq() != 1) return false;
    record.reply(pb::Outcome(), {});
    return true;
  };
  gate_.set_hooks(hooks);
  gate_.hold_everything();
  Answer twice, once;
  write(1, twice);
  write(2, once);
  gate_.open();
  EXPECT_TRUE(twice.given());
  EXPECT_TRUE(once.given());
  EXPECT_EQ(store_.seqs(), (Seqs{2}));
}

TEST_F(GateTest, HeldRequestsAreReported) {
  Seqs held;
  bool opened = false;
  Gate::Hooks hooks;
  hooks.held = [&](const pb::Request& request) { held.push_back(request.seq()); };
  hooks.opened = [&] { opened = true; };
  gate_.set_hooks(hooks);
  gate_.close(kAttempt, nullptr);
  Answer mutation, query;
  write(1, mutation);
  ask(lookup(2), query);
  EXPECT_EQ(held, (Seqs{1}));
  EXPECT_FALSE(opened);
  gate_.open();
  EXPECT_TRUE(opened);
}

TEST_F(GateTest, ReopeningForgetsTheDrain) {
  store_.late = true;
  Answer change;
  write(1, change);
  bool drained = false;
  gate_.close(kAttempt, note(drained));
  gate_.open();
  store_.answer(0);
  EXPECT_FALSE(drained);
  EXPECT_TRUE(change.given());
}

TEST_F(GateTest, ManyLateRepliesInAnyOrderReachTheirOwnCallers) {
  store_.late = true;
  constexpr std::size_t kMany = 50;
  std::vector<Answer> answers(kMany);
  for (int round = 0; round < 3; ++round) {
    store_.calls.clear();
    for (std::size_t i = 0; i < kMany; ++i) write(i, answers[i] = {});
    for (std::size_t i = 0; i < kMany; i += 2) store_.answer(i);
    for (std::size_t i = kMany; i-- > 0;) {
      if (i % 2 == 1) store_.answer(i);
    }
    for (const Answer& answer : answers) EXPECT_TRUE(answer.given());
    EXPECT_EQ(gate_.in_flight(), 0U);
  }
}

}  // namespace
}  // namespace sharefs
