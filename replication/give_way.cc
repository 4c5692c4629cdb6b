#include "replication/give_way.h"

#include <algorithm>

namespace sharefs {
namespace {

using Seconds = std::chrono::duration<double>;

constexpr Seconds kRemembered(0.5);  // of work, and of rests
constexpr Seconds kPeriod(0.25);     // of work and rest where applications suffer
constexpr Seconds kUnhindered(1);    // of work where they do not
constexpr Seconds kShortestRest(0.02);
constexpr double kMost = 1 - kShortestRest / kUnhindered;
constexpr double kEnough = 50;  // requests that say something of a rate

GiveWay::Clock::duration ticks(Seconds seconds) {
  return std::chrono::duration_cast<GiveWay::Clock::duration>(seconds);
}

}  // namespace

void GiveWay::Progress::add(double more_seconds, double more_requests) {
  seconds += more_seconds;
  requests += more_requests;
  if (seconds <= kRemembered.count()) return;
  requests *= kRemembered.count() / seconds;
  seconds = kRemembered.count();
}

double GiveWay::share() const {
  if (alone_.requests < kEnough || beside_.seconds == 0) return kMost;
  // Of the rate that applications have alone, working costs them this part.
  const double cost = 1 - beside_.rate() / alone_.rate();
  return cost * kMost <= 1 - kLeft ? kMost : std::max((1 - kLeft) / cost, kLeast);
}

GiveWay::Clock::duration GiveWay::rest(Clock::time_point now, std::uint64_t done) {
  const Seconds worked = now - since_;
  const bool nobody = done == done_;
  beside_.add(worked.count(), static_cast<double>(done - done_));
  since_ = now;
  done_ = done;
  if (nobody) return {};
  return ticks(std::max(kShortestRest, worked * (1 - share()) / share()));
}

void GiveWay::work(Clock::time_point now, std::uint64_t done) {
  alone_.add(Seconds(now - since_).count(), static_cast<double>(done - done_));
  since_ = now;
  done_ = done;
  work_ = ticks(share() < kMost ? kPeriod * share() : kUnhindered);
}

}  // namespace sharefs
