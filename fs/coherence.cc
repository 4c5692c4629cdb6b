#include "fs/coherence.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "fs/data_changes.h"
#include "fs/orphans.h"
#include "meta/log.h"

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

OpenHandle handle_of(const pb::Request& request) {
  return {request.client(), request.open().handle(), request.open().id(), request.open().flags(), false};
}

bool valid(const pb::LockRange& range) {
  return pb::LockRange::Type_IsValid(range.type()) && range.start() <= range.end();
}

const auto ignore = [](const pb::Outcome&, Bytes) {};

}  // namespace

struct Coherence::Impl {
  struct Arrival {
    struct Waiting {
      pb::Request request;
      std::string data;
      Reply reply;
    };
    ClientId client;
    SiteName site;
    Reply reply;
    std::vector<Waiting> waiting;  // what it asks before it is let in
  };

  Impl(Executor& the_store, OpenTable& the_opens, LockTable& the_locks, Reactor& the_reactor,
       Recall the_recall, CoherenceTiming the_timing)
      : store(the_store),
        opens(the_opens),
        locks(the_locks),
        reactor(the_reactor),
        recall(std::move(the_recall)),
        timing(std::move(the_timing)),
        changes(
            opens, reactor, recall,
            [this](const pb::Request& request, Bytes data, Reply reply) {
              perform(request, data, std::move(reply));
            },
            timing),
        orphans(store, opens, reactor, recall) {}

  void perform(const pb::Request& request, Bytes data, Reply reply);
  void open(const pb::Request& request, const OpenHandle& handle, Reply reply);
  void create(const pb::Request& request, Reply reply);
  void remove_name(const pb::Request& request, Reply reply);
  void release(const pb::Request& request, Reply reply);
  void sync(const pb::Request& request, Bytes data, Reply reply);
  Reply with_what_it_missed(ClientId client, Reply granted);
  void set_lock(const pb::Request& request, Reply reply);
  void get_lock(const pb::Request& request, Reply reply);
  void release_locks(const pb::Request& request);

  void execute(const pb::Request& request, Bytes data, Reply reply);
  std::optional<DataChanges::Range> changed(const pb::Request& request);
  bool waits_to_be_let_in(const pb::Request& request, Bytes data, Reply& reply);
  void attach(ClientId client, SiteName site, const Reply& reply);
  void reassert(ClientId client, const SiteName& site, const std::vector<OpenHandle>& handles,
                const std::vector<LockTable::Lock>& locks);
  void recovered();
  void heard(const SiteName& site);
  void detach(ClientId client);
  void expire_site(const SiteName& site, ClientId except);
  void take_back_sole();
  void wait_for_sole(Reactor::Clock::duration time, Reactor::Clock::time_point asked);
  void sole_taken_back(std::uint64_t number);
  void admit();
  void tell_sole();

  void end_asked(const std::function<bool(const pb::Request&)>& which);

  // constant after construction
  Executor& store;
  OpenTable& opens;
  LockTable& locks;
  Reactor& reactor;
  const Recall recall;
  const CoherenceTiming timing;
  // reactor thread
  DataChanges changes;
  Orphans orphans;
  std::vector<Arrival> arrivals;  // attaching while the first mount drops what it cached alone
  // What a sync of each of these handles has to say yet: see sync().
  std::map<std::pair<ClientId, std::uint64_t>, std::uint32_t> failed_syncs;
  // After a restart, until all sites have said what they hold: locks that are asked for, and what gives them
  // up.
  struct Asked {
    pb::Request request;
    Reply reply;
  };
  bool recovering = false;
  std::set<SiteName> unheard;  // have not said what they hold, also after that
  std::vector<Asked> asked;
  bool taking_back = false;
  std::uint64_t taking_back_number = 0;
  Reactor::TimerId taking_back_timer = 0;
  std::shared_ptr<const bool> alive = std::make_shared<const bool>(true);  // replaced by clear()
};

// ---- requests

void Coherence::Impl::perform(const pb::Request& request, Bytes data, Reply reply) {
  switch (request.op_case()) {
    case pb::Request::kOpen:
      open(request, handle_of(request), std::move(reply));
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
    case pb::Request::kWrite:
      if (request.write().sync())
        sync(request, data, std::move(reply));
      else
        store.execute(request, data, std::move(reply));
      break;
    case pb::Request::kSync:
      sync(request, data, std::move(reply));
      break;
    case pb::Request::kFlush:
      release_locks(request);
      reply_errno(reply, 0);
      break;
    case pb::Request::kSetlock:
      set_lock(request, std::move(reply));
      break;
    case pb::Request::kGetlock:
      get_lock(request, std::move(reply));
      break;
    case pb::Request::kCancel:
      locks.cancel(request.client(), request.cancel().seq());
      end_asked([&](const pb::Request& lock) {
        return lock.client() == request.client() && lock.seq() == request.cancel().seq();
      });
      if (changes.cancel(request.client(), request.cancel().seq()))
        reply_errno(reply, 0);
      else
        store.execute(request, {}, std::move(reply));
      break;
    case pb::Request::kForget:
      for (const InodeId id : request.forget().ids()) orphans.let_go(id, request.client());
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
                  if (outcome.error() == 0)
                    opens.open(handle);
                  else
                    opens.close(handle.client, handle.handle);  // see Coherence::held
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
      request, {},
      [this, handle, seq = request.seq(), reply = std::move(reply)](const pb::Outcome& outcome,
                                                                    Bytes data) mutable {
        if (outcome.error() == 0) {
          handle.id = outcome.attr().id();
          opens.open(handle);
          // It may have been made while this waited, and have been truncated.
          if ((handle.flags & O_TRUNC) != 0 && !changes.performs(handle.client, seq, handle.id)) {
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
        orphans.made(ids);
        reply(outcome, data);
        orphans.ask(ids, asker);
      });
}

void Coherence::Impl::release(const pb::Request& request, Reply reply) {
  const ClientId client = request.client();
  InodeId id = request.releasedir().id();
  if (request.op_case() == pb::Request::kRelease) {
    const pb::Release& release = request.release();
    id = release.id();
    opens.close(client, release.handle());
    failed_syncs.erase({client, release.handle()});
    release_locks(request);
  } else {
    opens.close(client, request.releasedir().handle());
    failed_syncs.erase({client, request.releasedir().handle()});
  }
  store.execute(request, {}, std::move(reply));
  orphans.closed(id);
}

// Also of a write by a handle that is synchronous. What could not be written back is told once to each open
// file, as a local disk does.
void Coherence::Impl::sync(const pb::Request& request, Bytes data, Reply reply) {
  const bool writes = request.has_write();
  const InodeId id = writes ? request.write().id() : request.sync().id();
  const std::uint64_t handle = writes ? request.write().handle() : request.sync().handle();
  store.execute(request, data,
                [this, client = request.client(), id, handle, still = std::weak_ptr(alive),
                 reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
                  if (still.expired()) return reply(outcome, bytes);
                  if (outcome.write_lost()) {
                    for (const OpenHandle& open : opens.all())
                      if (open.id == id) failed_syncs[{open.client, open.handle}] = outcome.error();
                  }
                  if (outcome.error() != 0 && !outcome.write_lost()) return reply(outcome, bytes);
                  const auto earlier = failed_syncs.extract({client, handle});
                  if (outcome.error() != 0 || earlier.empty()) return reply(outcome, bytes);
                  reply_errno(reply, static_cast<int>(earlier.mapped()));
                });
}

// Of a Flush or Release. After a restart nobody waits for that, but what its client has asked for before is
// granted later, and must go then, too.
void Coherence::Impl::release_locks(const pb::Request& request) {
  const ClientId client = request.client();
  if (request.has_flush()) {
    locks.release_posix(client, request.flush().lock_owner(), request.flush().id());
  } else {
    const pb::Release& release = request.release();
    if (release.lock_owner() != 0) locks.release_posix(client, release.lock_owner(), release.id());
    if (release.unlock_flock()) locks.release_flock(client, release.lock_owner(), release.id());
  }
  if (recovering && !asked.empty()) asked.push_back({request, ignore});
}

// Who is granted a lock looks at what others have done under it: what its mount has missed comes before.
Reply Coherence::Impl::with_what_it_missed(ClientId client, Reply granted) {
  return [this, client, still = std::weak_ptr(alive), granted = std::move(granted)](
             const pb::Outcome& outcome, Bytes data) {
    if (outcome.error() != 0 || still.expired()) return granted(outcome, data);
    changes.remind(client);
    if (!changes.met(client)) return granted(outcome, data);
    pb::Outcome told = outcome;
    told.set_changes_met(true);
    granted(told, data);
  };
}

void Coherence::Impl::set_lock(const pb::Request& request, Reply reply) {
  LockTable::Lock lock = lock_of(request);
  const bool locks_something = lock.range.type() != pb::LockRange::UNLOCKED;
  if (locks_something) reply = with_what_it_missed(request.client(), std::move(reply));
  if (!valid(lock.range)) {
    reply_errno(reply, EINVAL);
  } else if (recovering && locks_something) {
    asked.push_back({request, std::move(reply)});
  } else if (locks_something && (request.setlock().wait() || request.given_up())) {
    locks.wait({std::move(lock), request.seq(), std::move(reply), request.given_up()});
  } else {
    reply_errno(reply, locks.set(lock));
    if (recovering && !asked.empty()) asked.push_back({request, ignore});  // see release_locks
  }
}

void Coherence::Impl::get_lock(const pb::Request& request, Reply reply) {
  const LockTable::Lock wanted = lock_of(request);
  if (!valid(wanted.range)) {
    reply_errno(reply, EINVAL);
    return;
  }
  if (recovering) {
    asked.push_back({request, std::move(reply)});
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
  const auto holder = opens.clients().find(client);
  const bool known = holder != opens.clients().end();
  if (known && holder->second != site) return reply_errno(reply, EPERM);
  // A site has one mount: another one has ended with its process.
  if (!known) expire_site(site, client);
  const std::size_t others = opens.clients().size();
  if (known || recovering || others > 1 || (others == 0 && arrivals.empty())) {
    opens.attach(client, std::move(site));
    reply_errno(reply, 0);
    tell_sole();
    return;
  }
  // What the client has asked meanwhile comes behind all its words of what it holds, which do not know of it.
  const auto same = std::ranges::find(arrivals, client, &Arrival::client);
  Arrival arrival{client, std::move(site), reply, {}};
  if (same != arrivals.end()) arrival.waiting.swap(same->waiting);
  arrivals.insert(same, std::move(arrival));
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
  wait_for_sole(timing.lease, Reactor::Clock::now());
  RecallOrder order;
  order.client = opens.clients().begin()->first;
  order.sole = false;
  recall(order, [said_so](bool) { said_so(); });
}

// Like any recall, the order may still be on its way to a mount that is heard (CoherenceTiming::extension).
void Coherence::Impl::wait_for_sole(Reactor::Clock::duration time, Reactor::Clock::time_point asked) {
  taking_back_timer = reactor.after(time, [this, asked, number = taking_back_number] {
    Reactor::Clock::duration more{};
    if (timing.extension && !opens.clients().empty())
      more = timing.extension(opens.clients().begin()->first, Reactor::Clock::now() - asked);
    if (more > more.zero()) return wait_for_sole(more, asked);
    sole_taken_back(number);
  });
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
    for (auto& one : arrival.waiting) execute(one.request, as_bytes(one.data), std::move(one.reply));
  }
  tell_sole();
}

// A site whose connection was lost, or whose owner was restarted, asks as soon as it has said Attach again.
bool Coherence::Impl::waits_to_be_let_in(const pb::Request& request, Bytes data, Reply& reply) {
  if (request.has_attach() || request.has_detach()) return false;
  const auto arrival = std::find_if(arrivals.begin(), arrivals.end(),
                                    [&](const Arrival& one) { return one.client == request.client(); });
  if (arrival == arrivals.end()) return false;
  if (request.has_cancel()) {
    auto& waiting = arrival->waiting;
    const auto killed = std::find_if(waiting.begin(), waiting.end(), [&](const Arrival::Waiting& one) {
      return one.request.seq() == request.cancel().seq();
    });
    if (killed == waiting.end()) return false;
    const Reply cancelled = std::move(killed->reply);
    waiting.erase(killed);
    reply_errno(cancelled, EINTR);
    reply_errno(reply, 0);
    return true;
  }
  arrival->waiting.push_back({request, std::string(as_text(data)), std::move(reply)});
  return true;
}

// After the number of clients has changed: if one is left, it may cache alone.
void Coherence::Impl::tell_sole() {
  if (taking_back || recovering || opens.clients().size() != 1) return;
  RecallOrder order;
  order.client = opens.clients().begin()->first;
  order.sole = true;
  recall(order, [](bool) {});
}

void Coherence::Impl::end_asked(const std::function<bool(const pb::Request&)>& which) {
  const auto kept = std::stable_partition(asked.begin(), asked.end(),
                                          [&](const Asked& one) { return !which(one.request); });
  std::vector<Asked> ended(std::make_move_iterator(kept), std::make_move_iterator(asked.end()));
  asked.erase(kept, asked.end());
  for (const Asked& one : ended) reply_errno(one.reply, EINTR);
}

void Coherence::Impl::detach(ClientId client) {
  end_asked([client](const pb::Request& lock) { return lock.client() == client; });
  std::vector<Arrival> turned_back;
  for (Arrival& arrival : arrivals) {
    if (arrival.client == client) turned_back.push_back(std::move(arrival));
  }
  std::erase_if(arrivals, [&](const Arrival& arrival) { return arrival.client == client; });
  for (const Arrival& arrival : turned_back) {
    reply_errno(arrival.reply, 0);
    for (const auto& one : arrival.waiting) reply_errno(one.reply, ESTALE);
  }

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
  std::erase_if(failed_syncs, [client](const auto& one) { return one.first.first == client; });

  orphans.detached(client);

  if (taking_back && opens.clients().empty()) {
    ++taking_back_number;
    reactor.cancel(taking_back_timer);
    admit();
  } else if (attached) {
    tell_sole();
  }
}

void Coherence::Impl::expire_site(const SiteName& site, ClientId except) {
  std::vector<ClientId> gone;
  for (const auto& [client, name] : opens.clients()) {
    if (name == site && client != except) gone.push_back(client);
  }
  for (const auto& arrival : arrivals) {
    if (arrival.site == site && arrival.client != except) gone.push_back(arrival.client);
  }
  for (const ClientId client : gone) detach(client);
}

// ---- after a restart

// Its kernel may have pages that a change has made wrong which this process does not know of.
void Coherence::Impl::reassert(ClientId client, const SiteName& site, const std::vector<OpenHandle>& handles,
                               const std::vector<LockTable::Lock>& held) {
  attach(client, site, [this, client, site, handles, held](const pb::Outcome& outcome, Bytes) {
    if (outcome.error() != 0) return;
    std::set<InodeId> ids;
    for (OpenHandle handle : handles) {
      handle.client = client;
      opens.open(handle);
      if (!handle.directory) ids.insert(handle.id);
    }
    for (LockTable::Lock lock : held) {
      lock.client = client;
      if (!valid(lock.range)) continue;
      if (locks.set(lock) != 0)
        log::warn("a lock of client {:x} on inode {:x} was given to somebody else while it was away", client,
                  lock.id);
    }
    changes.tell(client, ids);
    heard(site);
  });
}

void Coherence::Impl::heard(const SiteName& site) {
  if (unheard.erase(site) > 0 && unheard.empty()) orphans.all_heard();
}

void Coherence::Impl::recovered() {
  if (!std::exchange(recovering, false)) return;
  for (Asked& one : std::exchange(asked, {})) {
    if (one.request.has_flush() || one.request.has_release())
      release_locks(one.request);
    else if (one.request.has_getlock())
      get_lock(one.request, std::move(one.reply));
    else
      set_lock(one.request, std::move(one.reply));
  }
  tell_sole();
}

// ---- the interface

Coherence::Coherence(Executor& store, OpenTable& opens, LockTable& locks, Reactor& reactor, Recall recall,
                     CoherenceTiming timing)
    : impl_(std::make_unique<Impl>(store, opens, locks, reactor, std::move(recall), std::move(timing))) {}

Coherence::~Coherence() { clear(); }

void Coherence::execute(const pb::Request& request, Bytes data, Reply reply) {
  impl_->execute(request, data, std::move(reply));
}

// A Create names what it may truncate by its name alone.
std::optional<DataChanges::Range> Coherence::Impl::changed(const pb::Request& request) {
  const pb::Create& create = request.create();
  if (!create.has_handle() || (create.flags() & O_TRUNC) == 0 || opens.clients().size() < 2)
    return DataChanges::changed(request);
  pb::Request look;  // of nobody, who is promised nothing
  look.mutable_lookup()->set_parent(create.parent());
  look.mutable_lookup()->set_name(create.name());
  const auto found = std::make_shared<InodeId>(0);
  store.execute(look, {}, [found](const pb::Outcome& outcome, Bytes) {
    if (outcome.error() == 0) *found = outcome.attr().id();
  });
  if (*found == 0) return std::nullopt;
  return DataChanges::Range{*found, 0, 0, false};
}

void Coherence::Impl::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (!arrivals.empty() && waits_to_be_let_in(request, data, reply)) return;
  changes.heard(request.client());
  if (const auto range = changed(request)) {
    if (changes.take(request, *range, data, reply)) return;
    // Somebody may open the inode before the change is performed, if that has to wait (for space).
    reply = [this, client = request.client(), range = *range, still = std::weak_ptr(alive),
             reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
      if (outcome.error() != 0 || still.expired()) return reply(outcome, result);
      changes.performed(client, range, outcome, result, reply);
    };
  }
  perform(request, data, std::move(reply));
}

void Coherence::held(const pb::Request& request) {
  if (request.given_up()) return;  // its caller is gone, and has no pages locked
  impl_->changes.held(request);
  if (request.has_open() && request.lazy()) impl_->opens.open(handle_of(request));
}

void Coherence::dropped(const pb::Request& request) {
  const auto range = DataChanges::changed(request);
  if (range && !request.given_up()) impl_->changes.not_held(request.client(), *range);
}

void Coherence::none_held() { impl_->changes.none_held(); }

bool Coherence::awaits(const pb::Request& writeback) const {
  return impl_->changes.awaits(writeback.client(), writeback.write().id());
}

const std::map<InodeId, std::set<ClientId>>& Coherence::orphans() const { return impl_->orphans.holders(); }

std::map<ClientId, std::set<InodeId>> Coherence::missed() const { return impl_->changes.missed(); }

const std::set<SiteName>& Coherence::unheard() const { return impl_->unheard; }

void Coherence::restore_orphans(std::map<InodeId, std::set<ClientId>> orphans, std::set<SiteName> unheard) {
  impl_->unheard.merge(unheard);
  if (!impl_->unheard.empty() && !impl_->recovering) {
    // Nobody waits for them: what they had been promised has run out at the owner before.
    impl_->reactor.post([this, still = std::weak_ptr(impl_->alive)] {
      if (still.expired()) return;
      impl_->recall({.client = 0, .all_names = true}, [](bool) {});
      // One of them may have come back in the pause, and be known here before the only mount was told of it.
      if (impl_->opens.clients().size() < 2) return;
      for (const auto& [client, site] : impl_->opens.clients())
        impl_->recall({.client = client, .sole = false}, [](bool) {});
    });
  }
  impl_->orphans.restore(std::move(orphans));
}

void Coherence::tell_missed(ClientId client, std::set<InodeId> ids) {
  impl_->reactor.post([this, client, ids = std::move(ids), still = std::weak_ptr(impl_->alive)] {
    if (!still.expired()) impl_->changes.tell(client, ids);
  });
}

void Coherence::recover(const std::vector<InodeId>& orphans, std::set<SiteName> sites) {
  impl_->recovering = true;
  impl_->orphans.found(orphans);
  impl_->unheard = std::move(sites);
  if (impl_->unheard.empty()) impl_->orphans.all_heard();
}

void Coherence::reassert(ClientId client, const SiteName& site, const std::vector<OpenHandle>& handles,
                         const std::vector<LockTable::Lock>& locks) {
  if (client != 0)
    impl_->reassert(client, site, handles, locks);
  else
    impl_->heard(site);
}

void Coherence::recovered() { impl_->recovered(); }
bool Coherence::recovering() const { return impl_->recovering; }
bool Coherence::letting_in() const { return !impl_->arrivals.empty(); }

void Coherence::away(const SiteName& site) { impl_->orphans.away(site); }
void Coherence::back(const SiteName& site) {
  impl_->orphans.back(site);
  for (const auto& [client, known] : impl_->opens.clients())
    if (known == site) impl_->changes.heard(client);
}

void Coherence::clear() {
  impl_->alive = std::make_shared<const bool>(true);
  impl_->recovering = false;
  impl_->unheard.clear();
  impl_->asked.clear();
  impl_->reactor.cancel(impl_->taking_back_timer);
  impl_->taking_back = false;
  impl_->arrivals.clear();
  impl_->orphans.clear();
  impl_->failed_syncs.clear();
  impl_->changes.clear();
}

void Coherence::expire_site(const SiteName& site, ClientId except) { impl_->expire_site(site, except); }

}  // namespace sharefs
