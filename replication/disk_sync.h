// Writes dirty pages of a file system to its disk: while more arrive, so that the sync at the end is short,
// and whenever that is asked for.
//
// A sync that fails has lost something, and no later one tells of it: the kernel takes those pages for
// written. So the failure stays until it is noted what is not believed from now on (note_failure). And there
// is one object for as long as the process lives, with one open description: a later one would not hear of
// what this one has heard.
//
// A sync cannot be interrupted, and may take as long as the disk likes. Whoever ends this does not wait for
// it: the thread that is in it has a descriptor of its own, and touches nothing else.
//
// Threads: any; the syncs on a thread of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>

namespace sharefs {

class DiskSync {
 public:
  explicit DiskSync(int file_system);  // any descriptor of it that can be synced
  ~DiskSync();
  DiskSync(const DiskSync&) = delete;
  DiskSync& operator=(const DiskSync&) = delete;

  void written(std::uint64_t bytes);  // starts a sync now and then; never waits for one
  // Everything written before is on the disk when it returns. Throws if this sync has failed, or
  // one before that is not noted; also when it is interrupted.
  void sync(const std::stop_token& interrupted = {});
  // Calls `note`, which may throw, if a sync has failed since that was noted last.
  void note_failure(const std::function<void()>& note);

 private:
  static constexpr std::uint64_t kEvery = std::uint64_t{128} << 20;
  struct Shared;

  const std::shared_ptr<Shared> shared_;
};

}  // namespace sharefs
