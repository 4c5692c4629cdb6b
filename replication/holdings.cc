#include "replication/holdings.h"

#include <algorithm>
#include <cerrno>
#include <set>
#include <utility>

namespace sharefs {
namespace {

// An exclusive lock that is being made a shared one is shared at least; others may have a shared one already.
void weaken(const pb::Request& request, LockTable& locks) {
  const auto& asked = request.setlock();
  for (auto lock : locks.held()) {
    if (lock.client != request.client() || lock.owner != asked.lock_owner() || lock.id != asked.id() ||
        lock.flock || lock.range.type() != pb::LockRange::EXCLUSIVE)
      continue;
    lock.range.set_start(std::max(lock.range.start(), asked.range().start()));
    lock.range.set_end(std::min(lock.range.end(), asked.range().end()));
    lock.range.set_type(pb::LockRange::SHARED);
    if (lock.range.start() <= lock.range.end()) locks.note(lock);
  }
}

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
      locks.note(lock);
      return;
    }
    case pb::Request::kCancel:
      return locks.cancel(client, request.cancel().seq());
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

// What is sure to be held still, whatever comes of the requests that are on their way: they may have been
// performed, and somebody else been granted what they give up. Of a flock that is being converted nothing is
// sure, since the old lock goes before the new one comes.
std::vector<LockTable::Lock> Holdings::sure_locks(ClientId client) const {
  LockTable sure;
  for (const auto& lock : locks_.held())
    if (lock.client == client) sure.note(lock);
  OpenTable ignored;
  for (const auto& [number, request] : unanswered_) {
    const bool gives_up = request.has_flush() || request.has_release() ||
                          request.setlock().range().type() == pb::LockRange::UNLOCKED ||
                          request.setlock().flock();
    if (request.client() != client) continue;
    if (!gives_up) {
      if (request.setlock().range().type() == pb::LockRange::SHARED) weaken(request, sure);
      continue;
    }
    pb::Outcome outcome;
    if (request.setlock().flock()) outcome.set_error(EAGAIN);
    hold(request, outcome, ignored, sure);
  }
  return sure.held();
}

void Holdings::tell(ClientId client, pb::RecallDone& done) const {
  std::vector<OpenHandle> opened = opens_.all();
  std::set<std::uint64_t> closing;  // handles
  for (const auto& [number, request] : unanswered_) {
    if (request.client() != client) continue;
    if (request.has_open() && request.lazy())
      opened.push_back({client, request.open().handle(), request.open().id(), request.open().flags(), false});
    if (request.has_releasedir()) closing.insert(request.releasedir().handle());
    if (request.has_release()) closing.insert(request.release().handle());
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
  for (const auto& held : sure_locks(client)) {
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
  for (const auto& lock : sure_locks(client)) {
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
    if (lock.client == client) locks_.note(lock);
}

void Holdings::clear() {
  opens_.clear();
  locks_.clear();
}

}  // namespace sharefs
