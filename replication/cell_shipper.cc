#include "replication/cell_shipper.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#include "replication/checksum.h"

namespace sharefs {

namespace {

// A file up to this size is sent in one batch, even if the batch before it then stays smaller.
constexpr std::uint64_t kSmallFile = std::uint64_t{256} << 10;
static_assert(kSmallFile <= BatchSender::kBatchBytes);
// The last bit of a batch that is too small to be worth a read call of its own.
constexpr std::size_t kLeastRead = std::size_t{16} << 10;

// Blocks alone do not tell: some may be reserved beyond the end of the file.
bool has_no_holes(int fd, const Backing& backing) {
  return backing.stx_blocks * 512 >= backing.stx_size &&
         lseek(fd, 0, SEEK_HOLE) >= static_cast<off_t>(backing.stx_size);
}

// The next data at or after `at` and where it ends, both at most `to`.
struct Segment {
  std::uint64_t begin, end;
};
Segment next_data(int fd, bool dense, std::uint64_t at, std::uint64_t to) {
  if (dense) return {at, to};
  const off_t begin = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
  if (begin < 0 && errno == ENXIO) return {to, to};
  if (begin < 0) return {at, to};  // cannot tell: all is data
  const off_t end = lseek(fd, begin, SEEK_HOLE);
  const auto clip = [&](off_t offset) { return std::min(static_cast<std::uint64_t>(offset), to); };
  return {clip(begin), end < 0 ? to : clip(end)};
}

ssize_t read_at(int fd, void* buffer, std::size_t size, std::uint64_t offset, InodeId id) {
  const ssize_t count = pread(fd, buffer, size, static_cast<off_t>(offset));
  if (count < 0) throw_errno("cannot read inode " + std::to_string(id));
  return count;
}

}  // namespace

std::uint64_t data_bytes(const Backing& backing) {
  if (!is_regular(backing)) return 0;
  return std::min<std::uint64_t>(backing.stx_size, backing.stx_blocks * 512);
}

void CellShipper::passed(std::uint64_t bytes) {
  if (image_) counters_.image_bytes_passed += bytes;
}

void CellShipper::count(const Backing& backing) {
  if (!image_) return;
  counters_.image_files += 1;
  counters_.image_bytes += data_bytes(backing);
}

// What is stamped with this or less has changed as a whole: a change that is under way may have stamped its
// inode already, and its bytes are still to come.
std::int64_t CellShipper::settled_before() const {
  return std::min(ctime_floor(), store_.oldest_change() - 1);
}

pb::InodeState& CellShipper::add_state(InodeId id, const OpenedInode& opened) {
  pb::InodeState& state = sender_.add_state();
  *state.mutable_attr() = attributes(id, opened);
  if (inodes_.is_orphan(id)) state.set_orphan(true);
  if (S_ISLNK(opened.backing.stx_mode)) state.set_link_target(read_link(opened.fd.get()));
  return state;
}

void CellShipper::state(InodeId id, const OpenedInode& opened, std::int64_t as_of) {
  pb::InodeState& state = add_state(id, opened);
  state.set_complete(true);
  // By this machine's clock, which may be behind the one that an imported ctime is from. After the attributes
  // were read: what changes between is too fresh.
  const std::int64_t stamp = timestamp_ns(stat_inode(opened.fd.get()).stx_ctime);
  // One that lies ahead, and did when the inode was opened, is from before the clock was set back: what has
  // changed since got another one.
  const bool ahead = stamp > ctime_ceiling() && stamp == timestamp_ns(opened.backing.stx_ctime);
  if (!still_ && stamp > as_of && !ahead) {
    state.mutable_attr()->set_ctime(state.attr().ctime() - 1);
    too_fresh_.insert(id);
  }
  for (auto& [name, value] : read_xattrs(opened.fd.get(), opened.path_only)) {
    pb::Xattr& xattr = *state.add_xattrs();
    xattr.set_name(name);
    xattr.set_value(value);
    sender_.grown(name.size() + value.size() + 16);
  }
}

void CellShipper::whole(InodeId id, const OpenedInode& opened, const EntryName* entry, Holes holes) {
  const std::int64_t as_of = settled_before();
  // Looked at again: what was appended since it was opened, and before `as_of`, belongs to its stamp.
  const Backing backing = stat_inode(opened.fd.get());
  bool announced = false;
  if (is_regular(backing)) {
    const std::uint64_t size = backing.stx_size;
    if (size > sender_.room().size() && size <= kSmallFile) sender_.flush();
    if (size > sender_.room().size()) {
      announce(id, opened);
      if (entry != nullptr) sender_.add_entry(entry->parent, entry->name, id, S_IFREG);
      announced = true;
    }
    const int fd = opened.fd.get();
    data(id, fd, has_no_holes(fd, backing), 0, size, holes);
    if (holes == Holes::send) nothing_behind(id, size);
  }
  state(id, opened, as_of);
  if (entry != nullptr && !announced) {
    sender_.add_entry(entry->parent, entry->name, id, backing.stx_mode & static_cast<std::uint32_t>(S_IFMT));
  }
  sender_.checkpoint();
}

void CellShipper::changed_blocks(InodeId id, const OpenedInode& opened, const pb::Need::Inode& need) {
  const int fd = opened.fd.get();
  const std::int64_t as_of = settled_before();
  const Backing backing = stat_inode(fd);  // again, as in whole()
  const std::uint64_t size = backing.stx_size;
  const bool dense = has_no_holes(fd, backing);
  block_.resize(kBlockBytes);
  const std::uint64_t compared = std::min(size, static_cast<std::uint64_t>(need.blocks_size()) * kBlockBytes);
  for (std::uint64_t at = 0; at < compared; at += kBlockBytes) {
    sender_.check();
    sender_.checkpoint();
    const std::uint64_t end = std::min(at + kBlockBytes, size);
    const auto index = static_cast<int>(at / kBlockBytes);
    const bool held = std::min(at + kBlockBytes, need.size()) == end;
    bool same = false;
    if (held && next_data(fd, dense, at, end).begin < end) {
      std::uint64_t filled = 0;
      while (filled < end - at) {
        const ssize_t count = read_at(fd, block_.data() + filled, end - at - filled, at + filled, id);
        if (count == 0) break;
        filled += static_cast<std::uint64_t>(count);
      }
      same = filled == end - at && XXH3_64bits(block_.data(), filled) == need.blocks(index);
    }
    if (!same) {
      data(id, fd, dense, at, end, Holes::send);
      continue;
    }
    passed(end - at);
    for (std::uint64_t from = at; from < end;) {
      const Segment next = next_data(fd, dense, from, end);
      hole(id, from, next.begin);
      from = next.end;
    }
  }
  if (compared < size) data(id, fd, dense, compared, size, Holes::send);
  if (need.size() > size) nothing_behind(id, size);
  state(id, opened, as_of);
  sender_.checkpoint();
}

// The target's copy may be longer. The file, which ended here, may have grown over that before its state is
// read, by a gap of which the log says nothing.
void CellShipper::nothing_behind(InodeId id, std::uint64_t end) { hole(id, end, kMaxFileSize); }

void CellShipper::extent(InodeId id, const OpenedInode& opened, std::uint64_t from, std::uint64_t to) {
  const std::uint64_t size = opened.backing.stx_size;
  if (from < size) data(id, opened.fd.get(), false, from, std::min(to, size), Holes::send);
  // The file may have been cut off here and may grow again before its size is read: then it grows by zeros,
  // and so must the target's copy.
  hole(id, std::max(from, size), to);
  sender_.checkpoint();
}

void CellShipper::data(InodeId id, int fd, bool dense, std::uint64_t from, std::uint64_t to, Holes holes) {
  while (from < to) {
    const Segment next = next_data(fd, dense, from, to);
    if (holes == Holes::send) hole(id, from, next.begin);
    const std::uint64_t reached = bytes(id, fd, next.begin, next.end);
    if (reached < next.end) {  // cut off meanwhile
      if (holes == Holes::send) hole(id, reached, to);
      return;
    }
    from = next.end;
  }
}

// Returns how far it came: less than `to` when the file ends before.
std::uint64_t CellShipper::bytes(InodeId id, int fd, std::uint64_t from, std::uint64_t to) {
  while (from < to) {
    auto room = sender_.room();
    if (room.size() < std::min<std::uint64_t>(to - from, kLeastRead)) {
      sender_.flush();
      room = sender_.room();
    }
    const ssize_t count = read_at(fd, room.data(), std::min<std::uint64_t>(room.size(), to - from), from, id);
    if (count == 0) break;
    sender_.add_data(id, from, static_cast<std::size_t>(count));
    if (image_) counters_.image_bytes_sent += static_cast<std::uint64_t>(count);
    passed(static_cast<std::uint64_t>(count));
    from += static_cast<std::uint64_t>(count);
  }
  return from;
}

void CellShipper::hole(InodeId id, std::uint64_t from, std::uint64_t to) {
  if (from < to) sender_.add_hole(id, from, to - from);
}

}  // namespace sharefs
