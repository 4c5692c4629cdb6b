// The handoff as two explicit state machines: pure transition tables, no I/O. The drivers (handoff_source.h,
// handoff_target.h) feed them events and act on the states they enter; tests drive them without a network.
//
// Invariants, checked for every reachable path by tests/replication/handoff_machines_test.cc:
//  - The source performs mutations in every state up to `closing`, holds them from there on, and never
//  performs one
//    again after `committed`.
//  - The only way to `committed` leads through `log_applied` of the same attempt; nothing leads back out of
//  it but
//    `taken_over`.
//  - The target becomes owner by `commit` only, and only when prepared; losing the source never promotes it.
#pragma once

#include <optional>
#include <string_view>

namespace sharefs {

enum class SourceState {
  preparing,    // asked the target whether it can
  imaging,      // t0: the log is on, the image is on its way
  catching_up,  // «image complete»: rounds of the log until the rest is small
  closing,      // t1: the gate is closed, mutations in flight drain
  finishing,    // the last round and the live state are on their way
  committing,   // t2: «log applied»; records made durable, queries drained
  committed,    // the commit point has passed: the target owns; records are sent until it has taken over
  done,         // t3
  rolled_back,  // before the commit point: this site goes on as owner
};

enum class SourceEvent {
  prepared,         // the target can
  image_complete,   // the target has the image
  rest_is_small,    // the prediction says that the rest fits into max-pause
  drained,          // no mutation is in flight behind the closed gate
  log_applied,      // the target has everything, durable, and is prepared
  ownership_given,  // «owner = target» is durable here
  taken_over,       // the target has performed the records and serves
  give_up,          // abort, refusal, overrun of max-pause, connection or target lost
};

enum class TargetState {
  receiving,   // image and rounds arrive
  finishing,   // everything arrived: being made durable
  prepared,    // «log applied» was said: waits for commit or abandon, never decides by itself
  performing,  // owner: performs the records, serves nobody else
  serving,     // done
  abandoned,
};

enum class TargetEvent {
  final_end,  // the last batch and the live state arrived
  durable,    // all of it is on stable storage, and so is «prepared»
  commit,     // the source gave up ownership
  performed,  // the last record was performed
  abandon,    // the source says so, the attempt was replaced, or this site cannot go on
};

// The state that `event` leads to; nullopt: the event has no meaning in this state (a late or hostile
// message) and is ignored.
std::optional<SourceState> next(SourceState state, SourceEvent event);
std::optional<TargetState> next(TargetState state, TargetEvent event);

// As shown by status and kept in SQLite.
std::string_view name(SourceState state);
std::string_view name(TargetState state);

// True from the closing of the gate until the outcome is decided.
constexpr bool holds_requests(SourceState state) {
  return state == SourceState::closing || state == SourceState::finishing || state == SourceState::committing;
}
// An attempt can be given up before the commit point only.
constexpr bool may_give_up(SourceState state) { return state < SourceState::committed; }

}  // namespace sharefs
