#include "fs/fuse_notifier.h"

#include <utility>

#include "fs/fuse_session.h"

namespace sharefs {

FuseNotifier::FuseNotifier(const FuseSession& session, Reactor& reactor)
    : session_(session), reactor_(reactor), alive_(std::make_shared<bool>(true)) {}

FuseNotifier::~FuseNotifier() {
  *alive_ = false;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  for (Queue* queue : {&pages_, &attributes_}) {
    queue->wanted.notify_all();
    queue->threads.clear();  // joins
  }
}

void FuseNotifier::invalidate(InodeId id, std::uint64_t offset, std::uint64_t length,
                              std::function<void()> done) {
  add(offset == kAttributes ? attributes_ : pages_, {id, offset, length, std::move(done)});
}

void FuseNotifier::add(Queue& queue, Order order) {
  bool another = false;
  {
    const std::lock_guard lock(mutex_);
    queue.orders.push_back(std::move(order));
    another =
        queue.busy + queue.orders.size() > queue.threads.size() && queue.threads.size() < queue.most_threads;
  }
  if (another) queue.threads.emplace_back([this, &queue] { work(queue); });
  queue.wanted.notify_one();
}

bool FuseNotifier::idle() const {
  const std::lock_guard lock(mutex_);
  const auto rests = [](const Queue& queue) { return queue.orders.empty() && queue.busy == 0; };
  return rests(pages_) && rests(attributes_);
}

void FuseNotifier::work(Queue& queue) {
  std::unique_lock lock(mutex_);
  while (true) {
    queue.wanted.wait(lock, [&] { return ending_ || !queue.orders.empty(); });
    if (queue.orders.empty()) return;
    Order order = std::move(queue.orders.front());
    queue.orders.pop_front();
    ++queue.busy;
    lock.unlock();
    // Whatever it says (ENOENT: the kernel does not know the inode), nothing is cached afterwards.
    fuse_lowlevel_notify_inval_inode(session_.get(), order.id, static_cast<off_t>(order.offset),
                                     static_cast<off_t>(order.length));
    if (order.done) finished(std::move(order.done));
    lock.lock();
    --queue.busy;
  }
}

void FuseNotifier::finished(std::function<void()> done) {
  reactor_.post([alive = alive_, done = std::move(done)] {
    if (*alive) done();
  });
}

}  // namespace sharefs
