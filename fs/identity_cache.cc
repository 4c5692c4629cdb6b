#include "fs/identity_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace sharefs {
namespace {

std::size_t mix(std::uint64_t value) {
  value *= 0x9e3779b97f4a7c15u;
  return static_cast<std::size_t>(value ^ (value >> 32));
}

}  // namespace

IdentityCache::IdentityCache(std::uint32_t capacity)
    : capacity_(std::max(capacity, 16u)),
      by_id_(std::bit_ceil(capacity_), 0),
      by_ino_(std::bit_ceil(capacity_), 0) {}

std::uint32_t& IdentityCache::id_bucket(InodeId id) { return by_id_[mix(id) & (by_id_.size() - 1)]; }
std::uint32_t& IdentityCache::ino_bucket(std::uint64_t ino) {
  return by_ino_[mix(ino) & (by_ino_.size() - 1)];
}

IdentityCache::Entry* IdentityCache::by_id(InodeId id) {
  for (std::uint32_t index = id_bucket(id); index != 0;) {
    Entry& entry = at(index - 1);
    if (entry.id == id) {
      entry.flags |= Entry::kReferenced;
      return &entry;
    }
    index = entry.next_by_id;
  }
  return nullptr;
}

IdentityCache::Entry* IdentityCache::by_ino(std::uint64_t ino) {
  for (std::uint32_t index = ino_bucket(ino); index != 0;) {
    Entry& entry = at(index - 1);
    if (entry.ino == ino) {
      entry.flags |= Entry::kReferenced;
      return &entry;
    }
    index = entry.next_by_ino;
  }
  return nullptr;
}

void IdentityCache::unlink_ino(Entry& entry, std::uint32_t index) {
  if (entry.erased()) return;  // is not in that table
  std::uint32_t* link = &ino_bucket(entry.ino);
  while (*link != index + 1) link = &at(*link - 1).next_by_ino;
  *link = entry.next_by_ino;
}

void IdentityCache::unlink_id(Entry& entry, std::uint32_t index) {
  std::uint32_t* link = &id_bucket(entry.id);
  while (*link != index + 1) link = &at(*link - 1).next_by_id;
  *link = entry.next_by_id;
}

// Evicts when full. What is not in SQLite yet is at most a journal full; if that is all there is, the cache
// grows.
std::uint32_t IdentityCache::free_index(std::uint64_t flushed) {
  if (size_ >= capacity_) {
    for (std::uint32_t step = 0; step < 2 * size_; ++step) {
      const std::uint32_t index = hand_;
      hand_ = hand_ + 1 < size_ ? hand_ + 1 : 0;
      Entry& entry = at(index);
      if (entry.id == kRootInode || entry.position > flushed) continue;
      if ((entry.flags & Entry::kReferenced) != 0) {
        entry.flags &= static_cast<std::uint8_t>(~Entry::kReferenced);
        continue;
      }
      unlink_ino(entry, index);
      unlink_id(entry, index);
      return index;
    }
  }
  if (size_ % kChunk == 0) chunks_.push_back(std::make_unique<Entry[]>(kChunk));
  return size_++;
}

void IdentityCache::fill(Entry& entry, const Identity& identity, std::uint64_t position) {
  entry.id = identity.id;
  entry.ino = identity.ino;
  entry.born = identity.born;
  entry.parent = identity.parent;
  entry.imported_ctime = identity.imported_ctime;
  entry.backing_ctime = identity.backing_ctime;
  entry.position = position;
  entry.type_bits = static_cast<std::uint8_t>(identity.type >> 12);
  entry.flags = static_cast<std::uint8_t>(Entry::kReferenced | (identity.imported ? Entry::kImported : 0) |
                                          (identity.orphan ? Entry::kOrphan : 0) |
                                          (identity.erased ? Entry::kErased : 0));
  const std::string& handle = identity.handle.bytes;
  entry.handle_type = identity.handle.type;
  entry.handle_size = static_cast<std::uint8_t>(handle.size());
  entry.name_size = static_cast<std::uint16_t>(identity.name.size());
  const std::size_t outside = handle.size() > Entry::kInline ? handle.size() : 0;
  if (outside == 0) std::memcpy(entry.small, handle.data(), handle.size());
  entry.heap.reset();
  if (outside + identity.name.size() == 0) return;
  entry.heap = std::make_unique<char[]>(outside + identity.name.size());
  std::memcpy(entry.heap.get(), handle.data(), outside);
  std::memcpy(entry.heap.get() + outside, identity.name.data(), identity.name.size());
}

IdentityCache::Entry& IdentityCache::put(const Identity& identity, std::uint64_t position,
                                         std::uint64_t flushed) {
  std::uint32_t index = id_bucket(identity.id);
  while (index != 0 && at(index - 1).id != identity.id) index = at(index - 1).next_by_id;
  if (index == 0) {
    index = free_index(flushed) + 1;
    at(index - 1).id = identity.id;
    at(index - 1).next_by_id = id_bucket(identity.id);
    id_bucket(identity.id) = index;
  } else {
    unlink_ino(at(index - 1), index - 1);
  }
  Entry& entry = at(index - 1);
  fill(entry, identity, position);
  if (!identity.erased) {
    entry.next_by_ino = ino_bucket(entry.ino);
    ino_bucket(entry.ino) = index;
  }
  return entry;
}

Identity IdentityCache::identity(const Entry& entry) const {
  Identity result;
  result.id = entry.id;
  result.ino = entry.ino;
  result.born = entry.born;
  result.type = entry.type();
  result.handle.type = entry.handle_type;
  result.handle.bytes.assign(entry.handle(), entry.handle_size);
  result.parent = entry.parent;
  const std::size_t outside = entry.handle_size > Entry::kInline ? entry.handle_size : 0;
  if (entry.name_size > 0) result.name.assign(entry.heap.get() + outside, entry.name_size);
  result.imported = entry.imported();
  result.imported_ctime = entry.imported_ctime;
  result.backing_ctime = entry.backing_ctime;
  result.orphan = entry.orphan();
  result.erased = entry.erased();
  return result;
}

}  // namespace sharefs
