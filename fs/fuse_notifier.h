// Tells the kernel to drop what it has cached, on threads of its own.
//
// Why threads: an invalidation waits for pages that the kernel has locked, and those may wait for a reply of
// ours. Why several: one that waits for a writer behind a closed gate must not keep the others from being
// acknowledged. Invalidations of attributes wait for no page, so one thread is theirs alone.
//
// What has been followed is told by way of a descriptor: of those of the process these threads have no other
// (FuseSession::part_device).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "fs/inode_table.h"
#include "meta/reactor.h"
#include "meta/types.h"

namespace sharefs {

class FuseSession;

class FuseNotifier {
 public:
  FuseNotifier(const FuseSession& session, Reactor& reactor);
  // Does what was asked, then ends the threads; no `done` is called any more. Blocks until the kernel has
  // followed, so its requests must be answered meanwhile: see idle().
  ~FuseNotifier();
  FuseNotifier(const FuseNotifier&) = delete;
  FuseNotifier& operator=(const FuseNotifier&) = delete;

  // As an offset: attributes only. The kernel waits for no page then.
  static constexpr std::uint64_t kAttributes = ~std::uint64_t{0};

  // See FrontEnd::invalidate. Reactor thread. An empty `done` is allowed.
  void invalidate(InodeId id, std::uint64_t offset, std::uint64_t length, std::function<void()> done);

  // `done` is called once all that has been asked so far is followed. Reactor thread.
  void when_followed(std::function<void()> done);

  // Nothing is queued or being done.
  bool idle() const;

 private:
  struct Order {
    InodeId id = 0;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    std::function<void()> done;
    std::uint64_t number = 0;
  };
  struct Queue {
    explicit Queue(std::size_t most) : most_threads(most) {}
    const std::size_t most_threads;
    std::condition_variable wanted;     // with mutex_
    std::deque<Order> orders;           // under mutex_
    std::size_t busy = 0;               // under mutex_: threads at an order
    std::vector<std::jthread> threads;  // reactor thread
  };
  void add(Queue& queue, Order order);
  void work(Queue& queue);
  void note_followed(std::uint64_t number);  // mutex_ is held
  void tell_followed();

  // constant after construction
  const FuseSession& session_;
  Reactor& reactor_;
  const UniqueFd wake_;                // of the reactor: something has been followed
  const std::shared_ptr<bool> alive_;  // reactor thread; outlives this object in what was posted

  mutable std::mutex mutex_;
  // under mutex_
  bool ending_ = false;
  std::uint64_t last_number_ = 0;
  std::set<std::uint64_t> open_;                                 // orders that are not followed yet
  std::multimap<std::uint64_t, std::function<void()>> waiting_;  // for all orders up to this number
  std::vector<std::function<void()>> followed_;                  // whoever waits for that
  Queue pages_{16};
  Queue attributes_{1};
};

}  // namespace sharefs
