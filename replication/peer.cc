#include "replication/peer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meta/log.h"

namespace sharefs {
namespace {

// The owner that we know says that it is not (yet): it may be about to take over.
constexpr std::chrono::milliseconds kFirstRetry{2};  // doubled each time
constexpr std::chrono::milliseconds kLastRetry{50};
constexpr auto kShortestTimeoutCheck = std::chrono::milliseconds(1);
// Requests that the Peer makes itself; the kernel's, the front end's and the site's have other bits.
constexpr std::uint64_t kPeerSeqBit = std::uint64_t{1} << 60;

struct RequestKey {
  std::uint64_t client;
  std::uint64_t seq;
  bool operator==(const RequestKey&) const = default;
};

struct RequestKeyHash {
  std::size_t operator()(const RequestKey& key) const { return key.client * 0x9e3779b97f4a7c15u ^ key.seq; }
};

// With --timeout. What gives something up, or was answered already, has to reach the owner: it would know of
// open files and locks for ever that nobody has, or not of those that somebody has.
bool may_fail(const pb::Request& request) {
  switch (request.op_case()) {
    case pb::Request::kRelease:
    case pb::Request::kReleasedir:
    case pb::Request::kFlush:
    case pb::Request::kCancel:
    case pb::Request::kForget:
    case pb::Request::kDetach:
      return false;
    case pb::Request::kSetlock:
      return request.setlock().range().type() != pb::LockRange::UNLOCKED;
    default:
      return !request.lazy() && request.write().lease() == 0;
  }
}

// The envelope of a request, without copying the request into it.
zmq::message_t serialize_ask(const pb::Request& request) {
  pb::Envelope envelope;
  auto* ask = envelope.mutable_ask();
  ask->unsafe_arena_set_allocated_request(const_cast<pb::Request*>(&request));
  zmq::message_t frame = serialize(envelope);
  ask->unsafe_arena_release_request();
  return frame;
}

// Of two messages in a row Protobuf makes one.
zmq::message_t with(const zmq::message_t& head, const std::string& more) {
  zmq::message_t whole(head.size() + more.size());
  std::memcpy(whole.data(), head.data(), head.size());
  std::memcpy(whole.data<char>() + head.size(), more.data(), more.size());
  return whole;
}

}  // namespace

struct Peer::Impl {
  struct Pending {
    RequestKey key;
    zmq::message_t head;  // kept to be sent again; what is sent shares its bytes
    std::vector<zmq::message_t> data;
    Reply reply;
    Reactor::Clock::time_point deadline{};
    std::uint64_t asked = 0;        // bits of the sites that it was sent to, see bit_of
    bool waits_for_others = false;  // a lock that somebody has; to be let in beside the only mount
    bool locks = false;             // and was not asked again yet
    bool sent = false;              // to the present owner, on a connection that has not broken since
    bool lazy = false;              // not sent yet: it travels with the next request
    bool unwanted = false;          // a lock that is given up: not to be granted when it is asked again
    std::uint64_t opens = 0;        // the handle; 0: none
    std::uint64_t cancels = 0;      // the seq; 0: none
  };
  using PendingMap = std::map<std::uint64_t, Pending>;  // by arrival

  Impl(Options the_options, Transport& the_transport, Reactor& the_reactor)
      : options(the_options), transport(the_transport), reactor(the_reactor) {}
  ~Impl();

  void execute(const pb::Request& request, Bytes data, Reply reply);
  void send(Pending& pending);
  void delay(Pending& pending);
  bool give_up(const RequestKey& key);
  void cancelled(const RequestKey& key);
  bool closes_unsent(const pb::Request& request);
  void send_lazy();
  static void asked_again(Pending& pending);
  void send_again();
  void send_unsent_soon();
  void send_unsent();
  void set_owner(const SiteName& new_owner, Epoch new_epoch);
  void answered(const SiteName& from, const pb::Answer& answer, Bytes data);
  void moved(const SiteName& from, const pb::Moved& moved);
  void attach_again(std::uint64_t client);
  void retry_soon();
  void begin_round();
  void resubmit_to(Executor& local);
  void resubmit_urgent_to(Executor& local);
  void finish(PendingMap::iterator which, const pb::Outcome& outcome, Bytes data);
  void fail(PendingMap::iterator which, int error);
  void time_out(PendingMap::iterator which);
  void close_late(const pb::Request& opened, const pb::Outcome& outcome);
  void fail_client(std::uint64_t client, int error);
  void check_timeouts();
  void arm_timeouts();
  std::uint64_t bit_of(const SiteName& site);
  PendingMap::iterator find(std::uint64_t client, std::uint64_t seq);

  // constant after construction
  const Options options;
  Transport& transport;
  Reactor& reactor;
  // reactor thread
  std::function<void(const SiteName&, Epoch)> on_moved;
  std::function<void()> on_stray_promise;
  std::function<std::vector<pb::Request>(ClientId)> holdings;
  SiteName owner;  // empty: this site, or nobody known
  Epoch epoch = 0;
  std::uint64_t owner_bit = 0;
  std::vector<SiteName> asked_sites;  // bit i of Pending::asked
  std::uint64_t next_number = 1;
  PendingMap pending;
  std::unordered_map<RequestKey, std::uint64_t, RequestKeyHash> numbers;
  bool sending_due = false;
  std::uint64_t round = 0;  // see Ask.round
  std::string round_bytes;  // of an Envelope that says so; empty for 0
  // Clients attached again in this round: their Attach, by seq.
  std::map<std::uint64_t, std::uint64_t> reattached;
  std::set<std::uint64_t> to_attach;  // ahead of all that is sent in the next round
  std::uint64_t next_attach = 1;
  Reactor::TimerId retry_timer = 0;
  std::chrono::milliseconds retry_delay = kFirstRetry;
  Reactor::TimerId timeout_timer = 0;
  std::vector<RequestKey> lazy;
  std::string joined;  // bytes that came in several parts
  Reactor::TimerId lazy_timer = 0;
  std::shared_ptr<int> alive = std::make_shared<int>();  // expires with this: for posted tasks
};

Peer::Impl::~Impl() {
  reactor.cancel(retry_timer);
  reactor.cancel(timeout_timer);
  reactor.cancel(lazy_timer);
}

// ---- asking

void Peer::Impl::execute(const pb::Request& request, Bytes data, Reply reply) {
  const RequestKey key{request.client(), request.seq()};
  if (const auto known = find(key.client, key.seq); known != pending.end()) {
    // Asked twice: both get the one answer.
    known->second.reply = [first = std::move(known->second.reply), second = std::move(reply)](
                              const pb::Outcome& outcome, Bytes bytes) {
      first(outcome, bytes);
      second(outcome, bytes);
    };
    return;
  }
  if (request.lazy() && closes_unsent(request)) return reply({}, {});
  if (request.has_cancel() && give_up({key.client, request.cancel().seq()})) return reply({}, {});
  const auto number = next_number++;
  auto& added = pending[number];
  added.key = key;
  added.head = serialize_ask(request);
  added.data = copy_to_parts(data);
  added.reply = std::move(reply);
  added.waits_for_others = request.setlock().wait() || request.has_attach();
  added.locks = request.has_setlock();
  added.cancels = request.cancel().seq();
  added.opens = request.has_open()     ? request.open().handle()
                : request.has_create() ? request.create().handle()
                                       : request.opendir().handle();
  numbers.emplace(key, number);
  if (options.timeout && may_fail(request)) {
    added.deadline = Reactor::Clock::now() + *options.timeout;
    arm_timeouts();
  } else {
    added.deadline = Reactor::Clock::time_point::max();
  }
  // Otherwise it goes with all the others as soon as the owner is there.
  if (sending_due || retry_timer != 0 || !transport.connected(owner)) return;
  if (request.lazy()) return delay(added);
  send_lazy();
  send(added);
}

// What was opened and closed before anybody told the owner need not be told: its files were read from what
// the kernel had kept. True if the request was such a Release; the Open is answered.
bool Peer::Impl::closes_unsent(const pb::Request& request) {
  const std::uint64_t handle =
      request.has_release() ? request.release().handle() : request.releasedir().handle();
  if (handle == 0) return false;
  for (const auto& key : lazy) {
    const auto found = find(key.client, key.seq);
    if (found == pending.end() || !found->second.lazy || found->second.opens != handle ||
        key.client != request.client())
      continue;
    finish(found, {}, {});
    return true;
  }
  return false;
}

// The caller of this request was killed. True: it was sent to nobody, and is not going to be. A lock is asked
// for in any case: what gives it up follows, and of a flock the old one may be gone. Asked again, it is not
// granted any more: what gives it up may be known there as performed, and the lock not.
bool Peer::Impl::give_up(const RequestKey& key) {
  const auto found = find(key.client, key.seq);
  if (found == pending.end()) return false;
  auto& head = found->second.head;
  pb::Envelope envelope;
  if (!envelope.ParseFromArray(head.data(), static_cast<int>(head.size()))) return false;
  pb::Request& request = *envelope.mutable_ask()->mutable_request();
  if (request.has_setlock()) {
    found->second.unwanted = true;
    return false;
  }
  if (found->second.asked == 0) {
    fail(found, EINTR);
    return true;
  }
  request.set_given_up(true);
  head = serialize(envelope);
  return false;
}

// The owner has performed the Cancel of a lock that waits: another one, which that had not reached, would
// grant the lock when it is asked again, to a caller that may be gone, and has given up all that it had.
void Peer::Impl::cancelled(const RequestKey& key) {
  const auto found = find(key.client, key.seq);
  if (found == pending.end()) return;
  pb::Envelope envelope;
  envelope.mutable_ask()->mutable_request()->set_given_up(true);
  const std::string mark = envelope.SerializeAsString();
  auto& head = found->second.head;
  head = with(head, mark);
  found->second.unwanted = false;
}

// Several messages sent at once wake the threads and the machine between here and the owner once.
void Peer::Impl::delay(Pending& which) {
  which.lazy = true;
  lazy.push_back(which.key);
  if (lazy_timer == 0)
    lazy_timer = reactor.after(kLaziness, [this] {
      lazy_timer = 0;
      if (!sending_due && retry_timer == 0 && transport.connected(owner)) send_lazy();
    });
}

void Peer::Impl::send_lazy() {
  for (const auto& key : std::exchange(lazy, {}))
    if (const auto found = find(key.client, key.seq); found != pending.end() && found->second.lazy)
      send(found->second);
}

void Peer::Impl::send(Pending& which) {
  if (which.unwanted && which.asked != 0) cancelled(which.key);
  if (which.asked != 0) asked_again(which);
  zmq::message_t head = with(which.head, round_bytes);
  std::vector<zmq::message_t> parts;
  for (auto& part : which.data) parts.emplace_back().copy(part);
  which.asked |= owner_bit;
  which.sent = true;
  which.lazy = false;
  transport.send(owner, Lane::requests, std::move(head), std::move(parts));
}

void Peer::Impl::asked_again(Pending& which) {
  if (std::exchange(which.locks, false)) which.reply = telling_of_changes(std::move(which.reply));
}

void Peer::Impl::send_again() {
  begin_round();
  send_unsent_soon();
}

void Peer::Impl::begin_round() {
  reattached.clear();
  pb::Envelope envelope;
  envelope.mutable_ask()->set_round(++round);
  round_bytes = envelope.SerializeAsString();
  for (auto& [number, one] : pending) one.sent = false;
}

// A new owner and a new connection often come together: everything is sent again once.
void Peer::Impl::send_unsent_soon() {
  if (std::exchange(sending_due, true)) return;
  reactor.post([this, watch = std::weak_ptr(alive)] {
    if (!watch.expired()) send_unsent();
  });
}

void Peer::Impl::send_unsent() {
  sending_due = false;
  if (owner.empty() || !transport.connected(owner)) return;  // connected() or set_owner() comes
  for (const auto client : std::exchange(to_attach, {})) attach_again(client);
  for (auto& [number, one] : pending)
    if (!one.sent) send(one);
}

void Peer::Impl::set_owner(const SiteName& new_owner, Epoch new_epoch) {
  if (new_owner.empty() || new_epoch < epoch) return;
  if (new_epoch == epoch && new_owner == owner) return;
  if (new_epoch == epoch && !owner.empty()) {
    log::error("two owners are named for epoch {}: {} and {}; the first one is believed", epoch, owner,
               new_owner);
    return;
  }
  owner = new_owner;
  epoch = new_epoch;
  owner_bit = bit_of(owner);
  to_attach.clear();
  send_again();
}

// Beyond 64 owners bits are shared: then only fewer answers are doubted.
std::uint64_t Peer::Impl::bit_of(const SiteName& site) {
  const auto found = std::find(asked_sites.begin(), asked_sites.end(), site);
  const auto index = static_cast<std::size_t>(found - asked_sites.begin());
  if (found == asked_sites.end()) asked_sites.push_back(site);
  return std::uint64_t{1} << (index % 64);
}

Peer::Impl::PendingMap::iterator Peer::Impl::find(std::uint64_t client, std::uint64_t seq) {
  const auto found = numbers.find({client, seq});
  return found == numbers.end() ? pending.end() : pending.find(found->second);
}

// ---- answers

void Peer::Impl::finish(PendingMap::iterator which, const pb::Outcome& outcome, Bytes data) {
  retry_delay = kFirstRetry;
  const Reply reply = std::move(which->second.reply);
  numbers.erase(which->second.key);
  pending.erase(which);
  reply(outcome, data);
}

void Peer::Impl::fail(PendingMap::iterator which, int error) {
  pb::Outcome outcome;
  outcome.set_error(static_cast<std::uint32_t>(error));
  finish(which, outcome, {});
}

void Peer::Impl::answered(const SiteName& from, const pb::Answer& answer, Bytes data) {
  const auto attached = reattached.find(answer.client());
  if (attached != reattached.end() && attached->second == answer.seq() && from == owner) {
    if (answer.outcome().error() != 0)
      fail_client(answer.client(), static_cast<int>(answer.outcome().error()));
    return;
  }
  const auto found = find(answer.client(), answer.seq());
  if (found == pending.end() && answer.outcome().promise() != 0 && on_stray_promise) on_stray_promise();
  if (found == pending.end() || !(found->second.asked & bit_of(from))) return;
  if (found->second.cancels != 0) cancelled({answer.client(), found->second.cancels});
  finish(found, answer.outcome(), data);
}

// The owner would not have the client back: nothing that it asks can succeed.
void Peer::Impl::fail_client(std::uint64_t client, int error) {
  log::error("{} does not admit this mount any more: {}", owner, std::strerror(error));
  reattached.erase(client);
  std::vector<RequestKey> keys;
  for (const auto& [number, one] : pending)
    if (one.key.client == client && one.asked) keys.push_back(one.key);
  for (const auto& key : keys)
    if (const auto found = find(key.client, key.seq); found != pending.end()) fail(found, ESTALE);
}

void Peer::Impl::moved(const SiteName& from, const pb::Moved& moved) {
  const auto found = find(moved.client(), moved.seq());
  const bool present = from == owner && moved.round() == round;
  // What attaches a client again is nobody's request, but not to be lost either.
  const bool attaches = found == pending.end() && present && reattached.contains(moved.client());
  if (!attaches && (found == pending.end() || !(found->second.asked & bit_of(from)))) return;
  if (moved.owner() == from) {
    if (!present) return;  // sent again in any case
    to_attach.insert(moved.client());
    return send_again();
  }
  if (moved.epoch() > epoch && transport.knows(moved.owner())) {
    set_owner(moved.owner(), moved.epoch());
    if (on_moved) on_moved(moved.owner(), moved.epoch());
    return;
  }
  // Of an earlier owner or round: the request has been sent again, or will be when the owner is connected.
  if (!present) return;
  if (attaches) to_attach.insert(moved.client());
  retry_soon();
}

void Peer::Impl::attach_again(std::uint64_t client) {
  const auto [known, added] = reattached.try_emplace(client, kPeerSeqBit | next_attach);
  if (!added) return;
  ++next_attach;
  pb::Request request;
  request.set_client(client);
  request.set_seq(known->second);
  request.mutable_attach()->set_site(transport.site());
  transport.send(owner, Lane::requests, with(serialize_ask(request), round_bytes));
  if (!holdings) return;
  for (auto& held : holdings(client)) {
    held.set_seq(kPeerSeqBit | next_attach++);
    transport.send(owner, Lane::requests, with(serialize_ask(held), round_bytes));
  }
}

// Everything is sent again, and nothing that is asked meanwhile before it: what gives a lock up, or cancels
// the wait for it, would come before the lock, which nobody would give up then.
void Peer::Impl::retry_soon() {
  begin_round();
  if (retry_timer) return;
  retry_timer = reactor.after(retry_delay, [this] {
    retry_timer = 0;
    retry_delay = std::min(2 * retry_delay, kLastRetry);
    send_unsent();
  });
}

// ---- this site becomes the owner

void Peer::Impl::resubmit_to(Executor& local) {
  owner.clear();
  owner_bit = 0;
  reattached.clear();
  to_attach.clear();
  while (!pending.empty()) {  // an answer may make one more, see close_late()
    numbers.clear();
    for (auto& [number, one] : std::exchange(pending, {})) {
      pb::Envelope envelope;
      if (!envelope.ParseFromArray(one.head.data(), static_cast<int>(one.head.size())))
        throw std::logic_error("a kept request cannot be read");
      pb::Request& request = *envelope.mutable_ask()->mutable_request();
      if (one.unwanted && one.asked != 0) request.set_given_up(true);
      if (one.asked != 0) asked_again(one);
      local.execute(request, join_parts(one.data, joined), std::move(one.reply));
    }
  }
}

void Peer::Impl::resubmit_urgent_to(Executor& local) {
  std::vector<std::pair<pb::Envelope, Pending>> urgent;
  for (auto one = pending.begin(); one != pending.end();) {
    pb::Envelope envelope;
    const auto& head = one->second.head;
    const bool parsed = envelope.ParseFromArray(head.data(), static_cast<int>(head.size()));
    const pb::Request& request = envelope.ask().request();
    if (!parsed || (op_class(request.op_case()) != OpClass::query && !request.write().writeback())) {
      ++one;
      continue;
    }
    numbers.erase(one->second.key);
    urgent.emplace_back(std::move(envelope), std::move(one->second));
    one = pending.erase(one);
  }
  for (auto& [envelope, one] : urgent)
    local.execute(envelope.ask().request(), join_parts(one.data, joined), std::move(one.reply));
}

// ---- timeouts

void Peer::Impl::arm_timeouts() {
  if (timeout_timer) return;
  const auto interval = std::max<Reactor::Clock::duration>(*options.timeout / 8, kShortestTimeoutCheck);
  timeout_timer = reactor.after(interval, [this] {
    timeout_timer = 0;
    check_timeouts();
    if (!pending.empty()) arm_timeouts();
  });
}

// Deadlines are in the order of arrival, except of what waits for others, which a connected owner extends.
void Peer::Impl::check_timeouts() {
  const auto now = Reactor::Clock::now();
  const bool reachable = transport.connected(owner);
  std::vector<RequestKey> late;
  for (auto& [number, one] : pending) {
    const bool may_fail = one.deadline != Reactor::Clock::time_point::max();
    if (may_fail && one.waits_for_others && reachable) one.deadline = now + *options.timeout;
    if (one.deadline <= now)
      late.push_back(one.key);
    else if (!one.waits_for_others && may_fail)
      break;
  }
  for (const auto& key : late)
    if (const auto found = find(key.client, key.seq); found != pending.end()) time_out(found);
}

// What the owner may perform all the same leaves nothing open there: an Open is waited for, though its caller
// has its answer. What is sent again for it is not performed any more. Nor does it leave a lock that waits,
// and would be granted to nobody: that is cancelled. (One that was granted goes when its file is closed.)
void Peer::Impl::time_out(PendingMap::iterator which) {
  Pending& one = which->second;
  pb::Envelope envelope;
  const bool known = envelope.ParseFromArray(one.head.data(), static_cast<int>(one.head.size()));
  const bool locks = envelope.ask().request().has_setlock();
  if ((one.opens == 0 && !locks) || one.asked == 0 || !known) return fail(which, ETIMEDOUT);
  if (locks) {
    pb::Request cancel;
    cancel.set_client(one.key.client);
    cancel.set_seq(kPeerSeqBit | next_attach++);
    cancel.mutable_cancel()->set_seq(one.key.seq);
    fail(which, ETIMEDOUT);
    return execute(cancel, {}, [](const pb::Outcome&, Bytes) {});
  }
  give_up(one.key);
  one.deadline = Reactor::Clock::time_point::max();
  const Reply reply =
      std::exchange(one.reply, [this, opened = envelope.ask().request()](const pb::Outcome& outcome, Bytes) {
        // It may have been performed, and the answer be lost and no longer known there (ESTALE).
        if (outcome.error() == 0 || outcome.error() == ESTALE) close_late(opened, outcome);
      });
  reply_errno(reply, ETIMEDOUT);
}

void Peer::Impl::close_late(const pb::Request& opened, const pb::Outcome& outcome) {
  if (outcome.promise() != 0 && on_stray_promise) on_stray_promise();
  pb::Request close;
  close.set_client(opened.client());
  close.set_seq(kPeerSeqBit | next_attach++);
  close.set_lazy(true);
  if (opened.has_opendir()) {
    close.mutable_releasedir()->set_id(opened.opendir().id());
    close.mutable_releasedir()->set_handle(opened.opendir().handle());
  } else {
    close.mutable_release()->set_id(opened.has_create() ? outcome.attr().id() : opened.open().id());
    close.mutable_release()->set_handle(opened.has_create() ? opened.create().handle()
                                                            : opened.open().handle());
  }
  execute(close, {}, [](const pb::Outcome&, Bytes) {});
}

// ---- the public face

Reply telling_of_changes(Reply granted) {
  return [granted = std::move(granted)](const pb::Outcome& outcome, Bytes data) {
    pb::Outcome told = outcome;
    told.set_changes_met(true);
    granted(told, data);
  };
}

Peer::Peer(Options options, Transport& transport, Reactor& reactor)
    : impl_(std::make_unique<Impl>(options, transport, reactor)) {}
Peer::~Peer() = default;

void Peer::execute(const pb::Request& request, Bytes data, Reply reply) {
  impl_->execute(request, data, std::move(reply));
}

void Peer::execute_again(const pb::Request& request, Bytes data, Reply reply) {
  impl_->execute(request, data,
                 request.has_setlock() ? telling_of_changes(std::move(reply)) : std::move(reply));
}

void Peer::cancelled(std::uint64_t client, std::uint64_t seq) { impl_->cancelled({client, seq}); }
void Peer::set_owner(const SiteName& owner, Epoch epoch) { impl_->set_owner(owner, epoch); }
void Peer::for_each_unanswered(const std::function<void(const pb::Request&)>& visit) {
  for (const auto& [number, one] : impl_->pending) {
    pb::Envelope envelope;
    if (envelope.ParseFromArray(one.head.data(), static_cast<int>(one.head.size())))
      visit(envelope.ask().request());
  }
}
void Peer::resubmit_to(Executor& local) { impl_->resubmit_to(local); }
void Peer::resubmit_urgent_to(Executor& local) { impl_->resubmit_urgent_to(local); }
void Peer::on_moved(std::function<void(const SiteName&, Epoch)> moved) { impl_->on_moved = std::move(moved); }

void Peer::on_stray_promise(std::function<void()> stray) { impl_->on_stray_promise = std::move(stray); }

void Peer::answer(const SiteName& from, const Message& message) {
  if (message.head.has_moved()) return impl_->moved(from, message.head.moved());
  if (!message.head.has_answer()) return;
  impl_->answered(from, message.head.answer(), join_parts(message.parts, impl_->joined));
}

void Peer::connected(const SiteName& site, bool broken) {
  if (site != impl_->owner) return;
  if (broken)
    impl_->send_again();
  else
    impl_->send_unsent_soon();
}

void Peer::remember(std::function<std::vector<pb::Request>(ClientId)> holdings) {
  impl_->holdings = std::move(holdings);
}
std::size_t Peer::unanswered() const { return impl_->pending.size(); }

}  // namespace sharefs
