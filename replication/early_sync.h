// Writes dirty pages of a file system to its disk while more arrive, so that the sync at the end is short.
//
// Threads: written() and check() on one thread; the syncs on a thread of its own.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace sharefs {

class EarlySync {
 public:
  explicit EarlySync(int file_system);  // any descriptor of it; borrowed
  ~EarlySync();
  EarlySync(const EarlySync&) = delete;
  EarlySync& operator=(const EarlySync&) = delete;

  void written(std::uint64_t bytes);  // starts a sync now and then; never waits for one
  void check();  // throws std::system_error if one has failed: what it lost, no later sync tells

 private:
  static constexpr std::uint64_t kEvery = std::uint64_t{128} << 20;
  void serve();

  const int file_system_;
  std::uint64_t since_ = 0;  // calling thread
  // under mutex_
  std::mutex mutex_;
  std::condition_variable changed_;
  bool wanted_ = false;
  bool stopping_ = false;
  int error_ = 0;
  std::thread thread_;
};

}  // namespace sharefs
