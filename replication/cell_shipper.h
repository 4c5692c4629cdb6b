// Reads the cells of single inodes from the store and adds them to batches: states, entries, data.
//
// Threads: the shipping thread only.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "fs/inode_table.h"
#include "fs/store.h"
#include "replication/batch_sender.h"
#include "replication/image_source.h"
#include "replication/inode_io.h"

namespace sharefs {

// What the target may have where the source has a hole: nothing (skip the hole) or old data (say that it is
// one).
enum class Holes { skip, send };

// The name under which an inode is sent, so that the target creates it in its place.
struct EntryName {
  InodeId parent = 0;
  std::string_view name;
};

// Without holes; 0 of what is no regular file.
std::uint64_t data_bytes(const Backing& backing);

class CellShipper {
 public:
  CellShipper(InodeTable& inodes, Store& store, BatchSender& sender, ShipCounters& counters)
      : inodes_(inodes), store_(store), sender_(sender), counters_(counters) {}

  // What is shipped from now on belongs to the log: it is not counted as image.
  void image_ended() { image_ = false; }
  // Nothing changes any more: what is read now is final.
  void tree_is_still() { still_ = true; }
  void tree_may_change() { still_ = false; }
  // Inodes whose states must be sent again, since the last call; see state().
  std::set<InodeId> take_too_fresh() { return std::exchange(too_fresh_, {}); }
  void count(const Backing& backing);  // an inode of the image, whether or not the target has it already
  std::int64_t settled_before() const;
  void passed(std::uint64_t bytes);  // of the image, which the target has already
  pb::Attr attributes(InodeId id, const OpenedInode& opened) {
    return store_.attributes(id, opened.fd.get());
  }

  void entry(const EntryName& entry, InodeId id, std::uint32_t mode) {
    sender_.add_entry(entry.parent, entry.name, id, mode & static_cast<std::uint32_t>(S_IFMT));
    sender_.checkpoint();
  }
  // Creation and the attributes; state() follows.
  void announce(InodeId id, const OpenedInode& opened) { add_state(id, opened).set_complete(false); }
  // Everything that is not data. After an attempt that ended early, the next one takes a copy with the same
  // ctime for a good one. So the ctime is only told if the data that was sent is that of this ctime: if the
  // last change is not later than `as_of`, from before the data was read or the log was cut. Otherwise the
  // inode is sent with an older ctime, and its state is due again.
  void state(InodeId id, const OpenedInode& opened, std::int64_t as_of);
  // Everything of an inode that is not a directory: creation in its place, data, state.
  void whole(InodeId id, const OpenedInode& opened, const EntryName* entry, Holes holes);
  // The same where the target holds another version: only the blocks that differ from those in `need`.
  void changed_blocks(InodeId id, const OpenedInode& opened, const pb::Need::Inode& need);
  // The bytes in [from, to) as they are now; what lies beyond the end of file is sent as a hole.
  void extent(InodeId id, const OpenedInode& opened, std::uint64_t from, std::uint64_t to);

 private:
  pb::InodeState& add_state(InodeId id, const OpenedInode& opened);
  void data(InodeId id, int fd, bool dense, std::uint64_t from, std::uint64_t to, Holes holes);
  std::uint64_t bytes(InodeId id, int fd, std::uint64_t from, std::uint64_t to);
  void hole(InodeId id, std::uint64_t from, std::uint64_t to);
  void nothing_behind(InodeId id, std::uint64_t end);

  InodeTable& inodes_;
  Store& store_;
  BatchSender& sender_;
  ShipCounters& counters_;
  bool image_ = true;
  bool still_ = false;
  std::set<InodeId> too_fresh_;
  std::string block_;  // one block, for comparison
};

}  // namespace sharefs
