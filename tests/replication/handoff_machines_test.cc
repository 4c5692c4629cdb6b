// The two handoff machines, explored exhaustively: every path of events from the first state.
#include "replication/handoff_machines.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <vector>

namespace sharefs {
namespace {

constexpr std::array kSourceEvents{
    SourceEvent::prepared,    SourceEvent::image_complete,  SourceEvent::rest_is_small, SourceEvent::drained,
    SourceEvent::log_applied, SourceEvent::ownership_given, SourceEvent::taken_over,    SourceEvent::give_up};
constexpr std::array kTargetEvents{TargetEvent::final_end, TargetEvent::durable, TargetEvent::commit,
                                   TargetEvent::performed, TargetEvent::abandon};

// Calls `visit` with every path of states that events can produce from `state`.
template <class State, class Events>
void explore(std::vector<State> path, const Events& events,
             const std::function<void(const std::vector<State>&)>& visit) {
  visit(path);
  for (auto event : events)
    if (auto to = next(path.back(), event)) {
      auto longer = path;
      longer.push_back(*to);
      explore(longer, events, visit);
    }
}

bool contains(const std::vector<SourceState>& path, SourceState state) {
  return std::find(path.begin(), path.end(), state) != path.end();
}

TEST(SourceMachine, CommitsOnlyAfterTheLogWasAppliedBehindAClosedGate) {
  explore<SourceState>({SourceState::preparing}, kSourceEvents, [](const auto& path) {
    if (!contains(path, SourceState::committed)) return;
    EXPECT_TRUE(contains(path, SourceState::closing));
    EXPECT_TRUE(contains(path, SourceState::finishing));
    EXPECT_TRUE(contains(path, SourceState::committing));
  });
}

TEST(SourceMachine, NeverRollsBackAfterTheCommitPoint) {
  for (auto state : {SourceState::committed, SourceState::done}) {
    EXPECT_FALSE(may_give_up(state));
    EXPECT_FALSE(next(state, SourceEvent::give_up));
    EXPECT_FALSE(holds_requests(state));
  }
}

TEST(SourceMachine, CanBeGivenUpInEveryStateBeforeTheCommitPoint) {
  for (auto state : {SourceState::preparing, SourceState::imaging, SourceState::catching_up,
                     SourceState::closing, SourceState::finishing, SourceState::committing}) {
    EXPECT_TRUE(may_give_up(state));
    EXPECT_EQ(next(state, SourceEvent::give_up), SourceState::rolled_back);
  }
}

TEST(SourceMachine, EndsInDoneOrRolledBackOnly) {
  std::set<SourceState> ends;
  explore<SourceState>({SourceState::preparing}, kSourceEvents, [&](const auto& path) {
    bool end = true;
    for (auto event : kSourceEvents) end = end && !next(path.back(), event);
    if (end) ends.insert(path.back());
  });
  EXPECT_EQ(ends, (std::set{SourceState::done, SourceState::rolled_back}));
}

TEST(TargetMachine, BecomesOwnerByCommitOfAPreparedAttemptOnly) {
  explore<TargetState>({TargetState::receiving}, kTargetEvents, [](const auto& path) {
    for (std::size_t i = 0; i < path.size(); ++i)
      if (path[i] == TargetState::performing) {
        ASSERT_GT(i, 0u);
        EXPECT_EQ(path[i - 1], TargetState::prepared);
      }
  });
  EXPECT_FALSE(next(TargetState::receiving, TargetEvent::commit));
  EXPECT_FALSE(next(TargetState::finishing, TargetEvent::commit));
  EXPECT_FALSE(next(TargetState::abandoned, TargetEvent::commit));
}

TEST(TargetMachine, AnOwnerIsNeverAbandoned) {
  EXPECT_FALSE(next(TargetState::performing, TargetEvent::abandon));
  EXPECT_FALSE(next(TargetState::serving, TargetEvent::abandon));
}

}  // namespace
}  // namespace sharefs
