// The sending half of image and log: walks the tree, then ships what the change log names, round by round.
//
// Why a fuzzy image converges: after ImageEnd every inode that exists has been sent or is named by a log
// entry; a round ships the value that its cells have when they are read, and whatever changes after that has
// a later entry. The last round is cut when nothing changes any more, so after it both trees are equal.
//
// Threads: run() is sequential code on a thread of its own. It may wait (credit, answers); feed methods are
// called on the reactor thread. Bounded memory: at most `credit` bytes of batches are in flight.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fs/inode_table.h"
#include "fs/store.h"
#include "meta/change_log.h"
#include "meta/reactor.h"
#include "replication/transport.h"

namespace sharefs {

struct ShipCounters {
  std::atomic<std::uint64_t> image_files{0};         // inodes of the tree
  std::atomic<std::uint64_t> image_bytes{0};         // their data, holes not counted
  std::atomic<std::uint64_t> image_bytes_passed{0};  // of them: sent, or known to be there
  std::atomic<std::uint64_t> image_bytes_sent{0};    // what the target did not have already
  std::atomic<std::uint64_t> log_entries{0};
  std::atomic<std::uint64_t> log_bytes{0};
  std::atomic<std::uint32_t> rounds{0};
  std::atomic<std::uint64_t> estimated_files{0};  // for the progress bar, from statfs or the last walk
};

class ImageSource {
 public:
  struct Options {
    std::uint64_t attempt = 0;
    SiteName target;
    std::filesystem::path database;  // opened again on the thread of run()
    std::uint64_t rate = 0;          // bytes per second; 0: unlimited
    std::uint64_t credit = 0;        // from Prepared
    bool holds_image = false;        // ask what the target needs before sending
    // How many requests applications were answered; any thread. The image gives way to them. Empty: to
    // nobody.
    std::function<std::uint64_t()> performed{};
  };
  // Thrown out of the blocking calls when cancel() was called or the target refused.
  struct Cancelled : std::runtime_error {
    using std::runtime_error::runtime_error;
  };

  // Queues a message to the target, in the order of the calls. Called on the reactor thread.
  using Send = std::function<void(const pb::Envelope& head, std::vector<zmq::message_t> parts)>;

  ImageSource(Options options, InodeTable& inodes, Store& store, Send send, Reactor& reactor);
  // Sends over the bulk lane of `transport`.
  ImageSource(const Options& options, InodeTable& inodes, Store& store, Transport& transport,
              Reactor& reactor)
      : ImageSource(options, inodes, store, over(transport, options.target), reactor) {}
  ~ImageSource();
  ImageSource(const ImageSource&) = delete;
  ImageSource& operator=(const ImageSource&) = delete;

  // --- on a thread of its own, in this order; throw Cancelled or std::runtime_error
  void send_image();  // ends with ImageEnd, returns when ImageComplete arrived
  // Ships the entries in (after, through]; returns when RoundApplied arrived. `cut`: ctime_floor() when
  // `through` was the last entry. `final_round`: nothing changes any more; does not wait for an answer
  // (FinalEnd follows at once on the same lane).
  // `open`: the inodes that are.
  void ship_round(std::uint64_t after, std::uint64_t through, std::int64_t cut,
                  const std::vector<InodeId>& open, bool final_round);

  // --- reactor thread
  void credit(const pb::Credit& credit);
  void need(const pb::Need& need);
  void image_complete(const pb::ImageComplete& message);
  void round_applied(const pb::RoundApplied& message);
  void cancel(const std::string& reason);

  // --- any thread
  const ShipCounters& counters() const;
  std::uint64_t batches() const;                 // sent so far
  std::chrono::nanoseconds target_sync() const;  // how long the target's last sync took
  double bytes_per_second() const;               // measured over the last seconds
  std::chrono::nanoseconds search() const;       // of the last round: to look for inodes in the whole tree

 private:
  static Send over(Transport& transport, const SiteName& target) {
    return [&transport, target](const pb::Envelope& head, std::vector<zmq::message_t> parts) {
      transport.send(target, Lane::bulk, head, std::move(parts));
    };
  }

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
