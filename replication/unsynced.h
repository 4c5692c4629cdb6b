// What this mount has changed at another site and has not synced since. If that site's machine loses its
// power, it may be lost, and the next fsync of such an inode has to say so: EIO, once, as after a failed
// writeback on a local disk. The kernel cannot know, since writes go through to the owner and leave no dirty
// pages behind. (NFS has its write verifier for this, RFC 1813 section 3.3.21; it keeps the data and writes
// it again.)
//
// Between the NameCache and the Router, whoever owns: a loss at the last owner is told also when this site
// has become the owner since, and what a record of a handoff has done counts like everything else. While this
// site owns, the power that is lost is its own, and its mount with it.
//
// Bounded: of too many inodes those that were changed longest ago are forgotten, which the owner's kernel has
// written back long since (vm.dirty_expire_centisecs). Threads: reactor thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>

#include "meta/executor.h"
#include "meta/types.h"

namespace sharefs {

class Unsynced final : public Executor {
 public:
  explicit Unsynced(Executor& next) : next_(next) {}

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // The owner's machine has lost what was not synced.
  void lost();
  // Whatever has been answered is durable at the owner, as after a handoff.
  void durable() { changed_.clear(); }

  std::size_t size() const { return changed_.size() + lost_.size(); }

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
  void forget_old();

  Executor& next_;
  std::uint64_t changes_ = 0;                           // counted
  std::unordered_map<InodeId, std::uint64_t> changed_;  // by which change, the last one
  std::unordered_set<InodeId> lost_;
};

}  // namespace sharefs
