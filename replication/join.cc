// How an invited site asks to be admitted: one Join under the invitation's keys.
#include "replication/join.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "replication/link.h"
#include "replication/transport.h"

namespace sharefs {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMonitored = ZMQ_EVENT_CONNECTED | ZMQ_EVENT_HANDSHAKE_SUCCEEDED |
                           ZMQ_EVENT_HANDSHAKE_FAILED_AUTH | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                           ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;
constexpr auto kMonitorAddress = "inproc://join-monitor";
constexpr int kReconnectMs = 200;

// Stops the events of the socket before their reader goes.
struct MonitorGuard {
  zmq::socket_t& socket;
  ~MonitorGuard() { stop_monitor(socket); }
};

// How far the connection has come.
struct Progress {
  bool connected = false;
  bool admitted = false;
  bool refused = false;       // the other site said so
  bool key_mismatch = false;  // no handshake on a connection
};

void read_monitor(zmq::socket_t& monitor, Progress& progress) {
  zmq::message_t what, where;
  while (receive_frame(monitor, what)) {
    if (what.more()) receive_frame(monitor, where);
    std::uint16_t kind = 0;
    if (what.size() < sizeof kind) continue;
    std::memcpy(&kind, what.data(), sizeof kind);
    switch (kind) {
      case ZMQ_EVENT_CONNECTED:
        progress.connected = true;
        break;
      case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
        progress.admitted = true;
        break;
      case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
        progress.refused = true;
        break;
      default:
        progress.key_mismatch = true;
        break;
    }
  }
}

bool read_reply(zmq::socket_t& socket, pb::Envelope& envelope) {
  zmq::message_t frame, rest;
  if (!receive_frame(socket, frame)) return false;
  for (bool more = frame.more(); more; more = rest.more())
    if (!receive_frame(socket, rest)) break;
  return envelope.ParseFromArray(frame.data(), static_cast<int>(frame.size())) && envelope.has_join_reply();
}

std::string explain(const std::string& endpoint, const Progress& progress,
                    std::chrono::milliseconds timeout) {
  if (progress.refused)
    return fmt::format(
        "{} refuses this invitation: it has been used or has expired; make a new one with \"sharefs invite "
        "NAME\" there",
        endpoint);
  if (progress.admitted)
    return fmt::format(
        "{} does not answer: the invitation may have been used meanwhile; make a new one with "
        "\"sharefs invite NAME\" there",
        endpoint);
  if (progress.key_mismatch)
    return fmt::format(
        "{} is not the site that made this invitation, or its keys have changed; make a new one with "
        "\"sharefs invite NAME\" there",
        endpoint);
  return fmt::format(
      "{} cannot be reached within {} s: does this machine know that host, is its daemon running, and the "
      "port open?",
      endpoint, static_cast<double>(timeout.count()) / 1000);
}

// Before the handshake nothing has been asked.
[[noreturn]] void end_without_answer(const Progress& progress, const std::string& why) {
  if (progress.admitted) throw JoinUnanswered(why);
  throw std::runtime_error(why);
}

zmq::socket_t open_socket(zmq::context_t& context, const std::string& endpoint,
                          const std::string& server_public_key, const CurveKeys& invitation) {
  zmq::socket_t socket(context, zmq::socket_type::dealer);
  set_common_options(socket, endpoint);
  socket.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
  socket.set(zmq::sockopt::curve_serverkey, server_public_key);
  socket.set(zmq::sockopt::curve_publickey, invitation.public_key);
  socket.set(zmq::sockopt::curve_secretkey, invitation.secret_key);
  if (zmq_socket_monitor(socket.handle(), kMonitorAddress, kMonitored) != 0) throw zmq::error_t();
  return socket;
}

}  // namespace

pb::JoinReply join_by_invitation(const std::string& endpoint, const std::string& server_public_key,
                                 const CurveKeys& invitation, const pb::Join& join,
                                 std::chrono::milliseconds timeout) {
  check_endpoint(endpoint);
  check_key(server_public_key);
  check_key(invitation.public_key);
  check_key(invitation.secret_key);
  const auto deadline = Clock::now() + timeout;
  Progress progress;
  try {
    zmq::context_t context(1);
    zmq::socket_t socket = open_socket(context, endpoint, server_public_key, invitation);
    zmq::socket_t monitor(context, zmq::socket_type::pair);
    monitor.set(zmq::sockopt::linger, 0);
    monitor.connect(kMonitorAddress);
    const MonitorGuard guard{socket};
    socket.connect(endpoint);

    pb::Envelope ask;
    *ask.mutable_join() = join;
    if (join.version() == 0) ask.mutable_join()->set_version(kProtocolVersion);
    zmq::message_t frame = serialize(ask);
    send_frame(socket, frame, false);  // waits in the socket for the connection
    pb::Envelope answer;
    while (!progress.refused) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      if (left <= std::chrono::milliseconds::zero()) break;
      std::array<zmq::pollitem_t, 2> items{
          {{socket.handle(), 0, ZMQ_POLLIN, 0}, {monitor.handle(), 0, ZMQ_POLLIN, 0}}};
      zmq::poll(items.data(), items.size(), left);
      read_monitor(monitor, progress);
      if (!read_reply(socket, answer)) continue;
      if (!answer.join_reply().error().empty()) throw std::runtime_error(answer.join_reply().error());
      return answer.join_reply();
    }
  } catch (const zmq::error_t& error) {
    end_without_answer(progress, fmt::format("cannot ask {}: {}", endpoint, error.what()));
  }
  end_without_answer(progress, explain(endpoint, progress, timeout));
}

}  // namespace sharefs
