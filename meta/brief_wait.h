// Decides when it pays to look for the next event a little longer before going to sleep.
//
// Waking a sleeping thread on another core costs 20 us and more, several times what a request does, and a
// request of another site wakes four threads before it is answered. So the reactor looks for the next event
// for kLongest, as long as the next one has lately come soon: it learns that from its sleeps, too.
//
// Threads: one.
#pragma once

#include <algorithm>
#include <chrono>

namespace sharefs {

class BriefWait {
 public:
  using Clock = std::chrono::steady_clock;
  using Duration = Clock::duration;

  // Long enough for the owner on a fast network to answer, or for its next request to come.
  static constexpr std::chrono::microseconds kLongest{250};
  // Whoever had the core for so long when it was offered needs it more.
  static constexpr std::chrono::microseconds kContended{50};

  bool worth_it() const { return credit_ > 0 && Clock::now() >= not_before_; }

  // What came of looking for events...
  void looked(bool with_event) { credit(with_event); }
  // Somebody else needed the core, and had it for `time`. If that was a whole time slice, then by a thread
  // that computes (an image is made), and each further wait would cost such a slice.
  void contended(Clock::time_point now, Duration time) {
    if (time >= kSlice) not_before_ = now + kRespite;
  }
  // ... and of a sleep: awake, the same event would have come sooner.
  void slept(Duration time, bool with_event) { credit(with_event && time < kLongest + kWaking); }

 private:
  static constexpr std::chrono::microseconds kWaking{100};
  static constexpr std::chrono::milliseconds kSlice{1};
  static constexpr std::chrono::milliseconds kRespite{100};
  static constexpr int kMostCredit = 12;
  static constexpr int kPrice = 4;  // a wait in vain takes as much away as that many good ones gave

  void credit(bool good) {
    credit_ = good ? std::min(credit_ + 1, kMostCredit) : std::max(credit_ - kPrice, 0);
  }

  int credit_ = 0;
  Clock::time_point not_before_{};
};

}  // namespace sharefs
