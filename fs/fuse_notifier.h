// Tells the kernel to drop what it has cached, on threads of its own.
//
// Why threads: an invalidation waits for pages that the kernel has locked, and those may wait for a reply of
// ours. Why several: one that waits for a writer behind a closed gate must not keep the others from being
// acknowledged.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "meta/reactor.h"
#include "meta/types.h"

struct fuse_session;

namespace sharefs {

class FuseNotifier {
 public:
  FuseNotifier(fuse_session* session, Reactor& reactor);
  // Does what was asked, then ends the threads; no `done` is called any more. Blocks until the kernel has
  // followed, so its requests must be answered meanwhile: see idle().
  ~FuseNotifier();
  FuseNotifier(const FuseNotifier&) = delete;
  FuseNotifier& operator=(const FuseNotifier&) = delete;

  // As an offset: attributes only. The kernel waits for no page then.
  static constexpr std::uint64_t kAttributes = ~std::uint64_t{0};

  // See FrontEnd::invalidate. Reactor thread. An empty `done` is allowed.
  void invalidate(InodeId id, std::uint64_t offset, std::uint64_t length, std::function<void()> done);

  // Nothing is queued or being done.
  bool idle() const;

 private:
  struct Order {
    InodeId id = 0;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    std::function<void()> done;
  };
  void work();
  void finished(std::function<void()> done);

  static constexpr std::size_t kMostThreads = 16;

  // constant after construction
  fuse_session* const session_;
  Reactor& reactor_;
  const std::shared_ptr<bool> alive_;  // reactor thread; outlives this object in what was posted

  mutable std::mutex mutex_;
  std::condition_variable wanted_;  // with mutex_
  std::deque<Order> orders_;        // under mutex_
  std::size_t busy_ = 0;            // under mutex_: threads at an order
  bool ending_ = false;             // under mutex_

  std::vector<std::jthread> threads_;  // reactor thread
};

}  // namespace sharefs
