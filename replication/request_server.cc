#include "replication/request_server.h"

#include <algorithm>
#include <cerrno>
#include <deque>
#include <string>
#include <unordered_map>
#include <utility>

#include "meta/log.h"
#include "replication/request_check.h"

namespace sharefs {
namespace {

// Replies kept per client, should it never say what it has received. A kernel has far fewer requests under
// way.
constexpr std::size_t kMaxAnswered = 4096;
// Requests with a seq from here on are not the kernel's (Attach, Forget ...): answered_below never frees
// them, and they are few.
constexpr std::uint64_t kOwnSeqs = std::uint64_t{1} << 60;
constexpr std::size_t kMaxOwnAnswered = 256;
// Requests that may wait for a takeover to end, and their bytes. Whoever asks more is to ask again, as before
// the takeover.
constexpr std::size_t kMaxWaiting = 65536;
constexpr std::size_t kMaxWaitingBytes = std::size_t{64} << 20;
static_assert(kMaxOwnAnswered < kMaxAnswered);

// The outcome is lent to the envelope for the time of serializing, so that it is not copied.
zmq::message_t serialize_answer(std::uint64_t client, std::uint64_t seq, const pb::Outcome& outcome) {
  pb::Envelope envelope;
  auto* answer = envelope.mutable_answer();
  answer->set_client(client);
  answer->set_seq(seq);
  answer->unsafe_arena_set_allocated_outcome(const_cast<pb::Outcome*>(&outcome));
  zmq::message_t frame = serialize(envelope);
  answer->unsafe_arena_release_outcome();
  return frame;
}

}  // namespace

struct RequestServer::Impl {
  // A request that is being performed, or waits in the gate. Belongs to the closure that takes its reply: a
  // gate that lets go of a request (it is asked again elsewhere) ends it.
  struct Execution {
    std::uint64_t client;
    std::uint64_t seq;
    pb::Request::OpCase op;
    bool waits_for_lock;
    bool lazy;                   // nobody waits for the outcome
    SiteName asker;              // the site that asked last; empty: none
    std::vector<Reply> replies;  // of askers at this site
  };
  struct Kept {
    pb::Outcome outcome;
    std::string data;
  };
  struct Window {
    SiteName site;
    std::uint64_t answered_below = 0;
    std::uint64_t ahead_answered_below = kAheadSeqBit;
    // Of the two ranges in which a client counts what it asks.
    bool is_freed(std::uint64_t seq) const {
      return seq < answered_below || (seq >= kAheadSeqBit && seq < ahead_answered_below);
    }
    std::map<std::uint64_t, Kept> answered;
    std::deque<std::uint64_t> kept;  // of the kernel's, in the order in which they were kept; some are freed
    std::unordered_map<std::uint64_t, std::weak_ptr<Execution>> running;
  };
  struct Waiting {
    SiteName from;
    Message message;
  };
  enum class Mode { redirecting, taking_over, serving };

  // Performs what the windows do not know.
  class Once final : public Executor {
   public:
    Once(Impl& impl, Executor& local) : impl_(impl), local_(local) {}
    void execute(const pb::Request& request, Bytes data, Reply reply) override {
      impl_.execute_once(request, data, std::move(reply), local_);
    }

   private:
    Impl& impl_;
    Executor& local_;
  };

  Impl(Transport& the_transport, Executor& the_local) : transport(the_transport), local(the_local) {}

  void receive(const SiteName& from, Message& message);
  void ask(const SiteName& from, Message& message);
  void perform(const SiteName& from, const pb::Ask& ask, Bytes data);
  void let_in(const SiteName& from, const pb::Request& request, const std::shared_ptr<Execution>& execution);
  void execute_once(const pb::Request& request, Bytes data, Reply reply, Executor& performer);
  void run(std::shared_ptr<Execution> execution, const pb::Request& request, Bytes data);
  static std::shared_ptr<Execution> new_execution(const SiteName& asker, const pb::Request& request);
  void finished(Execution& execution, const pb::Outcome& outcome, Bytes data);
  void settle(Execution& execution, const pb::Outcome& outcome, Bytes data);
  void forestall(Window& window, std::uint64_t seq);
  void keep(Window& window, std::uint64_t seq, const pb::Outcome& outcome, Bytes data);
  static void free_answered(Window& window, std::uint64_t below, std::uint64_t ahead_below);
  static void free_all_ahead(Window& window);
  bool admit(const SiteName& site, std::uint64_t client);
  void expire(const SiteName& site, std::uint64_t except);
  bool is_unanswered(const SiteName& from, const pb::Request& request) const;
  void end_takeover();
  void redirect(const SiteName& to, Epoch at);
  void answer(const SiteName& to, std::uint64_t client, std::uint64_t seq, const pb::Outcome& outcome,
              Bytes data);
  void refuse(const SiteName& to, const pb::Request& request, int error);
  void send_away(const SiteName& from, const pb::Ask& ask, const SiteName& where);
  void say_moved(const SiteName& to, const pb::Request& request, std::uint64_t round, const SiteName& where);

  // constant after construction
  Transport& transport;
  Executor& local;
  // reactor thread
  Mode mode = Mode::redirecting;
  SiteName owner;
  Epoch epoch = 0;
  std::unordered_map<std::uint64_t, Window> windows;
  std::map<SiteName, std::vector<std::weak_ptr<Execution>>> ending;  // what expired clients asked
  std::deque<Waiting> waiting;                                       // asked during a takeover
  std::size_t waited = 0, waited_bytes = 0;                          // of these, and of those sent away
  // The last round (Ask.round) of a site in which something was sent away, whose, and where to.
  struct SentAway {
    std::uint64_t client = 0, round = 0;
    SiteName where;
  };
  std::map<SiteName, SentAway> sent_away;
  std::string joined;  // bytes that came in several parts
  std::function<void(const pb::Request&)> waits;
};

// ---- executions

std::shared_ptr<RequestServer::Impl::Execution> RequestServer::Impl::new_execution(
    const SiteName& asker, const pb::Request& request) {
  return std::make_shared<Execution>(Execution{.client = request.client(),
                                               .seq = request.seq(),
                                               .op = request.op_case(),
                                               .waits_for_lock = request.setlock().wait(),
                                               .lazy = request.lazy(),
                                               .asker = asker,
                                               .replies = {}});
}

void RequestServer::Impl::run(std::shared_ptr<Execution> execution, const pb::Request& request, Bytes data) {
  local.execute(request, data,
                [this, execution = std::move(execution)](const pb::Outcome& outcome, Bytes bytes) {
                  finished(*execution, outcome, bytes);
                });
}

void RequestServer::Impl::finished(Execution& execution, const pb::Outcome& outcome, Bytes data) {
  if (op_class(execution.op) != OpClass::query) settle(execution, outcome, data);
  if (!execution.asker.empty() && execution.lazy && data.empty())
    transport.send_soon(execution.asker, serialize_answer(execution.client, execution.seq, outcome));
  else if (!execution.asker.empty())
    answer(execution.asker, execution.client, execution.seq, outcome, data);
  for (const auto& reply : std::exchange(execution.replies, {})) reply(outcome, data);
}

// What a performed request means for its client's window.
void RequestServer::Impl::settle(Execution& execution, const pb::Outcome& outcome, Bytes data) {
  const auto found = windows.find(execution.client);
  if (found == windows.end()) return;  // detached, or handed over, meanwhile
  Window& window = found->second;
  const auto running = window.running.find(execution.seq);
  if (running != window.running.end() && running->second.lock().get() == &execution)
    window.running.erase(running);
  const bool gone = execution.op == pb::Request::kDetach && outcome.error() == 0;
  const bool never_came = execution.op == pb::Request::kAttach && outcome.error() != 0 &&
                          window.answered.empty() && window.running.empty();
  if (gone || never_came)
    windows.erase(found);
  else
    keep(window, execution.seq, outcome, data);
}

// ---- windows

void RequestServer::Impl::keep(Window& window, std::uint64_t seq, const pb::Outcome& outcome, Bytes data) {
  const auto [kept, first_time] = window.answered.try_emplace(seq);
  kept->second = {.outcome = outcome, .data = std::string(as_text(data))};
  if (seq >= kOwnSeqs) {
    const auto first = window.answered.lower_bound(kOwnSeqs);
    if (static_cast<std::size_t>(std::distance(first, window.answered.end())) > kMaxOwnAnswered)
      window.answered.erase(first);
    return;
  }
  // The oldest answer goes, which need not be that to the oldest request: it may have taken long.
  if (!first_time) return;
  window.kept.push_back(seq);
  if (window.kept.size() <= kMaxAnswered - kMaxOwnAnswered) return;
  window.answered.erase(window.kept.front());
  window.kept.pop_front();
}

void RequestServer::Impl::free_all_ahead(Window& window) {
  const auto last = window.answered.lower_bound(kOwnSeqs);
  if (last == window.answered.begin()) return;
  const auto seq = std::prev(last)->first;
  if (seq >= kAheadSeqBit) free_answered(window, 0, seq + 1);
}

// The request has not come before. It is not performed for a caller that was killed, nor is a copy that a
// connection which was given up still delivers.
void RequestServer::Impl::forestall(Window& window, std::uint64_t seq) {
  pb::Outcome interrupted;
  interrupted.set_error(EINTR);
  window.running.erase(seq);
  keep(window, seq, interrupted, {});
}

void RequestServer::Impl::free_answered(Window& window, std::uint64_t below, std::uint64_t ahead_below) {
  if (below <= window.answered_below && ahead_below <= window.ahead_answered_below) return;
  window.answered_below = std::max(window.answered_below, below);
  window.ahead_answered_below = std::max(window.ahead_answered_below, ahead_below);
  auto& answered = window.answered;
  answered.erase(answered.begin(), answered.lower_bound(std::min(window.answered_below, kAheadSeqBit)));
  answered.erase(answered.lower_bound(kAheadSeqBit), answered.lower_bound(window.ahead_answered_below));
  while (!window.kept.empty() && window.is_freed(window.kept.front())) window.kept.pop_front();
}

// False: the site has had a later mount, or the client is another site's.
bool RequestServer::Impl::admit(const SiteName& site, std::uint64_t client) {
  if (const auto known = windows.find(client); known != windows.end() && known->second.site != site)
    return false;
  for (const auto& [other, window] : windows)
    if (window.site == site && other > client) return false;
  expire(site, client);
  windows[client].site = site;
  return true;
}

void RequestServer::Impl::expire(const SiteName& site, std::uint64_t except) {
  std::erase_if(windows, [&](const auto& one) {
    const auto& [client, window] = one;
    if (window.site != site || client == except) return false;
    for (const auto& [seq, execution] : window.running) ending[site].push_back(execution);
    return true;
  });
}

// ---- requests of other sites

// What was on its way behind a request that was sent away comes before that is asked again, but not first: of
// what gives up a lock nothing would be left by then.
void RequestServer::Impl::receive(const SiteName& from, Message& message) {
  const pb::Ask& asked = message.head.ask();
  if (const auto found = sent_away.find(from); found != sent_away.end()) {
    if (asked.request().client() == found->second.client && asked.round() <= found->second.round)
      return say_moved(from, asked.request(), asked.round(),
                       mode == Mode::redirecting ? owner : found->second.where);
    sent_away.erase(found);
  }
  ask(from, message);
}

void RequestServer::Impl::send_away(const SiteName& from, const pb::Ask& ask, const SiteName& where) {
  sent_away[from] = {.client = ask.request().client(), .round = ask.round(), .where = where};
  say_moved(from, ask.request(), ask.round(), where);
}

void RequestServer::Impl::ask(const SiteName& from, Message& message) {
  const pb::Request& request = message.head.ask().request();
  if (mode == Mode::redirecting) return send_away(from, message.head.ask(), owner);
  const Bytes data = join_parts(message.parts, joined);
  if (const int error = check_request(request, data); error != 0) return refuse(from, request, error);
  if (mode == Mode::taking_over && op_class(request.op_case()) != OpClass::query &&
      !request.write().writeback()) {
    // What is not kept counts, too: nothing that comes behind it is to overtake it.
    ++waited;
    waited_bytes += request.ByteSizeLong() + data.size();
    if (waited <= kMaxWaiting && waits && is_unanswered(from, request)) waits(request);
    if (waited > kMaxWaiting || waited_bytes > kMaxWaitingBytes)
      return send_away(from, message.head.ask(), owner);
    waiting.push_back({from, std::move(message)});
    return;
  }
  perform(from, message.head.ask(), data);
}

// As far as the windows know: not a late copy.
bool RequestServer::Impl::is_unanswered(const SiteName& from, const pb::Request& request) const {
  const auto found = windows.find(request.client());
  return found != windows.end() && found->second.site == from && !found->second.is_freed(request.seq()) &&
         !found->second.answered.contains(request.seq());
}

void RequestServer::Impl::perform(const SiteName& from, const pb::Ask& ask, Bytes data) {
  const pb::Request& request = ask.request();
  auto found = windows.find(request.client());
  if (found != windows.end() && found->second.site != from) return refuse(from, request, EPERM);
  if (request.has_attach()) {
    if (request.attach().site() != from) return refuse(from, request, EPERM);
    if (!admit(from, request.client())) return refuse(from, request, ESTALE);
    found = windows.find(request.client());
  }
  if (found == windows.end()) {
    // Detached already, if that is what it asks; otherwise it is attached again first.
    if (request.has_detach()) return refuse(from, request, 0);
    return send_away(from, ask, transport.site());
  }
  Window& window = found->second;
  free_answered(window, request.answered_below(), request.ahead_answered_below());
  if (op_class(request.op_case()) == OpClass::query) {
    return run(new_execution(from, request), request, data);
  }
  if (const auto kept = window.answered.find(request.seq()); kept != window.answered.end())
    return answer(from, request.client(), request.seq(), kept->second.outcome, as_bytes(kept->second.data));
  if (const auto running = window.running.find(request.seq()); running != window.running.end()) {
    if (const auto execution = running->second.lock()) {
      execution->asker = from;
      return;
    }
  }
  if (window.is_freed(request.seq())) return refuse(from, request, ESTALE);
  if (request.given_up() && !request.has_setlock()) {
    forestall(window, request.seq());
    return refuse(from, request, EINTR);
  }
  const auto execution = new_execution(from, request);
  window.running[request.seq()] = execution;
  if (request.has_attach()) return let_in(from, request, execution);
  run(execution, request, data);
}

// The site's mount before this one has ended, and with it whatever would wait for long. What else it asked
// and is under way (it may wait for other sites) is performed before the new one looks.
void RequestServer::Impl::let_in(const SiteName& from, const pb::Request& request,
                                 const std::shared_ptr<Execution>& execution) {
  local.execute(request, {}, [this, from, execution](const pb::Outcome& outcome, Bytes) {
    std::vector<std::shared_ptr<Execution>> earlier;
    const auto node = ending.extract(from);
    if (!node.empty())
      for (const auto& one : node.mapped())
        if (auto running = one.lock()) earlier.push_back(std::move(running));
    if (earlier.empty()) return finished(*execution, outcome, {});
    const auto left = std::make_shared<std::size_t>(earlier.size());
    for (const auto& one : earlier)
      one->replies.push_back([this, execution, outcome, left](const pb::Outcome&, Bytes) {
        if (--*left == 0) finished(*execution, outcome, {});
      });
  });
}

void RequestServer::Impl::answer(const SiteName& to, std::uint64_t client, std::uint64_t seq,
                                 const pb::Outcome& outcome, Bytes data) {
  transport.send(to, Lane::requests, serialize_answer(client, seq, outcome), copy_to_parts(data));
}

// Answers without performing anything; 0: there was nothing to do.
void RequestServer::Impl::refuse(const SiteName& to, const pb::Request& request, int error) {
  pb::Outcome outcome;
  outcome.set_error(static_cast<std::uint32_t>(error));
  answer(to, request.client(), request.seq(), outcome, {});
}

void RequestServer::Impl::say_moved(const SiteName& to, const pb::Request& request, std::uint64_t round,
                                    const SiteName& where) {
  pb::Envelope envelope;
  auto* moved = envelope.mutable_moved();
  moved->set_client(request.client());
  moved->set_seq(request.seq());
  moved->set_round(round);
  moved->set_epoch(epoch);
  moved->set_owner(where);
  transport.send(to, Lane::requests, envelope);
}

// ---- takeover and redirection

void RequestServer::Impl::end_takeover() {
  mode = Mode::serving;
  for (auto& [from, message] : std::exchange(waiting, {})) ask(from, message);
}

void RequestServer::Impl::redirect(const SiteName& to, Epoch at) {
  mode = Mode::redirecting;
  owner = to;
  epoch = at;
  for (auto& [client, window] : windows)
    for (auto& [seq, running] : window.running)
      // Held records are answered here, with what the new owner made of them. A waiting lock is not: its site
      // asks the new owner again, where it goes on waiting.
      if (const auto execution = running.lock(); execution && execution->waits_for_lock)
        execution->asker.clear();
  windows.clear();
  for (auto& [from, message] : std::exchange(waiting, {})) ask(from, message);
}

// For what this site's own mount asked an earlier owner: it may have been a record, or be one of another
// asker. And for records: a writeback among them may have been performed already, and its page have been
// written again since.
void RequestServer::Impl::execute_once(const pb::Request& request, Bytes data, Reply reply,
                                       Executor& performer) {
  const auto found = windows.find(request.client());
  if (found == windows.end() || op_class(request.op_case()) == OpClass::query)
    return performer.execute(request, data, std::move(reply));
  Window& window = found->second;
  if (const auto kept = window.answered.find(request.seq()); kept != window.answered.end())
    return reply(kept->second.outcome, as_bytes(kept->second.data));
  if (const auto running = window.running.find(request.seq()); running != window.running.end()) {
    if (const auto execution = running->second.lock()) {
      execution->replies.push_back(std::move(reply));
      return;
    }
  }
  if (request.given_up() && !request.has_setlock()) {
    forestall(window, request.seq());
    return reply_errno(reply, EINTR);
  }
  const auto execution = new_execution({}, request);
  execution->replies.push_back(std::move(reply));
  window.running[request.seq()] = execution;
  performer.execute(request, data, [this, execution](const pb::Outcome& outcome, Bytes bytes) {
    finished(*execution, outcome, bytes);
  });
}

// ---- the public face

RequestServer::RequestServer(Transport& transport, Executor& local)
    : impl_(std::make_unique<Impl>(transport, local)) {}
RequestServer::~RequestServer() = default;

bool RequestServer::admit(const SiteName& site, std::uint64_t client) { return impl_->admit(site, client); }
void RequestServer::expire(const SiteName& site, std::uint64_t except) { impl_->expire(site, except); }
void RequestServer::on_takeover(std::function<void(const pb::Request&)> waits) {
  impl_->waits = std::move(waits);
}
void RequestServer::ahead_answered(std::uint64_t client) {
  const auto found = impl_->windows.find(client);
  if (found != impl_->windows.end()) RequestServer::Impl::free_all_ahead(found->second);
}
void RequestServer::serve() { impl_->end_takeover(); }
void RequestServer::redirect(const SiteName& owner, Epoch epoch) { impl_->redirect(owner, epoch); }
void RequestServer::ask(const SiteName& from, Message message) {
  if (message.head.has_ask()) impl_->receive(from, message);
}

std::unique_ptr<Executor> RequestServer::once(Executor& local) {
  return std::make_unique<Impl::Once>(*impl_, local);
}

void RequestServer::note(const pb::Request& request, const pb::Outcome& outcome, Bytes data) {
  if (op_class(request.op_case()) == OpClass::query) return;
  const auto found = impl_->windows.find(request.client());
  if (found == impl_->windows.end()) return;
  if (request.has_detach() && outcome.error() == 0)
    impl_->windows.erase(found);
  else
    impl_->keep(found->second, request.seq(), outcome, data);
}

bool RequestServer::answer_known(const SiteName& site, const pb::Request& request) {
  const auto found = impl_->windows.find(request.client());
  if (found == impl_->windows.end() || found->second.site != site) return false;
  const auto kept = found->second.answered.find(request.seq());
  if (kept == found->second.answered.end()) return false;
  impl_->answer(site, request.client(), request.seq(), kept->second.outcome, as_bytes(kept->second.data));
  return true;
}

std::vector<pb::Client> RequestServer::windows() const {
  std::vector<pb::Client> all;
  for (const auto& [id, window] : impl_->windows) {
    pb::Client client;
    client.set_client(id);
    client.set_site(window.site);
    client.set_answered_below(window.answered_below);
    client.set_ahead_answered_below(window.ahead_answered_below);
    // What this site's own mount has asked since was answered in this process.
    const bool own = window.site == impl_->transport.site();
    for (const auto& [seq, kept] : window.answered) {
      if (own) break;
      auto* answered = client.add_answered();
      answered->set_seq(seq);
      *answered->mutable_outcome() = kept.outcome;
      answered->set_data(kept.data);
    }
    all.push_back(std::move(client));
  }
  return all;
}

void RequestServer::restore(const std::vector<pb::Client>& windows) {
  impl_->mode = Impl::Mode::taking_over;
  impl_->waited = impl_->waited_bytes = 0;
  impl_->windows.clear();
  for (const auto& client : windows) {
    auto& window = impl_->windows[client.client()];
    window.site = client.site();
    window.answered_below = client.answered_below();
    window.ahead_answered_below = std::max(client.ahead_answered_below(), kAheadSeqBit);
    for (const auto& answered : client.answered())
      impl_->keep(window, answered.seq(), answered.outcome(), as_bytes(answered.data()));
  }
}

}  // namespace sharefs
