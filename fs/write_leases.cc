#include "fs/write_leases.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <utility>

#include "fs/inode_table.h"
#include "fs/named_files.h"
#include "meta/log.h"

namespace sharefs {

// `state` is written last, so a slot is whole when it says so.
struct WriteLeases::Slot {
  enum : std::uint32_t { kFree = 0, kLease = 0x1ea5, kBroken = 0x2ea5, kChanged = 0x3ea5 };
  std::atomic<std::uint32_t> state;
  std::uint32_t site_size;
  std::uint64_t id;
  std::uint64_t client;
  std::uint64_t number;
  char site[64];
  char unused[32];
};

namespace {

// How soon it is looked again whether the mount that has a lease is there.
constexpr auto kPoll = std::chrono::milliseconds(20);
// It is looked whether there is room when so much has been written.
constexpr std::size_t kRoomFor = 8 << 20;

}  // namespace

WriteLeases::WriteLeases(Executor& next, Executor& look, const OpenTable& opens, const Promises& promises,
                         Reactor& reactor, Options options)
    : next_(next),
      look_(look),
      opens_(opens),
      promises_(promises),
      reactor_(reactor),
      options_(std::move(options)) {
  static_assert(sizeof(Slot) == 128);
  UniqueFd fd(::open(options_.file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) throw std::runtime_error("cannot open " + options_.file.string() + ": " + std::strerror(errno));
  // Allocated, so that a full disk fails here and not with a signal at a store into the mapping.
  if (const int error = ::posix_fallocate(fd.get(), 0, kMost * sizeof(Slot)); error != 0)
    throw std::runtime_error("no space for " + options_.file.string() + ": " + std::strerror(error));
  map_ = ::mmap(nullptr, kMost * sizeof(Slot), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (map_ == MAP_FAILED)
    throw std::runtime_error("cannot map " + options_.file.string() + ": " + std::strerror(errno));
  // Numbers are not used again, by whichever owner.
  last_number_ = static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                                std::chrono::system_clock::now().time_since_epoch())
                                                .count());
  load();
}

WriteLeases::~WriteLeases() {
  for (const auto& [id, lease] : leases_) reactor_.cancel(lease.timer);
  ::munmap(map_, kMost * sizeof(Slot));
}

void WriteLeases::load() {
  for (std::size_t index = kMost; index-- > 0;) {
    Slot& slot = at(index);
    const SiteName site(slot.site, std::min<std::size_t>(slot.site_size, sizeof slot.site));
    if (slot.state == Slot::kLease)
      leases_[slot.id] = {.site = site, .client = slot.client, .number = slot.number, .slot = index};
    else if (slot.state == Slot::kBroken || slot.state == Slot::kChanged)
      broken_[slot.id] = {{slot.id, site, slot.client, slot.number, slot.state == Slot::kChanged}, index};
    else
      free_slots_.push_back(index);
    last_number_ = std::max(last_number_, slot.number);
  }
}

WriteLeases::Slot& WriteLeases::at(std::size_t index) { return static_cast<Slot*>(map_)[index]; }

std::optional<std::size_t> WriteLeases::take_slot(std::uint32_t state, const Broken& what) {
  if (free_slots_.empty() || what.site.size() > sizeof Slot::site) return std::nullopt;
  const std::size_t index = free_slots_.back();
  free_slots_.pop_back();
  Slot& slot = at(index);
  slot.id = what.id;
  slot.client = what.client;
  slot.number = what.number;
  slot.site_size = static_cast<std::uint32_t>(what.site.size());
  std::memcpy(slot.site, what.site.data(), what.site.size());
  slot.state.store(state, std::memory_order_release);
  return index;
}

void WriteLeases::free_slot(std::size_t index) {
  at(index).state.store(Slot::kFree, std::memory_order_release);
  free_slots_.push_back(index);
}

// ---- requests

void WriteLeases::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (request.has_cancel() && cancel(request)) return reply_errno(reply, 0);
  if (request.write().writeback()) {
    opened(request.client(), request.write().id());
    if (!broken_.empty()) note_change(request);
    return next_.execute(request, data, std::move(reply));
  }
  if (const InodeId id = leased_to_another(request); id != 0)
    return wait(id, request, data, std::move(reply));
  if (!broken_.empty()) note_change(request);
  if (request.has_write()) return write(request, data, std::move(reply));
  if (request.has_readdir()) return list(request, std::move(reply));
  if (const InodeId id = changed_by(request); id != 0)
    return pass_counted(id, request, data, std::move(reply));
  pass(request, data, std::move(reply));
}

bool WriteLeases::is_another(ClientId client, InodeId id) const {
  const auto found = leases_.find(id);
  return found != leases_.end() && found->second.client != client;
}

// 0: the request has nothing to do with a lease of somebody else.
InodeId WriteLeases::leased_to_another(const pb::Request& request) {
  if (leases_.empty()) return 0;
  InodeId found = 0;
  visit_named_files(request, [&](InodeId id) {
    if (is_another(request.client(), id)) found = id;
  });
  visit_names(request, [&](InodeId parent, const std::string& name) {
    if (found != 0) return;
    if (const InodeId id = named(parent, name); is_another(request.client(), id)) found = id;
  });
  return found;
}

InodeId WriteLeases::named(InodeId parent, const std::string& name) {
  pb::Request look;
  look.mutable_lookup()->set_parent(parent);
  look.mutable_lookup()->set_name(name);
  const auto found = std::make_shared<InodeId>(0);
  look_.execute(look, {}, [found](const pb::Outcome& outcome, Bytes) {
    if (outcome.error() == 0) *found = outcome.attr().id();
  });
  return *found;
}

void WriteLeases::pass(const pb::Request& request, Bytes data, Reply reply) {
  const ClientId client = request.client();
  switch (request.op_case()) {
    case pb::Request::kAttach:
      // What an earlier process of the site had acknowledged has been performed (WriteBehind::replay).
      return next_.execute(request, data,
                           [this, client, site = request.attach().site(), still = std::weak_ptr(alive_),
                            reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                             if (outcome.error() == 0 && !still.expired()) end_earlier(site, client);
                             reply(outcome, result);
                           });
    case pb::Request::kDetach:
      detach(client);
      return next_.execute(request, data,
                           [this, client, still = std::weak_ptr(alive_), reply = std::move(reply)](
                               const pb::Outcome& outcome, Bytes result) {
                             if (!still.expired())
                               for (const InodeId id : leases_of(client)) end(id);
                             reply(outcome, result);
                           });
    case pb::Request::kRelease:
      if (leases_.empty()) break;
      return next_.execute(request, data,
                           [this, client, id = request.release().id(), still = std::weak_ptr(alive_),
                            reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                             if (!still.expired() && !opens_.is_open(id))
                               if (const auto found = leases_.find(id);
                                   found != leases_.end() && found->second.client == client)
                                 end(id);
                             reply(outcome, result);
                           });
    default:
      break;
  }
  next_.execute(request, data, std::move(reply));
}

// Whoever asked looks the names up one by one.
void WriteLeases::list(const pb::Request& request, Reply reply) {
  next_.execute(request, {},
                [this, client = request.client(), still = std::weak_ptr(alive_), reply = std::move(reply)](
                    const pb::Outcome& outcome, Bytes result) {
                  const auto hidden = [&](const pb::DirEntry& entry) {
                    return tells_inode(entry) && is_another(client, entry.attr().id());
                  };
                  if (still.expired() || leases_.empty() || std::ranges::none_of(outcome.entries(), hidden))
                    return reply(outcome, result);
                  pb::Outcome told = outcome;
                  for (auto& entry : *told.mutable_entries())
                    if (hidden(entry)) strip_attributes(entry);
                  reply(told, result);
                });
}

// The inode whose data the request, other than a write, may change; 0: none.
InodeId WriteLeases::changed_by(const pb::Request& request) {
  if (request.has_create() && (request.create().flags() & O_TRUNC) != 0)
    return named(request.create().parent(), request.create().name());
  return changes_data_of(request);
}

void WriteLeases::pass_counted(InodeId id, const pb::Request& request, Bytes data, Reply reply) {
  passed_.insert(id);
  pass(request, data,
       [this, id, still = std::weak_ptr(alive_), reply = std::move(reply)](const pb::Outcome& outcome,
                                                                           Bytes result) {
         if (!still.expired())
           if (const auto counted = passed_.find(id); counted != passed_.end()) passed_.erase(counted);
         reply(outcome, result);
       });
}

void WriteLeases::write(const pb::Request& request, Bytes data, Reply reply) {
  const pb::Write& write = request.write();
  if (write.lease() != 0 && !write_early(request)) return reply_errno(reply, ESTALE);
  if (!write.wants_lease()) return next_.execute(request, data, std::move(reply));
  next_.execute(request, data,
                [this, client = request.client(), id = write.id(), still = std::weak_ptr(alive_),
                 reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                  const std::uint64_t number =
                      outcome.error() == 0 && !still.expired() ? grant(client, id) : 0;
                  if (number == 0) return reply(outcome, result);
                  pb::Outcome told = outcome;
                  told.set_lease(number);
                  reply(told, result);
                });
}

// Whether what was acknowledged ahead is performed.
bool WriteLeases::write_early(const pb::Request& request) {
  const pb::Write& write = request.write();
  const InodeId id = write.id();
  if (const auto lease = leases_.find(id); lease != leases_.end()) {
    if (bytes_ += write.size(); bytes_ >= kRoomFor) {
      bytes_ = 0;
      if (!options_.room()) call_back(id);
    }
    return true;  // nobody else's comes here
  }
  if (options_.performed(request)) return true;
  const auto broken = broken_.find(id);
  if (broken != broken_.end() && broken->second.what.number >= write.lease())
    return broken->second.what.number == write.lease() && !broken->second.what.changed;
  const auto site = opens_.clients().find(request.client());
  return options_.recovering() && !held_ && site != opens_.clients().end() &&
         add(id, {.site = site->second, .client = request.client(), .number = write.lease()});
}

// What comes late under a broken lease would undo it. That is on the disk before it can be.
void WriteLeases::note_change(const pb::Request& request) {
  const InodeId id = request.has_write() ? request.write().id() : changed_by(request);
  const auto found = broken_.find(id);
  if (found == broken_.end() || found->second.what.client == request.client() || found->second.what.changed)
    return;
  found->second.what.changed = true;
  at(found->second.slot).state.store(Slot::kChanged, std::memory_order_release);
  sync();
}

void WriteLeases::sync() {
  if (::msync(map_, kMost * sizeof(Slot), MS_SYNC) != 0)
    log::warn("{} is not on the disk: {}", options_.file.string(), std::strerror(errno));
}

bool WriteLeases::cancel(const pb::Request& request) {
  for (auto& [id, lease] : leases_) {
    const auto killed = std::find_if(lease.waiting.begin(), lease.waiting.end(), [&](const Waiting& one) {
      return one.request.client() == request.client() && one.request.seq() == request.cancel().seq();
    });
    if (killed == lease.waiting.end()) continue;
    const Reply reply = std::move(killed->reply);
    lease.waiting.erase(killed);
    reply_errno(reply, EINTR);
    return true;
  }
  return false;
}

// ---- giving

// 0: none.
std::uint64_t WriteLeases::grant(ClientId client, InodeId id) {
  if (held_ || options_.letting_in() || passed_.contains(id) || !options_.room()) return 0;
  if (const auto known = leases_.find(id); known != leases_.end())
    return known->second.client == client && !known->second.ordered ? known->second.number : 0;
  // Who waits for two files in turn would never have both.
  if (std::ranges::any_of(leases_, [](const auto& one) { return !one.second.waiting.empty(); })) return 0;
  const auto site = opens_.clients().find(client);
  if (site == opens_.clients().end() || options_.recovering()) return 0;
  if (!opens_.is_open(id) || !opens_.openers(id, client, /*writable_only=*/false).empty()) return 0;
  if (promises_.promised_to_others(id, client)) return 0;
  if (const auto broken = broken_.find(id); broken != broken_.end()) {
    if (broken->second.what.client != client) return 0;
    mend(id);  // it asks behind all that it had acknowledged
  }
  return add(id, {.site = site->second, .client = client, .number = ++last_number_}) ? last_number_ : 0;
}

bool WriteLeases::add(InodeId id, Lease lease) {
  const auto slot =
      take_slot(Slot::kLease, {.id = id, .site = lease.site, .client = lease.client, .number = lease.number});
  if (!slot) return false;
  lease.slot = *slot;
  leases_[id] = std::move(lease);
  return true;
}

// ---- calling back

void WriteLeases::wait(InodeId id, const pb::Request& request, Bytes data, Reply reply) {
  leases_.at(id).waiting.push_back({request, std::string(as_text(data)), std::move(reply)});
  call_back(id);
}

void WriteLeases::call_back(InodeId id) {
  Lease& lease = leases_.at(id);
  if (lease.ordered) return;
  if (lease.since == Reactor::Clock::time_point{}) lease.since = Reactor::Clock::now();
  // Its process is gone, or has not been heard by this one: what it has acknowledged comes with the site's
  // next mount.
  if (!opens_.clients().contains(lease.client)) {
    if (lease.timer == 0) look_again(id, kPoll);
    return;
  }
  lease.ordered = true;
  look_again(id, options_.timing.lease);
  options_.recall({.client = lease.client, .id = id, .lease = lease.number},
                  [this, id, number = lease.number, still = std::weak_ptr(alive_)](bool followed) {
                    if (still.expired()) return;
                    const auto found = leases_.find(id);
                    if (found == leases_.end() || found->second.number != number) return;
                    if (followed) return returned(id);
                    found->second.ordered = false;  // nobody was there to be asked
                    look_again(id, kPoll);
                  });
}

void WriteLeases::look_again(InodeId id, Reactor::Clock::duration time) {
  Lease& lease = leases_.at(id);
  reactor_.cancel(lease.timer);
  lease.timer = reactor_.after(time, [this, id, number = lease.number] {
    const auto found = leases_.find(id);
    if (found == leases_.end() || found->second.number != number) return;
    Lease& awaited = found->second;
    awaited.timer = 0;
    const auto ago = Reactor::Clock::now() - awaited.since;
    if (ago < options_.timing.lease) {
      if (awaited.ordered) return look_again(id, options_.timing.lease - ago);
      return call_back(id);
    }
    const auto more = awaited.ordered && options_.timing.extension
                          ? options_.timing.extension(awaited.client, ago)
                          : Reactor::Clock::duration::zero();
    if (more > more.zero()) return look_again(id, more);
    give_up(id);
  });
}

// All that was acknowledged under it has been performed.
void WriteLeases::end(InodeId id) {
  auto node = leases_.extract(id);
  if (node.empty()) return;
  Lease& lease = node.mapped();
  reactor_.cancel(lease.timer);
  free_slot(lease.slot);
  for (Waiting& one : lease.waiting) execute(one.request, as_bytes(one.data), std::move(one.reply));
}

void WriteLeases::returned(InodeId id) {
  const ClientId client = leases_.at(id).client;
  end(id);
  const bool none_left =
      std::ranges::none_of(leases_, [client](const auto& one) { return one.second.client == client; }) &&
      std::ranges::none_of(broken_, [client](const auto& one) { return one.second.what.client == client; });
  if (none_left) options_.returned(client);
}

std::vector<InodeId> WriteLeases::leases_of(ClientId client) const {
  std::vector<InodeId> ids;
  for (const auto& [id, lease] : leases_)
    if (lease.client == client) ids.push_back(id);
  return ids;
}

// Who is silent relies on none of its leases any more: whoever looks at many files waits once.
void WriteLeases::give_up(InodeId id) {
  const SiteName site = leases_.at(id).site;
  const auto ids = options_.silent(site) ? leases_of(leases_.at(id).client) : std::vector<InodeId>{id};
  log::warn("{} has not said for {} s whether it has written to inode {:x}: it is not waited for any longer",
            site, std::chrono::duration_cast<std::chrono::seconds>(options_.timing.lease).count(), id);
  for (const InodeId one : ids) {
    const Lease& lease = leases_.at(one);
    adopt({one, lease.site, lease.client, lease.number});
  }
  sync();
  for (const InodeId one : ids) end(one);
}

void WriteLeases::opened(ClientId client, InodeId id) {
  if (is_another(client, id)) call_back(id);
}

void WriteLeases::drop_waiting(const std::function<bool(ClientId)>& of) {
  std::vector<Reply> dropped;
  for (auto& [id, lease] : leases_)
    std::erase_if(lease.waiting, [&](Waiting& one) {
      if (!of(one.request.client())) return false;
      dropped.push_back(std::move(one.reply));
      return true;
    });
  for (const Reply& reply : dropped) reply_errno(reply, ESTALE);
}

void WriteLeases::detach(ClientId client) {
  drop_waiting([client](ClientId one) { return one == client; });
}

void WriteLeases::expire(const SiteName& site, ClientId except) {
  drop_waiting([&](ClientId one) {
    const auto known = opens_.clients().find(one);
    return one != except && known != opens_.clients().end() && known->second == site;
  });
}

void WriteLeases::hold(bool held) {
  held_ = held;
  if (!held) return;
  std::vector<InodeId> ids;
  for (const auto& [id, lease] : leases_) ids.push_back(id);
  for (const InodeId id : ids)
    if (leases_.contains(id)) call_back(id);
}

// ---- ownership

void WriteLeases::clear() {
  alive_ = std::make_shared<const bool>(true);
  held_ = false;
  std::vector<Waiting> waiting;
  for (auto& [id, lease] : leases_) {
    reactor_.cancel(lease.timer);
    std::move(lease.waiting.begin(), lease.waiting.end(), std::back_inserter(waiting));
  }
  leases_.clear();
  broken_.clear();
  passed_.clear();
  free_slots_.clear();
  for (std::size_t index = kMost; index-- > 0;) {
    at(index).state.store(Slot::kFree, std::memory_order_relaxed);
    free_slots_.push_back(index);
  }
  // Other sites ask the new owner again.
  for (Waiting& one : waiting)
    if (one.request.client() == options_.own)
      next_.execute(one.request, as_bytes(one.data), std::move(one.reply));
}

std::vector<WriteLeases::Broken> WriteLeases::broken() const {
  std::vector<Broken> all;
  for (const auto& [id, lease] : broken_) all.push_back(lease.what);
  return all;
}

// Of two of one inode the newer one counts: what comes under the older one comes after a change.
void WriteLeases::adopt(Broken broken) {
  // Another process may have performed changes by then that this one adopts it once more.
  const auto known = broken_.find(broken.id);
  if (known != broken_.end() && known->second.what.number == broken.number)
    broken.changed = broken.changed || known->second.what.changed;
  mend(broken.id);
  if (const auto slot = take_slot(broken.changed ? Slot::kChanged : Slot::kBroken, broken))
    broken_[broken.id] = {broken, *slot};
}

void WriteLeases::mend(InodeId id) {
  if (const auto known = broken_.extract(id); !known.empty()) free_slot(known.mapped().slot);
}

// What these processes had acknowledged has been performed, or is not going to be.
void WriteLeases::end_earlier(const SiteName& site, ClientId client) {
  const auto earlier = [&](const auto& one) { return one.site == site && one.client < client; };
  std::vector<InodeId> ended, mended;
  for (const auto& [id, lease] : leases_)
    if (earlier(lease)) ended.push_back(id);
  for (const auto& [id, lease] : broken_)
    if (earlier(lease.what)) mended.push_back(id);
  for (const InodeId id : ended) end(id);
  for (const InodeId id : mended) mend(id);
}

void WriteLeases::forget(const SiteName& site) { end_earlier(site, std::numeric_limits<ClientId>::max()); }

}  // namespace sharefs
