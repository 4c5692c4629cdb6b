// Ships one round of the change log: what the cells named in it are now.
//
// The invariant that lets the target apply it in order, whatever was renamed: the edges "directory D is entry
// n of P" that the target has are, after the first part of the round, edges that the tree has at the cut or
// edges that a later round names. So attaching a directory never closes a cycle, except between cells read at
// different times, and then a later round names one of them; the target sets such an entry aside until it
// fits (target_tree.h).
//
// To that end a round is sent as
//   1. names that are gone; if the round moves a directory, all names of the round, so that everything that
//   moves is
//      detached first (a/b -> b/a, exchanged directories)
//   2. inodes never sent, whole, directories with their subtree, at their names
//   3. names of inodes sent before: moves, hard links, replacements
//   4. data and holes of inodes sent before
//   5. states of everything touched, directories last
//   6. ids that are free.
// A name whose directory is gone is gone. An inode that is gone when it is read is left out: a later entry
// tells.
//
// Memory: bounded by the number of cells changed. Threads: the shipping thread only.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "meta/change_log.h"
#include "replication/tree_walk.h"

namespace sharefs {

class Round {
 public:
  Round(InodeTable& inodes, BatchSender& sender, CellShipper& shipper, SentSet& sent, TreeWalk& walk)
      : inodes_(inodes), sender_(sender), shipper_(shipper), sent_(sent), walk_(walk) {}

  // Every entry of the log up to the cut; then `cut`: ctime_floor() when that was made.
  void note(const Change& change);
  // Is open. If it has not been sent by any name it has none here: a link outside of the store keeps its
  // number of links from telling that it is an orphan.
  void note_open(InodeId id) {
    if (!sent_.contains(id)) touched_.insert(id);
  }
  void ship(std::int64_t cut);

 private:
  struct Cell {
    InodeId parent = 0;
    std::string name;
    InodeId id = 0;  // 0: no such name
    std::uint32_t mode = 0;
    bool settled = false;  // sent together with its inode
  };
  struct Range {
    std::uint64_t begin, end;
  };

  struct Ranges {
    std::vector<Range> all;
    std::size_t merge_at = 64;  // when there are so many
    void add(Range range);
    void merge();
  };

  void read_cells();
  void reach_all();
  void find_new();
  void send_detached();
  void send_new();
  void send_names();
  void send_data();
  void send_states(std::int64_t cut);

  InodeTable& inodes_;
  BatchSender& sender_;
  CellShipper& shipper_;
  SentSet& sent_;
  TreeWalk& walk_;

  std::map<InodeId, std::set<std::string>> names_;  // by directory
  std::map<InodeId, Ranges> extents_;               // by inode
  std::set<InodeId> touched_;
  std::set<InodeId> freed_;
  std::vector<Cell> cells_;
  std::set<InodeId> new_;  // of touched_: sent whole in this round
};

}  // namespace sharefs
