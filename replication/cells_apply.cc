#include "replication/cells_apply.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "replication/checksum.h"

namespace sharefs {

namespace {

constexpr std::uint32_t kTypeBits = S_IFMT;
constexpr std::uint32_t kPermissionBits = 07777;

std::uint32_t type_of(const pb::InodeState& state) { return state.attr().mode() & kTypeBits; }

void check_state(const pb::InodeState& state) {
  const pb::Attr& attr = state.attr();
  const std::uint32_t type = type_of(state);
  constexpr std::array<std::uint32_t, 7> kTypes{S_IFREG,  S_IFDIR, S_IFLNK, S_IFIFO,
                                                S_IFSOCK, S_IFCHR, S_IFBLK};
  if (attr.id() == 0) throw Malformed("an inode without an id");
  if (std::find(kTypes.begin(), kTypes.end(), type) == kTypes.end() ||
      (attr.mode() & ~(kTypeBits | kPermissionBits)) != 0) {
    throw Malformed("a mode that no inode can have");
  }
  if (attr.id() == kRootInode && type != S_IFDIR) throw Malformed("the root is not a directory");
  if (attr.size() > kMaxFileSize) throw Malformed("a size that no file can have");
  const std::string& target = state.link_target();
  if (type == S_IFLNK &&
      (target.empty() || target.size() >= PATH_MAX || target.find('\0') != std::string::npos)) {
    throw Malformed("a link target that no symbolic link can have");
  }
  for (const auto& xattr : state.xattrs()) {
    if (xattr.name().empty() || xattr.name().find('\0') != std::string::npos) {
      throw Malformed("a name that no extended attribute can have");
    }
  }
}

void check_entry(InodeId parent, const std::string& name, InodeId id) {
  if (parent == 0) throw Malformed("a name without a directory");
  if (id == kRootInode) throw Malformed("it gives the root a name");
  check_name(parent, name);
}

void check(const pb::Cells& cells, Bytes data) {
  for (const auto& state : cells.inodes()) check_state(state);
  for (const auto& entry : cells.entries()) check_entry(entry.parent(), entry.name(), entry.id());
  for (const auto& directory : cells.directories()) {
    for (const auto& entry : directory.entries()) {
      if (entry.id() == 0) throw Malformed("a listed name without an inode");
      check_entry(directory.id(), entry.name(), entry.id());
    }
  }
  std::uint64_t bytes = 0;
  for (const auto& extent : cells.extents()) {
    if (extent.id() == 0 || extent.id() == kRootInode) throw Malformed("data of what is not a file");
    if (extent.offset() > kMaxFileSize || extent.length() > kMaxFileSize - extent.offset()) {
      throw Malformed("data where no file can have any");
    }
    if (extent.hole()) continue;
    if (extent.length() > data.size() - bytes) throw Malformed("fewer bytes than it says");
    bytes += extent.length();
  }
  if (bytes != data.size()) throw Malformed("more bytes than it says");
  for (const InodeId id : cells.freed()) {
    if (id == 0 || id == kRootInode) throw Malformed("it frees the root");
  }
}

void write_bytes(int fd, Bytes bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const ssize_t count = pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("cannot write");
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
}

// The range reads as zeros afterwards, as far as it lies within the file.
void punch(int fd, std::uint64_t offset, std::uint64_t length) {
  const std::uint64_t size = stat_inode(fd).stx_size;
  if (offset >= size) return;
  length = std::min(length, size - offset);
  if (length == 0) return;
  if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                static_cast<off_t>(length)) == 0) {
    return;
  }
  if (errno != EOPNOTSUPP) throw_errno("cannot punch a hole");
  const std::vector<std::byte> zeros(std::min<std::uint64_t>(length, kBlockBytes));
  for (std::uint64_t done = 0; done < length; done += zeros.size()) {
    write_bytes(fd, Bytes(zeros).first(std::min<std::uint64_t>(zeros.size(), length - done)), offset + done);
  }
}

void set_owner(const OpenedInode& opened, const pb::Attr& attr) {
  if (fchownat(opened.fd.get(), "", attr.uid(), attr.gid(), AT_EMPTY_PATH) == 0) return;
  if (errno == EPERM) {
    throw_errno("cannot give a file to user " + std::to_string(attr.uid()) + ", group " +
                std::to_string(attr.gid()) + " (sharefs must run as root here)");
  }
  throw_errno("cannot set an owner");
}

void set_mode(const OpenedInode& opened, std::uint32_t permissions) {
  const int result = opened.path_only ? chmod(proc_path(opened.fd.get()).c_str(), permissions)
                                      : fchmod(opened.fd.get(), permissions);
  if (result != 0) throw_errno("cannot set a mode");
}

void set_times(int fd, const pb::Attr& attr) {
  const std::array<struct timespec, 2> times{to_timespec(attr.atime()), to_timespec(attr.mtime())};
  if (utimensat(fd, "", times.data(), AT_EMPTY_PATH) != 0) throw_errno("cannot set times");
}

std::string lost_time(const pb::Attr& attr) {
  return "the target's file system cannot keep the modification time " + std::to_string(attr.mtime()) +
         " ns of inode " + std::to_string(attr.id()) +
         ": it has whole seconds only, or none so late (ext4 with inodes of 128 bytes)";
}

}  // namespace

void CellsApply::apply(const pb::Cells& cells, Bytes data) {
  check(cells, data);
  const std::vector<Piece> pieces = pieces_by_inode(cells);
  const auto pieces_of = [&](InodeId id) {
    const auto by_id = [](const auto& a, const auto& b) { return a.extent->id() < b.extent->id(); };
    pb::Extent key;
    key.set_id(id);
    const auto [begin, end] = std::equal_range(pieces.begin(), pieces.end(), Piece{&key, 0}, by_id);
    return Pieces(begin, end);
  };

  std::unordered_map<InodeId, const pb::EntryState*> places;
  for (const auto& entry : cells.entries()) {
    if (entry.id() == 0) {
      tree_.detach(entry.parent(), entry.name());
    } else {
      places.emplace(entry.id(), &entry);
    }
  }
  SentSet written;
  std::unordered_set<const pb::EntryState*> created;
  for (const auto& state : cells.inodes()) {
    const InodeId id = state.attr().id();
    const auto found = places.find(id);
    const pb::EntryState* place = found != places.end() ? found->second : nullptr;
    const bool first = written.insert(id);
    if (apply_inode(state, place, first ? pieces_of(id) : Pieces(), data)) created.insert(place);
  }
  for (const auto& entry : cells.entries()) {
    if (entry.id() != 0 && !created.contains(&entry)) tree_.attach(entry.parent(), entry.name(), entry.id());
  }
  for (const auto& directory : cells.directories()) tree_.list(directory);
  for (const auto& piece : pieces) {
    if (written.insert(piece.extent->id())) {
      const auto opened = tree_.open(piece.extent->id(), S_IFREG);
      inodes_.changing(piece.extent->id());
      write(opened, pieces_of(piece.extent->id()), data);
    }
  }
  tree_.lock_again();
  for (const auto& state : cells.inodes()) {
    if (state.complete() && type_of(state) == S_IFDIR)
      apply_state(tree_.open(state.attr().id(), S_IFDIR), state);
  }
  for (const InodeId id : cells.freed()) tree_.freed(id);
}

std::vector<CellsApply::Piece> CellsApply::pieces_by_inode(const pb::Cells& cells) {
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<std::size_t>(cells.extents_size()));
  std::size_t at = 0;
  for (const auto& extent : cells.extents()) {
    pieces.push_back({&extent, at});
    if (!extent.hole()) at += extent.length();
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.extent->id() < b.extent->id(); });
  return pieces;
}

// Returns whether the inode was created in its place.
bool CellsApply::apply_inode(const pb::InodeState& state, const pb::EntryState* place, Pieces pieces,
                             Bytes data) {
  const InodeId id = state.attr().id();
  const bool held = tree_.known(id);
  if (held && type_of(state) == S_IFDIR) return false;  // its state comes last
  const OpenedInode opened = held ? tree_.open(id, type_of(state)) : tree_.create(state, place);
  if (!pieces.empty()) {
    if (type_of(state) != S_IFREG) throw Malformed("data of what is not a file");
    if (held) inodes_.changing(id);
    write(opened, pieces, data);
  }
  if (state.complete() && type_of(state) != S_IFDIR) apply_state(opened, state);
  return !held && place != nullptr && !tree_.is_parked(id);
}

void CellsApply::write(const OpenedInode& opened, Pieces pieces, Bytes data) {
  for (const auto& [extent, at] : pieces) {
    if (extent->hole()) {
      punch(opened.fd.get(), extent->offset(), extent->length());
    } else {
      write_bytes(opened.fd.get(), data.subspan(at, extent->length()), extent->offset());
    }
  }
}

// Owner before xattrs (chown strips capabilities), both before the mode (chown strips setuid, an ACL sets
// it).
void CellsApply::apply_state(const OpenedInode& opened, const pb::InodeState& state) {
  const pb::Attr& attr = state.attr();
  const int fd = opened.fd.get();
  Backing before = stat_inode(fd);
  if (is_regular(before) && before.stx_size != attr.size()) {
    if (ftruncate(fd, static_cast<off_t>(attr.size())) != 0) throw_errno("cannot set a size");
    before = stat_inode(fd);  // not root's strips setuid
  }
  const bool new_owner = before.stx_uid != attr.uid() || before.stx_gid != attr.gid();
  if (new_owner) set_owner(opened, attr);
  // Its extended attributes are for who may write it, or root.
  const bool unlocked = ::geteuid() != 0 && !S_ISLNK(attr.mode()) && (before.stx_mode & S_IWUSR) == 0;
  if (unlocked) set_mode(opened, (before.stx_mode & kPermissionBits) | S_IWUSR);
  Xattrs xattrs;
  for (const auto& xattr : state.xattrs()) xattrs.emplace(xattr.name(), xattr.value());
  const bool new_xattrs = write_xattrs(fd, opened.path_only, xattrs);
  const std::uint32_t permissions = attr.mode() & kPermissionBits;
  if (!S_ISLNK(attr.mode()) &&
      (new_owner || new_xattrs || unlocked || (before.stx_mode & kPermissionBits) != permissions)) {
    set_mode(opened, permissions);
  }
  set_times(fd, attr);
  const Backing after = stat_inode(fd);
  if (timestamp_ns(after.stx_mtime) != attr.mtime()) throw std::runtime_error(lost_time(attr));
  inodes_.import_ctime(attr.id(), attr.ctime(), after);
  tree_.received(attr.id());
}

// Of a manifest: more would make its answer too large.
constexpr std::uint64_t kMostBlocks = 4'000'000;

pb::Need CellsApply::need(const pb::Manifest& manifest) {
  pb::Need need;
  need.set_attempt(manifest.attempt());
  need.set_number(manifest.number());
  std::uint64_t room = kMostBlocks;
  for (const auto& attr : manifest.inodes()) *need.add_inodes() = need_of(attr, room);
  return need;
}

pb::Need::Inode CellsApply::need_of(const pb::Attr& attr, std::uint64_t& room) {
  pb::Need::Inode need;
  need.set_what(pb::Need::ALL);
  const UniqueFd path =
      tree_.known(attr.id()) ? inodes_.open(attr.id(), O_PATH | O_NOFOLLOW | O_CLOEXEC) : UniqueFd();
  if (!path) return need;
  const Backing here = stat_inode(path.get());
  const bool regular = is_regular(here);
  if (here.stx_mode == attr.mode() && here.stx_uid == attr.uid() && here.stx_gid == attr.gid() &&
      (!regular || here.stx_size == attr.size()) && timestamp_ns(here.stx_mtime) == attr.mtime() &&
      inodes_.presented_ctime(attr.id(), here) == attr.ctime() &&
      !tree_.doubt_of(attr.id()).contains(timestamp_ns(here.stx_ctime)) &&
      (tree_.was_received(attr.id()) || !lost_.contains(attr.ctime()))) {
    need.set_what(pb::Need::HAVE);
    tree_.received(attr.id());  // in doubt it would come with its ctime, which it does not
    return need;
  }
  if (!regular || here.stx_size == 0 || !S_ISREG(attr.mode())) return need;
  const UniqueFd fd = inodes_.open(attr.id(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (!fd) return need;
  // What could not be written may still be there in memory, for a while, whatever its stamp is by now.
  if (doubtful_.to != 0) ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  const std::uint64_t blocks = here.stx_size / kBlockBytes + 1;
  if (blocks > room) return need;
  room -= blocks;
  need.set_what(pb::Need::BLOCKS);
  need.set_size(here.stx_size);
  std::vector<char> block(kBlockBytes);
  for (std::uint64_t at = 0; at < here.stx_size; at += kBlockBytes) {
    if (tree_.interrupted()) throw std::runtime_error("the attempt has ended");
    const std::uint64_t wanted = std::min<std::uint64_t>(kBlockBytes, here.stx_size - at);
    std::uint64_t filled = 0;
    while (filled < wanted) {
      const ssize_t count =
          pread(fd.get(), block.data() + filled, wanted - filled, static_cast<off_t>(at + filled));
      if (count < 0) {  // what comes instead is written over it
        need.clear_blocks();
        need.clear_size();
        need.set_what(pb::Need::ALL);
        return need;
      }
      if (count == 0) break;
      filled += static_cast<std::uint64_t>(count);
    }
    need.add_blocks(XXH3_64bits(block.data(), filled));
  }
  return need;
}

}  // namespace sharefs
