// Acknowledges writes of this mount before the owner has performed them, where that has given it a lease on
// the inode (fs/write_leases.h): an application need not wait for the network with each write.
//
// Invariants
//  - What is acknowledged is in the journal: another process of this site sends it, if this one is killed.
//  - It reaches the owner in order, and ahead of whatever this mount asks later. Whatever else this mount
//  asks of the inode (attributes, reading, fsync, closing, locks) waits until all of it has been performed,
//  so its applications see their own writes, and are told errors when they sync or close, as by a local disk.
//  - Nothing is acknowledged while the oldest write that was is older than kLongest and two round trips,
//  while the owner is not heard, or when it may have lost what it knew of the lease: then applications wait.
//  So a connection that is cut leaves no more than so much unsent.
//  - What the owner does not take any more (others have changed the file, which it was not to wait for
//  longer) is not lost: its bytes are kept in files under `unwritten`, and the log says so.
//
// Between the NameCache and Unsynced. Threads: reactor thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "meta/executor.h"
#include "meta/reactor.h"
#include "replication/write_journal.h"

namespace sharefs {

class WriteBehind final : public Executor {
 public:
  struct Options {
    std::filesystem::path journal;    // see WriteJournal
    std::uint64_t power = 0;          // Power::number
    std::filesystem::path unwritten;  // a folder, made when it is needed
    // For how long the owner may be believed; zero: not at all, or this site is the owner.
    std::function<Reactor::Clock::duration()> trusted_for;
    std::function<Reactor::Clock::duration()> round_trip;
    // All that was acknowledged of the inode is performed: what was told of it before this stamp is old.
    std::function<void(InodeId, std::uint64_t stamp)> performed = [](InodeId, std::uint64_t) {};
    // The kernel's pages of the inode are not what the owner has.
    std::function<void(InodeId)> drop_pages = [](InodeId) {};
    // By which this mount has the inode open.
    std::function<std::vector<std::uint64_t>(InodeId)> handles = [](InodeId) {
      return std::vector<std::uint64_t>();
    };
  };
  WriteBehind(Executor& next, Options options);

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // The owner wants the lease back; `returned` when all that was acknowledged under it is performed.
  void recall(InodeId id, std::uint64_t lease, std::function<void()> returned);
  // The owner may not know of the leases any more, or its answers may come once more.
  void distrust();
  // Sends what an earlier process has left, under its client; `sent` when all of it is answered.
  void replay(const std::function<void()>& sent);
  // This process ends: what is left survives the machine's end, too.
  void sync() { journal_.sync(); }

  // Whether whoever closes this handle waits for something, or has not been told an error.
  bool must_flush(InodeId id, std::uint64_t handle) const;

  // Of this process and of earlier ones.
  std::size_t unsent() const { return journal_.size(); }

  static constexpr auto kLongest = std::chrono::milliseconds(100);
  static constexpr std::size_t kMost = 512;  // fewer than the owner keeps answers of
  static constexpr std::size_t kMostBytes = 24 << 20;

 private:
  struct Waiting {
    pb::Request request;
    std::string data;
    Reply reply;
  };
  struct File {
    std::uint64_t lease = 0;
    bool written = false;      // since it was opened
    std::uint64_t period = 0;  // another one when a handle was closed: the lease may end with it
    std::size_t ahead = 0;
    std::size_t looks = 0;  // that have waited, and are being asked again: nothing goes ahead of them
    std::uint64_t stamp = 0;
    std::deque<Waiting> waiting{};
    std::vector<std::function<void()>> when_performed{};
    std::map<std::uint64_t, int> errors{};  // by handle: what it has not been told
    bool idle() const { return ahead == 0 && looks == 0 && waiting.empty() && when_performed.empty(); }
  };
  struct Ahead {
    InodeId id = 0;
    std::uint64_t handle = 0, offset = 0;
    std::size_t size = 0;
    WriteJournal::Position position = 0;
    Reactor::Clock::time_point acknowledged{};
  };

  void write(const pb::Request& request, Bytes data, Reply reply);
  bool may_go_ahead(std::size_t size) const;
  bool go_ahead(File& file, const pb::Request& request, Bytes data, const Reply& reply);
  void answered(std::uint64_t seq, const pb::Outcome& outcome);
  void lost(const Ahead& write, int error);
  void tell_handles(const Ahead& write, int error);
  bool keep(const Ahead& write);
  struct Look;
  void look(const std::shared_ptr<Look>& look);
  void list(const pb::Request& request, Reply reply);
  void change(const pb::Request& request, Bytes data, Reply reply);
  void close(const pb::Request& request, Bytes data, Reply reply);
  InodeId named_ahead(const pb::Request& request) const;
  bool is_ahead(InodeId id) const;
  bool cancel(std::uint64_t seq);
  void drop_if_idle(InodeId id);
  void detach(const std::set<std::uint64_t>& clients, const std::function<void()>& detached);

  // constant after construction
  Executor& next_;
  const Options options_;
  // reactor thread
  WriteJournal journal_;
  std::uint64_t last_ = 0;
  std::uint64_t periods_ = 0;
  std::uint64_t generation_ = 0;          // leases that were asked for in an earlier one do not count
  std::size_t bytes_ = 0;                 // of ahead_
  std::size_t lazy_bytes_ = 0;            // since one was sent at once
  std::map<std::uint64_t, Ahead> ahead_;  // by seq
  std::unordered_map<InodeId, File> files_;
};

}  // namespace sharefs
