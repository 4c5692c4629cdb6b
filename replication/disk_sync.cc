#include "replication/disk_sync.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
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
  int error = 0;  // the last one
  std::uint64_t failures = 0;
  std::uint64_t noted = 0;  // of them

  void check(std::uint64_t known) const;
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
    if (failed != 0) {
      error = failed;
      ++failures;
    }
    done = number;
    changed.notify_all();
  }
}

// Not as if a write had found the disk full: it is no matter of room for what comes next.
void DiskSync::Shared::check(std::uint64_t known) const {
  if (failures != known)
    throw std::runtime_error(std::string("cannot sync the store: ") + std::strerror(error));
}

DiskSync::DiskSync(int file_system) : shared_(std::make_shared<Shared>(file_system)) {
  std::thread([shared = shared_] { shared->serve(); }).detach();
}

DiskSync::~DiskSync() {
  const std::lock_guard lock(shared_->mutex);
  shared_->ending = true;
  shared_->changed.notify_all();
}

void DiskSync::written(std::uint64_t bytes, std::uint64_t known) {
  const std::lock_guard lock(shared_->mutex);
  shared_->check(known);
  shared_->since += bytes;
  if (shared_->since < kEvery) return;
  shared_->since = 0;
  ++shared_->wanted;
  shared_->changed.notify_all();
}

void DiskSync::sync(std::uint64_t known, const std::stop_token& interrupted) {
  std::unique_lock lock(shared_->mutex);
  const std::uint64_t number = ++shared_->wanted;
  shared_->changed.notify_all();
  const bool done = shared_->changed.wait(lock, interrupted, [&] { return shared_->done >= number; });
  shared_->check(known);
  if (!done) throw std::runtime_error("the attempt has ended");
}

std::uint64_t DiskSync::note_failure(const std::function<void()>& note) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->noted != shared_->failures) note();
  return shared_->noted = shared_->failures;
}

}  // namespace sharefs
