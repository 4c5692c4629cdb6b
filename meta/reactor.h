// The one thread of a site on which requests, replies, network messages and both handoff state machines run.
//
// Why one thread: a FUSE request costs 8 us when served on the core of its caller and 45 us and more when
// another core must be woken, and state that one thread owns needs no locks. What may take long (fsync, cold
// reads, the image) runs on Workers or on threads of its own, and comes back with post().
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

namespace sharefs {

class Reactor {
 public:
  using Clock = std::chrono::steady_clock;
  using Task = std::function<void()>;
  using TimerId = std::uint64_t;

  Reactor();
  ~Reactor();
  Reactor(const Reactor&) = delete;
  Reactor& operator=(const Reactor&) = delete;

  // Calls `ready` whenever `fd` is readable, at its end or in error (level-triggered: `ready` drains it),
  // until unwatch(fd), which comes before close(fd) and may come from any callback. Reactor thread, or before
  // run().
  void watch(int fd, Task ready);
  void unwatch(int fd);

  // Called once after every round of events, before the reactor sleeps: where batches are flushed and
  // edge-triggered sources (a ZeroMQ descriptor) are checked again. Returns true if it did something, so that
  // the round is repeated.
  void before_sleep(std::function<bool()> check);

  // Runs `task` once after `delay`. Reactor thread, or before run().
  TimerId after(Clock::duration delay, Task task);
  void cancel(TimerId timer);  // unknown or past timers are ignored

  // Runs `task` on the reactor thread, in the order of the calls. Any thread.
  void post(Task task);

  // Serves events until stop(). Throws what a task throws.
  void run();
  void stop();  // any thread; async-signal-safe

  bool on_reactor_thread() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A few threads for what may block: fsync, cold reads, large copies, SQLite commits. What `work` throws, the
// reactor's run() throws.
class Workers {
 public:
  Workers(Reactor& reactor, unsigned threads);
  ~Workers();  // finishes what was submitted
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Runs `work` on a worker, then `done` on the reactor thread. Reactor thread only.
  void submit(std::function<void()> work, std::function<void()> done);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
