#include "fs/orphans.h"

#include <utility>

namespace sharefs {
namespace {

// Among the holders: a mount that has not said what it holds since the owner's restart.
constexpr ClientId kAnyClient = 0;

}  // namespace

Orphans::Orphans(Executor& store, const OpenTable& opens, Reactor& reactor, const Recall& recall)
    : store_(store), opens_(opens), reactor_(reactor), recall_(recall) {}

void Orphans::made(const std::vector<InodeId>& ids) {
  for (const InodeId id : ids) {
    std::set<ClientId>& holders = holders_[id];
    for (const auto& [client, site] : opens_.clients())
      if (!away_.contains(site)) holders.insert(client);
  }
}

void Orphans::ask(const std::vector<InodeId>& ids, ClientId asker) {
  for (const InodeId id : ids) ask(id, asker);
}

void Orphans::ask(InodeId id, ClientId except) {
  const auto it = holders_.find(id);
  if (it == holders_.end()) return;
  const std::set<ClientId> holders = it->second;
  for (const ClientId client : holders) {
    if (client == except || client == kAnyClient) continue;
    RecallOrder order;
    order.client = client;
    order.id = id;
    order.orphan = true;
    recall_(order, [this, id, client, still = std::weak_ptr(alive_)](bool referenced) {
      if (!referenced && !still.expired()) let_go(id, client);
    });
  }
  if (holders.empty()) free_unused({id});
}

// An answer may free an inode at once, and the caller is in the middle of something.
void Orphans::ask_later(InodeId id) {
  reactor_.post([this, id, still = std::weak_ptr(alive_)] {
    if (!still.expired()) ask(id, kAnyClient);
  });
}

void Orphans::let_go(InodeId id, ClientId client) {
  const auto it = holders_.find(id);
  if (it == holders_.end()) return;
  it->second.erase(client);
  free_unused({id});
}

void Orphans::closed(InodeId id) {
  if (!holders_.empty()) free_unused({id});
}

void Orphans::detached(ClientId client) {
  std::vector<InodeId> ids;
  for (auto& [id, holders] : holders_) {
    holders.erase(client);
    ids.push_back(id);
  }
  free_unused(std::move(ids));
}

void Orphans::away(const SiteName& site) {
  away_.insert(site);
  std::vector<InodeId> ids;
  for (auto& [id, holders] : holders_) {
    for (const auto& [client, name] : opens_.clients())
      if (name == site && holders.erase(client) > 0) ids.push_back(id);
  }
  free_unused(std::move(ids));
}

void Orphans::back(const SiteName& site) { away_.erase(site); }

void Orphans::found(const std::vector<InodeId>& ids) {
  for (const InodeId id : ids) holders_[id] = {kAnyClient};
}

void Orphans::all_heard() {
  for (auto& [id, holders] : holders_) {
    if (holders.erase(kAnyClient) == 0) continue;
    for (const auto& [client, site] : opens_.clients()) holders.insert(client);
    ask_later(id);
  }
}

void Orphans::restore(Holders holders) {
  holders.merge(holders_);
  holders_ = std::move(holders);
  for (const auto& [id, clients] : holders_) ask_later(id);
}

void Orphans::clear() {
  alive_ = std::make_shared<const bool>(true);
  holders_.clear();
}

bool Orphans::unused(InodeId id) {
  const auto it = holders_.find(id);
  return it != holders_.end() && it->second.empty() && !opens_.is_open(id);
}

// Those of them that nobody refers to.
void Orphans::free_unused(std::vector<InodeId> ids) {
  std::erase_if(ids, [this](InodeId id) { return !unused(id); });
  if (ids.empty()) return;
  for (const InodeId id : ids) holders_.erase(id);
  pb::Request forget;
  forget.mutable_forget()->mutable_ids()->Add(ids.begin(), ids.end());
  store_.execute(forget, {}, [](const pb::Outcome&, Bytes) {});
}

}  // namespace sharefs
