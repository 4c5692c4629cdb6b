#include "fs/identity_flusher.h"

#include <chrono>
#include <stdexcept>
#include <unordered_set>
#include <utility>
#include <vector>

#include "meta/log.h"

namespace sharefs {
namespace {

constexpr unsigned kBatch = 512;     // records per transaction: others wait for it
constexpr std::uint64_t kRoom = 40;  // slots: a few records of the largest size
constexpr std::uint64_t kRequestRoom = 3 * kRoom;
constexpr auto kDelay = std::chrono::milliseconds(50);    // collects a batch
constexpr auto kRetry = std::chrono::milliseconds(1000);  // after SQLite failed
// Files last as long: file systems commit about as often what nobody syncs. An inode that a kernel of another
// site knows is to have its id after a power cut, too.
constexpr auto kSyncInterval = std::chrono::seconds(5);
constexpr std::uint64_t kReserveBelow = IdentityFlusher::kBlock / 2;
constexpr unsigned kEpochShift = 40;

}  // namespace

IdentityFlusher::IdentityFlusher(const std::filesystem::path& database, IdentityJournal& journal,
                                 std::mutex& mutex)
    : journal_(journal), mutex_(mutex), rows_(database) {
  flushed_ = journal_.tail();
  journal_.replay([](const Identity&) {});
  const std::uint64_t replayed = journal_.head();
  import_noted_ = rows_.any_import();
  while (flushed_ < replayed) flushed_ = write_batch(flushed_, replayed, Durability::normal);
  const std::uint64_t head = journal_.begin_anew();
  // A last commit with a sync, in any case: the former process may have left commits that were never synced.
  durable_ = flushed_ = write_batch(head, head, Durability::full);
  journal_.release(head);
  imported_before_ = import_noted_;
  thread_ = std::thread([this] { run(); });
}

IdentityFlusher::~IdentityFlusher() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    wake_.notify_one();
  }
  thread_.join();
}

bool IdentityFlusher::work() const {
  return journal_.head() > flushed_ || ids_wanted_ || durable_wanted_ > durable_;
}

bool IdentityFlusher::urgent() const {
  return ending_ || waiters_ > 0 || ids_wanted_ || journal_.used() > journal_.slots() / 2;
}

// A notification costs a system call, so it is only given when the thread would not look by itself soon.
void IdentityFlusher::wake() {
  if (!idle_ && !urgent()) return;
  idle_ = false;
  wake_.notify_one();
}

void IdentityFlusher::appended(const Lock&) {
  if (idle_ || journal_.used() > journal_.slots() / 2) wake();
}

template <class Reached>
void IdentityFlusher::wait_until(Lock& lock, Reached reached) {
  if (reached()) return;
  const std::uint64_t failures = failures_;
  ++waiters_;
  wake();
  done_.wait(lock, [&] { return reached() || failures_ != failures; });
  --waiters_;
  if (!reached()) throw std::runtime_error("identities cannot be written: " + error_);
}

void IdentityFlusher::wait_for_space(Lock& lock) {
  wait_until(lock, [&] { return journal_.used() + kRoom <= journal_.slots(); });
}

void IdentityFlusher::wait_for_request(Lock& lock) {
  wait_until(lock, [&] { return journal_.used() + kRequestRoom <= journal_.slots(); });
}

void IdentityFlusher::wait_flushed(Lock& lock, std::uint64_t position) {
  wait_until(lock, [&] { return flushed_ >= position; });
}

void IdentityFlusher::wait_durable(Lock& lock, std::uint64_t position) {
  if (durable_ >= position) return;
  durable_wanted_ = std::max(durable_wanted_, position);
  wait_until(lock, [&] { return durable_ >= position; });
}

void IdentityFlusher::set_epoch(const Lock&, Epoch epoch, std::uint64_t first) {
  epoch_ = epoch;
  current_ = {first, first + kBlock};
  spare_ = {};
}

void IdentityFlusher::wait_for_id(Lock& lock) {
  if (epoch_ == 0) throw std::logic_error("an inode id was asked for before the epoch is known");
  wait_for_space(lock);
  while (current_.empty()) {
    if (spare_.empty()) {
      ids_wanted_ = true;
      wait_until(lock, [&] { return !spare_.empty() || !current_.empty(); });
    }
    if (current_.empty()) current_ = std::exchange(spare_, {});
    wait_for_space(lock);  // others ran meanwhile, and may do so again
  }
}

InodeId IdentityFlusher::take_id(const Lock&) {
  const std::uint64_t counter = current_.next++;
  if (current_.end - current_.next < kReserveBelow && spare_.empty() && !ids_wanted_) {
    ids_wanted_ = true;
    wake();
  }
  return (epoch_ - 1) << kEpochShift | counter;
}

void IdentityFlusher::run() {
  Lock lock(mutex_);
  while (true) {
    idle_ = !work();
    const auto wanted = [&] { return ending_ || work(); };
    if (flushed_ > durable_)
      wake_.wait_until(lock, sync_at_, wanted);
    else
      wake_.wait(lock, wanted);
    idle_ = false;
    const bool sync_due = flushed_ > durable_ && std::chrono::steady_clock::now() >= sync_at_;
    if (!urgent() && !sync_due) wake_.wait_for(lock, kDelay, [&] { return urgent(); });
    if (!work() && !sync_due) {
      if (ending_) return;
      continue;
    }
    try {
      if (work()) step(lock);
      if (sync_due) sync_flushed(lock);
    } catch (const std::exception& error) {
      if (!lock.owns_lock()) lock.lock();
      log::error("identities cannot be written, will be tried again: {}", error.what());
      error_ = error.what();
      ++failures_;
      done_.notify_all();
      if (ending_) return;  // they are still in the journal
      wake_.wait_for(lock, kRetry, [&] { return ending_; });
    }
  }
}

void IdentityFlusher::step(Lock& lock) {
  if (ids_wanted_) reserve(lock);
  if (journal_.head() > flushed_ || durable_wanted_ > durable_) write_out(lock);
}

void IdentityFlusher::reserve(Lock& lock) {
  const Epoch epoch = epoch_;
  lock.unlock();
  const std::uint64_t first = rows_.reserve_block(epoch, kBlock);
  lock.lock();
  ids_wanted_ = false;
  if (epoch == epoch_) spare_ = {first, first + kBlock};
  done_.notify_all();
}

void IdentityFlusher::write_out(Lock& lock) {
  const std::uint64_t head = journal_.head();
  const bool durable = durable_wanted_ > durable_;
  std::uint64_t position = flushed_;
  do {
    lock.unlock();
    position = write_batch(position, head, durable ? Durability::full : Durability::normal);
    lock.lock();
    if (flushed_ == durable_) sync_at_ = std::chrono::steady_clock::now() + kSyncInterval;
    flushed_ = position;
    journal_.release(position);
    done_.notify_all();
  } while (position < head);
  if (durable) {
    durable_ = head;
    done_.notify_all();
  }
}

void IdentityFlusher::sync_flushed(Lock& lock) {
  const std::uint64_t position = flushed_;
  lock.unlock();
  rows_.database().sync_commits();
  lock.lock();
  durable_ = std::max(durable_, position);
  sync_at_ = std::chrono::steady_clock::now() + kSyncInterval;
}

// Writes the newest state of each inode among the next records, and how far this got, in one transaction.
std::uint64_t IdentityFlusher::write_batch(std::uint64_t from, std::uint64_t to, Durability durability) {
  std::vector<Identity> records;
  const std::uint64_t end =
      journal_.read(from, to, kBatch, [&](const Identity& identity) { records.push_back(identity); });
  std::unordered_set<InodeId> newer;
  std::vector<const Identity*> newest;
  for (auto record = records.rbegin(); record != records.rend(); ++record)
    if (newer.insert(record->id).second) newest.push_back(&*record);

  Transaction transaction(rows_.database(), durability);
  bool imported = false;
  for (auto record = newest.rbegin(); record != newest.rend(); ++record) {
    if ((*record)->erased) {
      rows_.remove((*record)->id);
    } else {
      rows_.put(**record);
    }
    imported = imported || (*record)->imported;
  }
  if (imported && !import_noted_) rows_.note_import();
  rows_.set_journal_tail(end);
  transaction.commit();
  import_noted_ = import_noted_ || imported;
  return end;
}

}  // namespace sharefs
