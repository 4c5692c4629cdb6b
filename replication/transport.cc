#include "replication/transport.h"

#include <fmt/format.h>
#include <google/protobuf/stubs/logging.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "fs/promises.h"
#include "meta/log.h"
#include "replication/authenticator.h"
#include "replication/link.h"

namespace sharefs {
namespace {

// One for what goes out on each lane (see Link), one more for what comes in.
constexpr int kIoThreads = 3;
constexpr std::uint64_t kIncomingThreads = 0b101;  // not that of the bulk lane, which encrypts an image
// Read from the ROUTER before the reactor looks at its other descriptors again.
constexpr int kMessagesPerRound = 256;
// Frames of one connection that wait for the reactor; then TCP holds the sender back.
constexpr int kRouterReceiveLimit = 16384;
constexpr auto kRefusalInterval = std::chrono::seconds(10);  // between two log lines about one site
constexpr auto kFarewell = std::chrono::seconds(1);          // until a removed site's connection is closed
// Both ends connect at about the same time; the other way is missing if it takes longer than that.
constexpr auto kWayBack = std::chrono::seconds(2);
constexpr std::size_t kHandlers = 64;  // body numbers of pb::Envelope are below

struct KeyHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

// At most one line per second about messages that are dropped.
class DropLog {
 public:
  // Whether this is the one.
  bool line(Reactor::Clock::time_point now, std::string_view from, std::string_view why) {
    if (now < next_) {
      ++unlogged_;
      return false;
    }
    log::warn("a message from {} is dropped: {} ({} more since the last such line)", from, why, unlogged_);
    next_ = now + std::chrono::seconds(1);
    unlogged_ = 0;
    return true;
  }

 private:
  Reactor::Clock::time_point next_{};
  std::uint64_t unlogged_ = 0;
};

std::uint64_t to_wire(Reactor::Clock::time_point time) {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

Reactor::Clock::time_point from_wire(std::uint64_t time) {
  return Reactor::Clock::time_point(std::chrono::nanoseconds(static_cast<std::int64_t>(time)));
}

void bind_to(zmq::socket_t& socket, const std::string& endpoint) {
  try {
    socket.bind(endpoint);
  } catch (const zmq::error_t& error) {
    throw std::runtime_error(fmt::format("cannot listen on {}: {}", endpoint, error.what()));
  }
}

std::uint64_t random_incarnation() {
  std::random_device device;
  return (std::uint64_t{device()} << 32 | device()) | 1;  // never 0, which means unset
}

}  // namespace

// Notices that the machine was suspended, which the clock of the reactor does not count.
class Sleep {
 public:
  // True from a suspension until the next look().
  bool since_last_look() const { return offset() - offset_ > kTolerance; }
  void look() { offset_ = offset(); }

 private:
  static constexpr std::int64_t kTolerance = 50'000'000;  // the two clocks are not read at the same instant
  static std::int64_t offset() {
    timespec boot{}, running{};
    ::clock_gettime(CLOCK_BOOTTIME, &boot);
    ::clock_gettime(CLOCK_MONOTONIC, &running);
    return (boot.tv_sec - running.tv_sec) * 1'000'000'000 + boot.tv_nsec - running.tv_nsec;
  }
  std::int64_t offset_ = offset();
};

struct Transport::Impl {
  // Who a message is from: a site, or the holder of an invitation.
  struct Sender {
    Link* link = nullptr;  // nullptr: an invitation
  };

  Impl(Options given, Reactor& the_reactor);
  ~Impl();

  void bind();
  bool read_router();
  bool receive_one();
  void dispatch(Link& link, Message& message);
  void dispatch_join(const std::string& key, const zmq::message_t& route, const Message& message);
  void dropped(std::string_view from, std::string_view why);
  void hello_arrived(Link& link, pb::Hello& said);
  std::string objection(const Link& link, const pb::Hello& said) const;
  pb::Hello own_hello(const Link& link) const;
  void send_hello(Link& link);
  void send_ping(Link& link);
  void link_changed(Link& link);
  void announce(Link& link);
  void pong_arrived(Link& link, Reactor::Clock::time_point sent, Reactor::Clock::time_point now);
  void tick();
  void reply(const std::string& route, const pb::Envelope& head);
  void send_on(zmq::message_t& route, zmq::message_t frame);

  // constant after construction
  Options options;
  Reactor& reactor;
  const std::uint64_t incarnation = random_incarnation();
  zmq::context_t context{kIoThreads};
  std::unique_ptr<Authenticator> authenticator;
  std::unique_ptr<WatchedSocket> router;  // none: this site does not listen
  // set before messages are served
  std::array<Handler, kHandlers> handlers;
  JoinHandler join_handler;
  std::function<void(const SiteName&, const pb::Hello&, Gap)> on_connected;
  std::function<void(const SiteName&)> on_lost;
  std::function<pb::Hello()> hello;
  // reactor thread
  std::map<SiteName, std::unique_ptr<Link>> links;
  std::deque<std::unique_ptr<Link>> removed;                                  // the oldest first
  std::unordered_map<std::string, Sender, KeyHash, std::equal_to<>> senders;  // by public key
  bool more_to_read = false;  // the ROUTER may hold messages that its descriptor does not tell of
  Reactor::TimerId timer = 0;
  Reactor::Clock::time_point last_tick = Reactor::Clock::now();
  Sleep slept;
  DropLog drop_log;
  Counters counters;
  std::shared_ptr<Impl*> alive =
      std::make_shared<Impl*>(this);  // expires with this: the reactor keeps its checks
};

Transport::Impl::Impl(Options given, Reactor& the_reactor) : options(std::move(given)), reactor(the_reactor) {
  // What peers send that cannot be parsed is counted and logged here; protobuf would write a line for each.
  google::protobuf::SetLogHandler(nullptr);
  check_name(options.site);
  check_key(options.keys.public_key);
  check_key(options.keys.secret_key);
  authenticator = std::make_unique<Authenticator>(
      context, reactor, [this](const std::string& key) { return senders.contains(key); });
  if (!options.listen.empty()) bind();
  reactor.before_sleep([weak = std::weak_ptr(alive)] {
    const auto self = weak.lock();
    return self && (*self)->more_to_read && (*self)->read_router();
  });
  timer = reactor.after(kPingInterval, [this] { tick(); });
}

Transport::Impl::~Impl() { reactor.cancel(timer); }

void Transport::Impl::bind() {
  check_endpoint(options.listen);
  zmq::socket_t socket(context, zmq::socket_type::router);
  set_common_options(socket, options.listen);
  socket.set(zmq::sockopt::sndhwm, 0);
  socket.set(zmq::sockopt::rcvhwm, kRouterReceiveLimit);
  socket.set(zmq::sockopt::affinity, kIncomingThreads);
  socket.set(zmq::sockopt::curve_server, true);
  socket.set(zmq::sockopt::curve_secretkey, options.keys.secret_key);
  socket.set(zmq::sockopt::zap_domain, std::string("sharefs"));
  try {
    bind_to(socket, options.listen);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(
        fmt::format("{}: \"sharefs invite NAME --listen tcp://HOST:PORT\" gives this site another address",
                    error.what()));
  }
  router = std::make_unique<WatchedSocket>(std::move(socket), reactor, [this] { read_router(); });
}

// ---- receiving

bool Transport::Impl::read_router() {
  more_to_read = false;
  for (int i = 0; i < kMessagesPerRound; ++i)
    if (!receive_one()) return i > 0;
  more_to_read = true;
  return true;
}

// One message: the frame that the ROUTER puts in front (which connection), the envelope, parts. False: none
// there.
bool Transport::Impl::receive_one() {
  zmq::message_t route, head;
  if (!receive_frame(**router, route)) return false;
  Message message;
  std::size_t frames = 1;
  bool more = route.more();
  while (more) {
    zmq::message_t frame;
    if (!receive_frame(**router, frame)) break;
    more = frame.more();
    if (++frames == 2)
      head = std::move(frame);
    else if (frames <= 2 + kMaxParts)
      message.parts.push_back(std::move(frame));
  }
  const char* key = zmq_msg_gets(head.handle(), "User-Id");
  const auto sender = key == nullptr ? senders.end() : senders.find(std::string_view(key));
  if (sender == senders.end()) {
    // Its connection is from before, and lasts; it is to find out.
    ++counters.malformed;
    if (drop_log.line(Reactor::Clock::now(), "a stranger", "its key is not registered any more"))
      send_on(route, zmq::message_t());
    return true;
  }
  if (sender->second.link) sender->second.link->inflow.came(route, head);
  const std::string_view from =
      sender->second.link ? std::string_view(sender->second.link->site()) : "an invitation";
  if (frames < 2 || frames > 2 + kMaxParts) {
    dropped(from, "wrong number of frames");
  } else if (!message.head.ParseFromArray(head.data(), static_cast<int>(head.size())) ||
             message.head.body_case() == pb::Envelope::BODY_NOT_SET) {
    dropped(from, "it is no envelope");
  } else {
    // What a handler throws concerns this message only.
    try {
      if (sender->second.link)
        dispatch(*sender->second.link, message);
      else
        dispatch_join(key, route, message);
    } catch (const std::exception& error) {
      dropped(from, error.what());
    }
  }
  return true;
}

void Transport::Impl::dropped(std::string_view from, std::string_view why) {
  ++counters.malformed;
  drop_log.line(Reactor::Clock::now(), from, why);
}

void Transport::Impl::dispatch(Link& link, Message& message) {
  ++counters.received;
  const auto now = Reactor::Clock::now();
  link.liveness.heard(now);
  const auto kind = message.head.body_case();
  if (kind == pb::Envelope::kHello) return hello_arrived(link, *message.head.mutable_hello());
  // The Hello is the first message on a connection: whoever has not said an acceptable one is not talked to.
  if (!link.hello) return;
  switch (kind) {
    case pb::Envelope::kPing: {
      pb::Envelope pong;
      pong.mutable_pong()->set_sent(message.head.ping().sent());
      link.send(Lane::requests, serialize(pong), {});
      break;
    }
    case pb::Envelope::kPong:
      pong_arrived(link, from_wire(message.head.pong().sent()), now);
      break;
    default: {
      const auto index = static_cast<std::size_t>(kind);
      if (index >= handlers.size() || !handlers[index])
        return dropped(link.site(), "nobody here expects its kind");
      handlers[index](link.site(), std::move(message));
    }
  }
}

void Transport::Impl::dispatch_join(const std::string& key, const zmq::message_t& route,
                                    const Message& message) {
  if (!message.head.has_join() || !message.parts.empty()) return dropped("an invitation", "it is no Join");
  if (!join_handler) return dropped("an invitation", "nobody may join now");
  const auto& join = message.head.join();
  if (protocol_major(join.version()) != protocol_major(kProtocolVersion)) {
    pb::Envelope refusal;
    refusal.mutable_join_reply()->set_error(
        fmt::format("this site speaks protocol version {}, {} speaks {}: install the same release on both",
                    join.version(), options.site, kProtocolVersion));
    return reply(route.to_string(), refusal);
  }
  join_handler(route.to_string(), key, join);
}

void Transport::Impl::reply(const std::string& route, const pb::Envelope& head) {
  if (!router) return;
  zmq::message_t to(route);
  send_on(to, serialize(head));
}

void Transport::Impl::send_on(zmq::message_t& route, zmq::message_t frame) {
  if (send_frame(**router, route, true)) send_frame(**router, frame, false);
  more_to_read = true;  // sending may have eaten the descriptor's signal
}

// ---- connections

void Transport::Impl::pong_arrived(Link& link, Reactor::Clock::time_point sent,
                                   Reactor::Clock::time_point now) {
  if (!link.up()) return;
  // Who was not trusted for a while is not trusted again as if nothing had been.
  const bool lapsed = now - link.liveness.asked() > kPromiseTrust;
  if (lapsed) link.widen(Gap::doubt);
  const bool proof = link.liveness.pong(sent, now);
  if (proof || (lapsed && link.liveness.proven())) announce(link);
}

pb::Hello Transport::Impl::own_hello(const Link& link) const {
  pb::Hello own = hello ? hello() : pb::Hello();
  if (own.version() == 0) own.set_version(kProtocolVersion);
  if (own.incarnation() == 0) own.set_incarnation(incarnation);
  own.set_connection(link.connections);
  return own;
}

// Why this Hello is not acceptable, or empty.
std::string Transport::Impl::objection(const Link& link, const pb::Hello& said) const {
  if (protocol_major(said.version()) != protocol_major(kProtocolVersion))
    return fmt::format("it speaks protocol version {}, this site {}: install the same release on both",
                       said.version(), kProtocolVersion);
  // What operators remove counts without a bound.
  if (said.sites_size() > int{kMostSites} || said.removed_size() > 2 * int{kMostRemoved})
    return "it names more sites than a data set can have";
  const auto mine = own_hello(link).data_set();
  if (mine != 0 && said.data_set() != 0 && mine != said.data_set()) return "it serves another data set";
  return "";
}

void Transport::Impl::hello_arrived(Link& link, pb::Hello& said) {
  if (const auto why = objection(link, said); !why.empty()) {
    const auto now = Reactor::Clock::now();
    if (now - link.refusal_logged > kRefusalInterval) {
      log::error("{} is not connected: {}", link.site(), why);
      link.refusal_logged = now;
    }
    link.objection = why;
    link.hello.reset();
    return link.liveness.doubt(now);
  }
  link.objection.clear();
  const bool new_process = !link.hello || link.hello->incarnation() != said.incarnation();
  // What the other end has sent on the connection before may be lost.
  if (new_process || link.hello->connection() != said.connection()) link.widen(Gap::broken);
  if (!said.endpoint().empty()) check_endpoint(said.endpoint());
  link.hello = std::move(said);
  link.follow(Reactor::Clock::now());
  // The same process has connected anew, or has news; the other direction goes on working as proven.
  if (!new_process && link.liveness.proven()) return announce(link);
  link.liveness.doubt(Reactor::Clock::now());
  if (!link.up()) return;
  if (new_process) send_hello(link);
  send_ping(link);
}

void Transport::Impl::send_hello(Link& link) {
  pb::Envelope envelope;
  *envelope.mutable_hello() = own_hello(link);
  link.send(Lane::requests, serialize(envelope), {});
}

void Transport::Impl::send_ping(Link& link) {
  pb::Envelope envelope;
  envelope.mutable_ping()->set_sent(to_wire(Reactor::Clock::now()));
  link.send(Lane::requests, serialize(envelope), {});
}

// Up: greets. Down: what was on its way may be lost, so the site counts as connected only after a proof.
void Transport::Impl::link_changed(Link& link) {
  link.liveness.doubt(Reactor::Clock::now());
  link.widen(Gap::broken);
  if (!link.up()) return link.objection.clear();
  ++link.connections;
  send_hello(link);
  send_ping(link);
}

void Transport::Impl::announce(Link& link) {
  log::debug("{} is connected", link.site());
  const Gap gap = std::exchange(link.gap, Gap::none);
  if (on_connected) on_connected(link.site(), *link.hello, gap);
}

void Transport::Impl::tick() {
  timer = reactor.after(kPingInterval, [this] { tick(); });
  if (router) read_router();  // what has arrived counts before silence is judged
  if (slept.since_last_look()) {
    for (auto& [name, link] : links) {
      link->liveness.doubt(Reactor::Clock::now());
      link->widen(Gap::broken);
    }
    slept.look();
  }
  const auto now = Reactor::Clock::now();
  const auto late = now - last_tick - kPingInterval;
  last_tick = now;
  std::vector<SiteName> lost;
  for (auto& [name, link] : links) {
    if (late > kPingInterval) link->liveness.forgive(late);
    link->discard_incoming();
    if (link->inflow.flows()) link->liveness.heard(now);
    if (link->up()) send_ping(*link);
    if (link->liveness.expired(now)) {
      link->widen(Gap::doubt);
      lost.push_back(name);
    }
    link->maintain(now);
  }
  for (const auto& name : lost) {
    log::info("{} is not heard any more", name);
    if (on_lost) on_lost(name);
  }
}

// ---- the public face

Transport::Transport(Options options, Reactor& reactor)
    : impl_(std::make_unique<Impl>(std::move(options), reactor)) {}
Transport::~Transport() = default;

void Transport::add_site(const SiteName& site, const std::string& endpoint, const std::string& public_key) {
  if (site == impl_->options.site) return;
  check_name(site);
  check_key(public_key);
  if (!endpoint.empty()) check_endpoint(endpoint);
  const auto holder = impl_->senders.find(public_key);
  const bool taken =
      holder != impl_->senders.end() && (!holder->second.link || holder->second.link->site() != site);
  if (taken || public_key == impl_->options.keys.public_key)
    throw std::runtime_error(fmt::format("the key of site {} is another one's already", site));
  auto& link = impl_->links[site];
  const bool added = !link;
  if (added)
    link = std::make_unique<Link>(site, impl_->context, impl_->reactor, impl_->options.keys,
                                  [impl = impl_.get()](Link& changed) { impl->link_changed(changed); });
  impl_->senders.erase(link->public_key());
  impl_->senders[public_key] = {.link = link.get()};
  impl_->authenticator->forget_refusal(public_key);
  try {
    link->connect_to(endpoint, public_key);
  } catch (const zmq::error_t& error) {
    if (added) {
      impl_->senders.erase(public_key);
      impl_->links.erase(site);
    }
    throw std::runtime_error(
        fmt::format("cannot connect to site {} at {}: {}", site, endpoint, error.what()));
  }
}

void Transport::remove_site(const SiteName& site) {
  const auto found = impl_->links.find(site);
  if (found == impl_->links.end()) return;
  impl_->senders.erase(found->second->public_key());
  // Its last messages may be under way, and a message of its own may have asked for this.
  impl_->removed.push_back(std::move(found->second));
  impl_->links.erase(found);
  impl_->reactor.after(kFarewell, [weak = std::weak_ptr(impl_->alive)] {
    if (const auto self = weak.lock()) (*self)->removed.pop_front();
  });
}

void Transport::admit_invitation(const std::string& public_key) {
  check_key(public_key);
  impl_->senders.try_emplace(public_key);
  impl_->authenticator->forget_refusal(public_key);
}

void Transport::remove_invitation(const std::string& public_key) {
  const auto found = impl_->senders.find(public_key);
  if (found != impl_->senders.end() && !found->second.link) impl_->senders.erase(found);
}

void Transport::send(const SiteName& to, Lane lane, const pb::Envelope& head,
                     std::vector<zmq::message_t> parts) {
  send(to, lane, serialize(head), std::move(parts));
}

void Transport::send(const SiteName& to, Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts) {
  const auto found = impl_->links.find(to);
  if (found == impl_->links.end() || !found->second->send(lane, std::move(head), std::move(parts)))
    ++impl_->counters.undeliverable;
}

void Transport::send_soon(const SiteName& to, zmq::message_t head) {
  const auto found = impl_->links.find(to);
  if (found != impl_->links.end()) found->second->send_soon(std::move(head));
}

void Transport::reply_to_join(const std::string& route, const pb::Envelope& head) {
  impl_->reply(route, head);
}

void Transport::subscribe(pb::Envelope::BodyCase kind, Handler handler) {
  impl_->handlers.at(static_cast<std::size_t>(kind)) = std::move(handler);
}

void Transport::on_join(JoinHandler handler) { impl_->join_handler = std::move(handler); }

void Transport::on_connection(std::function<void(const SiteName&, const pb::Hello&, Gap)> connected,
                              std::function<void(const SiteName&)> lost) {
  impl_->on_connected = std::move(connected);
  impl_->on_lost = std::move(lost);
}

void Transport::set_hello(std::function<pb::Hello()> hello) { impl_->hello = std::move(hello); }

void Transport::greet_all() {
  for (auto& [name, link] : impl_->links) impl_->send_hello(*link);
}

bool Transport::knows(const SiteName& site) const {
  return site == impl_->options.site || impl_->links.contains(site);
}

bool Transport::connected(const SiteName& site) const {
  const auto found = impl_->links.find(site);
  return found != impl_->links.end() && found->second->up() && found->second->liveness.proven();
}

Transport::Trouble Transport::trouble(const SiteName& site) const {
  const auto found = impl_->links.find(site);
  if (found == impl_->links.end()) return Trouble::unreachable;
  return found->second->up_for(kWayBack) ? Trouble::one_way
         : found->second->refused()      ? Trouble::refused
                                         : Trouble::unreachable;
}

std::string Transport::objection(const SiteName& site) const {
  const auto found = impl_->links.find(site);
  return found == impl_->links.end() ? "" : found->second->objection;
}

Reactor::Clock::duration Transport::trusted_for(const SiteName& site, Reactor::Clock::duration within) const {
  const auto found = impl_->links.find(site);
  if (found == impl_->links.end() || !found->second->up()) return {};
  const auto& liveness = found->second->liveness;
  if (!liveness.proven() || impl_->slept.since_last_look()) return {};
  return std::max(within - (Reactor::Clock::now() - liveness.asked()), Reactor::Clock::duration::zero());
}

std::optional<Reactor::Clock::duration> Transport::arrived(const SiteName& site,
                                                           Reactor::Clock::duration ago) const {
  if (trusted_for(site, ago) == ago.zero()) return std::nullopt;
  const auto now = Reactor::Clock::now();
  return impl_->links.at(site)->liveness.arrived(now - ago, now);
}

Reactor::Clock::duration Transport::silence(const SiteName& site) const {
  const auto found = impl_->links.find(site);
  return found == impl_->links.end() ? Reactor::Clock::duration::max()
                                     : found->second->liveness.silence(Reactor::Clock::now());
}

Reactor::Clock::duration Transport::round_trip(const SiteName& site) const {
  const auto found = impl_->links.find(site);
  return found == impl_->links.end() ? Reactor::Clock::duration::zero()
                                     : found->second->liveness.round_trip();
}

std::string Transport::endpoint() const {
  return impl_->router ? (*impl_->router)->get(zmq::sockopt::last_endpoint) : std::string();
}

const SiteName& Transport::site() const { return impl_->options.site; }

const Transport::Counters& Transport::counters() const {
  impl_->counters.refused = impl_->authenticator->refused();
  return impl_->counters;
}

CurveKeys make_curve_keys() {
  std::array<char, 41> public_key{}, secret_key{};
  if (zmq_curve_keypair(public_key.data(), secret_key.data()) != 0)
    throw std::runtime_error("cannot make keys: this libzmq was built without CURVE");
  return {.public_key = public_key.data(), .secret_key = secret_key.data()};
}

void check_name(const SiteName& name) {
  constexpr std::string_view kAllowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  if (name.empty() || name.size() > 64 || name.find_first_not_of(kAllowed) != std::string::npos)
    throw std::runtime_error("a site's name is 1 to 64 of A-Z a-z 0-9 . _ -");
}

void check_can_listen(const std::string& endpoint) {
  check_endpoint(endpoint);
  zmq::context_t context;
  zmq::socket_t socket(context, zmq::socket_type::router);
  set_common_options(socket, endpoint);
  bind_to(socket, endpoint);
}

zmq::message_t copy_to_message(Bytes bytes) { return {bytes.data(), bytes.size()}; }

std::vector<zmq::message_t> copy_to_parts(Bytes bytes) {
  const std::size_t piece = std::max(kPartBytes, (bytes.size() + kMaxParts - 1) / kMaxParts);
  std::vector<zmq::message_t> parts;
  for (; bytes.size() > piece; bytes = bytes.subspan(piece))
    parts.push_back(copy_to_message(bytes.first(piece)));
  if (!bytes.empty()) parts.push_back(copy_to_message(bytes));
  return parts;
}

Bytes join_parts(const std::vector<zmq::message_t>& parts, std::string& buffer) {
  if (parts.empty()) return {};
  if (parts.size() == 1) return as_bytes(parts[0].to_string_view());
  buffer.clear();
  for (const auto& part : parts) buffer += part.to_string_view();
  return as_bytes(buffer);
}

zmq::message_t serialize(const pb::Envelope& head) {
  const auto size = head.ByteSizeLong();
  zmq::message_t frame(size);
  head.SerializeWithCachedSizesToArray(frame.data<std::uint8_t>());
  return frame;
}

}  // namespace sharefs
