// How often the kernel was told of each inode, less what it has forgotten: kept only to know when an inode
// without a name may go, which files were opened before, and of which it may keep pages.
//
// At most 32 bytes per inode: open addressing in shards that grow one by one, so that no single request pays
// for moving a big table.
//
// Threads: one.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "meta/types.h"

namespace sharefs {

class KnownInodes {
 public:
  // The kernel was told of the inode `times` more.
  void add(InodeId id, std::uint64_t times = 1);

  // The kernel forgot the inode `times`. True when it does not know it any more.
  bool remove(InodeId id, std::uint64_t times);

  bool contains(InodeId id) const;

  // Notes that the inode is opened in `period` (not 0). True if it was already, since the kernel last learnt
  // of it.
  bool opened(InodeId id, std::uint16_t period);

  // The kernel may keep pages of the inode from now on, until it forgets it; `mappable`: dirty ones too,
  // since a descriptor for reading and writing can be mapped shared and stored into.
  void note_cached(InodeId id, bool mappable);
  bool may_be_cached(InodeId id) const;
  bool may_be_dirty(InodeId id) const;

  std::size_t size() const;
  std::size_t bytes() const;

 private:
  struct Slot {
    InodeId id = 0;  // 0: empty
    std::uint64_t count : 46 = 0;
    std::uint64_t cached : 1 = 0;
    std::uint64_t mappable : 1 = 0;
    std::uint64_t period : 16 = 0;
  };
  static_assert(sizeof(Slot) == 16);

  class Shard {
   public:
    Slot* find(std::uint64_t hash, InodeId id) const;
    Slot& find_or_insert(std::uint64_t hash, InodeId id);
    void erase(Slot* slot);
    std::uint32_t used() const { return used_; }
    std::uint32_t capacity() const { return capacity_; }

   private:
    std::uint32_t home(std::uint64_t hash) const;
    std::uint32_t next(std::uint32_t index) const { return index + 1 == capacity_ ? 0 : index + 1; }
    void resize(std::uint32_t capacity);

    std::unique_ptr<Slot[]> slots_;
    std::uint32_t capacity_ = 0;
    std::uint32_t used_ = 0;
  };

  static std::uint64_t hash(InodeId id) { return id * 0x9e3779b97f4a7c15U; }
  Shard& shard(std::uint64_t hash) { return shards_[hash >> kShardShift]; }
  const Shard& shard(std::uint64_t hash) const { return shards_[hash >> kShardShift]; }

  static constexpr unsigned kShardShift = 56;
  std::array<Shard, 256> shards_;
};

}  // namespace sharefs
