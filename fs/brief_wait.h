// Decides when it pays to look for the next request a little longer before going to sleep.
//
// Waking a sleeping thread on another core costs 20 us and more, several times what a request does. So after
// a request the server looks for the next one for kLongest, as long as that has lately been worth it: a
// client that thinks longer, or that needs this very core to go on, is found out after a few tries, and is
// then tried ever more seldom.
//
// Threads: one.
#pragma once

#include <algorithm>
#include <chrono>

namespace sharefs {

class BriefWait {
 public:
  // Long enough for a client on another core to be woken from its sleep and to ask again.
  static constexpr std::chrono::microseconds kLongest{80};

  // Whether to wait after this request.
  bool worth_it() {
    if (credit_ > 0) return true;
    if (++skipped_ < interval_) return false;
    skipped_ = 0;
    return true;
  }

  void ended(bool with_request) {
    if (with_request) {
      credit_ = std::min(credit_ + 1, kMostCredit);
      interval_ = kShortestInterval;
    } else if (credit_ > 0) {
      credit_ = std::max(credit_ - kPrice, 0);
    } else {
      interval_ = std::min(interval_ * 2, kLongestInterval);
    }
  }

 private:
  static constexpr int kMostCredit = 12;
  static constexpr int kPrice = 4;  // a wait in vain takes as much away as that many good ones gave
  static constexpr int kShortestInterval = 16;
  static constexpr int kLongestInterval = 2048;
  int credit_ = 0;
  int skipped_ = 0;
  int interval_ = kShortestInterval;
};

}  // namespace sharefs
