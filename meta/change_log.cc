#include "meta/change_log.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "meta/caller.h"

namespace sharefs {
namespace {

// So many entries are collected before they are written, whether or not a cut is made: bounds the memory and
// the length of one transaction on the reactor thread.
constexpr std::size_t kBatch = 256;
// How far back an entry looks for one that it can be merged with. A sequential writer alternates between
// extent and attributes of one inode; a few of them side by side still fit.
constexpr std::size_t kMergeWindow = 16;
static_assert(kMergeWindow < kBatch);
// How many cells NotedCells holds: those of a database that changes some MiB of its pages, in 256 KiB.
constexpr std::size_t kNotedCells = 8192;

// So many entries are removed at once, in about a millisecond, and so often.
constexpr int kSwept = 500;
constexpr auto kSweepInterval = std::chrono::milliseconds(10);
constexpr auto kSweepAgain = std::chrono::milliseconds(300);

constexpr std::uint64_t kNoEnd = std::numeric_limits<std::uint64_t>::max();

std::uint64_t end_of(const Change& extent) {
  return extent.length > kNoEnd - extent.offset ? kNoEnd : extent.offset + extent.length;
}

const char* kind_name(Change::Kind kind) {
  switch (kind) {
    case Change::Kind::entry:
      return "entry";
    case Change::Kind::attributes:
      return "attributes";
    case Change::Kind::extent:
      return "extent";
    case Change::Kind::freed:
      return "freed";
  }
  throw std::logic_error("change_log: a kind without a name");
}

Change::Kind kind_of(std::string_view name) {
  for (const auto kind :
       {Change::Kind::entry, Change::Kind::attributes, Change::Kind::extent, Change::Kind::freed})
    if (name == kind_name(kind)) return kind;
  throw DatabaseError("change_log: unknown kind \"" + std::string(name) + "\"");
}

// Lets `entry` cover `change` too, if both name one cell or touching extents of one inode. Returns how many
// bytes the entry has grown by.
std::optional<std::uint64_t> merge(Change& entry, const Change& change) {
  if (entry.kind != change.kind || entry.id != change.id) return std::nullopt;
  if (change.kind != Change::Kind::extent)
    return entry.name == change.name ? std::optional<std::uint64_t>(0) : std::nullopt;
  if (change.offset > end_of(entry) || entry.offset > end_of(change)) return std::nullopt;
  const std::uint64_t end = std::max(end_of(entry), end_of(change));
  const std::uint64_t before = entry.length;
  entry.offset = std::min(entry.offset, change.offset);
  entry.length = end - entry.offset;
  return entry.length - before;
}

std::int64_t now_ns() {
  using std::chrono::nanoseconds;
  return std::chrono::duration_cast<nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::uint64_t saturating_add(std::uint64_t a, std::uint64_t b) { return a > kNoEnd - b ? kNoEnd : a + b; }

}  // namespace

NotedCells::NotedCells() : cells_(kNotedCells) {}

bool NotedCells::note(const Change& change) {
  if (change.kind != Change::Kind::extent && change.kind != Change::Kind::attributes) return false;
  const Cell cell{change.id, change.kind, change.offset, change.length};
  // Offsets are multiples of large powers of two: their low bits tell little.
  const std::uint64_t mixed = (cell.id ^ cell.offset * 0x9e3779b97f4a7c15U) * 0xff51afd7ed558ccdU;
  return std::exchange(cells_[mixed >> 32U & (kNotedCells - 1)], cell) == cell;
}

void NotedCells::clear() { std::ranges::fill(cells_, Cell()); }

ChangeLog::ChangeLog(Database& database, Reactor& reactor)
    : database_(database),
      reactor_(reactor),
      insert_(
          database,
          "INSERT INTO change_log(seq, kind, inode, name, offset, length, at) VALUES(?, ?, ?, ?, ?, ?, ?)") {
  Statement last(database, "SELECT max(seq) FROM change_log");
  last.step();
  next_ = last.id(0) + 1;
  stop();  // what a process has left that was killed
}

ChangeLog::~ChangeLog() { reactor_.cancel(sweep_timer_); }

// Sequence numbers go on rising, so that a reader never takes an entry of an earlier attempt for one of its
// own.
std::uint64_t ChangeLog::start() {
  stop();
  entries_ = 0;
  broken_.clear();
  active_ = true;
  return next_ - 1;
}

void ChangeLog::stop() {
  active_ = false;
  pending_.clear();
  noted_.clear();
  bytes_since_cut_ = 0;
  unneeded_ = next_ - 1;
  sweep_later(kSweepInterval);
}

void ChangeLog::sweep_later(Reactor::Clock::duration delay) {
  if (sweep_timer_ == 0) sweep_timer_ = reactor_.after(delay, [this] { sweep(); });
}

void ChangeLog::sweep() {
  sweep_timer_ = 0;
  database_.wait_for_others(false);
  try {
    Statement(database_,
              "DELETE FROM change_log WHERE seq < (SELECT min(seq) + ? FROM change_log) AND seq <= ?")
        .bind(kSwept, unneeded_)
        .run();
    if (database_.changes() != 0) sweep_later(kSweepInterval);
  } catch (const DatabaseError&) {  // another connection was at it, or the disk is full
    sweep_later(kSweepAgain);
  }
  database_.wait_for_others(true);
}

// An entry may be merged into any that is still pending: no reader has seen that one, so the cell is read
// after the change at hand has happened.
void ChangeLog::changing(const Change& change) {
  if (!active_ || noted_.note(change)) return;
  const std::size_t window = std::min(kMergeWindow, pending_.size());
  for (std::size_t i = 1; i <= window; ++i) {
    if (const auto grown = merge(pending_[pending_.size() - i], change)) {
      bytes_since_cut_ = saturating_add(bytes_since_cut_, *grown);
      return;
    }
  }
  if (pending_.size() >= kBatch) {
    const CallerKept kept;
    try {
      write_pending();
    } catch (const DatabaseError& error) {
      broken_ = error.what();
      active_ = false;
      pending_.clear();
      return;
    }
  }
  pending_.push_back(change);
  ++entries_;
  if (change.kind == Change::Kind::extent) bytes_since_cut_ = saturating_add(bytes_since_cut_, change.length);
}

void ChangeLog::write_pending() {
  if (pending_.empty()) return;
  const std::int64_t at = now_ns();
  std::uint64_t seq = next_;
  Transaction transaction(database_);
  for (const Change& change : pending_)
    insert_
        .bind(seq++, kind_name(change.kind), change.id, as_bytes(change.name), change.offset, change.length,
              at)
        .run();
  transaction.commit();
  next_ = seq;
  pending_.clear();
}

std::uint64_t ChangeLog::flush() {
  if (!broken_.empty()) throw DatabaseError(broken_);
  write_pending();
  noted_.clear();
  bytes_since_cut_ = 0;
  return next_ - 1;
}

std::uint64_t ChangeLog::unshipped_bytes() const { return bytes_since_cut_; }

std::uint64_t read_changes(Database& database, std::uint64_t after, std::uint64_t through,
                           const std::function<void(const Change&)>& take) {
  Statement select(
      database,
      "SELECT kind, inode, name, offset, length FROM change_log WHERE seq > ? AND seq <= ? ORDER BY seq");
  select.bind(after, through);
  std::uint64_t count = 0;
  for (; select.step(); ++count)
    take({kind_of(select.blob(0)), select.id(1), select.text(2), select.id(3), select.id(4)});
  return count;
}

}  // namespace sharefs
