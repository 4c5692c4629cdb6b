#include "replication/holdings.h"

namespace sharefs {

bool Holdings::concerns(const pb::Request& request) {
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

void Holdings::answered(const pb::Request& request, const pb::Outcome& outcome) {
  const ClientId client = request.client();
  const auto opened = [&](std::uint64_t handle, InodeId id, std::uint32_t flags, bool directory) {
    if (outcome.error() == 0)
      opens_.open({.client = client, .handle = handle, .id = id, .flags = flags, .directory = directory});
  };
  switch (request.op_case()) {
    case pb::Request::kOpen:
      return opened(request.open().handle(), request.open().id(), request.open().flags(), false);
    case pb::Request::kOpendir:
      return opened(request.opendir().handle(), request.opendir().id(), 0, true);
    case pb::Request::kCreate:
      return opened(request.create().handle(), outcome.attr().id(), request.create().flags(), false);
    case pb::Request::kRelease: {
      const auto& release = request.release();
      opens_.close(client, release.handle());
      if (release.unlock_flock()) locks_.release_flock(client, release.lock_owner(), release.id());
      return;
    }
    case pb::Request::kReleasedir:
      opens_.close(client, request.releasedir().handle());
      return;
    case pb::Request::kFlush:
      return locks_.release_posix(client, request.flush().lock_owner(), request.flush().id());
    case pb::Request::kSetlock: {
      const auto& lock = request.setlock();
      if (outcome.error() == 0)
        locks_.set({.client = client,
                    .owner = lock.lock_owner(),
                    .id = lock.id(),
                    .range = lock.range(),
                    .flock = lock.flock()});
      return;
    }
    default:
      return;
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
  for (const auto& lock : locks_.held()) {
    if (lock.client != client) continue;
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
