#include "fs/promises.h"

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

namespace sharefs {

namespace {

// The inode that a query is about which may be promised: a directory, for what it says of names. 0: another
// request.
InodeId asked_of(const pb::Request& request) {
  switch (request.op_case()) {
    case pb::Request::kLookup:
      return request.lookup().parent();
    case pb::Request::kGetattr:
      return request.getattr().id();
    case pb::Request::kGetxattr:
      return request.getxattr().id();
    case pb::Request::kReaddir:
      return request.readdir().plus() ? request.readdir().id() : 0;
    default:
      return 0;
  }
}

}  // namespace

// An outcome that is kept back until others have forgotten what it makes untrue.
struct Promises::Waiting {
  Reply reply;
  pb::Outcome outcome;
  std::string data;
  std::size_t left = 1;  // the one that adds the others counts too

  void followed() {
    if (--left == 0) reply(outcome, as_bytes(data));
  }
};

// What the store reports from here on is a mutation's.
class Promises::Collecting {
 public:
  Collecting(Promises& promises, std::shared_ptr<Ids> changed)
      : promises_(promises), outer_(std::exchange(promises.collector_, std::move(changed))) {}
  ~Collecting() { promises_.collector_ = std::move(outer_); }
  Collecting(const Collecting&) = delete;
  Collecting& operator=(const Collecting&) = delete;

 private:
  Promises& promises_;
  std::shared_ptr<Ids> outer_;
};

Promises::Promises(Executor& store, ChangeObserver& log, const OpenTable& opens, ClientId own,
                   Reactor& reactor, Recall recall, Reactor::Clock::duration lease)
    : store_(store),
      log_(log),
      opens_(opens),
      own_(own),
      reactor_(reactor),
      recall_(std::move(recall)),
      lease_(lease) {}

Promises::~Promises() { end(); }

void Promises::changing(const Change& change) {
  if (collector_ != nullptr &&
      std::find(collector_->begin(), collector_->end(), change.id) == collector_->end())
    collector_->push_back(change.id);
  if (change.kind == Change::Kind::freed) holders_.erase(change.id);
  log_.changing(change);
}

// What is tried again may change other inodes than the first try would have: names have changed meanwhile.
std::function<void(const std::function<void()>& attempt)> Promises::put_aside() {
  return [this, changed = collector_](const std::function<void()>& attempt) {
    const Collecting collecting(*this, changed);
    attempt();
  };
}

void Promises::execute(const pb::Request& request, Bytes data, Reply reply) {
  const auto op = request.op_case();
  if (asked_of(request) != 0) return query(request, data, std::move(reply));
  if (!changes_files(op)) return store_.execute(request, data, std::move(reply));

  // The store reports what it changes before it returns, also what it does later on a worker. Somebody may be
  // told meanwhile, also where nobody had been told of anything.
  const auto changed = std::make_shared<Ids>();
  const Collecting collecting(*this, changed);
  store_.execute(
      request, data,
      [this, changed, client = request.client(), reply = std::move(reply)](
          const pb::Outcome& outcome, Bytes result) { performed(client, *changed, outcome, result, reply); });
}

// ---- promising

bool Promises::promises_to(ClientId client) const {
  return epoch_ != 0 && !paused_ && opens_.clients().size() > 1 && opens_.clients().contains(client);
}

// May be promised something: it has forgotten, or knows nothing of, what an earlier owner has promised.
bool Promises::settled(ClientId client) const {
  return promises_to(client) && std::none_of(recalling_.begin(), recalling_.end(), [client](const auto& one) {
           return one.second.all && (one.second.client == client || one.second.client == 0);
         });
}

Promises::Mask Promises::bit_of(ClientId client) {
  const auto found = std::find(clients_.begin(), clients_.end(), client);
  const auto index = static_cast<std::size_t>(found - clients_.begin());
  if (found == clients_.end()) {
    if (clients_.size() == kMaxClients) {
      forget_all();
      return bit_of(client);
    }
    clients_.push_back(client);
  }
  return Mask{1} << index;
}

bool Promises::grant(ClientId client, InodeId id) {
  const Mask bit = bit_of(client);
  if (holders_.size() >= kMaxInodes && !holders_.contains(id)) {
    forget_all();
    return false;
  }
  holders_[id] |= bit;
  return true;
}

void Promises::query(const pb::Request& request, Bytes data, Reply reply) {
  const ClientId client = request.client();
  if (!promises_to(client)) return store_.execute(request, data, std::move(reply));
  store_.execute(request, data,
                 [this, client, id = asked_of(request), reply = std::move(reply)](const pb::Outcome& outcome,
                                                                                  Bytes result) {
                   const auto error = outcome.error();
                   // A client that has not yet forgotten everything would forget this too.
                   if ((error != 0 && error != ENOENT && error != ENODATA) || !settled(client))
                     return reply(outcome, result);
                   bool kept = grant(client, id);
                   if (outcome.has_attr()) kept = kept && grant(client, outcome.attr().id());
                   // The store looks at each entry as it lists it: what it says is of now, not of the time
                   // at which the names were read.
                   for (const auto& entry : outcome.entries())
                     if (tells_inode(entry)) kept = kept && grant(client, entry.attr().id());
                   if (!kept) return reply(outcome, result);
                   pb::Outcome told = outcome;
                   told.set_promise(next_stamp());
                   reply(told, result);
                 });
}

// Whoever has not followed a recall yet may rely on it still.
bool Promises::promised_to_others(InodeId id, ClientId client) const {
  for (const auto& [number, one] : recalling_)
    if (one.client != client && (one.all || std::find(one.ids.begin(), one.ids.end(), id) != one.ids.end()))
      return true;
  const auto found = holders_.find(id);
  if (found == holders_.end()) return false;
  const auto own = std::find(clients_.begin(), clients_.end(), client);
  const Mask mask = own == clients_.end() ? 0 : Mask{1} << (own - clients_.begin());
  return (found->second & ~mask) != 0;
}

// ---- breaking promises

void Promises::performed(ClientId client, const Ids& changed, const pb::Outcome& outcome, Bytes data,
                         const Reply& reply) {
  // Whoever made a change that failed does not know how much of it was made.
  recall_holders(changed, outcome.error() == 0 ? client : 0);
  // Nothing was changed by what was asked again: what its outcome says is of then (Once).
  const bool promise = outcome.error() == 0 && !changed.empty() && settled(client);
  if (recalling_.empty() && !promise) return reply(outcome, data);

  const auto waiting = std::make_shared<Waiting>();
  waiting->reply = reply;
  waiting->outcome = outcome;
  waiting->data = as_text(data);
  for (auto& [number, one] : recalling_) {
    const bool concerns =
        one.all || std::any_of(changed.begin(), changed.end(), [&ids = one.ids](InodeId id) {
          return std::find(ids.begin(), ids.end(), id) != ids.end();
        });
    if (one.client == client || !concerns) continue;
    ++waiting->left;
    one.waiting.push_back(waiting);
  }
  if (promise && !tell_changed(client, changed, waiting->outcome)) waiting->outcome.clear_changed();
  waiting->followed();
}

// Tells whoever changed inodes what they are like now, as a promise.
bool Promises::tell_changed(ClientId client, const Ids& changed, pb::Outcome& outcome) {
  if (outcome.has_attr() && !grant(client, outcome.attr().id())) return false;
  for (const InodeId id : changed) {
    auto* told = outcome.add_changed();
    told->set_id(id);
    pb::Request look;
    look.set_client(client);
    look.mutable_getattr()->set_id(id);
    store_.execute(look, {}, [told](const pb::Outcome& now, Bytes) {
      if (now.error() == 0) *told = now.attr();
    });
    if (!grant(client, id)) return false;
  }
  outcome.set_promise(next_stamp());
  return true;
}

void Promises::recall_holders(const Ids& ids, ClientId except) {
  if (holders_.empty()) return;
  std::map<ClientId, Ids> recalled;
  for (const InodeId id : ids) {
    const auto found = holders_.find(id);
    if (found == holders_.end()) continue;
    Mask left = 0;
    for (std::size_t i = 0; i < clients_.size(); ++i) {
      if ((found->second >> i & 1) == 0) continue;
      if (clients_[i] == except)
        left = Mask{1} << i;
      else
        recalled[clients_[i]].push_back(id);
    }
    if (left != 0)
      found->second = left;
    else
      holders_.erase(found);
  }
  for (auto& [client, forgotten] : recalled) order(client, std::move(forgotten), false);
}

void Promises::order(ClientId client, Ids ids, bool all) {
  RecallOrder order;
  order.client = client;
  order.names = ids;
  order.all_names = all;
  order.stamp = next_stamp();
  const auto number = ++last_number_;
  recalling_[number] = {.client = client, .ids = std::move(ids), .all = all, .waiting = {}};
  wait(number, lease_);
  recall_(order, [this, number, watch = std::weak_ptr(alive_)](bool) {
    if (!watch.expired()) followed(number);
  });
}

void Promises::wait(std::uint64_t number, Reactor::Clock::duration time) {
  Recalling& recalling = recalling_.at(number);
  recalling.lease = reactor_.after(time, [this, number, everybody = recalling.client == 0] {
    const auto more = everybody && more_ ? more_() : Reactor::Clock::duration::zero();
    if (more > more.zero()) return wait(number, more);
    followed(number);
  });
}

void Promises::followed(std::uint64_t number) {
  const auto node = recalling_.extract(number);
  if (node.empty()) return;
  reactor_.cancel(node.mapped().lease);
  for (const auto& waiting : node.mapped().waiting) waiting->followed();
  if (node.mapped().client == 0 && on_recovered_) on_recovered_();
}

// There is no room for more promises: everybody forgets all, and changes wait for that.
void Promises::forget_all() {
  holders_.clear();
  for (const ClientId client : std::exchange(clients_, {}))
    if (opens_.clients().contains(client)) order(client, {}, true);
}

void Promises::begin(Epoch epoch, const std::vector<ClientId>& holders) {
  if (epoch != epoch_) end();
  epoch_ = epoch;
  paused_ = false;
  for (const ClientId client : holders)
    if (client != own_) order(client, {}, true);
  order(own_, {}, true);  // this site's kernel may have been lent what an earlier owner promised
}

// The gate is closed and drained: nothing waits.
void Promises::end() {
  alive_ = std::make_shared<const bool>(true);
  for (const auto& [number, one] : recalling_) reactor_.cancel(one.lease);
  recalling_.clear();
  epoch_ = 0;
  stamp_ = 0;
  holders_.clear();
  clients_.clear();
}

}  // namespace sharefs
