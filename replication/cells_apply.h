// Applies one batch of cells to a tree: the one function that image and log go through.
//
// A batch is checked as a whole before anything is touched. Then, in this order: names that are gone; inodes,
// created in their place where the batch names it, with their data and, if complete, their state; names;
// listings of directories; data of inodes whose state came before; states of directories (everything above
// moves their times); ids that are free. The ctime of a state is noted as imported last, after whatever moves
// the backing one.
//
// Threads: the applying thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fs/inode_table.h"
#include "meta/types.h"
#include "replication/power.h"
#include "replication/target_tree.h"
#include "replication/wire.pb.h"

namespace sharefs {

class CellsApply {
 public:
  // `doubtful` and `lost`: see ImageTarget::Options.
  CellsApply(InodeTable& inodes, TargetTree& tree, Power::Interval doubtful, Power::Interval lost)
      : inodes_(inodes), tree_(tree), doubtful_(doubtful), lost_(lost) {}

  // Throws Malformed, or std::system_error when the disk refuses.
  void apply(const pb::Cells& cells, Bytes data);

  // What of these inodes is here.
  pb::Need need(const pb::Manifest& manifest);

 private:
  // An extent, and where its bytes begin in the data part.
  struct Piece {
    const pb::Extent* extent;
    std::size_t at;
  };
  using Pieces = std::span<const Piece>;

  static std::vector<Piece> pieces_by_inode(const pb::Cells& cells);
  bool apply_inode(const pb::InodeState& state, const pb::EntryState* place, Pieces pieces, Bytes data);
  static void write(const OpenedInode& opened, Pieces pieces, Bytes data);
  void apply_state(const OpenedInode& opened, const pb::InodeState& state);
  pb::Need::Inode need_of(const pb::Attr& attr, std::uint64_t& room);

  InodeTable& inodes_;
  TargetTree& tree_;
  const Power::Interval doubtful_, lost_;
};

}  // namespace sharefs
