#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdlib>

#include "replication/site_parts.h"

namespace sharefs {
namespace {

pb::Lock to_wire(const LockTable::Lock& lock, std::uint64_t seq) {
  pb::Lock wire;
  wire.set_client(lock.client);
  wire.set_owner(lock.owner);
  wire.set_id(lock.id);
  *wire.mutable_range() = lock.range;
  wire.set_flock(lock.flock);
  wire.set_seq(seq);
  return wire;
}

LockTable::Lock from_wire(const pb::Lock& wire) {
  return {.client = wire.client(),
          .owner = wire.owner(),
          .id = wire.id(),
          .range = wire.range(),
          .flock = wire.flock()};
}

}  // namespace

std::uint64_t note_failed_syncs(const SiteParts& parts) {
  return parts.disk.note_failure([&] { parts.power.sync_failed(); });
}

std::int64_t wall_clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

void end_to_begin_anew(const std::exception& error) {
  spdlog::critical("the handoff cannot go on in this process, which ends to begin anew: {}", error.what());
  spdlog::shutdown();
  std::_Exit(EXIT_FAILURE);
}

nlohmann::json to_json(const HandoffRecord& handoff) {
  const auto ended = handoff.ended ? handoff.ended : wall_clock_ns();
  return {{"attempt", handoff.attempt},
          {"epoch", handoff.epoch},
          {"from", handoff.source},
          {"to", handoff.target},
          {"role", handoff.role},
          {"phase", handoff.phase},
          {"result", handoff.result},
          {"error", handoff.error},
          {"attempts", handoff.tries},
          {"t0", handoff.t0},
          {"t1", handoff.t1},
          {"t2", handoff.t2},
          {"t3", handoff.t3},
          {"image_files", handoff.image_files},
          {"image_bytes", handoff.image_bytes},
          {"image_bytes_sent", handoff.image_bytes_sent},
          {"log_entries", handoff.log_entries},
          {"log_bytes", handoff.log_bytes},
          {"rounds", handoff.rounds},
          {"records", handoff.records},
          {"pause_ms", handoff.pause_ms},
          {"total_ms", static_cast<double>(ended - handoff.started) / 1e6}};
}

pb::LiveState take_live_state(const SiteParts& parts) {
  pb::LiveState live;
  for (const auto& window : parts.server.windows()) {
    // Who has only asked to be let in asks the next owner again, which has others told before
    // (Coherence::attach). Nothing tells it from a mount that this process has not heard of yet, but that its
    // site has not.
    if (parts.opens.clients().contains(window.client()) || parts.coherence.unheard().contains(window.site()))
      *live.add_clients() = window;
  }
  for (const auto& [client, site] : parts.opens.clients()) {
    bool known = false;
    for (const auto& window : live.clients()) known = known || window.client() == client;
    if (known) continue;
    auto* mine = live.add_clients();
    mine->set_client(client);
    mine->set_site(site);
  }
  for (auto& client : *live.mutable_clients())
    client.set_silent(client.site() != parts.self && parts.transport.silence(client.site()) > kPromiseLease);
  for (const auto& open : parts.opens.all()) {
    auto* handle = live.add_handles();
    handle->set_client(open.client);
    handle->set_handle(open.handle);
    handle->set_id(open.id);
    handle->set_flags(open.flags);
    handle->set_directory(open.directory);
  }
  for (const auto& lock : parts.locks.held()) *live.add_held() = to_wire(lock, 0);
  for (const auto& waiter : parts.locks.waiting()) *live.add_waiting() = to_wire(waiter.lock, waiter.seq);
  for (const auto& [id, clients] : parts.coherence.orphans()) {
    auto* orphan = live.add_orphans();
    orphan->set_id(id);
    for (auto client : clients) orphan->add_clients(client);
  }
  for (const auto& [client, ids] : parts.coherence.missed()) {
    auto* missed = live.add_missed();
    missed->set_client(client);
    missed->mutable_ids()->Add(ids.begin(), ids.end());
  }
  for (const auto& broken : parts.leases.broken()) {
    auto* lease = live.add_broken_leases();
    lease->set_id(broken.id);
    lease->set_site(broken.site);
    lease->set_client(broken.client);
    lease->set_lease(broken.number);
    lease->set_changed(broken.changed);
  }
  for (const auto& site : parts.coherence.unheard()) live.add_unheard(site);
  live.set_power(parts.power.number());
  // What may be asked again, also of another process of the next owner, which has no windows: by a site that
  // has not said to have the answer, or that this process has not heard at all.
  std::map<ClientId, std::pair<std::uint64_t, std::uint64_t>> answered_below;
  for (const auto& client : live.clients())
    if (client.site() != parts.self)
      answered_below[client.client()] = {client.answered_below(), client.ahead_answered_below()};
  const bool more_may_come = !parts.coherence.unheard().empty();
  const auto may_be_asked = [&](ClientId client, std::uint64_t seq) {
    const auto back = answered_below.find(client);
    if (back != answered_below.end())
      return seq >= (seq >= kAheadSeqBit ? back->second.second : back->second.first);
    return more_may_come && !parts.opens.clients().contains(client);
  };
  for (auto& known : parts.once.left(may_be_asked)) {
    auto* slot = live.add_slots();
    slot->set_client(known.client);
    slot->set_seq(known.seq);
    slot->set_done(true);
    slot->mutable_body()->Swap(&known.outcome);
  }
  return live;
}

void restore_live_state(const SiteParts& parts, const pb::LiveState& live) {
  std::vector<ClientId> holders;
  for (const auto& client : live.clients()) {
    parts.opens.attach(client.client(), client.site());
    if (!client.silent() && client.site() != parts.self) holders.push_back(client.client());
  }
  parts.promises.begin(parts.state.ownership().epoch, holders);
  for (const auto& handle : live.handles())
    parts.opens.open({.client = handle.client(),
                      .handle = handle.handle(),
                      .id = handle.id(),
                      .flags = handle.flags(),
                      .directory = handle.directory()});
  std::vector<LockTable::Lock> held;
  for (const auto& lock : live.held()) held.push_back(from_wire(lock));
  std::vector<LockTable::Waiter> waiting;
  for (const auto& lock : live.waiting())
    waiting.push_back({.lock = from_wire(lock), .seq = lock.seq(), .reply = {}});
  parts.locks.restore(std::move(held), std::move(waiting));
  std::map<InodeId, std::set<ClientId>> orphans;
  for (const auto& orphan : live.orphans())
    orphans[orphan.id()] = {orphan.clients().begin(), orphan.clients().end()};
  parts.coherence.restore_orphans(std::move(orphans), {live.unheard().begin(), live.unheard().end()});
  for (const auto& missed : live.missed())
    parts.coherence.tell_missed(missed.client(), {missed.ids().begin(), missed.ids().end()});
  for (const auto& lease : live.broken_leases())
    parts.leases.adopt({.id = lease.id(),
                        .site = lease.site(),
                        .client = lease.client(),
                        .number = lease.lease(),
                        .changed = lease.changed()});
  if (live.broken_leases_size() != 0) parts.leases.sync();
  for (const auto& slot : live.slots())
    if (slot.done()) parts.once.adopt({.client = slot.client(), .seq = slot.seq(), .outcome = slot.body()});
  parts.server.restore({live.clients().begin(), live.clients().end()});
}

void drop_live_state(const SiteParts& parts) {
  std::vector<LockTable::Waiter> waiting = parts.locks.waiting();
  const auto clients = parts.opens.clients();
  parts.locks.clear();
  parts.opens.clear();
  parts.coherence.clear();
  parts.promises.end();
  parts.leases.clear();
  for (auto& waiter : waiting) {
    const auto client = clients.find(waiter.lock.client);
    if (!waiter.reply || client == clients.end() || client->second != parts.self) continue;
    pb::Request request;
    request.set_client(waiter.lock.client);
    request.set_seq(waiter.seq);
    auto* lock = request.mutable_setlock();
    lock->set_id(waiter.lock.id);
    lock->set_lock_owner(waiter.lock.owner);
    *lock->mutable_range() = waiter.lock.range;
    lock->set_wait(true);
    lock->set_flock(waiter.lock.flock);
    parts.peer.execute_again(request, {}, std::move(waiter.reply));
  }
}

}  // namespace sharefs
