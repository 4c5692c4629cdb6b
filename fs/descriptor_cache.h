// Open descriptors of the inodes in use: a bounded cache in front of InodeTable::open().
//
// Each cached inode may have one descriptor for its attributes and names (O_PATH), one for reading (O_RDONLY)
// and one for writing (O_RDWR, which then serves all three). The least recently used inode is closed when
// there are too many descriptors; one that a worker uses is pinned and closed when the last pin goes.
//
// Threads: reactor thread only; a pinned descriptor may be used on another thread.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

#include "fs/inode_table.h"

namespace sharefs {

class DescriptorCache {
 public:
  struct Node;
  // A borrowed descriptor; fd < 0: errno says why. The two inodes asked for last stay open, others until the
  // next call.
  struct Ref {
    int fd = -1;
    std::uint32_t type = 0;  // S_IFMT
    bool path_only = false;  // opened with O_PATH
    Node* node = nullptr;
    explicit operator bool() const { return fd >= 0; }
  };

  // `limit` of descriptors; fewer if the process may not have that many.
  DescriptorCache(InodeTable& inodes, unsigned limit);
  ~DescriptorCache();
  DescriptorCache(const DescriptorCache&) = delete;
  DescriptorCache& operator=(const DescriptorCache&) = delete;

  Ref any(InodeId id);       // whatever there is, otherwise O_PATH
  Ref readable(InodeId id);  // regular files and directories only, as the next one
  Ref writable(InodeId id);

  // Keeps a descriptor that is open already (O_RDWR) for the inode.
  void adopt(InodeId id, std::uint32_t type, UniqueFd writable);

  // The descriptor stays open until unpin(), whatever happens to the cache.
  void pin(const Ref& ref);
  void unpin(const Ref& ref);
  // So many inodes are pinned that what else is to be open had no room.
  bool crowded() const { return pinned_ >= limit_ / 4; }

  void drop_writable(InodeId id);
  void drop(InodeId id);
  void clear();

  unsigned open_descriptors() const { return count_; }
  unsigned limit() const { return limit_; }

 private:
  enum Kind : unsigned { kPath, kRead, kWrite, kKinds };
  Node* find(InodeId id);
  Node& at(InodeId id, std::uint32_t type);
  Ref get(InodeId id, Kind kind);
  UniqueFd open(InodeId id, Kind kind, std::uint32_t& type, bool& write_only);
  UniqueFd open_read_only(InodeId id, std::uint32_t& type);
  void make_room();
  void release(Node* node);
  void close(int& fd);

  // constant after construction
  InodeTable& inodes_;
  const unsigned limit_;
  // reactor thread
  std::list<Node> nodes_;   // most recently used first
  std::list<Node> doomed_;  // dropped while pinned
  std::unordered_map<InodeId, std::list<Node>::iterator> by_id_;
  unsigned count_ = 0;
  unsigned pinned_ = 0;  // inodes
};

struct DescriptorCache::Node {
  InodeId id = 0;
  std::uint32_t type = 0;
  unsigned pins = 0;
  bool doomed = false;
  bool write_only = false;  // the descriptor for writing cannot read
  int fds[3] = {-1, -1, -1};
};

}  // namespace sharefs
