// Makes the kernel let go of inodes that nobody uses and that have no name any more: their owner deletes them
// then.
//
// Kernels keep names although they are not to be trusted any more, and the inodes with them. Since Linux 6.18
// they can be told. The notification that earlier ones have for a name (FUSE_NOTIFY_INVAL_ENTRY) waits for
// whoever works in its directory, who may wait for an answer of this process: killed meanwhile, it could not
// end, and would keep the device open for both. So they are made to look at the name again, which drops it
// just as well. Whoever does that waits for the same lock, but has a table of descriptors of his own, without
// the device: a killed process ends. Finding the name takes CAP_DAC_READ_SEARCH; without it nothing is done.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <thread>
#include <vector>

#include "meta/types.h"

namespace sharefs {

class FuseSession;

class FusePruner {
 public:
  FusePruner(const FuseSession& session, std::filesystem::path mountpoint);
  // Blocks until the kernel has followed, so its requests must be answered meanwhile: see end() and idle().
  ~FusePruner();
  FusePruner(const FusePruner&) = delete;
  FusePruner& operator=(const FusePruner&) = delete;

  // What is used after all stays. Reactor thread.
  void prune(std::vector<InodeId> ids);

  // Begins nothing new, for the mount ends.
  void end();
  bool idle() const;

  // Whether it is this thread that looks.
  bool is_looking(pid_t thread) const { return thread == thread_id_; }

 private:
  void work();
  void look_again(const std::vector<InodeId>& ids) const;
  bool ending() const;

  // constant after construction
  const FuseSession& session_;
  const std::filesystem::path mountpoint_;

  std::atomic<pid_t> thread_id_{-1};
  mutable std::mutex mutex_;
  std::condition_variable wanted_;  // with mutex_
  std::vector<InodeId> ids_;        // under mutex_
  bool busy_ = false;               // under mutex_
  bool ending_ = false;             // under mutex_
  std::thread thread_;              // reactor thread; begins with the first prune()
};

}  // namespace sharefs
