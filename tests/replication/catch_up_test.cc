// When the gate is closed, writers are slowed, or a handoff is hopeless.

#include "replication/catch_up.h"

#include <gtest/gtest.h>

namespace sharefs {
namespace {

using std::chrono::milliseconds;
using Next = CatchUp::Verdict::Next;

constexpr CatchUp::Costs kCheap{
    .round_trip = milliseconds(1), .target_sync = milliseconds(1), .own_sync = milliseconds(1)};

class CatchUpTest : public testing::Test {
 protected:
  CatchUp::Verdict after(CatchUp::Round round, CatchUp::Rest rest, const CatchUp::Costs& costs = kCheap) {
    round.number = ++rounds_;
    return catch_up_.judge(round, rest, costs, "beta");
  }
  CatchUp catch_up_{milliseconds(100)};
  std::uint32_t rounds_ = 0;
};

TEST_F(CatchUpTest, TheGateIsClosedWhenTheRestFitsAndDoesNotShrinkAnyMore) {
  // 52 ms for 1000 entries: the 100 that are left take 5.
  EXPECT_EQ(after({.entries = 1000, .took = milliseconds(52)}, {.entries = 100}).next, Next::close_gate);
  EXPECT_DOUBLE_EQ(catch_up_.predicted_ms({.entries = 100}, kCheap), 10);
}

TEST_F(CatchUpTest, WhatStillGrowsIsNotWaitedForInThePause) {
  EXPECT_EQ(after({.entries = 100, .took = milliseconds(32)}, {.entries = 200}).next, Next::another_round);
  EXPECT_EQ(after({.entries = 200, .took = milliseconds(32)}, {.entries = 200}).next, Next::close_gate);
}

TEST_F(CatchUpTest, FewEntriesMayBeManyBytes) {
  const CatchUp::Round round{.entries = 1000, .bytes = 1000, .took = milliseconds(202)};
  EXPECT_EQ(after(round, {.entries = 1, .bytes = 1000}).next, Next::another_round);
  EXPECT_EQ(after(round, {.entries = 1, .bytes = 10}).next, Next::close_gate);
}

TEST_F(CatchUpTest, ASearchThroughTheTreeDoesNotGetShorterWithTheRest) {
  CatchUp::Costs searched = kCheap;
  searched.search = milliseconds(90);
  const CatchUp::Round round{.entries = 1000, .took = milliseconds(142)};
  EXPECT_EQ(after(round, {.entries = 100}, searched).next, Next::another_round);
  EXPECT_DOUBLE_EQ(catch_up_.predicted_ms({.entries = 100}, searched), 100);
  EXPECT_EQ(after(round, {.entries = 100}).next, Next::close_gate);
}

TEST_F(CatchUpTest, WritersAreSlowedMoreAndMoreWhereRoundsDoNotGetShorter) {
  const CatchUp::Round round{.entries = 1000, .bytes = 1'000'000, .took = milliseconds(1000)};
  const CatchUp::Rest rest{.entries = 1000, .bytes = 1'000'000};
  EXPECT_DOUBLE_EQ(after(round, rest).writers_rate, 500'000);
  EXPECT_DOUBLE_EQ(after(round, rest).writers_rate, 250'000);
  EXPECT_DOUBLE_EQ(after(round, {.entries = 500, .bytes = 500'000}).writers_rate, 0);  // it catches up
  EXPECT_DOUBLE_EQ(catch_up_.writers_rate(), 250'000);
  CatchUp::Verdict verdict;
  while (rounds_ < 40 && verdict.next == Next::another_round) verdict = after(round, rest);
  EXPECT_EQ(verdict.next, Next::give_up);
  EXPECT_NE(verdict.why.find("faster than beta can follow"), std::string::npos) << verdict.why;
}

TEST_F(CatchUpTest, ARoundThatShippedNothingTellsNotHowFastToWrite) {
  const CatchUp::Rest burst{.entries = 10, .bytes = 1000};
  EXPECT_EQ(after({.took = milliseconds(60)}, burst).next, Next::another_round);
  EXPECT_DOUBLE_EQ(catch_up_.writers_rate(), 0);
  after({.entries = 1000, .bytes = 1'000'000, .took = milliseconds(1000)},
        {.entries = 1000, .bytes = 1'000'000});
  EXPECT_DOUBLE_EQ(after({.took = milliseconds(60)}, burst).writers_rate, 500'000);
}

TEST_F(CatchUpTest, AnUnreachablePauseIsToldWithOneThatCanBe) {
  CatchUp::Costs far = kCheap;
  far.round_trip = milliseconds(100);
  EXPECT_EQ(after({.entries = 1, .took = milliseconds(102)}, {}, far).next, Next::another_round);
  EXPECT_EQ(after({.entries = 1, .took = milliseconds(102)}, {}, far).next, Next::another_round);
  const auto verdict = after({.entries = 1, .took = milliseconds(102)}, {}, far);
  EXPECT_EQ(verdict.next, Next::give_up);
  EXPECT_NE(verdict.why.find("about 302 ms: use --max-pause 454ms"), std::string::npos) << verdict.why;
}

TEST_F(CatchUpTest, APauseThatFitsBarelyIsNotBlamedOnApplicationsThatDoNotWrite) {
  CatchUp::Costs barely = kCheap;
  barely.target_sync = milliseconds(90);
  CatchUp::Verdict verdict;
  while (rounds_ < 40 && verdict.next == Next::another_round)
    verdict = after({.took = milliseconds(91)}, {}, barely);
  EXPECT_EQ(verdict.next, Next::give_up);
  EXPECT_NE(verdict.why.find("about 94 ms: use --max-pause 142ms"), std::string::npos) << verdict.why;
}

TEST_F(CatchUpTest, OneBusyMomentOfADiskDoesNotMakeItUnreachable) {
  CatchUp::Costs busy = kCheap;
  busy.own_sync = milliseconds(500);
  after({.entries = 1, .took = milliseconds(2)}, {});
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(after({.entries = 1, .took = milliseconds(2)}, {}, busy).next, Next::another_round);
}

}  // namespace
}  // namespace sharefs
