#include "replication/relocate.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>
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

// «up» or «down», and in octal the mode that the root gets in the end, if that lets nothing be moved.
struct Marker {
  std::string direction;
  std::optional<mode_t> mode;
};

Marker read_marker(int area) {
  std::array<char, 16> buffer;
  const ssize_t size = readlinkat(area, kMarker, buffer.data(), buffer.size());
  if (size < 0 && errno != ENOENT) throw_errno("cannot read the relocation marker");
  if (size < 0) return {};
  const std::string text(buffer.data(), static_cast<std::size_t>(size));
  const auto space = text.find(' ');
  if (space == std::string::npos) return {.direction = text, .mode = {}};
  return {.direction = text.substr(0, space),
          .mode = static_cast<mode_t>(std::strtoul(text.c_str() + space, nullptr, 8)) & 07777u};
}

void write_marker(int area, const Marker& marker) {
  std::array<char, 16> text;
  std::snprintf(text.data(), text.size(), marker.mode ? "%s %o" : "%s", marker.direction.c_str(),
                marker.mode.value_or(0));
  if (unlinkat(area, kNewMarker, 0) != 0 && errno != ENOENT) throw_errno("cannot remove an old marker");
  if (symlinkat(text.data(), area, kNewMarker) != 0 || renameat(area, kNewMarker, area, kMarker) != 0) {
    throw_errno("cannot write the relocation marker");
  }
}

mode_t permissions(const Backing& backing) { return backing.stx_mode & 07777u; }

void set_mode(int fd, mode_t mode) {
  if (fchmod(fd, mode) != 0) throw_errno("cannot set the mode of the root");
}

// What a directory must allow ordinary users who move names into or out of it.
mode_t open_to_moves(mode_t mode) { return ::geteuid() == 0 ? mode : mode | S_IRWXU; }

void copy_attributes(int from, const Backing& backing, int to) {
  if (fchown(to, backing.stx_uid, backing.stx_gid) != 0) throw_errno("cannot set the owner of the root");
  write_xattrs(to, false, read_xattrs(from, false));
}

void set_times(int fd, const Backing& backing) {
  const std::array<struct timespec, 2> times{to_timespec(timestamp_ns(backing.stx_atime)),
                                             to_timespec(timestamp_ns(backing.stx_mtime))};
  if (futimens(fd, times.data()) != 0) throw_errno("cannot set the times of the root");
}

}  // namespace

struct Relocation::Impl {
  Impl(InodeTable& inode_table, const std::filesystem::path& store, Direction direction,
       std::function<void()> when_moved, std::function<Power::Interval()> doubtful_ctimes);

  void look_for_doubts();
  bool move(const std::string& name);
  void move_some(unsigned entries);
  // Moves within one change of the root's times, which is undone.
  template <class Moves>
  void quietly(const Moves& moves);
  void finish();

  InodeTable& inodes;
  const std::function<void()> moved;
  const std::function<Power::Interval()> doubtful;
  Power::Interval doubted;  // what that said last
  UniqueFd area, from, to;
  std::optional<mode_t> mode;                      // of the root in the end, if it is another one meanwhile
  std::optional<std::vector<std::string>> behind;  // names, once listed; some may have been pulled meanwhile
  bool done = false;
};

Relocation::Impl::Impl(InodeTable& inode_table, const std::filesystem::path& store, Direction direction,
                       std::function<void()> when_moved, std::function<Power::Interval()> doubtful_ctimes)
    : inodes(inode_table), moved(std::move(when_moved)), doubtful(std::move(doubtful_ctimes)) {
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

  const char* const direction_name = up ? "up" : "down";
  const Backing old_root = stat_inode(from.get());
  const Marker marker = read_marker(area.get());
  const bool begun = marker.direction == direction_name;
  const std::int64_t ctime = inodes.presented_ctime(kRootInode, begun ? stat_inode(to.get()) : old_root);
  mode = marker.mode;
  if (!begun) {
    const mode_t wanted = mode.value_or(permissions(old_root));
    if (open_to_moves(wanted) != wanted) mode = wanted;
    const mode_t before = permissions(stat_inode(to.get()));
    if (open_to_moves(before) != before) set_mode(to.get(), open_to_moves(before));
    copy_attributes(from.get(), old_root, to.get());
    set_mode(to.get(), open_to_moves(wanted));
    set_times(to.get(), old_root);
    write_marker(area.get(), {.direction = direction_name, .mode = mode});
  }
  // What is put into the store of an old image is not part of the data set: nobody does by mistake, or with a
  // purpose.
  const mode_t left = up ? open_to_moves(permissions(old_root)) : kPrivate;
  if (left != permissions(old_root)) set_mode(from.get(), left);
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

// A sync may have failed since the last time.
void Relocation::Impl::look_for_doubts() {
  if (doubtful) doubted = doubtful();
}

bool Relocation::Impl::move(const std::string& name) {
  if (name == kPrivateArea) return false;
  const auto backing = stat_name(from.get(), name);
  if (!backing) return false;
  std::optional<CtimeKeeper> ctime;
  const auto id = inodes.find(*backing);
  if (id) ctime.emplace(inodes, *id, *backing, doubted);
  if (!move_name(from.get(), name, to.get(), name)) {
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

// What cannot be moved keeps nothing else from its place: it is tried last, and again. Throws what the first
// said.
void Relocation::Impl::move_some(unsigned entries) {
  look_for_doubts();
  std::vector<std::string> stuck;
  std::exception_ptr trouble;
  quietly([&] {
    for (; entries > 0 && !behind->empty(); --entries) {
      try {
        move(behind->back());
      } catch (const std::exception&) {
        if (!trouble) trouble = std::current_exception();
        stuck.push_back(behind->back());
      }
      behind->pop_back();
    }
  });
  behind->insert(behind->begin(), stuck.begin(), stuck.end());
  if (trouble) std::rethrow_exception(trouble);
}

void Relocation::Impl::finish() {
  if (mode && permissions(stat_inode(to.get())) == open_to_moves(*mode))
    quietly([this] { set_mode(to.get(), *mode); });
  if (moved) moved();
  if (unlinkat(area.get(), kMarker, 0) != 0 && errno != ENOENT)
    throw_errno("cannot remove the relocation marker");
  done = true;
}

Relocation::Relocation(InodeTable& inodes, const std::filesystem::path& store, Direction direction,
                       std::function<void()> moved, std::function<Power::Interval()> doubtful)
    : impl_(std::make_unique<Impl>(inodes, store, direction, std::move(moved), std::move(doubtful))) {}

Relocation::~Relocation() = default;

bool Relocation::under_way(const std::filesystem::path& store) {
  const UniqueFd root(open(store.c_str(), kDirectoryFlags));
  const UniqueFd area = root ? open_private_area(root.get()) : UniqueFd();
  return area && !read_marker(area.get()).direction.empty();
}

bool Relocation::step(unsigned entries) {
  if (impl_->done) return false;
  if (!impl_->behind) {
    impl_->behind.emplace();
    for (auto& entry : list_directory(impl_->from.get())) impl_->behind->push_back(std::move(entry.name));
  }
  impl_->move_some(entries);
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
  impl_->look_for_doubts();
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
  visit_root(
      request, [this](const std::string& name) { pull(name); }, [this] { all(); });
}

void Relocation::visit_root(const pb::Request& request, const std::function<void(const std::string&)>& named,
                            const std::function<void()>& all) {
  const auto in_root = [&named](const auto& op) {
    if (op.parent() == kRootInode) named(op.name());
  };
  switch (request.op_case()) {
    case pb::Request::kLookup:
      if (request.lookup().name() == "..") return all();  // of a directory that may be behind
      return in_root(request.lookup());
    case pb::Request::kCreate:
      return in_root(request.create());
    case pb::Request::kMkdir:
      return in_root(request.mkdir());
    case pb::Request::kSymlink:
      return in_root(request.symlink());
    case pb::Request::kLink:
      return in_root(request.link());
    case pb::Request::kUnlink:
      return in_root(request.unlink());
    case pb::Request::kRmdir:
      return in_root(request.rmdir());
    case pb::Request::kRename:
      in_root(request.rename());
      if (request.rename().new_parent() == kRootInode) named(request.rename().new_name());
      return;
    case pb::Request::kReaddir:
      if (request.readdir().id() == kRootInode) all();
      return;
    default:
      return;
  }
}

}  // namespace sharefs
