#include "fs/fuse_notifier.h"

#include <sys/eventfd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "fs/fuse_session.h"
#include "meta/fault.h"

namespace sharefs {

FuseNotifier::FuseNotifier(const FuseSession& session, Reactor& reactor)
    : session_(session),
      reactor_(reactor),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      alive_(std::make_shared<bool>(true)) {
  if (!wake_) throw std::system_error(errno, std::generic_category(), "FUSE: eventfd");
  reactor_.watch(wake_.get(), [this] { tell_followed(); });
}

FuseNotifier::~FuseNotifier() {
  *alive_ = false;
  reactor_.unwatch(wake_.get());
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

void FuseNotifier::when_followed(std::function<void()> done) {
  {
    const std::lock_guard lock(mutex_);
    if (!open_.empty()) {
      waiting_.emplace(last_number_, std::move(done));
      return;
    }
  }
  done();
}

void FuseNotifier::add(Queue& queue, Order order) {
  bool another = false;
  {
    const std::lock_guard lock(mutex_);
    order.number = ++last_number_;
    open_.insert(order.number);
    queue.orders.push_back(std::move(order));
    another =
        queue.busy + queue.orders.size() > queue.threads.size() && queue.threads.size() < queue.most_threads;
  }
  if (another) queue.threads.emplace_back([this, &queue] { work(queue); });
  queue.wanted.notify_one();
}

bool FuseNotifier::idle() const {
  const std::lock_guard lock(mutex_);
  return open_.empty();
}

void FuseNotifier::work(Queue& queue) {
  const int device = session_.part_device(wake_.get());
  std::unique_lock lock(mutex_);
  while (true) {
    queue.wanted.wait(lock, [&] { return ending_ || !queue.orders.empty(); });
    if (queue.orders.empty()) return;
    Order order = std::move(queue.orders.front());
    queue.orders.pop_front();
    ++queue.busy;
    lock.unlock();
    // Whatever it says (ENOENT: the kernel does not know the inode), nothing is cached afterwards.
    fault_point("fuse.dropping");
    FuseSession::invalidate(device, order.id, static_cast<std::int64_t>(order.offset),
                            static_cast<std::int64_t>(order.length));
    lock.lock();
    --queue.busy;
    if (order.done) followed_.push_back(std::move(order.done));
    note_followed(order.number);
    if (!followed_.empty()) ::eventfd_write(wake_.get(), 1);
  }
}

void FuseNotifier::note_followed(std::uint64_t number) {
  open_.erase(number);
  const auto last = open_.empty() ? waiting_.end() : waiting_.lower_bound(*open_.begin());
  for (auto one = waiting_.begin(); one != last; ++one) followed_.push_back(std::move(one->second));
  waiting_.erase(waiting_.begin(), last);
}

void FuseNotifier::tell_followed() {
  eventfd_t ignored = 0;
  ::eventfd_read(wake_.get(), &ignored);
  std::vector<std::function<void()>> followed;
  {
    const std::lock_guard lock(mutex_);
    followed.swap(followed_);
  }
  for (auto& done : followed)
    reactor_.post([alive = alive_, done = std::move(done)] {
      if (*alive) done();
    });
}

}  // namespace sharefs
