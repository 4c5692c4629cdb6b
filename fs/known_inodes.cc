#include "fs/known_inodes.h"

#include <utility>

namespace sharefs {
namespace {

constexpr std::uint32_t kSmallest = 8;
constexpr std::uint64_t kMostTimes = (1ULL << 46) - 1;

// Between 53 and 80 per cent full after growing: at most 16 / 0.53 = 30 bytes per inode.
constexpr bool too_full(std::uint64_t used, std::uint64_t capacity) { return used * 5 > capacity * 4; }
constexpr bool too_empty(std::uint64_t used, std::uint64_t capacity) {
  return capacity > kSmallest && used * 4 < capacity;
}

}  // namespace

// The bits below the shard's, scaled to the capacity, which need not be a power of two.
std::uint32_t KnownInodes::Shard::home(std::uint64_t hash) const {
  const std::uint64_t bits = (hash >> (kShardShift - 32)) & 0xffffffffU;
  return static_cast<std::uint32_t>(bits * capacity_ >> 32);
}

KnownInodes::Slot* KnownInodes::Shard::find(std::uint64_t hash, InodeId id) const {
  if (capacity_ == 0) return nullptr;
  for (std::uint32_t i = home(hash); slots_[i].id != 0; i = next(i)) {
    if (slots_[i].id == id) return &slots_[i];
  }
  return nullptr;
}

KnownInodes::Slot& KnownInodes::Shard::find_or_insert(std::uint64_t hash, InodeId id) {
  if (Slot* slot = find(hash, id)) return *slot;
  if (too_full(used_ + 1, capacity_)) resize(capacity_ == 0 ? kSmallest : capacity_ + capacity_ / 2);
  std::uint32_t i = home(hash);
  while (slots_[i].id != 0) i = next(i);
  slots_[i].id = id;
  ++used_;
  return slots_[i];
}

// Closes the gap: whatever stands behind it and would no longer be found moves forward.
void KnownInodes::Shard::erase(Slot* slot) {
  auto gap = static_cast<std::uint32_t>(slot - slots_.get());
  for (std::uint32_t i = next(gap); slots_[i].id != 0; i = next(i)) {
    const std::uint32_t wanted = home(KnownInodes::hash(slots_[i].id));
    const bool stays = gap <= i ? gap < wanted && wanted <= i : gap < wanted || wanted <= i;
    if (stays) continue;
    slots_[gap] = slots_[i];
    gap = i;
  }
  slots_[gap] = Slot{};
  --used_;
  if (too_empty(used_, capacity_)) resize(capacity_ / 2);
}

void KnownInodes::Shard::resize(std::uint32_t capacity) {
  const auto old = std::exchange(slots_, std::make_unique<Slot[]>(capacity));
  const std::uint32_t old_capacity = std::exchange(capacity_, capacity);
  for (std::uint32_t i = 0; i < old_capacity; ++i) {
    if (old[i].id == 0) continue;
    std::uint32_t to = home(KnownInodes::hash(old[i].id));
    while (slots_[to].id != 0) to = next(to);
    slots_[to] = old[i];
  }
}

void KnownInodes::add(InodeId id, std::uint64_t times) {
  const std::uint64_t h = hash(id);
  Slot& slot = shard(h).find_or_insert(h, id);
  slot.count = (slot.count + times) & kMostTimes;
}

bool KnownInodes::remove(InodeId id, std::uint64_t times) {
  const std::uint64_t h = hash(id);
  Slot* slot = shard(h).find(h, id);
  if (slot == nullptr) return true;
  if (slot->count > times) {
    slot->count = (slot->count - times) & kMostTimes;
    return false;
  }
  shard(h).erase(slot);
  return true;
}

bool KnownInodes::contains(InodeId id) const {
  const std::uint64_t h = hash(id);
  return shard(h).find(h, id) != nullptr;
}

bool KnownInodes::opened(InodeId id, std::uint16_t period) {
  const std::uint64_t h = hash(id);
  Slot* slot = shard(h).find(h, id);
  if (slot == nullptr) return false;
  const bool before = slot->period == period;
  slot->period = period;
  return before;
}

void KnownInodes::note_cached(InodeId id, bool mappable) {
  const std::uint64_t h = hash(id);
  Slot* slot = shard(h).find(h, id);
  if (slot == nullptr) return;
  slot->cached = 1;
  if (mappable) slot->mappable = 1;
}

bool KnownInodes::may_be_cached(InodeId id) const {
  const std::uint64_t h = hash(id);
  const Slot* slot = shard(h).find(h, id);
  return slot != nullptr && slot->cached != 0;
}

bool KnownInodes::may_be_dirty(InodeId id) const {
  const std::uint64_t h = hash(id);
  const Slot* slot = shard(h).find(h, id);
  return slot != nullptr && slot->mappable != 0;
}

std::size_t KnownInodes::size() const {
  std::size_t sum = 0;
  for (const Shard& shard : shards_) sum += shard.used();
  return sum;
}

std::size_t KnownInodes::bytes() const {
  std::size_t sum = sizeof(*this);
  for (const Shard& shard : shards_) sum += shard.capacity() * sizeof(Slot);
  return sum;
}

}  // namespace sharefs
