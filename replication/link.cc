#include "replication/link.h"

#include <fmt/format.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "meta/log.h"

namespace sharefs {
namespace {

using Clock = Reactor::Clock;

constexpr std::size_t kKeyLength = 40;  // Z85 of 32 bytes
constexpr int kReconnectMs = 50;
constexpr int kReconnectMaxMs = 1000;
constexpr int kHandshakeMs = 5000;
// A connection on which nothing that was sent is acknowledged for so long has ended: packets vanish on it, be
// it in one direction only, and TCP would wait ever longer to find out. Answers of the other site do not
// tell: on a slow link a message takes as long as that, and whoever cut it off would send it again for ever.
constexpr int kUnacknowledgedMs = 3000;
static_assert(std::chrono::milliseconds(kUnacknowledgedMs) == 2 * kLiveness);
// ZeroMQ's own pings give TCP something to acknowledge, and end a connection through a relay whose other half
// is dead. They wait behind data that fills the buffers of a slow link, hence the patience.
constexpr int kHeartbeatMs = 1000;
constexpr int kHeartbeatTimeoutMs = 15000;
// On a DEALER nothing is ever sent to us but a frame that says: this site's key is not registered any more.
constexpr int kDealerReceiveLimit = 16;
// Between two looks at a connection (kPingInterval): far more than heartbeats, which also a process sends
// that does nothing else any more.
constexpr std::uint64_t kFlows = 512;
constexpr auto kPlausibleRoundTrip = std::chrono::minutes(1);

// ZeroMQ does not try again where a handshake was refused; nor where a peer broke the protocol.
constexpr auto kReconnectAfterRefusal = std::chrono::seconds(1);
constexpr auto kReconnectWhenDown = std::chrono::seconds(10);
constexpr auto kFollowInterval = std::chrono::seconds(1);

constexpr int kMonitored = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED |
                           ZMQ_EVENT_HANDSHAKE_FAILED_AUTH | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                           ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;

template <class Value>
bool socket_option(int fd, int level, int option, Value& value) {
  socklen_t size = sizeof value;
  return ::getsockopt(fd, level, option, &value, &size) == 0;
}

// Names of monitors must be unique within a context.
std::string monitor_address() {
  static std::atomic<std::uint64_t> last = 0;
  return fmt::format("inproc://monitor-{}", ++last);
}

}  // namespace

bool receive_frame(zmq::socket_t& socket, zmq::message_t& frame) {
  while (zmq_msg_recv(frame.handle(), socket.handle(), ZMQ_DONTWAIT) < 0) {
    if (zmq_errno() == EAGAIN) return false;
    if (zmq_errno() != EINTR) throw zmq::error_t();
  }
  return true;
}

bool send_frame(zmq::socket_t& socket, zmq::message_t& frame, bool more) {
  while (zmq_msg_send(frame.handle(), socket.handle(), ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) < 0) {
    if (zmq_errno() == EAGAIN || zmq_errno() == EHOSTUNREACH) return false;
    if (zmq_errno() != EINTR) throw zmq::error_t();
  }
  return true;
}

void stop_monitor(zmq::socket_t& socket) { zmq_socket_monitor(socket.handle(), nullptr, 0); }

void set_common_options(zmq::socket_t& socket, const std::string& endpoint) {
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(kMaxFrame));
  socket.set(zmq::sockopt::handshake_ivl, kHandshakeMs);
  socket.set(zmq::sockopt::tcp_keepalive, 1);
  socket.set(zmq::sockopt::tcp_maxrt, kUnacknowledgedMs);
  if (endpoint.find('[') != std::string::npos) socket.set(zmq::sockopt::ipv6, true);
}

// Also what other sites say, so nothing that ZeroMQ would take for more than a host.
void check_endpoint(const std::string& endpoint) {
  constexpr std::string_view kScheme = "tcp://";
  constexpr std::string_view kHost = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_";
  constexpr std::string_view kDigits = "0123456789";
  const auto colon = endpoint.rfind(':');
  bool ok = endpoint.starts_with(kScheme) && endpoint.size() <= 256 && colon > kScheme.size() &&
            colon != std::string::npos && colon + 1 < endpoint.size();
  if (ok) {
    std::string_view host = std::string_view(endpoint).substr(kScheme.size(), colon - kScheme.size());
    const std::string_view port = std::string_view(endpoint).substr(colon + 1);
    const bool address = host.starts_with('[') && host.ends_with(']');
    if (address) host = host.substr(1, host.size() - 2);
    const auto strange = host.find_first_not_of(address ? std::string(kHost) + ":%" : std::string(kHost));
    ok = (host == "*" || (!host.empty() && strange == std::string_view::npos)) && port.size() <= 5 &&
         (port == "*" || port.find_first_not_of(kDigits) == std::string_view::npos);
  }
  if (!ok) throw std::runtime_error(fmt::format("«{}» is no endpoint: write tcp://HOST:PORT", endpoint));
}

void check_key(const std::string& key) {
  std::array<std::uint8_t, 32> raw{};
  if (key.size() != kKeyLength || key.find('\0') != std::string::npos ||
      zmq_z85_decode(raw.data(), key.c_str()) == nullptr)
    throw std::runtime_error("not a CURVE key: 40 characters of Z85 are expected");
}

WatchedSocket::WatchedSocket(zmq::socket_t socket, Reactor& reactor, Reactor::Task ready)
    : socket_(std::move(socket)), reactor_(reactor), fd_(socket_.get(zmq::sockopt::fd)) {
  reactor_.watch(fd_, std::move(ready));
}

WatchedSocket::~WatchedSocket() { reactor_.unwatch(fd_); }

// ---- Liveness

void Liveness::doubt(Clock::time_point now) {
  if (proven_) doubted_ = now;
  proven_ = false;
  proof_from_ = now;
  answered_.clear();
}

bool Liveness::pong(Clock::time_point sent, Clock::time_point now) {
  if (sent > now || now - sent > kPlausibleRoundTrip) return false;
  // Those that come late over a connection that has been replaced say nothing of the present one.
  if (sent >= asked_) samples_[sampled_++ % samples_.size()] = now - sent;
  if (sent > asked_) answered_.push_back({.sent = sent, .came = now});
  while (answered_.size() > 1 && now - answered_[1].came > kRemembered) answered_.pop_front();
  asked_ = std::max(asked_, sent);
  if (proven_ || sent < proof_from_) return false;
  proven_ = announced_ = true;
  return true;
}

std::optional<Clock::duration> Liveness::arrived(Clock::time_point then, Clock::time_point now) const {
  const auto first =
      std::ranges::find_if(answered_, [&](const Answered& answered) { return answered.sent >= then; });
  if (first == answered_.end()) return std::nullopt;
  return now - first->came;
}

Clock::duration Liveness::round_trip() const {
  const auto* end = samples_.begin() + std::min(sampled_, samples_.size());
  return end == samples_.begin() ? Clock::duration::zero() : *std::min_element(samples_.begin(), end);
}

bool Liveness::expired(Clock::time_point now) {
  if (!announced_) return false;
  const bool silent = now - last_heard_ > kLiveness;
  const bool doubtful = !proven_ && now - doubted_ > kLiveness;
  if (!silent && !doubtful) return false;
  doubt(now);
  announced_ = false;
  return true;
}

void Liveness::forgive(Clock::duration pause) {
  last_heard_ += pause;
  doubted_ += pause;
}

// ---- Inflow

void Inflow::came(const zmq::message_t& route, zmq::message_t& frame) {
  const std::string_view name = route.to_string_view();
  for (const auto& known : connections_)
    if (known.route == name) return;
  Connection& added = connections_[std::exchange(oldest_, 1 - oldest_)];
  added = {.route = std::string(name), .fd = zmq_msg_get(frame.handle(), ZMQ_SRCFD)};
  if (!socket_option(added.fd, SOL_SOCKET, SO_COOKIE, added.cookie)) added.fd = -1;
}

bool Inflow::flows() {
  bool any = false;
  for (auto& one : connections_) {
    std::uint64_t cookie = 0;
    tcp_info info{};
    if (one.fd < 0 || !socket_option(one.fd, SOL_SOCKET, SO_COOKIE, cookie) || cookie != one.cookie ||
        !socket_option(one.fd, IPPROTO_TCP, TCP_INFO, info))
      continue;
    const std::uint64_t before = std::exchange(one.bytes, info.tcpi_bytes_received);
    any |= one.bytes - before > kFlows;
  }
  return any;
}

// ---- Link

Link::Link(SiteName site, zmq::context_t& context, Reactor& reactor, const CurveKeys& keys,
           std::function<void(Link&)> changed)
    : site_(std::move(site)),
      context_(context),
      reactor_(reactor),
      keys_(keys),
      changed_(std::move(changed)) {}

void Link::connect_to(const std::string& endpoint, const std::string& public_key) {
  if (endpoint == endpoint_ && public_key == public_key_) return;
  endpoint_ = endpoint;
  public_key_ = public_key;
  failure_logged_ = false;
  reconnect();
}

void Link::reconnect() {
  const bool was_up = up();
  changed_at_ = Clock::now();
  handshake_failed_ = false;
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    close_lane(lane);
    if (!endpoint_.empty()) open_lane(lane);
  }
  if (was_up) changed_(*this);
}

Link::~Link() {
  reactor_.cancel(delay_);
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) close_lane(lane);
}

void Link::follow(Clock::time_point now) {
  if (!hello || hello->endpoint().empty() || hello->endpoint() == endpoint_ ||
      now - followed_ < kFollowInterval)
    return;
  followed_ = now;
  connect_to(hello->endpoint(), std::string(public_key_));
}

void Link::maintain(Clock::time_point now) {
  const auto patience = handshake_failed_ ? Clock::duration(kReconnectAfterRefusal) : kReconnectWhenDown;
  try {
    follow(now);
    if (endpoint_.empty() || (!std::exchange(turned_away_, false) && (up() || now - changed_at_ <= patience)))
      return;
    reconnect();
  } catch (const zmq::error_t& error) {  // of descriptors there may be none left; tried again
    if (!std::exchange(failure_logged_, true))
      log::warn("cannot connect to {} at {}: {}", site_, endpoint_, error.what());
  }
}

void Link::close_lane(std::size_t lane) {
  if (lanes_[lane].dealer) stop_monitor(**lanes_[lane].dealer);
  lanes_[lane].monitor.reset();
  lanes_[lane].dealer.reset();
  lanes_[lane].ready = false;
}

void Link::open_lane(std::size_t lane) {
  zmq::socket_t dealer(context_, zmq::socket_type::dealer);
  set_common_options(dealer, endpoint_);
  dealer.set(zmq::sockopt::immediate, true);
  dealer.set(zmq::sockopt::sndhwm,
             0);  // bounded by who sends: requests by their callers, the image by credit
  dealer.set(zmq::sockopt::rcvhwm, kDealerReceiveLimit);
  dealer.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
  dealer.set(zmq::sockopt::reconnect_ivl_max, kReconnectMaxMs);
  dealer.set(zmq::sockopt::heartbeat_ivl, kHeartbeatMs);
  dealer.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
  // Each lane has an I/O thread of its own: encrypting a megabyte of image delays no request.
  dealer.set(zmq::sockopt::affinity, std::uint64_t{1} << lane);
  dealer.set(zmq::sockopt::curve_serverkey, public_key_);
  dealer.set(zmq::sockopt::curve_publickey, keys_.public_key);
  dealer.set(zmq::sockopt::curve_secretkey, keys_.secret_key);

  const std::string address = monitor_address();
  if (zmq_socket_monitor(dealer.handle(), address.c_str(), kMonitored) != 0) throw zmq::error_t();
  zmq::socket_t monitor(context_, zmq::socket_type::pair);
  monitor.set(zmq::sockopt::linger, 0);
  monitor.connect(address);
  lanes_[lane].monitor =
      std::make_unique<WatchedSocket>(std::move(monitor), reactor_, [this, lane] { read_monitor(lane); });
  read_monitor(lane);  // a pipe signals only to a reader that has found it empty
  dealer.connect(endpoint_);
  lanes_[lane].dealer =
      std::make_unique<WatchedSocket>(std::move(dealer), reactor_, [this] { discard_incoming(); });
}

void Link::discard_incoming() {
  zmq::message_t frame;
  for (auto& lane : lanes_)
    for (int i = 0; lane.dealer && i < 4 * kDealerReceiveLimit && receive_frame(**lane.dealer, frame); ++i)
      turned_away_ = true;
}

// An event is two frames: u16 event and u32 value in the machine's order, then the endpoint.
void Link::read_monitor(std::size_t lane) {
  zmq::message_t what, where;
  while (lanes_[lane].monitor && receive_frame(**lanes_[lane].monitor, what)) {
    if (what.more()) receive_frame(**lanes_[lane].monitor, where);
    std::uint16_t kind = 0;
    std::uint32_t value = 0;
    if (what.size() != sizeof kind + sizeof value) continue;
    std::memcpy(&kind, what.data(), sizeof kind);
    std::memcpy(&value, static_cast<const char*>(what.data()) + sizeof kind, sizeof value);
    event(lane, kind, value);
  }
}

void Link::event(std::size_t lane, unsigned event, unsigned value) {
  const bool was_up = up();
  switch (event) {
    case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
      discard_incoming();  // makes the socket take notice of its connection
      lanes_[lane].ready = true;
      failure_logged_ = refused_ = false;
      break;
    case ZMQ_EVENT_DISCONNECTED:
      lanes_[lane].ready = false;
      break;
    default:
      lanes_[lane].ready = false;
      handshake_failed_ = true;
      refused_ = event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
      if (std::exchange(failure_logged_, true)) break;
      if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
        log::warn("{} at {} refuses this site's key (status {}): has this site joined it?", site_, endpoint_,
                  value);
      else
        log::warn(
            "no handshake with {} at {}: it may be starting, or its public key is not the one known here",
            site_, endpoint_);
      break;
  }
  if (up() == was_up) return;
  changed_at_ = Clock::now();
  changed_(*this);
}

bool Link::send(Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts) {
  const bool sent = send_now(lane, std::move(head), std::move(parts));
  if (lane == Lane::requests && !delayed_.empty()) send_delayed();
  return sent;
}

void Link::send_soon(zmq::message_t head) {
  delayed_.push_back(std::move(head));
  if (delay_ == 0) delay_ = reactor_.after(kLaziness, [this] { send_delayed(); });
}

void Link::send_delayed() {
  reactor_.cancel(std::exchange(delay_, 0));
  for (auto& head : std::exchange(delayed_, {})) send_now(Lane::requests, std::move(head), {});
}

bool Link::send_now(Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts) {
  // ZeroMQ's thread connects anew by itself: what it tells of that is heard first. The message is lost with
  // what was sent before, or it would overtake that.
  const std::uint64_t connection = connections;
  read_monitor(static_cast<std::size_t>(lane));
  if (!up() || connections != connection) return false;
  zmq::socket_t& socket = **lanes_[static_cast<std::size_t>(lane)].dealer;
  bool sent = send_frame(socket, head, !parts.empty());
  // Where the connection has broken behind the first frame ZeroMQ drops the others up to the last one,
  // whatever message that belongs to.
  for (std::size_t i = 0; i < parts.size() && (sent || i > 0); ++i)
    sent &= send_frame(socket, parts[i], i + 1 < parts.size());
  return sent;
}

}  // namespace sharefs
