// Moves identities from the mapped journal into SQLite, and reserves blocks of ids ahead, on a thread of its
// own: so no request waits for a sync, except when it asks for one or the journal is full.
//
// Threads: every method is called under the InodeTable's mutex, whose lock is passed as the proof; those that
// wait release it meanwhile. The thread takes the same mutex, but never while it works on SQLite.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <thread>

#include "fs/identity_journal.h"
#include "fs/identity_rows.h"

namespace sharefs {

class IdentityFlusher {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // Replays the journal into SQLite, durably, before it returns.
  IdentityFlusher(const std::filesystem::path& database, IdentityJournal& journal, std::mutex& mutex);
  ~IdentityFlusher();  // flushes what it can
  IdentityFlusher(const IdentityFlusher&) = delete;
  IdentityFlusher& operator=(const IdentityFlusher&) = delete;

  // Waits until the journal has room for a few records of any size, or for all that one request brings.
  void wait_for_space(Lock& lock);
  void wait_for_request(Lock& lock);
  void appended(const Lock& lock);  // records were added: they will be flushed soon

  // Positions in the journal. Both throw if SQLite failed meanwhile.
  std::uint64_t flushed() const { return flushed_; }
  void wait_flushed(Lock& lock, std::uint64_t position);
  void wait_durable(Lock& lock, std::uint64_t position);

  // Ids come from blocks of the epoch that were reserved durably. `first` is the first block.
  static constexpr std::uint64_t kBlock = 1u << 16;
  void set_epoch(const Lock& lock, Epoch epoch, std::uint64_t first);
  // Waits until there is an id to take and room in the journal for its records.
  void wait_for_id(Lock& lock);
  InodeId take_id(const Lock& lock);

  bool imported_before() const { return imported_before_; }

 private:
  struct Block {
    std::uint64_t next = 0, end = 0;
    bool empty() const { return next == end; }
  };
  bool work() const;
  bool urgent() const;
  void wake();
  void run();
  void step(Lock& lock);
  void reserve(Lock& lock);
  void write_out(Lock& lock);
  void sync_flushed(Lock& lock);
  std::uint64_t write_batch(std::uint64_t from, std::uint64_t to, Durability durability);
  template <class Reached>
  void wait_until(Lock& lock, Reached reached);

  // constant after construction
  IdentityJournal& journal_;
  std::mutex& mutex_;
  bool imported_before_ = false;
  // the flusher's thread (the constructor before it starts)
  IdentityRows rows_;
  bool import_noted_ = false;
  // under the mutex
  std::condition_variable wake_;  // for the thread
  std::condition_variable done_;  // for those who wait
  std::uint64_t flushed_ = 0;
  std::uint64_t durable_ = 0;
  std::uint64_t durable_wanted_ = 0;
  std::chrono::steady_clock::time_point sync_at_{};  // what was flushed is made durable
  std::uint64_t failures_ = 0;
  std::string error_;
  unsigned waiters_ = 0;
  bool idle_ = false;
  bool ending_ = false;
  bool ids_wanted_ = false;
  Epoch epoch_ = 0;
  Block current_, spare_;
  std::thread thread_;
};

}  // namespace sharefs
