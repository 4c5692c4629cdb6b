#include "fs/coherence.h"

#include <fcntl.h>

#include <cerrno>
#include <string>
#include <utility>
#include <vector>

#include "fs/data_changes.h"

namespace sharefs {
namespace {

LockTable::Lock lock_of(const pb::Request& request) {
  if (request.op_case() == pb::Request::kGetlock) {
    const pb::GetLock& get = request.getlock();
    return {request.client(), get.lock_owner(), get.id(), get.range(), false};
  }
  const pb::SetLock& set = request.setlock();
  return {request.client(), set.lock_owner(), set.id(), set.range(), set.flock()};
}

bool valid(const pb::LockRange& range) {
  return pb::LockRange::Type_IsValid(range.type()) && range.start() <= range.end();
}

const auto ignore = [](const pb::Outcome&, Bytes) {};

}  // namespace

struct Coherence::Impl {
  struct Arrival {
    ClientId client;
    SiteName site;
    Reply reply;
  };

  Impl(Executor& the_store, OpenTable& the_opens, LockTable& the_locks, Reactor& the_reactor,
       Recall the_recall, CoherenceTiming the_timing)
      : store(the_store),
        opens(the_opens),
        locks(the_locks),
        reactor(the_reactor),
        recall(std::move(the_recall)),
        timing(the_timing),
        changes(
            opens, reactor, recall,
            [this](const pb::Request& request, Bytes data, Reply reply) {
              perform(request, data, std::move(reply));
            },
            timing.lease) {}

  void perform(const pb::Request& request, Bytes data, Reply reply);
  void open(const pb::Request& request, const OpenHandle& handle, Reply reply);
  void create(const pb::Request& request, Reply reply);
  void remove_name(const pb::Request& request, Reply reply);
  void release(const pb::Request& request, Reply reply);
  void set_lock(const pb::Request& request, Reply reply);
  void get_lock(const pb::Request& request, const Reply& reply) const;

  void attach(ClientId client, SiteName site, const Reply& reply);
  void detach(ClientId client);
  void take_back_sole();
  void sole_taken_back(std::uint64_t number);
  void admit();
  void tell_sole();

  void ask_holders(InodeId id, ClientId except);
  void drop_holder(InodeId id, ClientId client);
  bool free_orphan(InodeId id);
  void free_in_store(const std::vector<InodeId>& ids);

  // constant after construction
  Executor& store;
  OpenTable& opens;
  LockTable& locks;
  Reactor& reactor;
  const Recall recall;
  const CoherenceTiming timing;
  // reactor thread
  DataChanges changes;
  std::map<InodeId, std::set<ClientId>> orphans;
  std::vector<Arrival> arrivals;  // attaching while the first mount drops what it cached alone
  bool taking_back = false;
  std::uint64_t taking_back_number = 0;
  Reactor::TimerId taking_back_timer = 0;
  std::shared_ptr<const bool> alive = std::make_shared<const bool>(true);  // replaced by clear()
};

// ---- requests

void Coherence::Impl::perform(const pb::Request& request, Bytes data, Reply reply) {
  switch (request.op_case()) {
    case pb::Request::kOpen:
      open(request,
           {request.client(), request.open().handle(), request.open().id(), request.open().flags(), false},
           std::move(reply));
      break;
    case pb::Request::kOpendir:
      open(request, {request.client(), request.opendir().handle(), request.opendir().id(), 0, true},
           std::move(reply));
      break;
    case pb::Request::kCreate:
      create(request, std::move(reply));
      break;
    case pb::Request::kUnlink:
    case pb::Request::kRmdir:
    case pb::Request::kRename:
      remove_name(request, std::move(reply));
      break;
    case pb::Request::kRelease:
    case pb::Request::kReleasedir:
      release(request, std::move(reply));
      break;
    case pb::Request::kFlush:
      locks.release_posix(request.client(), request.flush().lock_owner(), request.flush().id());
      reply_errno(reply, 0);
      break;
    case pb::Request::kSetlock:
      set_lock(request, std::move(reply));
      break;
    case pb::Request::kGetlock:
      get_lock(request, reply);
      break;
    case pb::Request::kCancel:
      locks.cancel(request.client(), request.cancel().seq());
      reply_errno(reply, 0);
      break;
    case pb::Request::kForget:
      for (const InodeId id : request.forget().ids()) drop_holder(id, request.client());
      reply_errno(reply, 0);
      break;
    case pb::Request::kAttach:
      attach(request.client(), request.attach().site(), reply);
      break;
    case pb::Request::kDetach:
      detach(request.client());
      reply_errno(reply, 0);
      break;
    default:
      store.execute(request, data, std::move(reply));
  }
}

void Coherence::Impl::open(const pb::Request& request, const OpenHandle& handle, Reply reply) {
  store.execute(request, {},
                [this, handle, reply = std::move(reply)](const pb::Outcome& outcome, Bytes data) {
                  if (outcome.error() == 0) opens.open(handle);
                  reply(outcome, data);
                });
}

void Coherence::Impl::create(const pb::Request& request, Reply reply) {
  if (!request.create().has_handle()) {
    store.execute(request, {}, std::move(reply));
    return;
  }
  OpenHandle handle{request.client(), request.create().handle(), 0, request.create().flags(), false};
  store.execute(
      request, {}, [this, handle, reply = std::move(reply)](const pb::Outcome& outcome, Bytes data) mutable {
        if (outcome.error() == 0) {
          handle.id = outcome.attr().id();
          opens.open(handle);
          // It may have existed, and have been truncated.
          if ((handle.flags & O_TRUNC) != 0) {
            changes.performed(handle.client, {handle.id, 0, 0, false}, outcome, data, std::move(reply));
            return;
          }
        }
        reply(outcome, data);
      });
}

void Coherence::Impl::remove_name(const pb::Request& request, Reply reply) {
  store.execute(
      request, {},
      [this, asker = request.client(), reply = std::move(reply)](const pb::Outcome& outcome, Bytes data) {
        const std::vector<InodeId> ids(outcome.orphaned().begin(), outcome.orphaned().end());
        // Every client may refer to it until it says otherwise. The caller does not wait for what they say.
        for (const InodeId id : ids) {
          std::set<ClientId>& holders = orphans[id];
          for (const auto& [client, site] : opens.clients()) holders.insert(client);
        }
        reply(outcome, data);
        for (const InodeId id : ids) ask_holders(id, asker);
      });
}

void Coherence::Impl::release(const pb::Request& request, Reply reply) {
  const ClientId client = request.client();
  InodeId id = request.releasedir().id();
  if (request.op_case() == pb::Request::kRelease) {
    const pb::Release& release = request.release();
    id = release.id();
    opens.close(client, release.handle());
    if (release.lock_owner() != 0) locks.release_posix(client, release.lock_owner(), id);
    if (release.unlock_flock()) locks.release_flock(client, release.lock_owner(), id);
  } else {
    opens.close(client, request.releasedir().handle());
  }
  store.execute(request, {}, std::move(reply));
  if (!orphans.empty() && free_orphan(id)) free_in_store({id});
}

void Coherence::Impl::set_lock(const pb::Request& request, Reply reply) {
  LockTable::Lock lock = lock_of(request);
  if (!valid(lock.range)) {
    reply_errno(reply, EINVAL);
  } else if (request.setlock().wait() && lock.range.type() != pb::LockRange::UNLOCKED) {
    locks.wait({std::move(lock), request.seq(), std::move(reply)});
  } else {
    reply_errno(reply, locks.set(lock));
  }
}

void Coherence::Impl::get_lock(const pb::Request& request, const Reply& reply) const {
  const LockTable::Lock wanted = lock_of(request);
  if (!valid(wanted.range)) {
    reply_errno(reply, EINVAL);
    return;
  }
  pb::Outcome outcome;
  if (const auto held = locks.conflict(wanted)) {
    *outcome.mutable_lock() = held->range;
  } else {
    outcome.mutable_lock()->set_type(pb::LockRange::UNLOCKED);
  }
  reply(outcome, {});
}

// ---- clients

void Coherence::Impl::attach(ClientId client, SiteName site, const Reply& reply) {
  const std::size_t others = opens.clients().size();
  const bool known = opens.clients().contains(client);
  if (known || others > 1 || (others == 0 && arrivals.empty())) {
    opens.attach(client, std::move(site));
    reply_errno(reply, 0);
    if (others == 0) tell_sole();
    return;
  }
  arrivals.push_back({client, std::move(site), reply});
  if (!taking_back) take_back_sole();
}

// The sole mount drops what it was allowed to cache alone: no new promises once it has said so, and the old
// ones have run out a timeout later. Silent for a whole lease, it has not been told anything new either.
void Coherence::Impl::take_back_sole() {
  taking_back = true;
  const std::uint64_t number = ++taking_back_number;
  const auto said_so = [this, number, still = std::weak_ptr(alive)] {
    if (!still.expired()) sole_taken_back(number);
  };
  taking_back_timer = reactor.after(timing.lease, said_so);
  RecallOrder order;
  order.client = opens.clients().begin()->first;
  order.sole = false;
  recall(order, [said_so](bool) { said_so(); });
}

void Coherence::Impl::sole_taken_back(std::uint64_t number) {
  if (!taking_back || number != taking_back_number) return;
  ++taking_back_number;  // whichever of answer and lease comes later is void
  reactor.cancel(taking_back_timer);
  taking_back_timer = reactor.after(timing.sole_timeout, [this, still = std::weak_ptr(alive)] {
    if (!still.expired()) admit();
  });
}

void Coherence::Impl::admit() {
  taking_back = false;
  for (Arrival& arrival : std::exchange(arrivals, {})) {
    opens.attach(arrival.client, std::move(arrival.site));
    reply_errno(arrival.reply, 0);
  }
  tell_sole();
}

// After the number of clients has changed: if one is left, it may cache alone.
void Coherence::Impl::tell_sole() {
  if (taking_back || opens.clients().size() != 1) return;
  RecallOrder order;
  order.client = opens.clients().begin()->first;
  order.sole = true;
  recall(order, [](bool) {});
}

void Coherence::Impl::detach(ClientId client) {
  std::vector<Reply> turned_back;
  for (const Arrival& arrival : arrivals) {
    if (arrival.client == client) turned_back.push_back(arrival.reply);
  }
  std::erase_if(arrivals, [&](const Arrival& arrival) { return arrival.client == client; });
  for (const Reply& reply : turned_back) reply_errno(reply, 0);

  const bool attached = opens.clients().contains(client);
  for (const OpenHandle& handle : opens.detach(client)) {
    pb::Request close;
    close.set_client(client);
    if (handle.directory) {
      close.mutable_releasedir()->set_id(handle.id);
      close.mutable_releasedir()->set_handle(handle.handle);
    } else {
      close.mutable_release()->set_id(handle.id);
      close.mutable_release()->set_handle(handle.handle);
    }
    store.execute(close, {}, ignore);
  }
  locks.detach(client);
  changes.detach(client);

  std::vector<InodeId> ids;
  for (auto& [id, holders] : orphans) {
    holders.erase(client);
    ids.push_back(id);
  }
  std::erase_if(ids, [&](InodeId id) { return !free_orphan(id); });
  free_in_store(ids);

  if (taking_back && opens.clients().empty()) {
    ++taking_back_number;
    reactor.cancel(taking_back_timer);
    admit();
  } else if (attached) {
    tell_sole();
  }
}

// ---- orphans

// All but `except`, which says so by itself.
void Coherence::Impl::ask_holders(InodeId id, ClientId except) {
  const auto it = orphans.find(id);
  if (it == orphans.end()) return;
  const std::set<ClientId> holders = it->second;
  for (const ClientId client : holders) {
    if (client == except) continue;
    RecallOrder order;
    order.client = client;
    order.id = id;
    order.orphan = true;
    recall(order, [this, id, client, still = std::weak_ptr(alive)](bool referenced) {
      if (!referenced && !still.expired()) drop_holder(id, client);
    });
  }
  if (holders.empty() && free_orphan(id)) free_in_store({id});
}

void Coherence::Impl::drop_holder(InodeId id, ClientId client) {
  const auto it = orphans.find(id);
  if (it == orphans.end()) return;
  it->second.erase(client);
  if (free_orphan(id)) free_in_store({id});
}

// Whether the inode is an orphan that nobody refers to any more; it is then no longer kept here. A handle
// counts as a reference even if its client has said that it has none: its Release may still be on the way.
bool Coherence::Impl::free_orphan(InodeId id) {
  const auto it = orphans.find(id);
  if (it == orphans.end() || !it->second.empty() || opens.is_open(id)) return false;
  orphans.erase(it);
  return true;
}

void Coherence::Impl::free_in_store(const std::vector<InodeId>& ids) {
  if (ids.empty()) return;
  pb::Request forget;
  forget.mutable_forget()->mutable_ids()->Add(ids.begin(), ids.end());
  store.execute(forget, {}, ignore);
}

// ---- the interface

Coherence::Coherence(Executor& store, OpenTable& opens, LockTable& locks, Reactor& reactor, Recall recall,
                     CoherenceTiming timing)
    : impl_(std::make_unique<Impl>(store, opens, locks, reactor, std::move(recall), timing)) {}

Coherence::~Coherence() { clear(); }

void Coherence::execute(const pb::Request& request, Bytes data, Reply reply) {
  impl_->changes.heard(request.client());
  if (const auto range = DataChanges::changed(request)) {
    if (impl_->changes.take(request, *range, data, reply)) return;
  }
  impl_->perform(request, data, std::move(reply));
}

void Coherence::held(const pb::Request& request) { impl_->changes.held(request); }

void Coherence::none_held() { impl_->changes.none_held(); }

bool Coherence::awaits(const pb::Request& writeback) const {
  return impl_->changes.awaits(writeback.client(), writeback.write().id());
}

const std::map<InodeId, std::set<ClientId>>& Coherence::orphans() const { return impl_->orphans; }

void Coherence::restore_orphans(std::map<InodeId, std::set<ClientId>> orphans) {
  impl_->orphans = std::move(orphans);
  // Not at once: an answer may free an inode, and the caller is in the middle of taking over.
  for (const auto& [id, holders] : impl_->orphans) {
    impl_->reactor.post([this, id = id, still = std::weak_ptr(impl_->alive)] {
      if (!still.expired()) impl_->ask_holders(id, 0);
    });
  }
}

void Coherence::clear() {
  impl_->alive = std::make_shared<const bool>(true);
  impl_->reactor.cancel(impl_->taking_back_timer);
  impl_->taking_back = false;
  impl_->arrivals.clear();
  impl_->orphans.clear();
  impl_->changes.clear();
}

void Coherence::expire_site(const SiteName& site) {
  std::vector<ClientId> gone;
  for (const auto& [client, name] : impl_->opens.clients()) {
    if (name == site) gone.push_back(client);
  }
  for (const auto& arrival : impl_->arrivals) {
    if (arrival.site == site) gone.push_back(arrival.client);
  }
  for (const ClientId client : gone) impl_->detach(client);
}

}  // namespace sharefs
