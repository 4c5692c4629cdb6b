#include "replication/relocate.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "fs/private_area.h"
#include "meta/caller.h"
#include "replication/inode_io.h"

namespace sharefs {

namespace {

constexpr const char* kTree = "tree";
constexpr const char* kMarker = "relocation";
constexpr const char* kNewMarker = "relocation.new";
constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
constexpr mode_t kPrivate = 0700;

UniqueFd open_directory(const std::filesystem::path& path) {
  UniqueFd fd(open(path.c_str(), kDirectoryFlags));
  if (!fd) throw_errno("cannot open '" + path.string() + "'");
  return fd;
}

std::string read_marker(int area) {
  std::array<char, 16> text;
  const ssize_t size = readlinkat(area, kMarker, text.data(), text.size());
  if (size < 0 && errno != ENOENT) throw_errno("cannot read the relocation marker");
  return size < 0 ? std::string() : std::string(text.data(), static_cast<std::size_t>(size));
}

void write_marker(int area, const char* direction) {
  if (unlinkat(area, kNewMarker, 0) != 0 && errno != ENOENT) throw_errno("cannot remove an old marker");
  if (symlinkat(direction, area, kNewMarker) != 0 || renameat(area, kNewMarker, area, kMarker) != 0) {
    throw_errno("cannot write the relocation marker");
  }
}

void copy_attributes(int from, int to) {
  const Backing backing = stat_inode(from);
  if (fchown(to, backing.stx_uid, backing.stx_gid) != 0) throw_errno("cannot set the owner of the root");
  write_xattrs(to, false, read_xattrs(from, false));
  if (fchmod(to, backing.stx_mode & 07777u) != 0) throw_errno("cannot set the mode of the root");
}

void set_times(int fd, const Backing& backing) {
  const std::array<struct timespec, 2> times{to_timespec(timestamp_ns(backing.stx_atime)),
                                             to_timespec(timestamp_ns(backing.stx_mtime))};
  if (futimens(fd, times.data()) != 0) throw_errno("cannot set the times of the root");
}

}  // namespace

struct Relocation::Impl {
  Impl(InodeTable& inode_table, const std::filesystem::path& store, Direction direction);

  bool move(const std::string& name);
  bool rename(const std::string& name, const Backing& backing);
  // Moves within one change of the root's times, which is undone.
  template <class Moves>
  void quietly(const Moves& moves);
  void finish();

  InodeTable& inodes;
  UniqueFd area, from, to;
  std::optional<std::vector<std::string>> behind;  // names, once listed; some may have been pulled meanwhile
  bool done = false;
};

Relocation::Impl::Impl(InodeTable& inode_table, const std::filesystem::path& store, Direction direction)
    : inodes(inode_table) {
  become_self();
  const bool up = direction == Direction::up;
  from = open_directory(store);
  area = open_private_area(from.get());
  if (!area) throw_errno("cannot use the private area of the store");
  if (mkdirat(area.get(), kTree, kPrivate) != 0 && errno != EEXIST)
    throw_errno("cannot create the tree's directory");
  to = UniqueFd(openat(area.get(), kTree, kDirectoryFlags | O_NOFOLLOW));
  if (!to) throw_errno("cannot open the tree's directory");
  if (up) std::swap(from, to);

  const char* const marker = up ? "up" : "down";
  const Backing old_root = stat_inode(from.get());
  const bool begun = read_marker(area.get()) == marker;
  const std::int64_t ctime = inodes.presented_ctime(kRootInode, begun ? stat_inode(to.get()) : old_root);
  if (!begun) {
    copy_attributes(from.get(), to.get());
    set_times(to.get(), old_root);
    write_marker(area.get(), marker);
    // What is put into the store of an old image is not part of the data set: nobody does by mistake, or with
    // a purpose.
    if (!up && fchmod(from.get(), kPrivate) != 0) throw_errno("cannot close the store");
  }
  inodes.set_root(UniqueFd(fcntl(to.get(), F_DUPFD_CLOEXEC, 0)));
  inodes.import_ctime(kRootInode, ctime, stat_inode(to.get()));
}

template <class Moves>
void Relocation::Impl::quietly(const Moves& moves) {
  const Backing before = stat_inode(to.get());
  CtimeKeeper ctime(inodes, kRootInode, before);
  moves();
  set_times(to.get(), before);
  ctime.restore(stat_inode(to.get()));
}

// A directory that may not be written cannot be moved either, but by root: its «..» changes.
bool Relocation::Impl::rename(const std::string& name, const Backing& backing) {
  const auto attempt = [&] {
    return renameat2(from.get(), name.c_str(), to.get(), name.c_str(), RENAME_NOREPLACE) == 0;
  };
  if (attempt()) return true;
  const mode_t mode = backing.stx_mode & 07777u;
  if (errno != EACCES || !S_ISDIR(backing.stx_mode) || (mode & S_IWUSR) != 0 ||
      fchmodat(from.get(), name.c_str(), mode | S_IWUSR, 0) != 0)
    return false;
  const bool moved = attempt();
  const int error = errno;
  fchmodat(moved ? to.get() : from.get(), name.c_str(), mode, 0);
  errno = error;
  return moved;
}

bool Relocation::Impl::move(const std::string& name) {
  if (name == kPrivateArea) return false;
  const auto backing = stat_name(from.get(), name);
  if (!backing) return false;
  std::optional<CtimeKeeper> ctime;
  if (const auto id = inodes.find(*backing)) ctime.emplace(inodes, *id, *backing);
  if (!rename(name, *backing)) {
    if (errno == EEXIST) {
      throw std::runtime_error("'" + name +
                               "' is both in the store and in its .sharefs/tree: move one of them away");
    }
    throw_errno("cannot move '" + name + "' between the store and its .sharefs/tree");
  }
  const auto after = stat_name(to.get(), name);
  if (ctime && after) ctime->restore(*after);
  return true;
}

void Relocation::Impl::finish() {
  if (unlinkat(area.get(), kMarker, 0) != 0 && errno != ENOENT)
    throw_errno("cannot remove the relocation marker");
  done = true;
}

Relocation::Relocation(InodeTable& inodes, const std::filesystem::path& store, Direction direction)
    : impl_(std::make_unique<Impl>(inodes, store, direction)) {}

Relocation::~Relocation() = default;

bool Relocation::under_way(const std::filesystem::path& store) {
  const UniqueFd root(open(store.c_str(), kDirectoryFlags));
  const UniqueFd area = root ? open_private_area(root.get()) : UniqueFd();
  return area && !read_marker(area.get()).empty();
}

bool Relocation::step(unsigned entries) {
  if (impl_->done) return false;
  if (!impl_->behind) {
    impl_->behind.emplace();
    for (auto& entry : list_directory(impl_->from.get())) impl_->behind->push_back(std::move(entry.name));
  }
  impl_->quietly([&] {
    for (; entries > 0 && !impl_->behind->empty(); --entries) {
      impl_->move(impl_->behind->back());
      impl_->behind->pop_back();
    }
  });
  if (impl_->behind->empty()) impl_->finish();
  return !impl_->done;
}

bool Relocation::pull(const std::string& name) {
  if (impl_->done || name.empty() || name == "." || name == ".." || name.size() > NAME_MAX ||
      name.find('/') != std::string::npos || name.find('\0') != std::string::npos ||
      !stat_name(impl_->from.get(), name)) {
    return false;
  }
  bool moved = false;
  impl_->quietly([&] { moved = impl_->move(name); });
  return moved;
}

void Relocation::all() {
  while (step(UINT_MAX)) {
  }
}

bool Relocation::done() const { return impl_->done; }

std::uint32_t Relocation::links_behind() const {
  constexpr std::uint32_t kOwn = 2;  // of an empty directory
  const std::uint32_t links = impl_->done ? kOwn : stat_inode(impl_->from.get()).stx_nlink;
  return links > kOwn ? links - kOwn : 0;
}

void Relocation::before(const pb::Request& request) {
  if (impl_->done) return;
  const auto named = [this](const auto& op) {
    if (op.parent() == kRootInode) pull(op.name());
  };
  switch (request.op_case()) {
    case pb::Request::kLookup:
      return named(request.lookup());
    case pb::Request::kCreate:
      return named(request.create());
    case pb::Request::kMkdir:
      return named(request.mkdir());
    case pb::Request::kSymlink:
      return named(request.symlink());
    case pb::Request::kLink:
      return named(request.link());
    case pb::Request::kUnlink:
      return named(request.unlink());
    case pb::Request::kRmdir:
      return named(request.rmdir());
    case pb::Request::kRename:
      named(request.rename());
      if (request.rename().new_parent() == kRootInode) pull(request.rename().new_name());
      return;
    case pb::Request::kReaddir:
      if (request.readdir().id() == kRootInode) all();
      return;
    default:
      return;
  }
}

}  // namespace sharefs
