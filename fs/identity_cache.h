// The identities in use, in memory: a bounded, compact cache with look-up by id and by backing inode.
//
// An entry is about 100 bytes, hash tables included 120; names (only kept where file handles cannot be used)
// and unusually long handles come on top. Replacement is second chance (a clock hand), so that a hit writes
// one flag.
//
// Invariants
//  - An entry wins over the SQLite row of the same id. An entry whose newest state is not in SQLite yet
//    (its journal position is above what was flushed) is never evicted, and neither is the root.
//  - An erased id stays as a tombstone until SQLite has forgotten it.
//
// Threads: none of its own; under the InodeTable's mutex.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fs/identity.h"

namespace sharefs {

class IdentityCache {
 public:
  struct Entry {
    InodeId id = 0;
    std::uint64_t ino = 0;
    std::int64_t born = 0;
    InodeId parent = 0;
    std::int64_t imported_ctime = 0;
    std::int64_t backing_ctime = 0;
    std::uint64_t position = 0;  // in the journal, after the newest record of this inode

    bool imported() const { return (flags & kImported) != 0; }
    bool orphan() const { return (flags & kOrphan) != 0; }
    bool erased() const { return (flags & kErased) != 0; }
    std::uint32_t type() const { return std::uint32_t{type_bits} << 12; }
    bool has_handle() const { return handle_size != 0; }
    const char* handle() const { return handle_size > kInline ? heap.get() : small; }
    std::uint32_t handle_type = 0;
    std::uint8_t handle_size = 0;

   private:
    friend class IdentityCache;
    static constexpr std::size_t kInline = 16;
    enum Flag : std::uint8_t { kImported = 1, kOrphan = 2, kErased = 4, kReferenced = 8 };
    std::uint8_t flags = 0;
    std::uint8_t type_bits = 0;
    std::uint16_t name_size = 0;
    std::uint32_t next_by_id = 0;  // index + 1
    std::uint32_t next_by_ino = 0;
    char small[kInline] = {};
    std::unique_ptr<char[]> heap;  // the handle if it is long, then the name
  };
  static_assert(sizeof(Entry) <= 112);

  explicit IdentityCache(std::uint32_t capacity);

  Entry* by_id(InodeId id);
  Entry* by_ino(std::uint64_t ino);  // never a tombstone

  // Adds the identity or replaces the one of the same id. `flushed`: journal positions up to it are in
  // SQLite.
  Entry& put(const Identity& identity, std::uint64_t position, std::uint64_t flushed);
  Identity identity(const Entry& entry) const;

  std::uint32_t size() const { return size_; }

 private:
  static constexpr std::uint32_t kChunk = 4096;
  Entry& at(std::uint32_t index) { return chunks_[index / kChunk][index % kChunk]; }
  std::uint32_t& id_bucket(InodeId id);
  std::uint32_t& ino_bucket(std::uint64_t ino);
  void unlink_ino(Entry& entry, std::uint32_t index);
  void unlink_id(Entry& entry, std::uint32_t index);
  std::uint32_t free_index(std::uint64_t flushed);
  void fill(Entry& entry, const Identity& identity, std::uint64_t position);

  const std::uint32_t capacity_;
  std::vector<std::unique_ptr<Entry[]>> chunks_;
  std::vector<std::uint32_t> by_id_, by_ino_;  // index + 1, chained
  std::uint32_t size_ = 0;                     // entries ever used
  std::uint32_t hand_ = 0;
};

}  // namespace sharefs
