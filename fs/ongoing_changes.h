// Since when the changes that are being made have been under way. A file system stamps an inode when a change
// begins, and its bytes may be there much later: who reads meanwhile, and finds a stamp of the past, must not
// take what was read for what belongs to the stamp.
//
// Threads: as said; the rest of a change has happened when it is ended.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#include <limits>
#include <mutex>
#include <set>

namespace sharefs {

class OngoingChanges {
 public:
  static constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();

  // --- reactor thread: one at a time, made there
  void begin() { here_.store(now()); }
  void end() { here_.store(kNone); }

  // --- any thread: made by a worker; what enlist() returned is given back
  std::int64_t enlist() {
    const std::lock_guard lock(mutex_);
    return *elsewhere_.insert(now());
  }
  void ended(std::int64_t since) {
    const std::lock_guard lock(mutex_);
    elsewhere_.erase(elsewhere_.find(since));
  }

  // Any thread. Ns since 1970, by the clock that stamps files; kNone: there is none.
  std::int64_t oldest() const {
    const std::lock_guard lock(mutex_);
    return std::min(here_.load(), elsewhere_.empty() ? kNone : *elsewhere_.begin());
  }

 private:
  static std::int64_t now() {
    timespec time{};
    ::clock_gettime(CLOCK_REALTIME_COARSE, &time);
    return time.tv_sec * std::int64_t{1'000'000'000} + time.tv_nsec;
  }

  std::atomic<std::int64_t> here_{kNone};
  mutable std::mutex mutex_;
  std::multiset<std::int64_t> elsewhere_;
};

}  // namespace sharefs
