// Sends a tree, directory by directory in pre-order, while it changes.
//
// Order, on which the target relies: a directory is announced before what is in it; everything in it has been
// sent before it is declared complete (its mtime would change again); an inode's first name comes with it, so
// that it is created in its place. Hard links are sent once, with an entry for each name.
//
// With a target that holds an old image, inodes that are not directories are queued and asked about
// (Manifest, Need) in groups, a few groups ahead; their order stays. Directories are sent with their whole
// listing, so that names that have vanished meanwhile vanish there too; in parts, so that no message grows
// with the number of names.
//
// What changes under the walk has a log entry, so a name or an inode that is gone when its turn comes is left
// out.
//
// Threads: the shipping thread only.
#pragma once

#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "replication/cell_shipper.h"
#include "replication/sent_set.h"
#include "replication/ship_link.h"

namespace sharefs {

class TreeWalk {
 public:
  TreeWalk(const ImageSource::Options& options, InodeTable& inodes, ShipLink& link, BatchSender& sender,
           CellShipper& shipper, SentSet& sent)
      : attempt_(options.attempt),
        holds_image_(options.holds_image),
        inodes_(inodes),
        link_(link),
        sender_(sender),
        shipper_(shipper),
        sent_(sent),
        holes_(options.holds_image ? Holes::send : Holes::skip) {}

  // The whole tree, then the orphans.
  void image();
  // An inode that has not been sent whole, `entry` being one of its names or nullptr; a directory with its
  // subtree. The target is not asked. Does nothing if it is gone.
  void send(InodeId id, const EntryName* entry);
  // Identifies whatever has one of these backing numbers under a name that it has now.
  void find(const std::set<std::uint64_t>& inos);
  // How long that has taken, since the last call.
  std::chrono::nanoseconds take_search() { return std::exchange(search_, {}); }
  // Nothing if it is gone, or has been out of reach once since take_missed(): even if it is back, a part of
  // it was not read then. It is to be sent whole in the next round.
  std::optional<OpenedInode> open(InodeId id);
  std::set<InodeId> take_missed() { return std::exchange(missed_, {}); }

 private:
  // What waits for an answer of the target, in order; `inode` is 0 for a listing: the end of a directory, or
  // a part of one.
  struct Item {
    InodeId inode = 0;
    InodeId parent = 0;
    std::string name;
    pb::Attr attr;  // until it is in a manifest
    std::uint64_t bytes = 0;
    pb::DirectoryState listing;
    bool gone = false;  // the directory, before it could be listed
  };

  // A directory: names first, then the directories below, to be visited later.
  void subtree(InodeId top);
  void visit(InodeId directory, std::vector<InodeId>& below);
  void child(InodeId directory, int directory_fd, const ListedName& listed, pb::DirectoryState& listing,
             std::vector<InodeId>& below);
  void list(InodeId directory, const OpenedInode& opened, pb::DirectoryState& listing);
  void queue_listing(pb::DirectoryState& listing, bool gone = false);
  void announce_directory(InodeId id, const OpenedInode& opened, const EntryName* entry);
  void gone(InodeId directory);
  void finish_directory(InodeId id, const OpenedInode& opened, pb::DirectoryState& listing);
  void orphans();

  void enqueue(Item item, const OpenedInode& opened);
  void ask();
  void settle(std::size_t leave_asked);
  void settle_item(Item& item, const pb::Need::Inode* need);

  // constant after construction
  const std::uint64_t attempt_;
  const bool holds_image_;
  InodeTable& inodes_;
  ShipLink& link_;
  BatchSender& sender_;
  CellShipper& shipper_;
  SentSet& sent_;

  Holes holes_;  // the target may have something of what is sent: an image, or what a round has sent of it
  std::set<InodeId> missed_;
  std::chrono::nanoseconds search_{};
  Backing root_{};
  bool asking_ = false;  // the target is asked before data is sent
  std::deque<Item> queue_;
  std::uint64_t manifests_ = 0;      // sent
  std::uint64_t settled_ = 0;        // of them answered and dealt with
  std::deque<std::size_t> groups_;   // items of the queue that each unsettled manifest covers
  std::size_t not_asked_ = 0;        // items behind them
  std::size_t names_not_asked_ = 0;  // in their listings
  int inodes_not_asked_ = 0;
};

}  // namespace sharefs
