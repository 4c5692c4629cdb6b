#include "replication/record_performer.h"

#include <cerrno>
#include <string>
#include <utility>

#include "meta/fault.h"
#include "replication/request_check.h"

namespace sharefs {

RecordPerformer::RecordPerformer(State& state, Executor& store, std::uint64_t attempt)
    : state_(state), store_(store), attempt_(attempt) {}

std::optional<std::string> RecordPerformer::outcome(State& state, std::uint64_t attempt, std::uint64_t number,
                                                    pb::Outcome& outcome) {
  Statement select(state.database(),
                   "SELECT outcome, outcome_data FROM record WHERE attempt = ? AND number = ? AND done");
  select.bind(attempt, number);
  if (!select.step()) return std::nullopt;
  if (!outcome.ParseFromString(std::string(select.blob(0)))) outcome.set_error(EIO);
  return std::string(select.blob(1));
}

void RecordPerformer::perform(std::uint64_t number, const pb::Request& request, Bytes data, Reply done,
                              Failed failed) {
  pb::Outcome known;
  if (const auto bytes = outcome(state_, attempt_, number, known)) return done(known, as_bytes(*bytes));
  // What a hostile source may send is answered like any other site's request.
  const int refused = check_request(request, data);
  const auto* op = pb::Request::descriptor()->FindFieldByNumber(request.op_case());
  state_.put_record(
      attempt_,
      {.number = number, .request = request.SerializeAsString(), .data = std::string(as_text(data))},
      request.client(), request.seq(), op != nullptr ? op->name() : "");
  fault_point("target.record.stored");
  const Reply performed = [this, number, done = std::move(done), failed = std::move(failed)](
                              const pb::Outcome& outcome, Bytes bytes) {
    fault_point("target.record.performed");
    try {
      state_.finish_record(attempt_, number, outcome.SerializeAsString(), as_text(bytes));
    } catch (const std::exception& error) {
      return failed(error);
    }
    done(outcome, bytes);
  };
  if (refused != 0) return reply_errno(performed, refused);
  store_.execute(request, data, performed);
}

}  // namespace sharefs
