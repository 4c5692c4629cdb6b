#include "replication/peer.h"

#include <algorithm>
#include <cerrno>
#include <iostream>
#include <map>

#include "replication/request_server.h"
#include "requests.h"
#include "sites.h"

namespace sharefs::testing {
namespace {

constexpr std::uint64_t kClient = 77;

// A site that may serve.
struct Server {
  Server(Reactor& reactor, const SiteName& name) : site(reactor, name) { wire(); }
  Server(Reactor& reactor, const SiteName& name, const CurveKeys& keys, const std::string& endpoint)
      : site(reactor, name, keys, endpoint) {
    wire();
  }
  void wire() {
    site.transport.subscribe(pb::Envelope::kAsk, [this](const SiteName& from, Message message) {
      ++asked;
      if (!lose) requests.ask(from, std::move(message));
    });
  }
  TestSite site;
  FakeStore store;
  RequestServer requests{site.transport, store};
  std::uint64_t asked = 0;
  bool lose = false;
};

class PeerTest : public ::testing::Test {
 protected:
  // Makes the Peer, owned by the first server, which knows the client.
  void start(Peer::Options options = {}, bool wait = true) {
    peer = std::make_unique<Peer>(options, me.transport, reactor);
    for (auto kind : {pb::Envelope::kAnswer, pb::Envelope::kMoved})
      me.transport.subscribe(kind, [this](const SiteName& from, Message message) {
        if (!deaf) peer->answer(from, std::move(message));
      });
    me.on_connected = [this](const SiteName& site, Gap gap) {
      if (gap != Gap::none) peer->connected(site, gap == Gap::broken);
    };
    introduce(me, one->site);
    introduce(me, two->site);
    one->requests.serve();
    two->requests.redirect("one", 1);
    peer->set_owner("one", 1);
    if (!wait) return;
    ASSERT_TRUE(run_until_connected(reactor, me, one->site));
    ASSERT_TRUE(run_until_connected(reactor, me, two->site));
    ASSERT_EQ(ask(attach_request(kClient, "me")), 0);
  }

  // Asks; what came of it is added to `answers` under its seq.
  void send(const pb::Request& request, std::string_view data = "") {
    peer->execute(request, as_bytes(data),
                  [this, seq = request.seq()](const pb::Outcome& outcome, Bytes bytes) {
                    answers.emplace_back(seq, static_cast<int>(outcome.error()));
                    answer_data = as_text(bytes);
                  });
  }
  int ask(const pb::Request& request, std::string_view data = "") {
    const auto before = answers.size();
    send(request, data);
    EXPECT_TRUE(run_until(reactor, [&] { return answers.size() > before; }));
    return answers.empty() ? -1 : answers.back().second;
  }
  bool all_answered(std::size_t count) {
    return run_until(
        reactor, [&] { return answers.size() >= count && peer->unanswered() == 0; }, 30s);
  }
  // As at a handoff: the windows go along.
  void move_ownership(Server& from, Server& to, Epoch epoch) {
    to.requests.restore(from.requests.windows());
    to.requests.serve();
    from.requests.redirect(to.site.name, epoch);
  }

  Reactor reactor;
  TestSite me{reactor, "me"};
  std::unique_ptr<Server> one = std::make_unique<Server>(reactor, "one");
  std::unique_ptr<Server> two = std::make_unique<Server>(reactor, "two");
  bool deaf = false;  // to answers
  std::unique_ptr<Peer> peer;
  std::vector<std::pair<std::uint64_t, int>> answers;
  std::string answer_data;
};

TEST_F(PeerTest, AsksTheOwner) {
  start();
  EXPECT_EQ(ask(write_request(kClient, 10, 4), "data"), 0);
  EXPECT_EQ(one->store.last_data, "data");
  one->store.data = "content";
  EXPECT_EQ(ask(read_request(kClient, 12)), 0);
  EXPECT_EQ(answer_data, "content");
  EXPECT_EQ(peer->unanswered(), 0u);
}

TEST_F(PeerTest, RequestsArePipelinedAndPerformedInOrder) {
  start();
  one->store.order.clear();
  for (std::uint64_t seq = 10; seq < 1010; ++seq) send(write_request(kClient, seq, 0));
  ASSERT_TRUE(all_answered(1001));
  EXPECT_TRUE(std::is_sorted(one->store.order.begin(), one->store.order.end()));
  EXPECT_EQ(one->store.performed(), 1000u);
}

TEST_F(PeerTest, OnlyWhatABrokenConnectionMayHaveLostIsSentAgain) {
  start();
  one->store.hold = true;
  for (std::uint64_t seq = 10; seq < 20; ++seq) send(read_request(kClient, seq));
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 10; }));
  peer->connected("one", false);
  run_for(reactor, 100ms);
  EXPECT_EQ(one->store.held(), 10u);
  peer->connected("one", true);
  EXPECT_TRUE(run_until(reactor, [&] { return one->store.held() == 20; }));
  one->store.release();
  EXPECT_TRUE(all_answered(11));
}

TEST_F(PeerTest, WhatHasNotReachedTheOwnerIsNotDoneForACallerThatWasKilled) {
  start();
  const auto cancel = [](std::uint64_t seq) {
    pb::Request request = request_of(kClient, seq + 1);
    request.mutable_cancel()->set_seq(seq);
    return request;
  };
  using Answer = std::pair<std::uint64_t, int>;
  send(write_request(kClient, 10, 0));  // on a connection that is about to break
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == 2; }));
  one->lose = true;
  send(write_request(kClient, 20, 0));
  send(cancel(20));
  one->store.hold = true;
  ASSERT_TRUE(run_until(reactor, [&] { return one->asked == 4; }));
  one->lose = false;
  peer->connected("one", true);
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == 3; }));
  EXPECT_EQ(answers.back(), Answer(20, EINTR));
  // What is under way is not given up by itself.
  send(write_request(kClient, 30, 0));
  send(cancel(30));
  peer->connected("one", true);
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 3; }));
  run_for(reactor, 50ms);
  one->store.release();
  ASSERT_TRUE(all_answered(6));
  EXPECT_EQ(answers[4], Answer(30, 0));
  // Nobody has been asked.
  one.reset();
  ASSERT_TRUE(run_until(reactor, [&] { return !me.transport.connected("one"); }));
  send(write_request(kClient, 40, 0));
  send(cancel(40));
  EXPECT_EQ(peer->unanswered(), 0u);
  EXPECT_EQ(answers[6], Answer(40, EINTR));
}

// As the old owner answers a Cancel that it held, and the new one the lock.
TEST_F(PeerTest, ALockThatIsGivenUpIsNotAskedForAnyMore) {
  start();
  std::vector<bool> given_up;
  one->site.transport.subscribe(pb::Envelope::kAsk, [&](const SiteName& from, const Message& message) {
    const auto& request = message.head.ask().request();
    if (request.has_setlock()) return given_up.push_back(request.given_up());
    pb::Envelope answer;
    answer.mutable_answer()->set_client(request.client());
    answer.mutable_answer()->set_seq(request.seq());
    answer.mutable_answer()->mutable_outcome();
    one->site.transport.send(from, Lane::requests, answer);
  });
  auto lock = request_of(kClient, 10), cancel = request_of(kClient, 11);
  lock.mutable_setlock()->set_wait(true);
  cancel.mutable_cancel()->set_seq(10);
  send(lock);
  send(cancel);
  peer->connected("one", true);  // what came of the Cancel may be known there, and nothing of the lock
  ASSERT_TRUE(run_until(reactor, [&] { return peer->unanswered() == 1 && given_up.size() == 2; }));
  peer->connected("one", true);
  ASSERT_TRUE(run_until(reactor, [&] { return given_up.size() == 3; }));
  EXPECT_EQ(given_up, (std::vector<bool>{false, true, true}));
}

TEST_F(PeerTest, ALockThatIsGivenUpIsNotAskedForWhenThisSiteBecomesTheOwner) {
  struct Local final : Executor {
    void execute(const pb::Request& request, Bytes, Reply) override {
      if (request.has_setlock()) given_up.push_back(request.given_up());
    }
    std::vector<bool> given_up;
  } local;
  start();
  one->store.hold = true;
  for (const std::uint64_t seq : {10u, 20u}) {
    auto lock = request_of(kClient, seq);
    lock.mutable_setlock()->set_wait(true);
    send(lock);
  }
  auto cancel = request_of(kClient, 21);
  cancel.mutable_cancel()->set_seq(20);
  send(cancel);
  peer->resubmit_to(local);
  EXPECT_EQ(local.given_up, (std::vector<bool>{false, true}));
}

// The answer of a change that was asked for later may be what was lost: the lock is answered first then, and
// the pages that the change made old are not dropped yet.
TEST_F(PeerTest, ALockThatIsAskedAgainTellsOfChanges) {
  const auto lock = [](std::uint64_t seq) {
    auto request = request_of(kClient, seq);
    request.mutable_setlock()->set_wait(true);
    return request;
  };
  std::map<std::uint64_t, bool> met;
  const auto granted = [&met](std::uint64_t seq) {
    return [&met, seq](const pb::Outcome& outcome, Bytes) { met[seq] = outcome.changes_met(); };
  };
  start();
  peer->execute(lock(10), {}, granted(10));
  ASSERT_TRUE(run_until(reactor, [&] { return met.contains(10); }));
  EXPECT_FALSE(met[10]);

  one->lose = true;
  peer->execute(lock(20), {}, granted(20));
  peer->execute(write_request(kClient, 21, 0), {}, [](const pb::Outcome&, Bytes) {});
  ASSERT_TRUE(run_until(reactor, [&] { return one->asked == 4; }));
  one->lose = false;
  peer->connected("one", true);
  peer->execute(lock(22), {}, granted(22));
  ASSERT_TRUE(run_until(reactor, [&] { return peer->unanswered() == 0; }));
  EXPECT_TRUE(met[20]);
  EXPECT_FALSE(met[22]);

  one->store.hold = true;
  peer->execute(lock(30), {}, granted(30));
  FakeStore local;
  peer->resubmit_to(local);
  EXPECT_TRUE(met[30]);

  two->requests.restore(one->requests.windows());
  two->requests.serve();
  peer->set_owner("two", 2);
  peer->execute_again(lock(40), {}, granted(40));
  ASSERT_TRUE(run_until(reactor, [&] { return met.contains(40); }));
  EXPECT_TRUE(met[40]);
}

TEST_F(PeerTest, WhatIsClosedBeforeItsOpenWasSentIsNotSent) {
  start();
  one->store.order.clear();
  const auto lazily = [](std::uint64_t seq) {
    pb::Request request;
    request.set_client(kClient);
    request.set_seq(seq);
    request.set_lazy(true);
    return request;
  };
  pb::Request open = lazily(10), release = lazily(11), other = lazily(12);
  open.mutable_open()->set_handle(7);
  release.mutable_release()->set_handle(7);
  other.mutable_release()->set_handle(8);
  send(open);
  send(other);
  send(release);
  EXPECT_EQ(answers.size(), 3u) << "attached, opened, released";
  ASSERT_TRUE(all_answered(4));
  EXPECT_EQ(one->store.order, std::vector<std::uint64_t>{12});

  open.set_seq(13);
  release.set_seq(15);
  send(open);
  send(write_request(kClient, 14, 0));  // takes the other one along
  send(release);
  ASSERT_TRUE(all_answered(7));
  EXPECT_EQ(one->store.order, (std::vector<std::uint64_t>{12, 13, 14, 15}));
}

TEST_F(PeerTest, WhatIsAskedBeforeTheConnectionIsSentWhenItIsThere) {
  start({}, false);
  send(attach_request(kClient, "me"));
  for (std::uint64_t seq = 10; seq < 20; ++seq) send(write_request(kClient, seq, 0));
  ASSERT_TRUE(all_answered(11));
  EXPECT_EQ(one->store.most_times(), 1);
  EXPECT_TRUE(std::is_sorted(one->store.order.begin() + 1, one->store.order.end()));
}

TEST_F(PeerTest, AnOwnerThatIsRestartedIsAskedAgainAndTheClientAttachedAgain) {
  start();
  one->store.hold = true;
  for (std::uint64_t seq = 10; seq < 20; ++seq) send(write_request(kClient, seq, 4), "data");
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 10; }));
  const auto keys = one->site.keys;
  const auto endpoint = one->site.transport.endpoint();
  one.reset();
  run_for(reactor, 100ms);
  EXPECT_EQ(answers.size(), 1u);

  one = std::make_unique<Server>(reactor, "one", keys, endpoint);
  one->site.knows(me);
  one->requests.serve();
  ASSERT_TRUE(all_answered(11));
  EXPECT_EQ(one->store.most_times(), 1);
  EXPECT_EQ(one->store.performed(), 11u);  // the Attach before
  EXPECT_TRUE(std::is_sorted(one->store.order.begin() + 1, one->store.order.end()));
  for (const auto& [seq, error] : answers) EXPECT_EQ(error, 0);
}

// It is attached again after the takeover, too, when what attaches it found no place to wait there.
TEST_F(PeerTest, AClientIsAttachedAgainByARestartedOwnerThatCanKeepNoMoreUntilItServes) {
  start();
  const std::string data(1 << 20, 'w');
  one->store.hold = true;
  send(read_request(kClient, 10));
  for (std::uint64_t seq = 11; seq < 81; ++seq)
    send(write_request(kClient, seq, static_cast<std::uint32_t>(data.size())), data);
  const auto keys = one->site.keys;
  const auto endpoint = one->site.transport.endpoint();
  one.reset();

  one = std::make_unique<Server>(reactor, "one", keys, endpoint);
  one->site.knows(me);
  one->requests.restore({});
  ASSERT_TRUE(run_until(reactor, [&] { return one->asked > 100; }));  // more than once
  one->requests.serve();
  ASSERT_TRUE(all_answered(72));
  EXPECT_EQ(one->store.most_times(), 1);
  for (const auto& [seq, error] : answers) EXPECT_EQ(error, 0) << seq;
}

TEST_F(PeerTest, AnInterruptedConnectionDoublesNothing) {
  start();
  // The link is broken and made again, again and again, while requests are under way.
  std::uint64_t seq = 10;
  for (int round = 0; round < 5; ++round) {
    for (int i = 0; i < 200; ++i) send(write_request(kClient, ++seq, 0));
    me.transport.add_site("one", "", one->site.keys.public_key);
    one->site.transport.add_site("me", "", me.keys.public_key);
    run_for(reactor, 20ms);
    introduce(me, one->site);
    run_for(reactor, 100ms);
  }
  ASSERT_TRUE(all_answered(1001));
  EXPECT_EQ(one->store.most_times(), 1);
  EXPECT_EQ(answers.size(), 1001u);
  for (const auto& [number, error] : answers) EXPECT_EQ(error, 0);
}

TEST_F(PeerTest, AMovedOwnerIsFollowedAndNothingIsDoneTwice) {
  start();
  SiteName told;
  peer->on_moved([&](const SiteName& owner, Epoch) { told = owner; });
  for (std::uint64_t seq = 10; seq < 510; ++seq) send(write_request(kClient, seq, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() > 50; }));
  move_ownership(*one, *two, 2);
  for (std::uint64_t seq = 510; seq < 1010; ++seq) send(write_request(kClient, seq, 0));
  ASSERT_TRUE(all_answered(1001));
  EXPECT_EQ(told, "two");
  EXPECT_EQ(answers.size(), 1001u);
  auto times = one->store.times;
  for (const auto& [key, count] : two->store.times) times[key] += count;
  EXPECT_EQ(times.size(), 1001u);
  EXPECT_TRUE(std::all_of(times.begin(), times.end(), [](const auto& entry) { return entry.second == 1; }));
  // Sent again once for the one change of owner, not for every «moved».
  EXPECT_LE(two->asked, 1001u);
}

// What gives up a lock, or cancels the wait for it, would come before the lock.
TEST_F(PeerTest, NothingOvertakesWhatAnOwnerThatIsNotReadyHasSentAway) {
  start();
  one->store.order.clear();
  std::uint64_t seq = 10;
  for (int round = 0; round < 30; ++round) {
    const auto windows = one->requests.windows();
    one->requests.redirect("two", 0);
    const auto asked = one->asked;
    send(write_request(kClient, seq++, 0));
    ASSERT_TRUE(run_until(reactor, [&] { return one->asked > asked; }));
    if (round % 2 > 0) run_for(reactor, 1ms);
    one->requests.restore(windows);
    one->requests.serve();
    for (int i = 0; i < 3; ++i) send(write_request(kClient, seq++, 0));
    ASSERT_TRUE(all_answered(static_cast<std::size_t>(seq - 10) + 1));
  }
  EXPECT_EQ(one->store.performed(), seq - 10);
  EXPECT_EQ(one->store.most_times(), 1);
  EXPECT_TRUE(std::is_sorted(one->store.order.begin(), one->store.order.end()));
}

// The same of an owner that has forgotten the client: what is asked between two of its answers is behind
// both.
TEST_F(PeerTest, NothingOvertakesWhatAnOwnerThatIsAnotherProcessHasSentAway) {
  start();
  one->store.order.clear();
  std::vector<Message> moved;
  me.transport.subscribe(pb::Envelope::kMoved,
                         [&](const SiteName&, Message message) { moved.push_back(std::move(message)); });
  one->requests.expire("me");
  send(write_request(kClient, 10, 0));
  send(write_request(kClient, 12, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return moved.size() == 2; }));
  peer->answer("one", moved[0]);
  send(write_request(kClient, 14, 0));
  peer->answer("one", moved[1]);
  ASSERT_TRUE(all_answered(4));
  EXPECT_EQ(one->store.most_times(), 1);
  EXPECT_TRUE(std::is_sorted(one->store.order.begin() + 1, one->store.order.end())) << "the Attach is first";
}

TEST_F(PeerTest, TheOldOwnerMayAnswerWhatItHeld) {
  start();
  one->store.hold = true;
  send(write_request(kClient, 10, 0));
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 1; }));
  two->requests.restore(one->requests.windows());  // performs records: its own answers wait
  one->requests.redirect("two", 2);
  peer->set_owner("two", 2);
  run_for(reactor, 50ms);
  EXPECT_EQ(answers.size(), 1u);
  one->store.release();
  EXPECT_TRUE(all_answered(2));
}

TEST_F(PeerTest, AnOwnerThatHasNotTakenOverYetIsAskedUntilItHas) {
  start();
  two->requests.redirect("one", 1);
  peer->set_owner("two", 2);
  send(write_request(kClient, 10, 0));
  run_for(reactor, 100ms);
  EXPECT_EQ(answers.size(), 1u);
  move_ownership(*one, *two, 2);
  EXPECT_TRUE(all_answered(2));
  EXPECT_EQ(two->store.performed(), 1u);
}

TEST_F(PeerTest, AnOlderEpochIsIgnored) {
  start();
  peer->set_owner("two", 0);
  peer->set_owner("two", 1);
  EXPECT_EQ(ask(write_request(kClient, 10, 0)), 0);
  EXPECT_EQ(one->store.performed(), 2u);
}

TEST_F(PeerTest, RequestsTimeOutWhenTheOwnerIsUnreachable) {
  start({.timeout = 200ms});
  one.reset();
  ASSERT_TRUE(run_until(reactor, [&] { return !me.transport.connected("one"); }));
  const auto start = Reactor::Clock::now();
  EXPECT_EQ(ask(write_request(kClient, 10, 0)), ETIMEDOUT);
  EXPECT_GE(Reactor::Clock::now() - start, 200ms);
  EXPECT_EQ(peer->unanswered(), 0u);
}

TEST_F(PeerTest, WhatIsOpenedTooLateIsClosed) {
  start({.timeout = 100ms});
  one->store.hold = true;
  auto open = request_of(kClient, 10);
  open.mutable_open()->set_handle(7);
  EXPECT_EQ(ask(open), ETIMEDOUT);
  auto create = request_of(kClient, 11);
  create.mutable_create()->set_handle(8);
  EXPECT_EQ(ask(create), ETIMEDOUT);
  one->store.order.clear();
  one->store.release();
  one->store.hold = false;
  ASSERT_TRUE(all_answered(3));
  EXPECT_EQ(one->store.performed(), 4u) << "two that open, two that close";
  EXPECT_EQ(answers.size(), 3u);
}

TEST_F(PeerTest, WhatIsOpenedTooLateIsClosedThoughTheAnswerWasLost) {
  start({.timeout = 100ms});
  one->store.hold = true;
  auto open = request_of(kClient, 10);
  open.mutable_open()->set_handle(7);
  EXPECT_EQ(ask(open), ETIMEDOUT);
  one->store.hold = false;
  deaf = true;
  one->store.release();
  run_for(reactor, 50ms);
  deaf = false;
  auto later = write_request(kClient, 12, 0);
  later.set_answered_below(12);
  EXPECT_EQ(ask(later), 0);
  peer->connected("one", true);
  ASSERT_TRUE(run_until(reactor, [&] { return peer->unanswered() == 0; }));
  EXPECT_EQ(one->store.performed(), 4u) << "what attaches, opens, came later, and closes";
}

TEST_F(PeerTest, WhatIsOpenedTooLateIsClosedWhereThisSiteTakesOver) {
  start({.timeout = 100ms});
  one->store.hold = true;
  auto open = request_of(kClient, 10);
  open.mutable_open()->set_handle(7);
  EXPECT_EQ(ask(open), ETIMEDOUT);
  FakeStore local;
  peer->resubmit_to(local);
  EXPECT_EQ(local.performed(), 2u) << "what opens, and what closes";
  EXPECT_EQ(peer->unanswered(), 0u);
}

TEST_F(PeerTest, WhatIsOpenedTooLateIsNotAskedForAgain) {
  start({.timeout = 100ms});
  one->lose = true;
  auto open = request_of(kClient, 10);
  open.mutable_open()->set_handle(7);
  EXPECT_EQ(ask(open), ETIMEDOUT);
  one->lose = false;
  const auto before = one->store.performed();
  peer->connected("one", true);
  ASSERT_TRUE(all_answered(2));
  EXPECT_EQ(one->store.performed(), before);
}

TEST_F(PeerTest, WaitingForALockOfAConnectedOwnerDoesNotTimeOut) {
  start({.timeout = 100ms});
  one->store.hold = true;
  auto lock = request_of(kClient, 10);
  lock.mutable_setlock()->set_wait(true);
  send(lock);
  EXPECT_EQ(ask(write_request(kClient, 12, 0)), ETIMEDOUT);
  run_for(reactor, 200ms);
  EXPECT_EQ(peer->unanswered(), 1u);
  one->store.release();
  EXPECT_TRUE(all_answered(3));
  EXPECT_EQ(answers.back(), (std::pair<std::uint64_t, int>(10, 0)));
}

// It would be granted to nobody, some time after its file was closed.
TEST_F(PeerTest, ALockThatWaitsAtAnOwnerWhichIsOutOfReachIsCancelledThere) {
  start({.timeout = 100ms});
  const auto keys = one->site.keys;
  const auto endpoint = one->site.transport.endpoint();
  one->store.hold = true;
  auto lock = request_of(kClient, 10);
  lock.mutable_setlock()->set_wait(true);
  lock.mutable_setlock()->mutable_range()->set_type(pb::LockRange::EXCLUSIVE);
  send(lock);
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 1; }));
  one.reset();
  ASSERT_TRUE(run_until(reactor, [&] { return answers.size() == 2; }));
  EXPECT_EQ(answers.back(), (std::pair<std::uint64_t, int>(10, ETIMEDOUT)));
  EXPECT_EQ(peer->unanswered(), 1u) << "the Cancel";

  one = std::make_unique<Server>(reactor, "one", keys, endpoint);
  std::vector<std::uint64_t> cancelled;
  one->site.transport.subscribe(pb::Envelope::kAsk, [&](const SiteName&, const Message& message) {
    const auto& request = message.head.ask().request();
    EXPECT_FALSE(request.has_setlock());
    if (request.has_cancel()) cancelled.push_back(request.cancel().seq());
  });
  one->site.knows(me);
  ASSERT_TRUE(run_until(reactor, [&] { return !cancelled.empty(); }));
  EXPECT_EQ(cancelled, (std::vector<std::uint64_t>{10}));
}

// The kernel asks for it as for a lock, waiting.
TEST_F(PeerTest, GivingUpALockDoesNotTimeOut) {
  start({.timeout = 100ms});
  one->store.hold = true;
  auto unlock = request_of(kClient, 10);
  unlock.mutable_setlock()->set_wait(true);
  unlock.mutable_setlock()->set_flock(true);
  unlock.mutable_setlock()->mutable_range()->set_type(pb::LockRange::UNLOCKED);
  send(unlock);
  EXPECT_EQ(ask(write_request(kClient, 12, 0)), ETIMEDOUT);  // the owner is looked at meanwhile
  one.reset();
  ASSERT_TRUE(run_until(reactor, [&] { return !me.transport.connected("one"); }));
  run_for(reactor, 300ms);
  EXPECT_EQ(peer->unanswered(), 1u);
}

TEST_F(PeerTest, QueriesAndWritebacksAreHandedOverBeforeTheRecordsArePerformed) {
  start();
  one->store.hold = true;
  send(write_request(kClient, 10, 4), "mine");
  send(read_request(kClient, 11));
  auto writeback = write_request(kClient, 12, 4);
  writeback.mutable_write()->set_writeback(true);
  send(writeback, "page");
  FakeStore local;
  peer->resubmit_urgent_to(local);
  EXPECT_EQ(local.order, (std::vector<std::uint64_t>{11, 12}));
  EXPECT_EQ(local.last_data, "page");
  EXPECT_EQ(peer->unanswered(), 1u);
  peer->resubmit_to(local);
  EXPECT_EQ(local.order, (std::vector<std::uint64_t>{11, 12, 10}));
  EXPECT_EQ(answers.size(), 4u);
}

TEST_F(PeerTest, UnansweredRequestsAreHandedToThisSiteWhenItTakesOver) {
  start();
  one->store.hold = true;
  for (std::uint64_t seq = 10; seq < 20; ++seq) send(write_request(kClient, seq, 4), "mine");
  FakeStore local;
  peer->resubmit_to(local);
  EXPECT_EQ(local.performed(), 10u);
  EXPECT_TRUE(std::is_sorted(local.order.begin(), local.order.end()));
  EXPECT_EQ(local.last_data, "mine");
  EXPECT_EQ(answers.size(), 11u);
  ASSERT_TRUE(run_until(reactor, [&] { return one->store.held() == 10; }));
  one->store.release();
  run_for(reactor, 50ms);
  EXPECT_EQ(answers.size(), 11u);  // late second answers

  peer->set_owner("two", 2);
  move_ownership(*one, *two, 2);
  EXPECT_EQ(ask(write_request(kClient, 30, 0)), 0);
  EXPECT_EQ(two->store.performed(), 1u);
}

TEST_F(PeerTest, ASiteThatWasNotAskedCannotAnswer) {
  start();
  one->store.hold = true;
  send(write_request(kClient, 10, 0));
  pb::Envelope forged;
  forged.mutable_answer()->set_client(kClient);
  forged.mutable_answer()->set_seq(10);
  two->site.transport.send("me", Lane::requests, forged);
  pb::Envelope moved;
  moved.mutable_moved()->set_client(kClient);
  moved.mutable_moved()->set_seq(10);
  moved.mutable_moved()->set_owner("two");
  moved.mutable_moved()->set_epoch(99);
  two->site.transport.send("me", Lane::requests, moved);
  run_for(reactor, 100ms);
  EXPECT_EQ(peer->unanswered(), 1u);
  one->store.release();
  EXPECT_TRUE(all_answered(2));
}

TEST_F(PeerTest, ThroughputOfPipelinedRequestsAndLatencyOfSingleOnes) {
  start();
  constexpr std::uint64_t kRequests = 20'000;
  constexpr std::uint64_t kUnderWay = 256;
  std::uint64_t sent = 0, done = 0;
  const auto next = [&](auto& self) -> void {
    auto request = request_of(kClient, 100 + sent++);
    request.mutable_getattr()->set_id(1);
    peer->execute(request, {}, [&](const pb::Outcome&, Bytes) {
      ++done;
      if (sent < kRequests) self(self);
    });
  };
  one->store.times.clear();
  const auto begin = Reactor::Clock::now();
  for (std::uint64_t i = 0; i < kUnderWay; ++i) next(next);
  ASSERT_TRUE(run_until(
      reactor, [&] { return done == kRequests; }, 120s));
  const std::chrono::duration<double> took = Reactor::Clock::now() - begin;
  std::cout << kRequests << " pipelined requests: " << static_cast<double>(kRequests) / took.count()
            << "/s\n";

  std::vector<double> round_trips;
  for (std::uint64_t seq = 1'000'000; seq < 1'002'000; ++seq) {
    auto request = request_of(kClient, seq);
    request.mutable_getattr()->set_id(1);
    const auto asked = Reactor::Clock::now();
    peer->execute(request, {}, [&](const pb::Outcome&, Bytes) {
      round_trips.push_back(std::chrono::duration<double, std::micro>(Reactor::Clock::now() - asked).count());
      reactor.stop();
    });
    reactor.run();
  }
  std::sort(round_trips.begin(), round_trips.end());
  std::cout << "one at a time: median " << round_trips[round_trips.size() / 2] << " us, 99 % "
            << round_trips[round_trips.size() * 99 / 100] << " us\n";
}

}  // namespace
}  // namespace sharefs::testing
