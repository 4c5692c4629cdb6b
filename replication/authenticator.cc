#include "replication/authenticator.h"

#include <array>
#include <string_view>
#include <utility>

#include "meta/log.h"

namespace sharefs {
namespace {

constexpr auto kZapEndpoint = "inproc://zeromq.zap.01";
// ZAP request: version, request id, domain, address, routing id, mechanism, credentials.
constexpr std::size_t kRequestFrames = 7;
constexpr std::size_t kCurveKeyBytes = 32;
// Strangers can make keys without end: after so many different ones, further ones are only counted.
constexpr std::size_t kLoggedKeys = 1000;

zmq::socket_t bind_zap(zmq::context_t& context) {
  zmq::socket_t socket(context, zmq::socket_type::rep);
  socket.set(zmq::sockopt::linger, 0);
  socket.bind(kZapEndpoint);
  return socket;
}

}  // namespace

Authenticator::Authenticator(zmq::context_t& context, Reactor& reactor,
                             std::function<bool(const std::string& key)> admits)
    : admits_(std::move(admits)), socket_(bind_zap(context), reactor, [this] { serve(); }) {}

void Authenticator::serve() {
  while (serve_one()) {
  }
}

bool Authenticator::serve_one() {
  std::vector<zmq::message_t> request(1);
  if (!receive_frame(*socket_, request.back())) return false;
  while (request.back().more()) {
    zmq::message_t frame;
    if (!receive_frame(*socket_, frame)) break;
    request.push_back(std::move(frame));
  }
  std::string key;
  const bool admitted = judge(request, key);
  std::array<zmq::message_t, 6> answer{
      zmq::message_t(std::string_view("1.0")),
      request.size() > 1 ? std::move(request[1]) : zmq::message_t(),
      zmq::message_t(std::string_view(admitted ? "200" : "400")),
      zmq::message_t(std::string_view(admitted ? "" : "unknown key")),
      zmq::message_t(key),
      zmq::message_t(),  // no further metadata
  };
  for (std::size_t i = 0; i < answer.size(); ++i) send_frame(*socket_, answer[i], i + 1 < answer.size());
  return true;
}

// Sets `key` to the Z85 text of an admitted key.
bool Authenticator::judge(const std::vector<zmq::message_t>& request, std::string& key) {
  if (request.size() != kRequestFrames || request[0].to_string_view() != "1.0" ||
      request[5].to_string_view() != "CURVE" || request[6].size() != kCurveKeyBytes) {
    ++refused_;
    return false;
  }
  std::array<char, 41> text{};
  zmq_z85_encode(text.data(), request[6].data<std::uint8_t>(), kCurveKeyBytes);
  if (admits_(text.data())) {
    key = text.data();
    return true;
  }
  ++refused_;
  if (refused_keys_.size() < kLoggedKeys && refused_keys_.insert(text.data()).second)
    log::warn("a connection from {} is refused: its key {} is not registered here",
              request[3].to_string_view(), text.data());
  return false;
}

}  // namespace sharefs
