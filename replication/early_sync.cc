#include "replication/early_sync.h"

#include <unistd.h>

#include <cerrno>

#include "replication/inode_io.h"

namespace sharefs {

EarlySync::EarlySync(int file_system) : file_system_(file_system), thread_([this] { serve(); }) {}

EarlySync::~EarlySync() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_one();
  }
  thread_.join();
}

void EarlySync::written(std::uint64_t bytes) {
  since_ += bytes;
  if (since_ < kEvery) return;
  since_ = 0;
  const std::lock_guard lock(mutex_);
  wanted_ = true;
  changed_.notify_one();
}

void EarlySync::check() {
  const std::lock_guard lock(mutex_);
  if (error_ != 0) throw_errno(error_, "cannot sync the store");
}

void EarlySync::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return wanted_ || stopping_; });
    if (stopping_) return;
    wanted_ = false;
    lock.unlock();
    const int error = syncfs(file_system_) == 0 ? 0 : errno;
    lock.lock();
    if (error != 0 && error_ == 0) error_ = error;
  }
}

}  // namespace sharefs
