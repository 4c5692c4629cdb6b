// Writes dirty pages of a file system to its disk: while more arrive, so that the sync at the end is short,
// and whenever that is asked for.
//
// A sync that fails has lost something, and no later one tells of it: the kernel takes those pages for
// written. So it is noted what is not believed from then on (note_failure), and who relies on what is there
// says of how many failures it knows: after another one, whoever has asked for that sync, it cannot go on.
// And there is one object for as long as the process lives, with one open description: a later one would not
// hear of what this one has heard.
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

  // Starts a sync now and then, and never waits for one. Throws if not just `known` have failed.
  void written(std::uint64_t bytes, std::uint64_t known);
  // Everything written before is on the disk when it returns. Throws if not just `known` have failed; also
  // when it is interrupted.
  void sync(std::uint64_t known, const std::stop_token& interrupted = {});
  // Calls `note`, which may throw, if a sync has failed since that was noted last. How many have failed, all
  // of them noted.
  std::uint64_t note_failure(const std::function<void()>& note);

 private:
  static constexpr std::uint64_t kEvery = std::uint64_t{128} << 20;
  struct Shared;

  const std::shared_ptr<Shared> shared_;
};

}  // namespace sharefs
