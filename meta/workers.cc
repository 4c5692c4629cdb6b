#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "meta/reactor.h"

namespace sharefs {

struct Workers::Impl {
  struct Job {
    std::function<void()> work, done;
  };

  explicit Impl(Reactor& home) : reactor(home) {}
  void serve();

  // constant after construction
  Reactor& reactor;
  std::vector<std::thread> threads;

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Job> jobs;  // under mutex
  bool ending = false;   // under mutex
};

void Workers::Impl::serve() {
  std::unique_lock lock(mutex);
  while (true) {
    changed.wait(lock, [this] { return ending || !jobs.empty(); });
    if (jobs.empty()) return;
    Job job = std::move(jobs.front());
    jobs.pop_front();
    lock.unlock();
    try {
      job.work();
      job.work = nullptr;  // its captures end here, before `done` may run elsewhere
      reactor.post(std::move(job.done));
    } catch (...) {
      // As if the reactor had done the work itself: run() throws.
      reactor.post([error = std::current_exception()] { std::rethrow_exception(error); });
    }
    lock.lock();
  }
}

Workers::Workers(Reactor& reactor, unsigned threads) : impl_(std::make_unique<Impl>(reactor)) {
  impl_->threads.reserve(threads);
  for (unsigned i = 0; i < threads; ++i) impl_->threads.emplace_back([this] { impl_->serve(); });
}

Workers::~Workers() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->ending = true;
  }
  impl_->changed.notify_all();
  for (auto& thread : impl_->threads) thread.join();
}

void Workers::submit(std::function<void()> work, std::function<void()> done) {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->jobs.push_back({std::move(work), std::move(done)});
  }
  impl_->changed.notify_one();
}

}  // namespace sharefs
