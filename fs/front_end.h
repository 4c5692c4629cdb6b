// The FUSE mount of a site: turns what the kernel asks into Requests, and Outcomes into replies.
//
// It holds nothing that the kernel may name: nodeids are InodeIds, handles are numbers it issues itself and
// the owner knows. What it keeps is bookkeeping that a successor can do without.
//
// Threads: the kernel's requests are read and answered on the reactor thread, in a loop of our own with
// pre-faulted buffers. Notifications to the kernel (invalidations) run on a thread of their own, because the
// kernel may hold the locks they need while it waits for a reply of ours.
#pragma once

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "meta/executor.h"
#include "meta/reactor.h"
#include "meta/types.h"

namespace sharefs {

// How long the kernel may answer by itself.
struct CachePolicy {
  std::chrono::milliseconds entry_timeout{0};
  std::chrono::milliseconds attr_timeout{0};
};
// While this is the only mount of the data set; never longer than the wait before a second one is answered.
constexpr CachePolicy kSoleMount{std::chrono::milliseconds(1000), std::chrono::milliseconds(1000)};
constexpr CachePolicy kSharedMount{};

class FrontEnd {
 public:
  struct Options {
    std::filesystem::path mountpoint;
    std::string data_set;                    // shown as the source of the mount
    std::vector<std::string> mount_options;  // -o, passed on to the mount
    // Whether an inode of this type (S_IFMT) may be opened at once: the executor is told, but not waited for.
    std::function<bool(InodeId, std::uint32_t type)> opens_at_once = {};
    // Whether the pages that the kernel has of an inode which is being opened are still right. Asked once for
    // each time that it is opened.
    std::function<bool(InodeId)> keeps_pages = {};
    // Whether closing this handle may have to tell of an error: what was written by it is not all performed.
    std::function<bool(InodeId, std::uint64_t handle)> must_flush = {};
    // How long the kernel may answer with these attributes by itself, beyond the policy. `held`: it holds the
    // inode already. And: it does not know an inode any more.
    std::function<Reactor::Clock::duration(const pb::Attr&, bool held)> lend_attributes = {};
    std::function<void(InodeId)> let_go = {};
  };

  // Mounts. Throws std::runtime_error with one clear line. `executor` gets every request; `client` is this
  // mount's incarnation. `unmounted` is called when the kernel ended the mount.
  FrontEnd(const Options& options, Reactor& reactor, Executor& executor, std::uint64_t client,
           std::function<void()> unmounted);
  ~FrontEnd();  // unmounts
  FrontEnd(const FrontEnd&) = delete;
  FrontEnd& operator=(const FrontEnd&) = delete;

  std::uint64_t client() const;

  // Applies to replies from now on. What the kernel was told before runs out after the old policy's timeouts.
  void set_policy(CachePolicy policy);

  // Drops pages [offset, offset+length) (length 0: to the end) and attributes of the inode; dirty pages of
  // mappings are written back first. `done` is called on the reactor thread when the kernel has done so.
  void invalidate(InodeId id, std::uint64_t offset, std::uint64_t length, std::function<void()> done);

  // Drops all pages of these. What may have to be written back first, and waits for an owner, comes last.
  void invalidate_all(std::vector<InodeId> ids);

  // What was promised of these inodes (nullptr: of all) is broken. The kernel believes no attributes of
  // `lent` any more. Files among `ids` that were opened at once with the pages that the kernel had lose
  // these, unless the owner has answered: it knows since then that they are open, and has their pages
  // recalled. `done` comes when they are gone; it does not wait for pages of an inode whose data this mount
  // is changing, since the kernel may hold their locks until the owner answers.
  void promise_broken(const std::vector<InodeId>* ids, const std::vector<InodeId>& lent,
                      std::function<void()> done);

  // The inode lost its last name on the owner, by another mount: tells whether this kernel still refers to
  // it; if so, it lets go of what nobody uses, and a Forget request for the inode follows when it no longer
  // does.
  bool watch_orphan(InodeId id);

  // The longest time that a request of this mount took from arrival to answer since the last call (the
  // stall).
  std::chrono::nanoseconds take_longest_wait();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
