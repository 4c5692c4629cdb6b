// The Store: listing directories.
//
// The offset of an entry is a hash of (data set, name), so it means the same on every site and in every
// process; the entries come in its order. A handle lists from a snapshot made at its offset 0; a handle that
// is not known here (after a restart or a handoff) gets a new one, and goes on behind the offset that it
// names.
#include <dirent.h>
#include <fcntl.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "fs/store_impl.h"

namespace sharefs {
namespace {

// What is dropped is made again when its handle goes on, which for a million names (40 MB) takes long: a few
// such listings must have room beside each other.
constexpr std::size_t kMaxSnapshots = 64;
constexpr std::size_t kMaxSnapshotBytes = 128 << 20;  // beside the newest
constexpr std::uint64_t kLargeDirectory = 1 << 20;    // bytes; above, it is read on a worker
constexpr std::uint64_t kDotOffset = 1, kDotDotOffset = 2;

// What an entry takes of the kernel's buffer: fuse_direntplus or fuse_dirent, the name, rounded up.
std::size_t entry_bytes(std::size_t name, bool plus) {
  constexpr std::size_t kDirent = 24, kDirentPlus = 152;
  return ((plus ? kDirentPlus : kDirent) + name + 7) & ~std::size_t{7};
}

bool has_no_xattrs(int directory, std::string_view name) {
  const std::string path = "/proc/self/fd/" + std::to_string(directory) + "/" + std::string(name);
  return ::llistxattr(path.c_str(), nullptr, 0) == 0;
}

std::uint32_t mode_of(std::uint8_t type) { return DTTOIF(std::uint32_t{type}); }

}  // namespace

std::uint64_t Store::Impl::offset_of(std::string_view name) const {
  const std::uint64_t hash = XXH3_64bits_withSeed(name.data(), name.size(), offset_seed) >> 1;
  return std::max(hash, kDotDotOffset + 1);
}

int Store::Impl::take_snapshot(int fd, bool root, DirectorySnapshot& snapshot) const {
  if (::lseek(fd, 0, SEEK_SET) < 0) return errno;
  std::vector<char> buffer(64 << 10);
  ssize_t size;
  while ((size = ::getdents64(fd, buffer.data(), buffer.size())) > 0) {
    for (ssize_t at = 0; at < size;) {
      const auto* entry = reinterpret_cast<const dirent64*>(buffer.data() + at);
      at += entry->d_reclen;
      const std::string_view name(entry->d_name);
      if (root && name == kPrivateArea) continue;
      const std::uint64_t offset = name == "." ? kDotOffset : name == ".." ? kDotDotOffset : offset_of(name);
      snapshot.items.push_back({offset, entry->d_ino, static_cast<std::uint32_t>(snapshot.names.size()),
                                static_cast<std::uint8_t>(name.size()), entry->d_type});
      snapshot.names += name;
    }
  }
  if (size < 0) return errno;
  std::sort(snapshot.items.begin(), snapshot.items.end(), [&](const auto& a, const auto& b) {
    return a.offset != b.offset ? a.offset < b.offset : snapshot.name(a) < snapshot.name(b);
  });
  snapshot.items.shrink_to_fit();
  snapshot.names.shrink_to_fit();
  return 0;
}

const DirectorySnapshot& Store::Impl::keep_snapshot(SnapshotKey key, InodeId id, DirectorySnapshot snapshot) {
  snapshots.remove_if([&](const KeptSnapshot& kept) { return kept.key == key; });
  snapshots.push_front({key, id, std::move(snapshot)});
  std::size_t bytes = 0, count = 0;
  for (auto kept = std::next(snapshots.begin()); kept != snapshots.end(); ++kept) {
    bytes += kept->snapshot.bytes();
    if (++count < kMaxSnapshots && bytes <= kMaxSnapshotBytes) continue;
    snapshots.erase(kept, snapshots.end());
    break;
  }
  return snapshots.front().snapshot;
}

int Store::Impl::readdir(const pb::ReadDir& op, StoreCall& call) {
  const auto ref = descriptors.readable(op.id());
  if (!ref) return errno == ELOOP || errno == ENXIO ? ENOTDIR : errno;
  if (ref.type != S_IFDIR) return ENOTDIR;
  if (inodes.is_orphan(op.id())) return ENOENT;  // as for any directory that was removed
  const SnapshotKey key{call.request.client(), op.handle()};
  if (op.offset() != 0) {
    const auto known = std::find_if(snapshots.begin(), snapshots.end(), [&](const KeptSnapshot& kept) {
      return kept.key == key && kept.id == op.id();
    });
    if (known != snapshots.end()) {
      snapshots.splice(snapshots.begin(), snapshots, known);
      return list(op, call.outcome, known->snapshot);
    }
  }
  Backing backing{};
  if (::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) return errno;
  const bool root = op.id() == kRootInode;
  if (backing.stx_size <= kLargeDirectory) {
    DirectorySnapshot snapshot;
    if (const int error = take_snapshot(ref.fd, root, snapshot); error != 0) return error;
    return list(op, call.outcome, keep_snapshot(key, op.id(), std::move(snapshot)));
  }
  // The position of an open directory is shared, so the worker has a descriptor of its own.
  const auto snapshot = std::make_shared<DirectorySnapshot>();
  const auto work = [this, root, snapshot, id = op.id()](Job&) {
    const UniqueFd own = inodes.open(id, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    return own ? take_snapshot(own.get(), root, *snapshot) : errno;
  };
  return later(call, {}, work, [this, key, op, snapshot](Job& job) {
    if (job.error == 0) job.error = list(op, job.outcome, keep_snapshot(key, op.id(), std::move(*snapshot)));
  });
}

int Store::Impl::list(const pb::ReadDir& op, pb::Outcome& outcome, const DirectorySnapshot& snapshot) {
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  const auto& items = snapshot.items;
  auto item = std::upper_bound(items.begin(), items.end(), op.offset(),
                               [](std::uint64_t offset, const auto& other) { return offset < other.offset; });
  std::size_t bytes = 0;
  while (item != items.end()) {
    // Names of one hash are never parted: going on behind their offset would skip the rest.
    auto next = item;
    std::size_t wanted = 0;
    for (; next != items.end() && next->offset == item->offset; ++next)
      wanted += entry_bytes(next->size, op.plus());
    if (bytes + wanted > op.max_bytes() && bytes > 0) break;
    if (wanted > op.max_bytes()) return EINVAL;
    for (; item != next; ++item)
      if (add_entry(op, outcome, ref.fd, snapshot, *item)) bytes += entry_bytes(item->size, op.plus());
  }
  return 0;
}

// False: the entry is gone.
bool Store::Impl::add_entry(const pb::ReadDir& op, pb::Outcome& outcome, int fd,
                            const DirectorySnapshot& snapshot, const DirectorySnapshot::Item& item) {
  const std::string_view name = snapshot.name(item);
  const bool dots = item.offset <= kDotDotOffset;
  Backing backing{};
  InodeId id = 0;
  std::uint32_t mode = mode_of(item.type);
  if (item.offset == kDotOffset || (item.offset == kDotDotOffset && op.id() == kRootInode)) {
    id = op.id();
  } else if (const auto known = inodes.peek(item.ino);
             known && item.type != DT_UNKNOWN && (!op.plus() || dots)) {
    id = *known;
  }
  if (id == 0) {
    const std::string path(name);
    if (item.offset == kDotDotOffset) {
      if (parent_of(fd, id, backing) != 0) return false;
    } else {
      if (::statx(fd, path.c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &backing) != 0 || foreign(backing))
        return false;
      id = inodes.identify(op.id(), name, fd, backing);
    }
    mode = backing.stx_mode & static_cast<std::uint32_t>(S_IFMT);
  }
  pb::DirEntry& entry = *outcome.add_entries();
  entry.set_name(name.data(), name.size());
  entry.set_offset(item.offset);
  if (op.plus() && !dots) {
    fill_named(*entry.mutable_attr(), id, backing);
    entry.mutable_attr()->set_bare(op.bare() && has_no_xattrs(fd, name));
  } else {
    entry.mutable_attr()->set_id(id);
    entry.mutable_attr()->set_mode(mode);
  }
  return true;
}

int Store::Impl::releasedir(const pb::ReleaseDir& op, StoreCall& call) {
  const SnapshotKey key{call.request.client(), op.handle()};
  snapshots.remove_if([&](const KeptSnapshot& kept) { return kept.key == key; });
  return 0;
}

}  // namespace sharefs
