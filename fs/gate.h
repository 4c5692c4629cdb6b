// The gate in front of the store: closed from t1 on, it holds what would change anything.
//
// Invariants
//  - Checking that the gate is open and counting the request in is one step (one thread), so a drain cannot
//  slip between.
//  - While closed, a mutation or a change of live state becomes a record: durable in SQLite (table record)
//  before
//    anybody relies on it (make_durable), its caller waits. Queries pass, and are counted, until
//    block_queries().
//  - Order of the records is the order of arrival; they are performed in that order, here (open) or by the
//  new owner.
//    Their numbers are 1, 2, ... without a gap.
//  - A held request whose caller waits no longer (Cancel) is not performed, until it is surrendered.
//  - Until the drain is finished, writebacks and Cancel pass a closed gate: what drains may wait for them.
//  After it
//    nothing changes files or live state any more, since both have been read for the new owner; only a
//    writeback that a recall waits for (Hooks::awaited) passes.
//  - A SetLock that waits is not counted: it is performed when it passes, and then is live state in the
//  LockTable.
//
// Threads: reactor thread only, but for performed().
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "meta/database.h"
#include "meta/executor.h"
#include "meta/state.h"

namespace sharefs {

class Gate final : public Executor {
 public:
  // One held request. The bytes are owned.
  struct Record {
    std::uint64_t number = 0;  // from 1, per attempt
    pb::Request request;
    std::string data;
    Reply reply;
  };

  // What the layers around the gate have to say; each may be empty.
  struct Hooks {
    // The request is held from now on: nothing may wait for its caller's kernel (Coherence::held).
    std::function<void(const pb::Request&)> held;
    // It is not held any more, and not going to be performed (Coherence::dropped).
    std::function<void(const pb::Request&)> dropped;
    // A recall waits for this writeback (Coherence::awaits).
    std::function<bool(const pb::Request&)> awaited;
    // Asked before open() performs a held request: true if `reply` has been called, because the same request
    // was performed as a record of the handoff meanwhile.
    std::function<bool(const Record&)> answered;
    // Nothing is held any more (Coherence::none_held).
    std::function<void()> opened;
  };

  Gate(Executor& store, Database& database);
  void set_hooks(Hooks hooks) { hooks_ = std::move(hooks); }

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // t1: holds from now on; `drained` is called once no mutation or live-state change is in flight, possibly
  // before this returns. The attempt is not 0.
  void close(std::uint64_t attempt, std::function<void()> drained);
  // Holds queries too from now on (just before the commit); `drained` once nothing is in flight.
  void block_queries(std::function<void()> drained);
  // Writes the records that arrived so far to SQLite, synchronous=FULL: called before the commit point, and
  // from a timer as long as the gate is closed, so that little is left to write then.
  void make_durable();
  // Roll-back: performs the records in order through the store, deletes them, and lets everything pass again.
  // Requests that arrive meanwhile do not overtake. `first` is given an executor that passes already, for
  // what was asked before anything that is held.
  void open(const std::function<void(Executor& passing)>& first = {});
  // Commit: gives the records away. The gate stays closed; the new owner's results are given to each `reply`.
  // Requests arriving later wait for pass_to().
  std::vector<Record> surrender();
  // After surrender(): what still reaches the gate goes to `after` (not owned), until open() or
  // hold_everything().
  void pass_to(Executor& after);

  // On a site that is not the owner: holds everything, queries too.
  void hold_everything();
  // On a new owner before its records are performed: holds what would change anything; open() lets go.
  // Queries and writebacks pass: a kernel keeps the page locked that it reads or writes back, and a record
  // may have to wait until that page has been recalled. These requests are not written to SQLite: their
  // callers ask again after a crash.
  void hold_changes();

  // From now on whatever changes files gets EROFS, also what is held: this site must not be the owner any
  // more.
  void refuse_changes() { refuses_changes_ = true; }
  bool refuses_changes() const { return refuses_changes_; }

  bool closed() const { return state_ != State::open; }
  std::uint64_t held() const { return records_.size(); }
  std::uint64_t in_flight() const { return in_flight_; }
  // Requests that have been answered by the store. Any thread.
  std::uint64_t performed() const { return performed_.load(std::memory_order_relaxed); }

 private:
  enum class State { open, holding_changes, holding_everything, reopening, passing_on };
  // The reply of a request in flight. Kept here, so that what the store is given fits into a std::function
  // without an allocation; `generation` makes a reply that is called twice harmless.
  struct Slot {
    Reply reply;
    std::uint32_t generation = 0;
    bool query = false;
    std::uint32_t next_free = 0;
  };
  class Passing final : public Executor {
   public:
    explicit Passing(Gate& gate) : gate_(gate) {}
    void execute(const pb::Request& request, Bytes data, Reply reply) override {
      gate_.pass(request, data, std::move(reply));
    }

   private:
    Gate& gate_;
  };
  void pass(const pb::Request& request, Bytes data, Reply reply);
  void finish(std::uint32_t slot, std::uint32_t generation, const pb::Outcome& outcome, Bytes data);
  void hold(const pb::Request& request, Bytes data, Reply reply);
  bool passes_closed(const pb::Request& request) const;
  bool cancel_held(const pb::Request& cancel);
  void renumbered(std::uint64_t from);
  void no_rows();
  void put_records(std::uint64_t from, std::uint64_t through);
  void drained_check();
  void drop_rows(std::uint64_t attempt);

  // constant after construction
  Executor& store_;
  Database& database_;
  sharefs::State database_state_;
  // reactor thread
  Hooks hooks_;
  State state_ = State::open;
  bool refuses_changes_ = false;
  Executor* after_ = nullptr;
  std::uint64_t attempt_ = 0;          // 0: records are not written
  std::uint64_t durable_through_ = 0;  // the records up to this number are in SQLite
  bool stale_rows_ = false;            // and rows behind them are of an earlier numbering
  bool draining_ = false;
  std::uint64_t in_flight_ = 0;  // changes
  std::uint64_t queries_in_flight_ = 0;
  std::vector<Slot> slots_;
  std::uint32_t free_slot_ = 0;  // head of the list of free slots; slots_.size() when there is none
  std::vector<Record> records_;
  std::function<void()> on_drained_;
  std::function<void()> on_queries_drained_;
  std::atomic<std::uint64_t> performed_{0};  // written by the reactor thread alone
};

}  // namespace sharefs
