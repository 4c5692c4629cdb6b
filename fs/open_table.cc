#include <fcntl.h>

#include <algorithm>
#include <utility>

#include "fs/live_state.h"

namespace sharefs {
namespace {

bool writable(const OpenHandle& handle) { return !handle.directory && (handle.flags & O_ACCMODE) == O_RDWR; }

}  // namespace

void OpenTable::attach(ClientId client, SiteName site) { clients_[client] = std::move(site); }

std::vector<OpenHandle> OpenTable::detach(ClientId client) {
  std::vector<OpenHandle> closed;
  for (auto it = handles_.begin(); it != handles_.end();) {
    if (it->first.client != client) {
      ++it;
      continue;
    }
    uncount(it->second);
    closed.push_back(it->second);
    it = handles_.erase(it);
  }
  clients_.erase(client);
  return closed;
}

void OpenTable::open(const OpenHandle& handle) {
  const auto [it, is_new] = handles_.try_emplace(Key{handle.client, handle.handle}, handle);
  if (!is_new) {
    uncount(it->second);
    it->second = handle;
  }
  count(handle);
}

bool OpenTable::close(ClientId client, std::uint64_t handle) {
  const auto it = handles_.find(Key{client, handle});
  if (it == handles_.end()) return false;
  uncount(it->second);
  handles_.erase(it);
  return true;
}

const OpenHandle* OpenTable::find(ClientId client, std::uint64_t handle) const {
  const auto it = handles_.find(Key{client, handle});
  return it == handles_.end() ? nullptr : &it->second;
}

std::vector<ClientId> OpenTable::openers(InodeId id, ClientId except, bool writable_only) const {
  std::vector<ClientId> clients;
  const auto it = by_inode_.find(id);
  if (it == by_inode_.end()) return clients;
  const auto add = [&](const Use& use) {
    if (use.client != except && (use.writable > 0 || !writable_only)) clients.push_back(use.client);
  };
  add(it->second.first);
  for (const Use& use : it->second.others) add(use);
  return clients;
}

std::vector<OpenHandle> OpenTable::all() const {
  std::vector<OpenHandle> handles;
  handles.reserve(handles_.size());
  for (const auto& [key, handle] : handles_) handles.push_back(handle);
  return handles;
}

void OpenTable::clear() {
  clients_.clear();
  handles_.clear();
  by_inode_.clear();
}

void OpenTable::count(const OpenHandle& handle) {
  const auto [it, is_new] = by_inode_.try_emplace(handle.id);
  Uses& uses = it->second;
  Use* use = &uses.first;
  if (is_new) {
    use->client = handle.client;
  } else if (use->client != handle.client) {
    const auto found = std::find_if(uses.others.begin(), uses.others.end(),
                                    [&](const Use& other) { return other.client == handle.client; });
    use = found != uses.others.end() ? &*found : &uses.others.emplace_back(Use{.client = handle.client});
  }
  ++use->handles;
  if (writable(handle)) ++use->writable;
}

void OpenTable::uncount(const OpenHandle& handle) {
  const auto it = by_inode_.find(handle.id);
  if (it == by_inode_.end()) return;
  Uses& uses = it->second;
  Use* use = &uses.first;
  for (Use& other : uses.others) {
    if (use->client == handle.client) break;
    use = &other;
  }
  if (writable(handle)) --use->writable;
  if (--use->handles > 0) return;
  if (uses.others.empty()) {
    by_inode_.erase(it);
  } else {
    *use = uses.others.back();  // may be itself
    uses.others.pop_back();
  }
}

}  // namespace sharefs
