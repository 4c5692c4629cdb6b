#include "replication/request_server.h"

#include <cerrno>

#include "replication/request_check.h"
#include "requests.h"
#include "sites.h"

namespace sharefs::testing {
namespace {

constexpr std::uint64_t kClient = 77;

// Two sites that ask, one that serves; what comes back is collected.
class RequestServerTest : public ::testing::Test {
 protected:
  RequestServerTest() {
    introduce(asker, owner);
    introduce(other, owner);
    owner.transport.subscribe(pb::Envelope::kAsk, [this](const SiteName& from, Message message) {
      server.ask(from, std::move(message));
    });
    for (auto* site : {&asker, &other})
      for (auto kind : {pb::Envelope::kAnswer, pb::Envelope::kMoved})
        site->transport.subscribe(kind, [this, site](const SiteName&, Message message) {
          (site == &asker ? answers : other_answers).push_back(std::move(message));
        });
  }
  void SetUp() override {
    ASSERT_TRUE(run_until_connected(reactor, asker, owner));
    ASSERT_TRUE(run_until_connected(reactor, other, owner));
  }

  // Sends and waits for one more answer.
  pb::Answer ask(const pb::Request& request, std::string_view data = "") {
    const auto before = answers.size();
    send(asker, request, data);
    EXPECT_TRUE(run_until(reactor, [&] { return answers.size() > before; }));
    return answers.empty() ? pb::Answer() : answers.back().head.answer();
  }
  void send(TestSite& from, const pb::Request& request, std::string_view data = "") {
    pb::Envelope envelope;
    *envelope.mutable_ask()->mutable_request() = request;
    envelope.mutable_ask()->set_round(round_);
    from.transport.send("owner", Lane::requests, envelope, copy_to_parts(as_bytes(data)));
  }
  void attach(std::uint64_t client = kClient) {
    EXPECT_EQ(ask(attach_request(client, "asker")).outcome().error(), 0u);
  }

  Reactor reactor;
  TestSite owner{reactor, "owner"}, asker{reactor, "asker"}, other{reactor, "other"};
  FakeStore store;
  RequestServer server{owner.transport, store};
  std::vector<Message> answers, other_answers;
  std::uint64_t round_ = 0;  // in which the sites ask
};

TEST_F(RequestServerTest, WhatIsGivenUpIsAnsweredFromTheWindowAndNeverPerformed) {
  server.serve();
  attach();
  auto request = write_request(kClient, 10, 5);
  EXPECT_EQ(ask(request, "hello").outcome().count(), 5u);
  request.set_given_up(true);
  EXPECT_EQ(ask(request, "hello").outcome().count(), 5u);
  request.set_seq(12);
  EXPECT_EQ(ask(request, "hello").outcome().error(), unsigned{EINTR});
  request.set_given_up(false);
  EXPECT_EQ(ask(request, "hello").outcome().error(), unsigned{EINTR}) << "a copy that comes late";
  server.restore(server.windows());
  const auto once = server.once(store);
  request.set_seq(14);
  request.set_given_up(true);
  int error = 0;
  once->execute(request, as_bytes("hello"),
                [&](const pb::Outcome& outcome, Bytes) { error = static_cast<int>(outcome.error()); });
  EXPECT_EQ(error, EINTR);
  EXPECT_EQ(store.performed(), 2u) << "attached, written";
}

// Only who knows the locks can say what came of it.
TEST_F(RequestServerTest, ALockThatIsGivenUpIsAskedFor) {
  server.serve();
  attach();
  auto lock = request_of(kClient, 10);
  lock.mutable_setlock()->set_wait(true);
  lock.set_given_up(true);
  EXPECT_EQ(ask(lock).outcome().error(), 0u);
  lock.set_seq(12);
  server.once(store)->execute(lock, {}, [](const pb::Outcome&, Bytes) {});
  EXPECT_EQ(store.performed(), 3u);
}

TEST_F(RequestServerTest, ServesQueriesAndMutationsWithTheirData) {
  server.serve();
  attach();
  EXPECT_EQ(ask(write_request(kClient, 10, 5), "hello").outcome().count(), 5u);
  EXPECT_EQ(store.last_data, "hello");
  store.data = std::string(1 << 20, 'r');
  ask(read_request(kClient, 12));
  EXPECT_GT(answers.back().parts.size(), 1u) << "in pieces";
  std::string joined;
  EXPECT_EQ(as_text(join_parts(answers.back().parts, joined)), store.data);
  ask(write_request(kClient, 13, 1 << 20), store.data);
  EXPECT_EQ(store.last_data, store.data);
}

TEST_F(RequestServerTest, BeforeItServesItSaysWhoDoes) {
  server.redirect("elsewhere", 9);
  ask(write_request(kClient, 10, 0));
  ASSERT_TRUE(answers.back().head.has_moved());
  EXPECT_EQ(answers.back().head.moved().owner(), "elsewhere");
  EXPECT_EQ(answers.back().head.moved().epoch(), 9u);
  EXPECT_EQ(answers.back().head.moved().seq(), 10u);
}

TEST_F(RequestServerTest, ARepeatedMutationIsAnsweredFromTheWindow) {
  server.serve();
  attach();
  const auto first = ask(write_request(kClient, 10, 0));
  const auto performed = store.performed();
  const auto second = ask(write_request(kClient, 10, 0));
  EXPECT_EQ(store.performed(), performed);
  EXPECT_EQ(first.SerializeAsString(), second.SerializeAsString());
}

TEST_F(RequestServerTest, ARequestUnderWayIsNotStartedAgainAndAnsweredOnce) {
  server.serve();
  attach();
  store.hold = true;
  send(asker, write_request(kClient, 10, 0));
  send(asker, write_request(kClient, 10, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return store.held() == 1; }));
  run_for(reactor, 50ms);
  EXPECT_EQ(store.held(), 1u);
  const auto before = answers.size();
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() > before; }));
  run_for(reactor, 50ms);
  EXPECT_EQ(answers.size(), before + 1);
}

TEST_F(RequestServerTest, AnsweredBelowFreesTheWindowAndRefusesLateCopies) {
  server.serve();
  attach();
  for (std::uint64_t seq = 10; seq < 20; seq += 2) ask(write_request(kClient, seq, 0));
  EXPECT_EQ(server.windows().at(0).answered_size(), 6);  // with the Attach
  ask(write_request(kClient, 20, 0, 18));
  EXPECT_EQ(server.windows().at(0).answered_size(), 3);
  const auto performed = store.performed();
  EXPECT_EQ(ask(write_request(kClient, 12, 0)).outcome().error(), static_cast<unsigned>(ESTALE));
  EXPECT_EQ(store.performed(), performed);
}

TEST_F(RequestServerTest, TheWindowIsBounded) {
  server.serve();
  attach();
  const auto before = answers.size();
  for (std::uint64_t seq = 1; seq <= 5000; ++seq) send(asker, write_request(kClient, seq, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 5000; }));
  EXPECT_LE(server.windows().at(0).answered_size(), 4096);
}

TEST_F(RequestServerTest, WhatTookLongIsKnownForAsLongAsWhatDidNot) {
  server.serve();
  attach();
  store.hold = true;
  send(asker, write_request(kClient, 1, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return store.held() == 1; }));
  store.hold = false;
  const auto before = answers.size();
  for (std::uint64_t seq = 2; seq <= 5000; ++seq) send(asker, write_request(kClient, seq, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 4999; }));
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 5000; }));
  ask(write_request(kClient, 5001, 0));
  const auto performed = store.performed();
  EXPECT_EQ(ask(write_request(kClient, 1, 0)).outcome().error(), 0u);
  EXPECT_EQ(store.performed(), performed);
}

// As when its caller has given it up (--timeout): its site goes on waiting for what it opens.
TEST_F(RequestServerTest, WhatIsUnderWayIsAnsweredThoughItsCallerHasBeen) {
  server.serve();
  attach();
  const auto before = answers.size();
  store.hold = true;
  send(asker, write_request(kClient, 1, 0));
  auto later = write_request(kClient, 2, 0);
  later.set_answered_below(2);
  send(asker, later);
  send(asker, write_request(kClient, 1, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return store.held() == 2; }));
  run_for(reactor, std::chrono::milliseconds(50));
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 2; }));
  for (std::size_t i = before; i < answers.size(); ++i)
    EXPECT_EQ(answers[i].head.answer().outcome().error(), 0u);
}

TEST_F(RequestServerTest, AClientBelongsToTheSiteThatAttachedIt) {
  server.serve();
  attach();
  send(other, write_request(kClient, 10, 0));
  send(other, attach_request(kClient, "asker"));
  send(other, attach_request(kClient + 1, "asker"));
  send(other, attach_request(kClient, "other"));
  ASSERT_TRUE(run_until(reactor, [&] { return other_answers.size() == 4; }));
  for (const auto& answer : other_answers)
    EXPECT_EQ(answer.head.answer().outcome().error(), static_cast<unsigned>(EPERM));
}

TEST_F(RequestServerTest, AnUnknownClientIsToldToAttachAgain) {
  server.serve();
  ask(write_request(kClient, 10, 0));
  ASSERT_TRUE(answers.back().head.has_moved());
  EXPECT_EQ(answers.back().head.moved().owner(), "owner");
  EXPECT_EQ(store.performed(), 0u);
}

// A mount that attaches for another reason would have what it asks behind that performed first.
TEST_F(RequestServerTest, WhatIsOnItsWayBehindWhatAnUnknownClientAskedIsSentAway) {
  server.serve();
  ask(write_request(kClient, 10, 0));
  ask(attach_request(kClient, "asker"));
  EXPECT_TRUE(answers.back().head.has_moved());
  EXPECT_EQ(answers.back().head.moved().owner(), "owner");
  ask(write_request(kClient, 12, 0));
  EXPECT_TRUE(answers.back().head.has_moved());
  EXPECT_EQ(store.performed(), 0u);
  ++round_;
  attach();
  EXPECT_EQ(ask(write_request(kClient, 10, 0)).outcome().error(), 0u);
  EXPECT_EQ(ask(write_request(kClient, 12, 0)).outcome().error(), 0u);
}

TEST_F(RequestServerTest, DetachForgetsTheClient) {
  server.serve();
  attach();
  EXPECT_EQ(ask(detach_request(kClient, 30)).outcome().error(), 0u);
  EXPECT_TRUE(server.windows().empty());
  EXPECT_EQ(ask(detach_request(kClient, 30)).outcome().error(), 0u);
}

TEST_F(RequestServerTest, AnEarlierMountOfASiteIsNotServedAnyMore) {
  server.serve();
  attach();
  attach(kClient + 1);
  EXPECT_EQ(server.windows().size(), 1u);
  const auto performed = store.performed();
  ask(write_request(kClient, 10, 0));
  EXPECT_TRUE(answers.back().head.has_moved());
  ++round_;
  EXPECT_EQ(ask(attach_request(kClient, "asker")).outcome().error(), static_cast<unsigned>(ESTALE));
  EXPECT_EQ(store.performed(), performed);
  EXPECT_FALSE(server.admit("asker", kClient));
  EXPECT_FALSE(server.admit("another", kClient + 1)) << "the client is of another site";
  EXPECT_EQ(ask(write_request(kClient + 1, 10, 0)).outcome().error(), 0u);
  server.expire("asker");
  ask(write_request(kClient + 1, 12, 0));
  EXPECT_TRUE(answers.back().head.has_moved());
}

TEST_F(RequestServerTest, AMountIsLetInWhenWhatTheEarlierOneAskedIsPerformed) {
  server.serve();
  attach();
  store.hold = true;
  send(asker, write_request(kClient, 10, 0));
  send(asker, write_request(kClient, 12, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return store.held() == 2; }));
  store.hold = false;
  const auto before = answers.size();
  send(asker, attach_request(kClient + 1, "asker"));
  run_for(reactor, 50ms);
  EXPECT_EQ(answers.size(), before);
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 3; }));
  EXPECT_EQ(answers.back().head.answer().client(), kClient + 1);
  EXPECT_EQ(ask(write_request(kClient + 1, 10, 0)).outcome().error(), 0u);
}

TEST_F(RequestServerTest, ImpossibleRequestsAreRefused) {
  server.serve();
  attach();
  const auto error_of = [&](const pb::Request& request, std::string_view data = "") {
    return static_cast<int>(ask(request, data).outcome().error());
  };
  const auto performed = store.performed();
  EXPECT_EQ(error_of(request_of(kClient, 10)), EINVAL);                // no operation
  EXPECT_EQ(error_of(write_request(kClient, 12, 5), "four"), EINVAL);  // size and data differ
  EXPECT_EQ(error_of(read_request(kClient, 14), "what for"), EINVAL);  // data that nobody asked for
  EXPECT_EQ(error_of(lookup_request(kClient, 16, std::string(256, 'n'))), ENAMETOOLONG);
  EXPECT_EQ(error_of(lookup_request(kClient, 18, std::string("a\0b", 3))), EINVAL);
  EXPECT_EQ(error_of(write_request(kClient, 20, 0, 21)), EINVAL);  // says itself that it is answered
  const std::string large(kMaxPayload + 1, 'x');
  EXPECT_EQ(error_of(write_request(kClient, 22, static_cast<std::uint32_t>(large.size())), large), EINVAL);
  auto huge_read = read_request(kClient, 24);
  huge_read.mutable_read()->set_size(~0u);
  EXPECT_EQ(error_of(huge_read), EINVAL);
  EXPECT_EQ(store.performed(), performed);
}

TEST_F(RequestServerTest, WindowsGoToTheNextOwner) {
  server.serve();
  attach();
  ask(write_request(kClient, 10, 0));
  ask(write_request(kClient, 12, 0));
  const auto windows = server.windows();

  server.redirect("elsewhere", 2);
  EXPECT_TRUE(server.windows().empty());
  server.restore(windows);
  server.serve();
  const auto performed = store.performed();
  ask(write_request(kClient, 12, 0));
  EXPECT_EQ(store.performed(), performed);
  EXPECT_TRUE(server.answer_known("asker", write_request(kClient, 10, 0)));
  EXPECT_FALSE(server.answer_known("other", write_request(kClient, 10, 0)));
  EXPECT_FALSE(server.answer_known("asker", write_request(kClient, 14, 0)));
}

TEST_F(RequestServerTest, QueriesAreAnsweredWhileRecordsArePerformed) {
  server.serve();
  attach();
  server.restore(server.windows());  // the takeover begins
  send(asker, write_request(kClient, 10, 0));
  EXPECT_EQ(ask(read_request(kClient, 11)).seq(), 11u);
}

// A record may wait for the page that a kernel writes back; the writeback itself may be among the records.
TEST_F(RequestServerTest, AWritebackIsPerformedAtOnceWhileRecordsArePerformedAndNotAgainAsARecord) {
  server.serve();
  attach();
  server.restore(server.windows());  // the takeover begins
  auto writeback = write_request(kClient, 10, 0);
  writeback.mutable_write()->set_writeback(true);
  EXPECT_EQ(ask(writeback).seq(), 10u);
  const auto performed = store.performed();
  int answered = 0;
  server.once(store)->execute(writeback, {}, [&](const pb::Outcome&, Bytes) { ++answered; });
  EXPECT_EQ(answered, 1);
  EXPECT_EQ(store.performed(), performed);

  // The other way round, and both at once.
  auto next = write_request(kClient, 12, 0);
  next.mutable_write()->set_writeback(true);
  store.hold = true;
  server.once(store)->execute(next, {}, [&](const pb::Outcome&, Bytes) { ++answered; });
  const auto before = answers.size();
  send(asker, next);
  run_for(reactor, 50ms);
  EXPECT_EQ(store.held(), 1u);
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 1; }));
  EXPECT_EQ(answered, 2);
  EXPECT_EQ(store.performed(), performed + 1);
}

TEST_F(RequestServerTest, WhatIsAskedWhileRecordsArePerformedWaitsAndIsNotDoneTwice) {
  server.serve();
  attach();
  server.restore(server.windows());  // the takeover begins
  const auto performed = store.performed();
  const auto before = answers.size();
  send(asker, write_request(kClient, 10, 0));  // is also a record
  send(asker, write_request(kClient, 12, 0));  // is not
  run_for(reactor, 50ms);
  EXPECT_EQ(store.performed(), performed);
  pb::Outcome outcome;
  outcome.set_count(4711);
  server.note(write_request(kClient, 10, 0), outcome, {});

  server.serve();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == before + 2; }));
  EXPECT_EQ(store.performed(), performed + 1);
  EXPECT_EQ(answers[before].head.answer().outcome().count(), 4711u);

  // This site's own mount may have asked the old owner the same.
  std::uint64_t count = 0;
  server.once(store)->execute(write_request(kClient, 10, 0), {},
                              [&](const pb::Outcome& said, Bytes) { count = said.count(); });
  EXPECT_EQ(count, 4711u);
  EXPECT_EQ(store.performed(), performed + 1);
  server.once(store)->execute(write_request(kClient, 14, 0), {}, [](const pb::Outcome&, Bytes) {});
  EXPECT_EQ(store.performed(), performed + 2);
}

// They are asked for again, as before the takeover: memory is bounded, and nothing is lost or refused. Nor
// does what comes behind them overtake them.
TEST_F(RequestServerTest, OfWhatIsAskedWhileRecordsArePerformedOnlySomeMegabytesWait) {
  server.redirect("former", 1);
  server.serve();
  attach();
  server.restore(server.windows());  // the takeover begins
  const auto performed = store.performed();
  const auto before = answers.size();
  const std::string megabyte(1 << 20, 'x');
  constexpr std::uint64_t kWrites = 80;
  for (std::uint64_t i = 0; i < kWrites; ++i)
    send(asker, write_request(kClient, 10 + 2 * i, 1 << 20), megabyte);
  send(asker, write_request(kClient, 10 + 2 * kWrites, 0));
  ASSERT_TRUE(run_until(reactor, [&] {
    return answers.size() > before && answers.back().head.moved().seq() == 10 + 2 * kWrites;
  }));
  std::vector<std::uint64_t> again;
  for (auto i = before; i < answers.size(); ++i) {
    ASSERT_TRUE(answers[i].head.has_moved()) << answers[i].head.ShortDebugString();
    EXPECT_EQ(answers[i].head.moved().owner(), "former");
    again.push_back(answers[i].head.moved().seq());
  }
  EXPECT_GT(again.size(), 10u);
  EXPECT_LT(again.size(), 40u);
  EXPECT_EQ(store.performed(), performed);

  server.serve();
  EXPECT_EQ(store.performed(), performed + kWrites + 1 - again.size());
  ++round_;
  for (const auto seq : again)
    send(asker, write_request(kClient, seq, seq == again.back() ? 0 : 1 << 20),
         seq == again.back() ? "" : megabyte);
  ASSERT_TRUE(run_until(reactor, [&] { return store.performed() == performed + kWrites + 1; }));
  EXPECT_EQ(store.most_times(), 1);
}

TEST_F(RequestServerTest, WhatIsOnItsWayBehindWhatWasSentAwayIsSentAway) {
  server.redirect("former", 1);
  server.serve();
  attach();
  const auto windows = server.windows();
  server.redirect("former", 1);
  const auto sent_away = [&](std::uint64_t seq) {
    const auto before = answers.size();
    send(asker, write_request(kClient, seq, 0));
    EXPECT_TRUE(run_until(reactor, [&] { return answers.size() > before; }));
    return answers.back().head.has_moved() && answers.back().head.moved().round() == round_;
  };
  EXPECT_TRUE(sent_away(10));
  server.restore(windows);
  server.serve();
  const auto performed = store.performed();
  EXPECT_TRUE(sent_away(12));
  EXPECT_EQ(store.performed(), performed);
  ++round_;
  EXPECT_FALSE(sent_away(10));
  EXPECT_FALSE(sent_away(12));
  EXPECT_EQ(store.performed(), performed + 2);
}

TEST_F(RequestServerTest, HeldRecordsAreAnsweredByTheOldOwnerButWaitingLocksAreNot) {
  server.serve();
  attach();
  store.hold = true;
  send(asker, write_request(kClient, 10, 0));
  auto lock = request_of(kClient, 12);
  lock.mutable_setlock()->set_wait(true);
  send(asker, lock);
  ASSERT_TRUE(run_until(reactor, [&] { return store.held() == 2; }));
  const auto before = answers.size();
  server.redirect("elsewhere", 2);
  store.release();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() > before; }));
  run_for(reactor, 50ms);
  ASSERT_EQ(answers.size(), before + 1);
  EXPECT_EQ(answers.back().head.answer().seq(), 10u);
}

}  // namespace
}  // namespace sharefs::testing
