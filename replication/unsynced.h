// What this mount has changed at another site and has not synced since. If that site's machine loses its
// power, it may be lost, and the next fsync of such an inode has to say so: EIO, once, as after a failed
// writeback on a local disk. The kernel cannot know, since writes go through to the owner and leave no dirty
// pages behind. (NFS has its write verifier for this, RFC 1813 section 3.3.21; it keeps the data and writes
// it again.)
//
// Between the NameCache and the Router, whoever owns: a loss at a former owner is told also when another
// site, or this one, has become the owner since, and what a record of a handoff has done counts like
// everything else. So it is noted who was the owner when a change was answered, and only an fsync that was
// answered under the same one settles it: a later owner can make durable only what it was given. While this
// site owns, the power that is lost is its own, and its mount with it.
//
// Bounded: of too many inodes those that were changed longest ago are forgotten, which the owner's kernel has
// written back long since (vm.dirty_expire_centisecs). Threads: reactor thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "meta/executor.h"
#include "meta/types.h"

namespace sharefs {

class Unsynced final : public Executor {
 public:
  Unsynced(Executor& next, std::function<const SiteName&()> owner) : next_(next), owner_(std::move(owner)) {}

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // The machine of this site, the owner or a former one, has lost what was not synced.
  void lost(const SiteName& site);
  // Whatever was answered under this owner is durable: it has handed over without a loss.
  void durable(const SiteName& site) { changed_.erase(site); }

  std::size_t size() const { return changes() + lost_.size(); }

  static constexpr std::size_t kMost = 100'000;

 private:
  // What a request leaves unsynced, or syncs.
  struct Part {
    InodeId changed = 0;
    InodeId also_changed = 0;
    InodeId synced = 0;
    std::uint64_t asked = 0;  // what was changed after this is not synced by it
    bool empty() const { return changed == 0 && also_changed == 0 && synced == 0; }
  };

  Part part_of(const pb::Request& request) const;
  // The request has been answered without an error. The error that its caller is told: 0 or EIO.
  int answered(const Part& part);
  void note(InodeId id);
  std::size_t changes() const;
  void forget_old();

  // constant after construction
  Executor& next_;
  const std::function<const SiteName&()> owner_;
  // reactor thread
  std::uint64_t changes_ = 0;                                               // counted
  std::map<SiteName, std::unordered_map<InodeId, std::uint64_t>> changed_;  // by which change, the last one
  std::unordered_set<InodeId> lost_;
};

}  // namespace sharefs
