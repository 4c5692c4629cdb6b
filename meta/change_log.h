// The change log: which cells of the tree were changed since t0 of the running handoff.
//
// An entry says what a mutation *changes* (a cell), not what was asked and not the new value: the value is
// read from the store when the entry is shipped, so the last change wins. Order, per mutation: entry ->
// effect -> reply. An entry without an effect is harmless; an effect without an entry is lost data. A
// mutation that runs on a worker is entered again when it has ended, because a round may have read the cell
// while it ran.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "meta/database.h"
#include "meta/reactor.h"
#include "meta/types.h"

namespace sharefs {

// One cell of the tree. `entry`: the name in directory `id`; `attributes`: mode, owner, times, xattrs, size
// of `id`; `extent`: the bytes [offset, offset+length) of `id`, holes included; `freed`: `id` exists no
// longer.
struct Change {
  enum class Kind : std::uint8_t { entry, attributes, extent, freed };
  Kind kind;
  InodeId id;
  std::string name = {};     // entry only
  std::uint64_t offset = 0;  // extent only
  std::uint64_t length = 0;  // extent only
};

// Where the store reports changes before it makes them.
class ChangeObserver {
 public:
  virtual ~ChangeObserver() = default;
  // Reactor thread; cheap. What it throws fails the mutation, which then has no effect.
  virtual void changing(const Change& change) = 0;
};

// Which cells without a name have been noted lately: those of the same hash push each other out, so it takes
// no more memory and time the more there are.
class NotedCells {
 public:
  NotedCells();
  // Whether `change` is among them; it is from now on.
  bool note(const Change& change);
  void clear();

 private:
  struct Cell {
    InodeId id = 0;  // 0: none
    Change::Kind kind = Change::Kind::entry;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    bool operator==(const Cell&) const = default;
  };
  std::vector<Cell> cells_;
};

// Entries are collected in memory, adjacent extents of one inode merged, and written to SQLite (table
// change_log) in batches and by flush(). Until the next cut nobody reads them, so a cell that has been noted
// since the last one needs no further entry: what rewrites the same blocks over and over costs a look at it.
// After a crash of the source the attempt is over, so entries need not be durable one by one. What is not
// needed any more is removed little by little: a long image leaves millions of entries, and callers wait for
// the thread that removes them.
class ChangeLog final : public ChangeObserver {
 public:
  ChangeLog(Database& database, Reactor& reactor);
  ~ChangeLog() override;

  // t0: notes from now on; before, changing() is a no-op. Returns the first cut: entries come after it.
  std::uint64_t start();
  void stop();  // the attempt is over: notes nothing more, and what has been noted is not needed
  bool active() const { return active_; }

  // Never throws: applications go on when the log cannot be written.
  void changing(const Change& change) override;

  // Writes what is pending and returns the sequence number of the last entry: a cut. Every effect whose entry
  // is at or below the cut has happened (reactor thread, no mutation on a worker in flight without its second
  // entry). Throws DatabaseError if entries could not be written, since start(): the attempt is over then.
  std::uint64_t flush();

  std::uint64_t entries() const { return entries_; }  // noted since start(), after merging
  std::uint64_t unshipped_bytes() const;              // extents noted after the last cut

 private:
  void write_pending();
  void sweep_later(Reactor::Clock::duration delay);
  void sweep();

  Database& database_;
  Reactor& reactor_;
  Statement insert_;
  Reactor::TimerId sweep_timer_ = 0;  // 0: nothing is there to be removed
  std::uint64_t unneeded_ = 0;        // entries up to here
  bool active_ = false;
  std::string broken_;  // why entries are missing; empty: none is
  std::uint64_t next_ = 1;
  std::uint64_t entries_ = 0;
  std::uint64_t bytes_since_cut_ = 0;
  std::vector<Change> pending_;
  NotedCells noted_;  // since the last cut
};

// Tells `take` the entries in (after, through], in order; returns how many. Any thread with a connection of
// its own.
std::uint64_t read_changes(Database& database, std::uint64_t after, std::uint64_t through,
                           const std::function<void(const Change&)>& take);

}  // namespace sharefs
