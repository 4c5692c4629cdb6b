// Hostile frames, from a site whose key is registered and from a stranger: the Transport goes on serving.
// SHAREFS_FUZZ_SEED repeats a run; SHAREFS_FUZZ_ROUNDS makes it longer.
#include <cstdlib>
#include <iostream>
#include <random>

#include "relay.h"
#include "replication/request_server.h"
#include "replication/transport.h"
#include "sites.h"

namespace sharefs::testing {
namespace {

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

class Nothing final : public Executor {
 public:
  void execute(const pb::Request&, Bytes, Reply reply) override { reply_errno(reply, ENOSYS); }
};

class Fuzzer {
 public:
  explicit Fuzzer(std::uint64_t seed) : random_(seed) {}

  // One message's frames: valid ones mutated, or noise.
  std::vector<std::string> frames() {
    std::vector<std::string> all(pick(12) == 0 ? pick(20) : 1 + pick(3));
    for (auto& frame : all)
      frame = pick(3) == 0 ? noise(pick(2000)) : mutated(envelope().SerializeAsString());
    if (all.empty()) all.emplace_back();
    return all;
  }

 private:
  std::size_t pick(std::size_t below) {
    return std::uniform_int_distribution<std::size_t>(0, below - 1)(random_);
  }
  std::uint64_t number() { return pick(2) == 0 ? pick(4) : random_(); }

  std::string noise(std::size_t size) {
    std::string text(size, '\0');
    for (auto& byte : text) byte = static_cast<char>(random_());
    return text;
  }

  std::string mutated(std::string text) {
    for (auto flips = pick(4); flips > 0 && !text.empty(); --flips)
      text[pick(text.size())] = static_cast<char>(random_());
    if (pick(8) == 0) text.resize(pick(text.size() + 1));
    if (pick(8) == 0) text += noise(pick(40));
    return text;
  }

  pb::Envelope envelope() {
    pb::Envelope envelope;
    switch (pick(9)) {
      case 0:
        envelope.mutable_hello()->set_version(pick(4) == 0 ? 5000 : kProtocolVersion);
        envelope.mutable_hello()->set_incarnation(number());
        envelope.mutable_hello()->add_sites()->set_name(noise(pick(100)));
        break;
      case 1:
        envelope.mutable_ping()->set_sent(number());
        break;
      case 2:
        envelope.mutable_pong()->set_sent(number());
        break;
      case 3:
        envelope.mutable_join()->mutable_site()->set_name(noise(pick(100)));
        break;
      case 4:
        envelope.mutable_answer()->set_client(number());
        break;
      case 5:
        envelope.mutable_moved()->set_owner(noise(pick(10)));
        break;
      case 6:
        envelope.mutable_batch()->set_checksum(number());
        break;
      default:
        *envelope.mutable_ask()->mutable_request() = request();
    }
    return envelope;
  }

  pb::Request request() {
    pb::Request request;
    request.set_client(pick(3));
    request.set_seq(number());
    request.set_answered_below(number());
    switch (pick(7)) {
      case 0:
        request.mutable_attach()->set_site(pick(2) == 0 ? "evil" : "a");
        break;
      case 1:
        request.mutable_detach();
        break;
      case 2:
        request.mutable_write()->set_size(static_cast<std::uint32_t>(number()));
        break;
      case 3:
        request.mutable_read()->set_size(static_cast<std::uint32_t>(number()));
        break;
      case 4:
        request.mutable_rename()->set_name(noise(pick(600)));
        break;
      case 5:
        request.mutable_create()->set_name(noise(pick(300)));
        break;
      default:
        break;
    }
    return request;
  }

  std::mt19937_64 random_;
};

struct Attacker {
  Attacker(const std::string& endpoint, const std::string& server_key, const CurveKeys& keys) {
    socket.set(zmq::sockopt::linger, 0);
    socket.set(zmq::sockopt::curve_serverkey, server_key);
    socket.set(zmq::sockopt::curve_publickey, keys.public_key);
    socket.set(zmq::sockopt::curve_secretkey, keys.secret_key);
    socket.connect(endpoint);
  }
  void send(const std::vector<std::string>& frames) {
    for (std::size_t i = 0; i < frames.size(); ++i)
      socket.send(zmq::buffer(frames[i]),
                  (i + 1 < frames.size() ? zmq::send_flags::sndmore : zmq::send_flags::none) |
                      zmq::send_flags::dontwait);
  }
  zmq::context_t context{1};
  zmq::socket_t socket{context, zmq::socket_type::dealer};
};

TEST(TransportFuzz, HostileFramesAreDroppedAndTheOthersServed) {
  const auto seed = number_from("SHAREFS_FUZZ_SEED", std::random_device()());
  const auto rounds = number_from("SHAREFS_FUZZ_ROUNDS", 300);
  std::cout << "SHAREFS_FUZZ_SEED=" << seed << "\n";
  Reactor reactor;
  TestSite server(reactor, "server"), friendly(reactor, "friendly");
  introduce(server, friendly);
  Nothing nothing;
  RequestServer requests(server.transport, nothing);
  requests.serve();
  server.transport.subscribe(pb::Envelope::kAsk, [&](const SiteName& from, Message message) {
    requests.ask(from, std::move(message));
  });
  std::uint64_t answered = 0;
  friendly.transport.subscribe(pb::Envelope::kAnswer, [&](const SiteName&, const Message&) { ++answered; });
  ASSERT_TRUE(run_until_connected(reactor, server, friendly));

  const auto evil = make_curve_keys();
  server.transport.add_site("evil", "", evil.public_key);
  Attacker insider(server.transport.endpoint(), server.keys.public_key, evil);
  Attacker stranger(server.transport.endpoint(), server.keys.public_key, make_curve_keys());
  Fuzzer fuzzer(seed);
  pb::Envelope attach;
  attach.mutable_ask()->mutable_request()->set_client(99);
  attach.mutable_ask()->mutable_request()->mutable_attach()->set_site("friendly");
  for (std::uint64_t round = 1; round <= rounds; ++round) {
    for (int i = 0; i < 50; ++i) {
      insider.send(fuzzer.frames());
      stranger.send(fuzzer.frames());
    }
    friendly.transport.send("server", Lane::requests, attach);
    ASSERT_TRUE(run_until(reactor, [&] { return answered >= round; })) << "round " << round;
  }
  EXPECT_GT(server.transport.counters().malformed, 0u);
  EXPECT_GT(server.transport.counters().refused, 0u);
  EXPECT_TRUE(server.transport.connected("friendly"));
}

TEST(TransportFuzz, BytesThatAreNoZmtpEndOnlyTheirConnection) {
  const auto seed = number_from("SHAREFS_FUZZ_SEED", std::random_device()());
  std::cout << "SHAREFS_FUZZ_SEED=" << seed << "\n";
  std::mt19937_64 random(seed);
  Reactor reactor;
  TestSite one(reactor, "one"), two(reactor, "two");
  introduce(one, two);
  ASSERT_TRUE(run_until_connected(reactor, one, two));
  for (int i = 0; i < 50; ++i) {
    const int fd = connect_to(loopback(one.transport.endpoint()));
    std::string noise(1 + random() % 500, '\0');
    for (auto& byte : noise) byte = static_cast<char>(random());
    // Every other one begins as ZMTP does.
    if (i % 2 == 0) noise.insert(0, std::string("\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE", 17));
    EXPECT_EQ(::send(fd, noise.data(), noise.size(), MSG_NOSIGNAL), static_cast<ssize_t>(noise.size()));
    run_for(reactor, 5ms);
    ::close(fd);
  }
  EXPECT_TRUE(one.transport.connected("two"));
}

}  // namespace
}  // namespace sharefs::testing
