// Performs the records of a handoff, and remembers what came of each: a record that is sent again, by a
// source that did not hear the outcome, is answered from SQLite. That a crash between effect and outcome
// doubles nothing is the business of Once (fs/once.h), through which `store` leads.
//
// Threads: reactor thread.
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <string>

#include "meta/executor.h"
#include "meta/state.h"

namespace sharefs {

class RecordPerformer {
 public:
  // `store`: where records are performed (Coherence).
  RecordPerformer(State& state, Executor& store, std::uint64_t attempt);

  using Failed = std::function<void(const std::exception&)>;

  // Performs `number`, or answers from what was done before. Calls `done` exactly once; the outcome survives
  // kill -9 by then. One at a time, in order. `failed` instead: the outcome could not be noted (a full disk),
  // and the record is to be performed again. Throws when it could not be begun.
  void perform(std::uint64_t number, const pb::Request& request, Bytes data, Reply done, Failed failed);

  // What came of a record that was performed: the outcome, and its bytes as the result. Nothing: not
  // performed, or forgotten.
  static std::optional<std::string> outcome(State& state, std::uint64_t attempt, std::uint64_t number,
                                            pb::Outcome& outcome);

 private:
  State& state_;
  Executor& store_;
  std::uint64_t attempt_;
};

}  // namespace sharefs
