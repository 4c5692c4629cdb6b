#include "fs/fuse_notifier.h"

#include <utility>

#include "fs/fuse_session.h"

namespace sharefs {

FuseNotifier::FuseNotifier(fuse_session* session, Reactor& reactor)
    : session_(session), reactor_(reactor), alive_(std::make_shared<bool>(true)) {}

FuseNotifier::~FuseNotifier() {
  *alive_ = false;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wanted_.notify_all();
  threads_.clear();  // joins
}

void FuseNotifier::invalidate(InodeId id, std::uint64_t offset, std::uint64_t length,
                              std::function<void()> done) {
  bool another = false;
  {
    const std::lock_guard lock(mutex_);
    orders_.push_back({id, offset, length, std::move(done)});
    another = busy_ + orders_.size() > threads_.size() && threads_.size() < kMostThreads;
  }
  if (another) threads_.emplace_back([this] { work(); });
  wanted_.notify_one();
}

bool FuseNotifier::idle() const {
  const std::lock_guard lock(mutex_);
  return orders_.empty() && busy_ == 0;
}

void FuseNotifier::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wanted_.wait(lock, [this] { return ending_ || !orders_.empty(); });
    if (orders_.empty()) return;
    Order order = std::move(orders_.front());
    orders_.pop_front();
    ++busy_;
    lock.unlock();
    // Whatever it says (ENOENT: the kernel does not know the inode), nothing is cached afterwards.
    fuse_lowlevel_notify_inval_inode(session_, order.id, static_cast<off_t>(order.offset),
                                     static_cast<off_t>(order.length));
    if (order.done) finished(std::move(order.done));
    lock.lock();
    --busy_;
  }
}

void FuseNotifier::finished(std::function<void()> done) {
  reactor_.post([alive = alive_, done = std::move(done)] {
    if (*alive) done();
  });
}

}  // namespace sharefs
