#include "replication/disk_sync.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "replication/inode_io.h"

namespace sharefs {

// Lives until the last sync has ended.
struct DiskSync::Shared {
  explicit Shared(int file_system) : fd(fcntl(file_system, F_DUPFD_CLOEXEC, 0)) {
    if (!fd) throw_errno("cannot sync the store");
  }
  void serve();

  const UniqueFd fd;
  std::mutex mutex;
  std::condition_variable changed;
  // under the mutex
  std::uint64_t wanted = 0;  // counts syncs
  std::uint64_t done = 0;
  bool ending = false;
  int error = 0;
};

void DiskSync::Shared::serve() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [&] { return wanted > done || ending; });
    if (ending) return;
    const std::uint64_t number = wanted;
    lock.unlock();
    const int failed = syncfs(fd.get()) == 0 ? 0 : errno;
    lock.lock();
    if (failed != 0 && error == 0) error = failed;
    done = number;
    changed.notify_all();
  }
}

DiskSync::DiskSync(int file_system) : shared_(std::make_shared<Shared>(file_system)) {
  std::thread([shared = shared_] { shared->serve(); }).detach();
}

DiskSync::~DiskSync() { interrupt(); }

void DiskSync::written(std::uint64_t bytes) {
  since_ += bytes;
  if (since_ < kEvery) return;
  since_ = 0;
  const std::lock_guard lock(shared_->mutex);
  ++shared_->wanted;
  shared_->changed.notify_all();
}

void DiskSync::sync() {
  std::unique_lock lock(shared_->mutex);
  const std::uint64_t number = ++shared_->wanted;
  shared_->changed.notify_all();
  shared_->changed.wait(lock, [&] { return shared_->done >= number || shared_->ending; });
  if (shared_->error != 0) throw_errno(shared_->error, "cannot sync the store");
  if (shared_->done < number) throw std::runtime_error("the attempt has ended");
}

void DiskSync::interrupt() {
  const std::lock_guard lock(shared_->mutex);
  shared_->ending = true;
  shared_->changed.notify_all();
}

}  // namespace sharefs
