// How much of the time an image takes, in a time of our own.

#include "replication/give_way.h"

#include <gtest/gtest.h>

namespace sharefs {
namespace {

using Clock = GiveWay::Clock;
using std::chrono::milliseconds;
using Seconds = std::chrono::duration<double>;

// Applications that get `alone` requests per second done, and `beside` while an image is worked on.
class World {
 public:
  World(double alone, double beside) : alone_(alone), beside_(beside) {}

  // What part of their rate applications keep, and the image of its time, from `from` until `until` seconds.
  struct Kept {
    double applications, image;
  };
  Kept run(GiveWay& give_way, Seconds from, Seconds until) {
    double done_from = 0;
    Seconds worked{};
    bool measured = false;
    while (now_ < until) {
      if (!measured && now_ >= from) {
        measured = true;
        done_from = done_;
        worked = {};
      }
      pass(milliseconds(5), beside_);
      worked += milliseconds(5);
      if (!give_way.rest_is_due(time())) continue;
      const Seconds rest = give_way.rest(time(), requests());
      pass(rest, alone_);
      give_way.work(time(), requests());
    }
    const double seconds = (now_ - from).count();
    return {(done_ - done_from) / seconds / alone_, worked.count() / seconds};
  }

  Clock::time_point time() const {
    return Clock::time_point() + std::chrono::duration_cast<Clock::duration>(now_);
  }
  std::uint64_t requests() const { return static_cast<std::uint64_t>(done_); }

 private:
  void pass(Seconds time, double rate) {
    now_ += time;
    done_ += rate * time.count();
  }

  double alone_, beside_;
  Seconds now_{};
  double done_ = 0;
};

World::Kept after_a_second(double alone, double beside) {
  World world(alone, beside);
  GiveWay give_way(world.time(), world.requests());
  return world.run(give_way, Seconds(1), Seconds(20));
}

TEST(GiveWayTest, ApplicationsKeepMostOfTheirRate) {
  for (const double beside : {0.3, 0.5, 0.6, 0.8}) {
    const auto kept = after_a_second(40'000, 40'000 * beside);
    EXPECT_GT(kept.applications, GiveWay::kLeft - 0.04) << beside;
    EXPECT_LT(kept.applications, GiveWay::kLeft + 0.04) << beside << ": it could have done more";
  }
}

TEST(GiveWayTest, WhatCostsNobodyAnythingGoesOn) {
  EXPECT_GT(after_a_second(1000, 1000).image, 0.95);
  EXPECT_GT(after_a_second(40'000, 38'000).image, 0.95);
}

TEST(GiveWayTest, WhereNobodyWorksThereIsNoRest) { EXPECT_GE(after_a_second(0, 0).image, 1); }

TEST(GiveWayTest, AnImageEndsWhateverItCosts) {
  EXPECT_GT(after_a_second(40'000, 0.1).image, GiveWay::kLeast - 0.04);
}

TEST(GiveWayTest, AFewRequestsSayNothing) { EXPECT_GT(after_a_second(60, 10).image, 0.95); }

TEST(GiveWayTest, ApplicationsThatEndAreGivenWayToNoLonger) {
  World busy(40'000, 20'000);
  GiveWay give_way(busy.time(), busy.requests());
  EXPECT_LT(busy.run(give_way, Seconds(1), Seconds(5)).image, 0.4);
  // A second world goes on where the first one has ended.
  const auto end = busy.time();
  EXPECT_EQ(give_way.rest(end + milliseconds(50), busy.requests()), Clock::duration::zero());
}

}  // namespace
}  // namespace sharefs
