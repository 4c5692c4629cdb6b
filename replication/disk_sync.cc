#include "replication/disk_sync.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
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
  std::condition_variable_any changed;
  // under the mutex
  std::uint64_t since = 0;   // bytes
  std::uint64_t wanted = 0;  // counts syncs
  std::uint64_t done = 0;
  bool ending = false;
  int error = 0;  // not noted
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
    if (failed != 0) error = failed;
    done = number;
    changed.notify_all();
  }
}

DiskSync::DiskSync(int file_system) : shared_(std::make_shared<Shared>(file_system)) {
  std::thread([shared = shared_] { shared->serve(); }).detach();
}

DiskSync::~DiskSync() {
  const std::lock_guard lock(shared_->mutex);
  shared_->ending = true;
  shared_->changed.notify_all();
}

void DiskSync::written(std::uint64_t bytes) {
  const std::lock_guard lock(shared_->mutex);
  shared_->since += bytes;
  if (shared_->since < kEvery) return;
  shared_->since = 0;
  ++shared_->wanted;
  shared_->changed.notify_all();
}

void DiskSync::sync(const std::stop_token& interrupted) {
  std::unique_lock lock(shared_->mutex);
  const std::uint64_t number = ++shared_->wanted;
  shared_->changed.notify_all();
  const bool done = shared_->changed.wait(lock, interrupted, [&] { return shared_->done >= number; });
  // Not as if a write had found the disk full: it is no matter of room for what comes next.
  if (shared_->error != 0)
    throw std::runtime_error(std::string("cannot sync the store: ") + std::strerror(shared_->error));
  if (!done) throw std::runtime_error("the attempt has ended");
}

void DiskSync::note_failure(const std::function<void()>& note) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error == 0) return;
  note();
  shared_->error = 0;
}

}  // namespace sharefs
