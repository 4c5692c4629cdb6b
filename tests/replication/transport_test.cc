#include "replication/transport.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <thread>

#include "fs/inode_table.h"
#include "relay.h"
#include "replication/link.h"
#include "sites.h"

namespace sharefs::testing {
namespace {

pb::Envelope command(std::uint64_t number, const std::string& text = "") {
  pb::Envelope envelope;
  envelope.mutable_command()->set_number(number);
  envelope.mutable_command()->set_text(text);
  return envelope;
}

// Where somebody may be made to connect to.
class Listener {
 public:
  Listener() {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    if (::bind(fd_.get(), generic, size) != 0 || ::listen(fd_.get(), 8) != 0 ||
        ::getsockname(fd_.get(), generic, &size) != 0)
      throw std::runtime_error("no port to listen on");
    endpoint_ = "tcp://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }
  const std::string& endpoint() const { return endpoint_; }
  bool called() const {
    pollfd waiting{.fd = fd_.get(), .events = POLLIN, .revents = 0};
    return ::poll(&waiting, 1, 0) == 1;
  }

 private:
  UniqueFd fd_{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  std::string endpoint_;
};

class TransportTest : public ::testing::Test {
 protected:
  void connect_two() {
    introduce(a, b);
    ASSERT_TRUE(run_until_connected(reactor, a, b));
  }
  // What `b` receives as Command.
  void collect() {
    b.transport.subscribe(pb::Envelope::kCommand, [this](const SiteName& from, Message message) {
      senders.push_back(from);
      received.push_back(std::move(message));
    });
  }

  Reactor reactor;
  TestSite a{reactor, "a"};
  TestSite b{reactor, "b"};
  std::vector<SiteName> senders;
  std::vector<Message> received;
};

TEST_F(TransportTest, MessagesArriveInOrderWithTheirPartsAndTheSendersName) {
  connect_two();
  collect();
  const std::string big(1 << 20, 'x');
  for (std::uint64_t i = 0; i < 100; ++i) {
    std::vector<zmq::message_t> parts;
    parts.push_back(copy_to_message(as_bytes(i % 10 == 0 ? big : std::to_string(i))));
    a.transport.send("b", Lane::requests, command(i), std::move(parts));
  }
  ASSERT_TRUE(run_until(reactor, [&] { return received.size() == 100; }));
  for (std::uint64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(senders[i], "a");
    EXPECT_EQ(received[i].head.command().number(), i);
    ASSERT_EQ(received[i].parts.size(), 1u);
    EXPECT_EQ(received[i].parts[0].to_string_view(), i % 10 == 0 ? big : std::to_string(i));
  }
}

TEST_F(TransportTest, BothLanesWorkAndTheRoundTripIsMeasured) {
  connect_two();
  collect();
  a.transport.send("b", Lane::bulk, command(1));
  a.transport.send("b", Lane::requests, command(2));
  ASSERT_TRUE(run_until(reactor, [&] { return received.size() == 2; }));
  EXPECT_GT(a.transport.round_trip("b"), 0us);
  EXPECT_LT(a.transport.round_trip("b"), 1s);
  EXPECT_EQ(a.transport.round_trip("nobody"), 0us);
}

TEST_F(TransportTest, ConnectedIsToldOncePerConnection) {
  connect_two();
  run_for(reactor, 700ms);
  EXPECT_GE(a.connected["b"], 1);
  EXPECT_LE(a.connected["b"], 2);  // the Hello of each side may cross
  EXPECT_EQ(a.lost["b"], 0);
}

TEST_F(TransportTest, AHelloSentAgainIsToldAgainWithItsNews) {
  connect_two();
  run_for(reactor, 100ms);
  const int before = b.connected["a"];
  pb::Envelope news;
  news.mutable_hello()->set_version(kProtocolVersion);
  a.transport.send("b", Lane::requests, news);
  EXPECT_TRUE(run_until(reactor, [&] { return b.connected["a"] > before; }));
}

TEST_F(TransportTest, NothingIsSentToASiteThatIsNotConnected) {
  a.transport.add_site("b", "tcp://127.0.0.1:1", b.keys.public_key);
  a.transport.send("b", Lane::requests, command(1));
  a.transport.send("nobody", Lane::requests, command(1));
  EXPECT_EQ(a.transport.counters().undeliverable, 2u);
  EXPECT_FALSE(a.transport.connected("b"));
}

TEST_F(TransportTest, ASiteThatComesBackOnItsPortIsConnectedAgain) {
  auto c = std::make_unique<TestSite>(reactor, "c");
  const auto keys = c->keys;
  const auto endpoint = c->transport.endpoint();
  introduce(a, *c);
  ASSERT_TRUE(run_until_connected(reactor, a, *c));
  c.reset();
  ASSERT_TRUE(run_until(reactor, [&] { return !a.transport.connected("c"); }));
  ASSERT_TRUE(run_until(reactor, [&] { return a.lost["c"] == 1; }));
  const int before = a.connected["c"];

  c = std::make_unique<TestSite>(reactor, "c", keys, endpoint);
  c->knows(a);
  ASSERT_TRUE(run_until_connected(reactor, a, *c));
  EXPECT_GT(a.connected["c"], before);
  EXPECT_EQ(a.lost["c"], 1);
}

TEST_F(TransportTest, AStrangersKeyIsRefusedUntilItIsRegistered) {
  a.knows(b);  // but b does not know a
  ASSERT_TRUE(run_until(reactor, [&] { return b.transport.counters().refused > 0; }));
  EXPECT_FALSE(a.transport.connected("b"));
  b.knows(a);
  EXPECT_TRUE(run_until_connected(reactor, a, b));
}

TEST_F(TransportTest, ARemovedSiteIsNotHeardAnyMoreThoughItAskedForItItself) {
  connect_two();
  int asked = 0;
  a.transport.subscribe(pb::Envelope::kCommand, [&](const SiteName& from, const Message&) {
    ++asked;
    a.transport.send(from, Lane::requests, command(7));
    a.transport.remove_site(from);
  });
  collect();  // at b
  b.transport.send("a", Lane::requests, command(1));
  ASSERT_TRUE(run_until(reactor, [&] { return asked == 1; }));
  EXPECT_FALSE(a.transport.connected("b"));
  EXPECT_TRUE(run_until(reactor, [&] { return received.size() == 1; })) << "its answer was under way";
  b.transport.send("a", Lane::requests, command(2));
  EXPECT_TRUE(run_until(reactor, [&] { return a.transport.counters().malformed > 0; }));
  run_for(reactor, 1200ms);  // its connection is closed
  EXPECT_EQ(asked, 1);
  EXPECT_TRUE(run_until(reactor, [&] { return !b.transport.connected("a"); }));
}

TEST_F(TransportTest, ASiteThatIsRemovedAfterAnotherHasTimeForItsLastMessagesToo) {
  TestSite c(reactor, "c");
  introduce(a, c);
  Relay to_b(b.transport.endpoint());
  a.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.knows(a);
  ASSERT_TRUE(run_until_connected(reactor, a, b));
  ASSERT_TRUE(run_until_connected(reactor, a, c));
  collect();
  a.transport.remove_site("c");
  run_for(reactor, 700ms);
  to_b.hold(true);
  constexpr std::uint64_t kMessages = 8;  // more than TCP takes
  for (std::uint64_t i = 0; i < kMessages; ++i)
    a.transport.send("b", Lane::requests, command(i), copy_to_parts(as_bytes(std::string(1 << 20, 'x'))));
  a.transport.remove_site("b");
  run_for(reactor, 400ms);
  EXPECT_LT(received.size(), kMessages);
  to_b.hold(false);
  EXPECT_TRUE(run_until(reactor, [&] { return received.size() == kMessages; })) << received.size();
}

// Its reactor is busy while the connection breaks and is made again.
TEST_F(TransportTest, WhatIsSentBeforeAnotherConnectionIsNoticedIsLostWithWhatWasSentBefore) {
  Reactor busy;
  TestSite c(busy, "c");
  Relay to_b(b.transport.endpoint());
  c.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.knows(c);
  const auto both = [&](const std::function<bool()>& done) {
    for (int i = 0; i < 1000 && !done(); ++i) {
      run_for(busy, 5ms);
      run_for(reactor, 5ms);
    }
    return done();
  };
  ASSERT_TRUE(both([&] { return c.transport.connected("b") && b.transport.connected("c"); }));
  both([&, i = 0]() mutable { return ++i > 50; });
  collect();
  const int before = b.broken["c"];
  std::map<std::uint64_t, int> broken_by;  // by message
  b.transport.subscribe(pb::Envelope::kCommand, [&](const SiteName&, const Message& message) {
    broken_by[message.head.command().number()] = b.broken["c"];
  });
  to_b.break_existing();
  c.transport.send("b", Lane::requests, command(1));  // on a connection that is no more
  run_for(reactor, 1s);
  c.transport.send("b", Lane::requests, command(2));
  both([&, i = 0]() mutable { return ++i > 100; });
  c.transport.send("b", Lane::requests, command(3));
  ASSERT_TRUE(both([&] { return broken_by.contains(3); }));
  EXPECT_EQ(broken_by.size(), 1u) << "the one overtakes the other when that is sent again";
  EXPECT_GT(broken_by.at(3), before);
}

TEST_F(TransportTest, TheSenderIsWhoseKeyItIsWhateverItSays) {
  // «mallory» is registered at b under her own key and calls herself «a».
  TestSite mallory(reactor, "a");
  b.transport.add_site("mallory", mallory.transport.endpoint(), mallory.keys.public_key);
  mallory.knows(b);
  ASSERT_TRUE(run_until(reactor, [&] { return mallory.transport.connected("b"); }));
  collect();
  mallory.transport.send("b", Lane::requests, command(1));
  ASSERT_TRUE(run_until(reactor, [&] { return !senders.empty(); }));
  EXPECT_EQ(senders[0], "mallory");
}

TEST_F(TransportTest, AnotherMajorVersionIsNotConnected) {
  a.transport.set_hello([] {
    pb::Hello hello;
    hello.set_version(kProtocolVersion + 1000);
    return hello;
  });
  introduce(a, b);
  run_for(reactor, 500ms);
  EXPECT_FALSE(b.transport.connected("a"));
  EXPECT_FALSE(a.transport.connected("b"));
  EXPECT_EQ(b.connected["a"], 0);
}

TEST_F(TransportTest, AnotherDataSetIsNotConnected) {
  const auto hello_of = [](std::uint64_t data_set) {
    return [data_set] {
      pb::Hello hello;
      hello.set_data_set(data_set);
      return hello;
    };
  };
  a.transport.set_hello(hello_of(1));
  b.transport.set_hello(hello_of(2));
  introduce(a, b);
  run_for(reactor, 500ms);
  EXPECT_FALSE(a.transport.connected("b"));
  EXPECT_FALSE(b.transport.connected("a"));
}

TEST_F(TransportTest, WhatAHandlerThrowsCostsOnlyThatMessage) {
  connect_two();
  int handled = 0;
  b.transport.subscribe(pb::Envelope::kCommand, [&](const SiteName&, const Message&) {
    if (++handled == 1) throw std::runtime_error("of no use");
  });
  a.transport.send("b", Lane::requests, command(1));
  a.transport.send("b", Lane::requests, command(2));
  EXPECT_TRUE(run_until(reactor, [&] { return handled == 2; }));
  EXPECT_EQ(b.transport.counters().malformed, 1u);
}

TEST_F(TransportTest, BadNamesEndpointsAndKeysAreRefused) {
  const auto& key = b.keys.public_key;
  EXPECT_THROW(a.transport.add_site("", "tcp://127.0.0.1:1", key), std::runtime_error);
  EXPECT_THROW(a.transport.add_site("invite:x", "tcp://127.0.0.1:1", key), std::runtime_error);
  EXPECT_THROW(a.transport.add_site("b", "ipc:///tmp/x", key), std::runtime_error);
  EXPECT_THROW(a.transport.add_site("b", "tcp://", key), std::runtime_error);
  EXPECT_THROW(a.transport.add_site("b", "tcp://127.0.0.1:1", "short"), std::runtime_error);
  EXPECT_THROW(a.transport.add_site("b", "tcp://127.0.0.1:1", a.keys.public_key), std::runtime_error);
  a.transport.add_site("b", "tcp://127.0.0.1:1", key);
  EXPECT_THROW(a.transport.add_site("c", "tcp://127.0.0.1:1", key), std::runtime_error);
  a.transport.add_site("a", "tcp://127.0.0.1:1", key);  // itself: ignored
  EXPECT_THROW(a.transport.admit_invitation("short"), std::runtime_error);
}

TEST_F(TransportTest, AnAddressInUseIsReported) {
  EXPECT_THROW(TestSite(reactor, "c", make_curve_keys(), a.transport.endpoint()), std::runtime_error);
}

TEST_F(TransportTest, ASiteMovesToAnotherEndpoint) {
  connect_two();
  TestSite moved(reactor, "b", b.keys);
  moved.knows(a);
  a.transport.add_site("b", moved.transport.endpoint(), moved.keys.public_key);
  EXPECT_FALSE(a.transport.connected("b"));
  EXPECT_TRUE(run_until(reactor, [&] { return a.transport.connected("b"); }));
}

// Or a site could have others connect to whatever hosts it likes, as fast as it can name them.
TEST_F(TransportTest, ASiteMovesOnceASecond) {
  const Listener first, second, third;
  connect_two();
  const auto began = Reactor::Clock::now();
  std::string endpoint;
  b.transport.set_hello([&] {
    pb::Hello hello;
    hello.set_endpoint(endpoint);
    return hello;
  });
  for (const auto* listener : {&first, &second, &third}) {
    endpoint = listener->endpoint();
    b.transport.greet_all();
    run_for(reactor, 100ms);
  }
  const bool within_a_second = Reactor::Clock::now() - began < 1s;  // not on a busy machine
  EXPECT_TRUE(run_until(reactor, [&] { return first.called(); }));
  ASSERT_TRUE(run_until(reactor, [&] { return third.called(); }))
      << "the newest address is followed in the end";
  if (within_a_second) {
    EXPECT_FALSE(second.called());
  }
}

TEST(LivenessTest, ItIsKnownSinceWhenAMessageHasArrived) {
  using std::chrono::seconds;
  Liveness liveness;
  const auto start = Reactor::Clock::now();
  const auto at = [&](int second) { return start + seconds(second); };
  EXPECT_FALSE(liveness.arrived(at(1), at(3)));
  liveness.pong(at(0), at(3));
  EXPECT_FALSE(liveness.arrived(at(1), at(3))) << "this ping was before it";
  liveness.pong(at(2), at(5));
  liveness.pong(at(4), at(6));
  EXPECT_EQ(liveness.arrived(at(1), at(9)), seconds(4)) << "the first ping behind it counts";
  EXPECT_EQ(liveness.arrived(at(4), at(9)), seconds(3));
  for (int second = 7; second < 60; ++second) liveness.pong(at(second), at(second));
  EXPECT_GT(liveness.arrived(at(1), at(60)), Liveness::kRemembered);
  EXPECT_EQ(liveness.arrived(at(57), at(60)), seconds(3));
  liveness.doubt(at(60));
  EXPECT_FALSE(liveness.arrived(at(57), at(60))) << "it is sent again over the next connection";
}

TEST_F(TransportTest, ANetworkThatSwallowsEverythingIsNoticedAndGottenOver) {
  Relay to_b(b.transport.endpoint()), to_a(a.transport.endpoint());
  a.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.transport.add_site("a", to_a.endpoint(), a.keys.public_key);
  ASSERT_TRUE(run_until_connected(reactor, a, b));
  const auto cut = Reactor::Clock::now();
  to_a.hold(true);
  to_b.hold(true);
  ASSERT_TRUE(run_until(reactor, [&] { return a.lost["b"] == 1 && b.lost["a"] == 1; }));
  EXPECT_GT(Reactor::Clock::now() - cut, kLiveness - kPingInterval);
  EXPECT_LT(Reactor::Clock::now() - cut, kLiveness + 4 * kPingInterval);
  EXPECT_FALSE(a.transport.connected("b"));
  to_a.hold(false);
  to_b.hold(false);
  EXPECT_TRUE(run_until_connected(reactor, a, b));
  EXPECT_EQ(a.lost["b"], 1);
}

TEST_F(TransportTest, AConnectionThatStaysDeadIsReplaced) {
  Relay to_b(b.transport.endpoint()), to_a(a.transport.endpoint());
  a.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.transport.add_site("a", to_a.endpoint(), a.keys.public_key);
  ASSERT_TRUE(run_until_connected(reactor, a, b));
  to_a.swallow_existing();
  to_b.swallow_existing();
  ASSERT_TRUE(run_until(reactor, [&] { return a.lost["b"] == 1 && b.lost["a"] == 1; }));
  EXPECT_TRUE(run_until_connected(reactor, a, b));
}

TEST_F(TransportTest, AConnectionThatIsDeadInOneDirectionIsReplaced) {
  Relay to_b(b.transport.endpoint());
  a.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.transport.add_site("a", a.transport.endpoint(), a.keys.public_key);
  ASSERT_TRUE(run_until_connected(reactor, a, b));
  int arrived = 0;
  b.transport.subscribe(pb::Envelope::kRecallDone, [&](const SiteName&, Message) { ++arrived; });
  to_b.swallow_existing();
  EXPECT_TRUE(run_until(reactor, [&] {
    pb::Envelope envelope;
    envelope.mutable_recall_done();
    a.transport.send("b", Lane::requests, envelope);
    return arrived > 0;
  })) << "b is heard all the time, but hears nothing";
}

// A message takes longer than a site may be silent, and pings wait behind it: whose bytes arrive is heard.
TEST_F(TransportTest, AConnectionThatIsSlowIsNeitherReplacedNorTakenForSilent) {
  Relay to_b(b.transport.endpoint());
  a.transport.add_site("b", to_b.endpoint(), b.keys.public_key);
  b.transport.add_site("a", a.transport.endpoint(), a.keys.public_key);
  ASSERT_TRUE(run_until_connected(reactor, a, b));
  run_for(reactor, 300ms);
  collect();
  const std::map<SiteName, int> broken_before{{"a", b.broken["a"]}, {"b", a.broken["b"]}};
  to_b.limit(200 << 10);
  for (std::uint64_t i = 0; i < 2; ++i)
    a.transport.send("b", Lane::requests, command(i), copy_to_parts(as_bytes(std::string(1 << 20, 'x'))));
  EXPECT_TRUE(run_until(
      reactor, [&] { return received.size() == 2; }, 20s));
  EXPECT_EQ(b.lost["a"], 0);
  EXPECT_EQ(a.lost["b"], 0);
  to_b.limit(0);
  EXPECT_TRUE(run_until_connected(reactor, a, b));
  run_for(reactor, 500ms);
  EXPECT_EQ(received.size(), 2u);
  EXPECT_EQ(b.broken["a"], broken_before.at("a"));
  EXPECT_EQ(a.broken["b"], broken_before.at("b"));
}

// ---- invitations

class InvitationTest : public TransportTest {
 protected:
  InvitationTest() {
    a.transport.admit_invitation(invitation.public_key);
    a.transport.on_join([this](const std::string& route, const std::string& key, const pb::Join& join) {
      EXPECT_EQ(key, invitation.public_key);
      joined.push_back(join);
      pb::Envelope envelope;
      if (refusal.empty()) {
        a.transport.remove_invitation(key);
        envelope.mutable_join_reply()->set_owner("a");
        envelope.mutable_join_reply()->set_epoch(7);
      } else {
        envelope.mutable_join_reply()->set_error(refusal);
      }
      a.transport.reply_to_join(route, envelope);
    });
  }

  // Joins on a thread of its own; the reply, or what was thrown.
  std::pair<pb::JoinReply, std::string> join(std::chrono::milliseconds timeout = 5s,
                                             std::uint32_t version = 0, const std::string& server_key = "") {
    pb::JoinReply reply;
    std::string error;
    std::atomic<bool> done = false;
    std::thread thread([&] {
      pb::Join ask;
      ask.mutable_site()->set_name("new");
      ask.set_version(version);
      try {
        reply =
            join_by_invitation(a.transport.endpoint(), server_key.empty() ? a.keys.public_key : server_key,
                               invitation, ask, timeout);
      } catch (const std::runtime_error& failure) {
        error = failure.what();
      }
      done = true;
    });
    EXPECT_TRUE(run_until(reactor, [&] { return done.load(); }));
    thread.join();
    return {reply, error};
  }

  CurveKeys invitation = make_curve_keys();
  std::string refusal;
  std::vector<pb::Join> joined;
};

TEST_F(InvitationTest, AnInvitationAdmitsOnce) {
  const auto [reply, error] = join();
  EXPECT_EQ(error, "");
  EXPECT_EQ(reply.owner(), "a");
  EXPECT_EQ(reply.epoch(), 7u);
  ASSERT_EQ(joined.size(), 1u);
  EXPECT_EQ(joined[0].site().name(), "new");

  const auto [again, refused] = join();
  EXPECT_NE(refused.find("has been used"), std::string::npos) << refused;
  EXPECT_EQ(joined.size(), 1u);
}

TEST_F(InvitationTest, ARefusalIsHandedOn) {
  refusal = "the name is taken";
  EXPECT_EQ(join().second, "the name is taken");
}

TEST_F(InvitationTest, AnotherMajorVersionMayNotJoin) {
  const auto [reply, error] = join(5s, kProtocolVersion + 1000);
  EXPECT_NE(error.find("version"), std::string::npos) << error;
  EXPECT_TRUE(joined.empty());
}

TEST_F(InvitationTest, AnotherServersKeyIsNoticed) {
  const auto [reply, error] = join(1s, 0, make_curve_keys().public_key);
  EXPECT_NE(error.find("is not the site"), std::string::npos) << error;
}

TEST_F(InvitationTest, AnUnreachableSiteIsReported) {
  EXPECT_THROW(
      {
        try {
          join_by_invitation("tcp://127.0.0.1:1", a.keys.public_key, invitation, {}, 200ms);
        } catch (const std::runtime_error& error) {
          EXPECT_NE(std::string(error.what()).find("cannot be reached"), std::string::npos) << error.what();
          throw;
        }
      },
      std::runtime_error);
}

TEST_F(InvitationTest, AnInvitedKeyMayOnlyJoin) {
  zmq::context_t context(1);
  zmq::socket_t socket(context, zmq::socket_type::dealer);
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::curve_serverkey, a.keys.public_key);
  socket.set(zmq::sockopt::curve_publickey, invitation.public_key);
  socket.set(zmq::sockopt::curve_secretkey, invitation.secret_key);
  socket.connect(a.transport.endpoint());
  bool handled = false;
  a.transport.subscribe(pb::Envelope::kCommand, [&](const SiteName&, const Message&) { handled = true; });
  socket.send(serialize(command(1)), zmq::send_flags::none);
  EXPECT_TRUE(run_until(reactor, [&] { return a.transport.counters().malformed == 1; }));
  EXPECT_FALSE(handled);
}

}  // namespace
}  // namespace sharefs::testing
