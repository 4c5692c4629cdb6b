// Writes dirty pages of a file system to its disk: while more arrive, so that the sync at the end is short,
// and whenever that is asked for.
//
// A sync cannot be interrupted, and may take as long as the disk likes. Whoever ends this does not wait for
// it: the thread that is in it has a descriptor of its own, and touches nothing else.
//
// Threads: everything but interrupt() on one thread; the syncs on a thread of its own.
#pragma once

#include <cstdint>
#include <memory>

namespace sharefs {

class DiskSync {
 public:
  explicit DiskSync(int file_system);  // any descriptor of it
  ~DiskSync();
  DiskSync(const DiskSync&) = delete;
  DiskSync& operator=(const DiskSync&) = delete;

  void written(std::uint64_t bytes);  // starts a sync now and then; never waits for one
  // Everything written before is on the disk when it returns. Throws std::system_error if this sync has
  // failed, or one before: what that has lost, no later one tells.
  void sync();
  void interrupt();  // any thread: sync() throws from now on

 private:
  static constexpr std::uint64_t kEvery = std::uint64_t{128} << 20;
  struct Shared;

  const std::shared_ptr<Shared> shared_;
  std::uint64_t since_ = 0;
};

}  // namespace sharefs
