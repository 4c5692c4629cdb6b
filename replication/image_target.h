// The receiving half: applies batches of image and log to this site's store, in the order in which they
// arrive.
//
// Every batch is applied by one function, in an order that always works: park every inode that moves or loses
// its name, create what is new, attach (parents before children), write data and punch holes, set size,
// owner, mode, xattrs and times of everything touched, directories last; then note ctime as imported
// (InodeTable).
//
// Invariants
//  - Nothing outside the tree directory is ever touched, whatever a batch says; a malformed one ends the
//  attempt.
//  - An inode without a name is parked (private area, `parked/<id in hex>`), and deleted by finish(), or
//  before that if
//    the disk is full and the source has not spoken of it.
//  - What was applied is kept when the attempt is abandoned, and is offered again as what this site holds.
//
// Threads: batches are queued by the reactor and applied on one thread; answers are posted back to the
// reactor.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>

#include "fs/inode_table.h"
#include "replication/disk_sync.h"
#include "replication/power.h"
#include "replication/sent_set.h"
#include "replication/transport.h"

namespace sharefs {

class ImageTarget {
 public:
  struct Options {
    std::uint64_t attempt = 0;
    SiteName source;
    std::filesystem::path private_area;  // holds tree/, parked/, orphans/
    Power::Interval doubtful{};  // ctimes of files that are not believed to have what their attributes say
    // Ctimes, as the source shows them, of files that it may have lost what was received of before.
    Power::Interval lost{};
    std::uint64_t failed_syncs = 0;  // that `doubtful` knows of
    // What has been received whole since the losses that `doubtful` and `lost` speak of: not in doubt,
    // whatever its stamp is. Lives beyond the attempt; its applying thread uses it.
    std::shared_ptr<SentSet> received = std::make_shared<SentSet>();
  };
  // `send` posts an answer to the source (called on the reactor thread); `failed` is called once, on the
  // reactor thread, with one clear line when the attempt cannot go on (disk full, malformed batch, checksum).
  ImageTarget(Options options, InodeTable& inodes, DiskSync& disk, Reactor& reactor,
              std::function<void(pb::Envelope)> send, std::function<void(std::string)> failed);
  ~ImageTarget();

  // --- reactor thread; each queues behind what came before
  void batch(Message message);
  void manifest(pb::Manifest manifest);
  void image_end();                     // syncs, then sends ImageComplete
  void round_end(std::uint32_t round);  // syncs, then sends RoundApplied
  // Checks that all batches arrived, syncs everything; then `applied` on the reactor thread.
  void final_end(std::uint64_t batches, std::function<void()> applied);
  // Once everything is applied: whether the inode is here, and has no name in the tree.
  bool is_parked(InodeId id) const;
  // The attempt won: moves what is in `orphans` to orphans/, durably, before it returns, then removes
  // everything else that is parked, on the thread; `discarded` is called when that is done. The destructor
  // interrupts it: what is left goes with the next process of the owner (Site::Impl::delete_leftovers).
  void finish(const std::set<InodeId>& orphans, std::function<void()> discarded = {});

  static constexpr std::uint64_t kCredit = 16u << 20;  // bytes in flight

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
