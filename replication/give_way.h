// How much of the time an image may take while applications work beside it.
//
// What an image costs them is not known beforehand: cores, caches, a disk, threads that wake on another core.
// So it is measured: the sender rests again and again, and what applications got done beside it is compared
// with what they get done in the rests. It works for so much of the time that kLeft of their rate is left
// over all, but never less than kLeast of it. (As MS Manners does, which measures the progress of the
// unimportant process: Douceur and Bolosky, SOSP 1999.)
//
// Pure: told the time and what was done. Threads: one at a time.
#pragma once

#include <chrono>
#include <cstdint>

namespace sharefs {

class GiveWay {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr double kLeft = 0.88;
  static constexpr double kLeast = 1.0 / 8;

  // Work begins. `done`: how many requests of applications have been performed, since whenever.
  GiveWay(Clock::time_point now, std::uint64_t done) : since_(now), done_(done) {}

  bool rest_is_due(Clock::time_point now) const { return now - since_ >= work_; }
  // What was sent has been worked off: the rest begins. Returns how long it is to be, perhaps 0.
  Clock::duration rest(Clock::time_point now, std::uint64_t done);
  void work(Clock::time_point now, std::uint64_t done);  // the rest has ended

  // What part of the time may be worked in.
  double share() const;

 private:
  // What was done, and in how many seconds; what was long ago counts less.
  struct Progress {
    double seconds = 0, requests = 0;
    void add(double more_seconds, double more_requests);
    double rate() const { return requests / seconds; }
  };

  Progress beside_;  // the image
  Progress alone_;
  Clock::time_point since_;
  std::uint64_t done_;
  Clock::duration work_ = std::chrono::milliseconds(100);
};

}  // namespace sharefs
