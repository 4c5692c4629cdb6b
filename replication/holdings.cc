#include "replication/holdings.h"

#include <cerrno>
#include <set>
#include <utility>

namespace sharefs {
namespace {

bool concerns(const pb::Request& request) {
  switch (request.op_case()) {
    case pb::Request::kOpen:
    case pb::Request::kOpendir:
    case pb::Request::kRelease:
    case pb::Request::kReleasedir:
    case pb::Request::kFlush:
    case pb::Request::kSetlock:
      return true;
    case pb::Request::kCreate:
      return request.create().has_handle();
    default:
      return false;
  }
}

}  // namespace

void hold(const pb::Request& request, const pb::Outcome& outcome, OpenTable& opens, LockTable& locks) {
  const ClientId client = request.client();
  const auto opened = [&](std::uint64_t handle, InodeId id, std::uint32_t flags, bool directory) {
    if (outcome.error() == 0)
      opens.open({.client = client, .handle = handle, .id = id, .flags = flags, .directory = directory});
  };
  switch (request.op_case()) {
    case pb::Request::kOpen:
      return opened(request.open().handle(), request.open().id(), request.open().flags(), false);
    case pb::Request::kOpendir:
      return opened(request.opendir().handle(), request.opendir().id(), 0, true);
    case pb::Request::kCreate:
      if (!request.create().has_handle()) return;
      return opened(request.create().handle(), outcome.attr().id(), request.create().flags(), false);
    case pb::Request::kRelease: {
      const auto& release = request.release();
      opens.close(client, release.handle());
      if (release.lock_owner() != 0) locks.release_posix(client, release.lock_owner(), release.id());
      if (release.unlock_flock()) locks.release_flock(client, release.lock_owner(), release.id());
      return;
    }
    case pb::Request::kReleasedir:
      opens.close(client, request.releasedir().handle());
      return;
    case pb::Request::kFlush:
      return locks.release_posix(client, request.flush().lock_owner(), request.flush().id());
    case pb::Request::kSetlock: {
      const auto& asked = request.setlock();
      LockTable::Lock lock{.client = client,
                           .owner = asked.lock_owner(),
                           .id = asked.id(),
                           .range = asked.range(),
                           .flock = asked.flock()};
      // A conversion has given up the old lock, also when it fails (flock(2)).
      if (asked.flock() && (outcome.error() == EAGAIN || outcome.error() == EINTR))
        lock.range.set_type(pb::LockRange::UNLOCKED);
      else if (outcome.error() != 0)
        return;
      locks.set(lock);
      return;
    }
    case pb::Request::kDetach:
      opens.detach(client);
      locks.detach(client);
      return;
    default:
      return;
  }
}

void Holdings::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (!concerns(request)) return next_.execute(request, data, std::move(reply));
  const auto number = ++last_;
  unanswered_.emplace(number, request);
  next_.execute(request, data,
                [this, number, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
                  const auto node = unanswered_.extract(number);
                  if (far_()) hold(node.mapped(), outcome, opens_, locks_);
                  reply(outcome, bytes);
                });
}

// A conversion gives up the old lock before it gets the new one: of a flock that is being asked for it cannot
// be known what the owner has, and somebody else may have been granted it meanwhile.
std::set<std::pair<InodeId, std::uint64_t>> Holdings::changing_flocks(ClientId client) const {
  std::set<std::pair<InodeId, std::uint64_t>> changing;
  for (const auto& [number, request] : unanswered_)
    if (request.client() == client && request.setlock().flock())
      changing.emplace(request.setlock().id(), request.setlock().lock_owner());
  return changing;
}

void Holdings::tell(ClientId client, pb::RecallDone& done) const {
  std::vector<OpenHandle> opened = opens_.all();
  std::set<std::uint64_t> closing;                        // handles
  std::set<std::pair<InodeId, std::uint64_t>> unlocking;  // inode, lock owner
  const auto changing = changing_flocks(client);
  for (const auto& [number, request] : unanswered_) {
    if (request.client() != client) continue;
    if (request.has_open() && request.lazy())
      opened.push_back({client, request.open().handle(), request.open().id(), request.open().flags(), false});
    if (request.has_releasedir()) closing.insert(request.releasedir().handle());
    if (request.has_release()) {
      closing.insert(request.release().handle());
      unlocking.emplace(request.release().id(), request.release().lock_owner());
    }
    if (request.has_flush()) unlocking.emplace(request.flush().id(), request.flush().lock_owner());
    if (request.has_setlock() && request.setlock().range().type() == pb::LockRange::UNLOCKED)
      unlocking.emplace(request.setlock().id(), request.setlock().lock_owner());
  }
  done.set_client(client);
  for (const auto& open : opened) {
    if (open.client != client || closing.contains(open.handle)) continue;
    auto* handle = done.add_handles();
    handle->set_handle(open.handle);
    handle->set_id(open.id);
    handle->set_flags(open.flags);
    handle->set_directory(open.directory);
  }
  for (const auto& held : locks_.held()) {
    if (held.client != client || unlocking.contains({held.id, held.owner})) continue;
    if (held.flock && changing.contains({held.id, held.owner})) continue;
    auto* lock = done.add_locks();
    lock->set_owner(held.owner);
    lock->set_id(held.id);
    *lock->mutable_range() = held.range;
    lock->set_flock(held.flock);
  }
}

std::vector<pb::Request> Holdings::requests(ClientId client) const {
  std::vector<pb::Request> all;
  const auto add = [&]() -> pb::Request& {
    all.emplace_back().set_client(client);
    return all.back();
  };
  for (const auto& open : opens_.all()) {
    if (open.client != client) continue;
    if (open.directory) {
      auto* again = add().mutable_opendir();
      again->set_id(open.id);
      again->set_handle(open.handle);
    } else {
      auto* again = add().mutable_open();
      again->set_id(open.id);
      again->set_handle(open.handle);
      again->set_flags(open.flags);
    }
  }
  const auto changing = changing_flocks(client);
  for (const auto& lock : locks_.held()) {
    if (lock.client != client) continue;
    if (lock.flock && changing.contains({lock.id, lock.owner})) continue;
    auto* again = add().mutable_setlock();
    again->set_id(lock.id);
    again->set_lock_owner(lock.owner);
    *again->mutable_range() = lock.range;
    again->set_flock(lock.flock);
  }
  return all;
}

void Holdings::take(ClientId client, const OpenTable& opens, const LockTable& locks) {
  clear();
  for (const auto& open : opens.all())
    if (open.client == client) opens_.open(open);
  for (const auto& lock : locks.held())
    if (lock.client == client) locks_.set(lock);
}

void Holdings::clear() {
  opens_.clear();
  locks_.clear();
}

}  // namespace sharefs
