#include "fs/gate.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>

#include "meta/fault.h"

namespace sharefs {
namespace {

bool is_query(const pb::Request& request) { return op_class(request.op_case()) == OpClass::query; }

bool is_writeback(const pb::Request& request) {
  return request.op_case() == pb::Request::kWrite && request.write().writeback();
}

// What a writeback of this inode comes before. Times that are set are not to be those of the writeback.
bool follows_writebacks(const pb::Request& request, InodeId id) {
  return !is_writeback(request) &&
         (changes_data_of(request) == id || (request.has_setattr() && request.setattr().id() == id));
}

bool is_waiting_lock(const pb::Request& request) {
  return request.op_case() == pb::Request::kSetlock && request.setlock().wait();
}

std::string op_name(const pb::Request& request) {
  const auto* field = pb::Request::descriptor()->FindFieldByNumber(request.op_case());
  return field == nullptr ? std::string("none") : field->name();
}

}  // namespace

Gate::Gate(Executor& store, Database& database)
    : store_(store), database_(database), database_state_(database) {}

void Gate::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (state_ == State::open) [[likely]]
    return pass(request, data, std::move(reply));
  if (state_ == State::passing_on && after_ != nullptr)
    return after_->execute(request, data, std::move(reply));
  const bool may_be_undone = state_ == State::holding_changes || state_ == State::holding_everything;
  if (may_be_undone && request.has_cancel() && cancel_held(request)) return reply_errno(reply, 0);
  if (passes_closed(request)) return pass(request, data, std::move(reply));
  hold(request, data, std::move(reply));
}

bool Gate::passes_closed(const pb::Request& request) const {
  if (state_ == State::holding_changes) {
    if (is_query(request)) return true;
    if (draining_ && request.op_case() == pb::Request::kCancel) return true;
    if ((draining_ || attempt_ == 0) && is_writeback(request)) return true;
  }
  if (state_ != State::holding_changes && state_ != State::holding_everything) return false;
  return is_writeback(request) && hooks_.awaited && hooks_.awaited(request);
}

void Gate::pass(const pb::Request& request, Bytes data, Reply reply) {
  if (refuses_changes_ && op_class(request.op_case()) == OpClass::mutation) return reply_errno(reply, EROFS);
  if (is_waiting_lock(request)) {
    store_.execute(request, data, std::move(reply));
    return;
  }
  const std::uint32_t index = free_slot_;
  if (index == slots_.size()) {
    slots_.emplace_back();
    free_slot_ = static_cast<std::uint32_t>(slots_.size());
  } else {
    free_slot_ = slots_[index].next_free;
  }
  Slot& slot = slots_[index];
  slot.reply = std::move(reply);
  slot.query = is_query(request);
  ++(slot.query ? queries_in_flight_ : in_flight_);
  // 16 trivially copyable bytes: kept inside the std::function.
  store_.execute(request, data,
                 [this, index, generation = slot.generation](const pb::Outcome& outcome, Bytes result) {
                   finish(index, generation, outcome, result);
                 });
}

void Gate::finish(std::uint32_t index, std::uint32_t generation, const pb::Outcome& outcome, Bytes data) {
  Slot& slot = slots_[index];
  if (slot.generation != generation) return;  // answered already
  ++slot.generation;
  const Reply reply = std::exchange(slot.reply, nullptr);
  const bool query = slot.query;
  slot.next_free = free_slot_;
  free_slot_ = index;
  performed_.store(performed() + 1, std::memory_order_relaxed);
  // The reply first: whoever waits for the drain then finds everything answered that was performed. `slot`
  // may be gone after it, since the reply can bring in new requests.
  reply(outcome, data);
  --(query ? queries_in_flight_ : in_flight_);
  if (state_ != State::open) drained_check();
}

// A writeback comes before the changes of its inode that are held: whoever performs them recalls dirty pages
// first, and would wait for this one, which holds what was stored before they were asked for.
void Gate::hold(const pb::Request& request, Bytes data, Reply reply) {
  const auto at = !is_writeback(request)
                      ? records_.end()
                      : std::find_if(records_.begin(), records_.end(), [&](const Record& record) {
                          return follows_writebacks(record.request, request.write().id());
                        });
  const auto number = static_cast<std::uint64_t>(at - records_.begin()) + 1;
  const auto held = records_.insert(at, {number, request, std::string(as_text(data)), std::move(reply)});
  for (auto later = held + 1; later != records_.end(); ++later) ++later->number;
  renumbered(number);
  if (hooks_.held) hooks_.held(request);
}

// Records from this one on have moved: make_durable(), without which nobody relies on them, writes their rows
// anew.
void Gate::renumbered(std::uint64_t from) {
  if (from > durable_through_) return;
  durable_through_ = from - 1;
  stale_rows_ = true;
}

void Gate::no_rows() {
  durable_through_ = 0;
  stale_rows_ = false;
}

// The caller of a held request waits no longer: nothing is to be performed for it.
bool Gate::cancel_held(const pb::Request& cancel) {
  const auto found = std::find_if(records_.begin(), records_.end(), [&](const Record& record) {
    return record.request.client() == cancel.client() && record.request.seq() == cancel.cancel().seq();
  });
  if (found == records_.end()) return false;
  const std::uint64_t number = found->number;
  const Reply reply = std::move(found->reply);
  if (hooks_.dropped) hooks_.dropped(found->request);
  for (auto later = records_.erase(found); later != records_.end(); ++later) --later->number;
  renumbered(number);
  reply_errno(reply, EINTR);
  return true;
}

void Gate::close(std::uint64_t attempt, std::function<void()> drained) {
  if (state_ != State::open) throw std::logic_error("the gate is closed already");
  state_ = State::holding_changes;
  attempt_ = attempt;
  no_rows();
  draining_ = true;
  on_drained_ = std::move(drained);
  drained_check();
}

void Gate::block_queries(std::function<void()> drained) {
  if (state_ != State::holding_changes)
    throw std::logic_error("the gate must be closed before queries are blocked");
  state_ = State::holding_everything;
  on_queries_drained_ = std::move(drained);
  drained_check();
}

void Gate::hold_everything() {
  state_ = State::holding_everything;
  after_ = nullptr;
  attempt_ = 0;
  no_rows();
}

void Gate::hold_changes() {
  hold_everything();
  state_ = State::holding_changes;
  draining_ = false;
}

void Gate::drained_check() {
  if (draining_ && in_flight_ == 0) {
    draining_ = false;
    if (const auto drained = std::exchange(on_drained_, nullptr)) drained();
  }
  if (on_queries_drained_ && in_flight_ == 0 && queries_in_flight_ == 0) {
    std::exchange(on_queries_drained_, nullptr)();
  }
}

void Gate::put_records(std::uint64_t from, std::uint64_t through) {
  for (std::uint64_t number = from; number <= through; ++number) {
    const Record& record = records_[number - 1];
    sharefs::State::StoredRecord stored;
    stored.number = number;
    stored.request = record.request.SerializeAsString();
    stored.data = record.data;
    database_state_.put_record(attempt_, stored, record.request.client(), record.request.seq(),
                               op_name(record.request));
  }
}

void Gate::make_durable() {
  if (attempt_ == 0 || (durable_through_ == records_.size() && !stale_rows_)) return;
  Transaction transaction(database_, Durability::full);
  if (stale_rows_)
    Statement(database_, "DELETE FROM record WHERE attempt = ? AND number > ?")
        .bind(attempt_, durable_through_)
        .run();
  put_records(durable_through_ + 1, records_.size());
  transaction.commit();
  durable_through_ = records_.size();
  stale_rows_ = false;
  fault_point("gate.records-durable");
}

void Gate::open(const std::function<void(Executor&)>& first) {
  if (state_ == State::open || state_ == State::reopening) return;
  state_ = State::reopening;
  // What a reply brings in from here on comes behind them all, and is in no row.
  const bool stored = durable_through_ > 0 || stale_rows_;
  no_rows();
  const std::uint64_t attempt = std::exchange(attempt_, 0);
  after_ = nullptr;
  draining_ = false;
  on_drained_ = nullptr;
  on_queries_drained_ = nullptr;
  if (first) {
    Passing passing(*this);
    first(passing);
  }
  while (!records_.empty()) {
    for (Record& record : std::exchange(records_, {})) {
      if (hooks_.answered && hooks_.answered(record)) continue;
      pass(record.request, as_bytes(record.data), std::move(record.reply));
    }
  }
  state_ = State::open;
  if (hooks_.opened) hooks_.opened();
  fault_point("gate.reopened");
  if (stored) drop_rows(attempt);
}

// Nobody reads those of an attempt that was given up: a full disk may keep them.
void Gate::drop_rows(std::uint64_t attempt) {
  try {
    database_state_.drop_records(attempt);
  } catch (const std::exception& error) {
    spdlog::warn("the records of attempt {}, performed here, stay in state.db: {}", attempt, error.what());
  }
}

std::vector<Gate::Record> Gate::surrender() {
  if (state_ != State::holding_everything)
    throw std::logic_error("only a gate that holds everything gives records away");
  state_ = State::passing_on;
  after_ = nullptr;
  attempt_ = 0;
  no_rows();
  return std::exchange(records_, {});
}

void Gate::pass_to(Executor& after) {
  if (state_ != State::passing_on) throw std::logic_error("the gate has not given its records away");
  after_ = &after;
  for (Record& record : std::exchange(records_, {})) {
    after.execute(record.request, as_bytes(record.data), std::move(record.reply));
  }
}

}  // namespace sharefs
