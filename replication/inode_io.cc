#include "replication/inode_io.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace sharefs {

namespace {

constexpr unsigned kBackingMask = STATX_BASIC_STATS | STATX_BTIME;
constexpr std::size_t kListingBuffer = std::size_t{64} << 10;

// Labels that a security module of this machine gives by itself; they mean nothing on another one.
bool machine_bound(std::string_view xattr) { return xattr == "security.selinux"; }

// The xattr calls know no O_PATH descriptors: those are reached through /proc, whose link leads to the inode
// itself, even when that is a symbolic link.
class XattrAccess {
 public:
  XattrAccess(int fd, bool path_only) : fd_(fd) {
    if (path_only) path_ = proc_path(fd);
  }
  ssize_t list(char* names, std::size_t size) const {
    return path_.empty() ? flistxattr(fd_, names, size) : listxattr(path_.c_str(), names, size);
  }
  ssize_t get(const char* name, char* value, std::size_t size) const {
    return path_.empty() ? fgetxattr(fd_, name, value, size) : getxattr(path_.c_str(), name, value, size);
  }
  int set(const char* name, const std::string& value) const {
    return path_.empty() ? fsetxattr(fd_, name, value.data(), value.size(), 0)
                         : setxattr(path_.c_str(), name, value.data(), value.size(), 0);
  }
  int remove(const char* name) const {
    return path_.empty() ? fremovexattr(fd_, name) : removexattr(path_.c_str(), name);
  }

 private:
  int fd_;
  std::string path_;
};

// Grows `buffer` until `call(data, size)` fits; returns what it returned (-1: errno is set).
template <class Call>
ssize_t call_with_room(std::string& buffer, const Call& call) {
  for (;;) {
    const ssize_t size = call(buffer.data(), buffer.size());
    if (size >= 0 || errno != ERANGE || buffer.size() >= (std::size_t{1} << 20)) return size;
    buffer.resize(std::max<std::size_t>(buffer.size() * 4, 4096));
  }
}

// For more than any extended attribute takes.
bool has_room(int fd) {
  constexpr std::uint64_t kRoom = std::uint64_t{1} << 20;
  struct statvfs space {};
  return fstatvfs(fd, &space) == 0 && std::uint64_t{space.f_bavail} * space.f_frsize >= kRoom;
}

bool no_xattrs_here(int error) { return error == ENOTSUP || error == EPERM || error == ENOSYS; }

}  // namespace

void throw_errno(const std::string& what) { throw_errno(errno, what); }
void throw_errno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

Backing stat_inode(int fd) {
  Backing backing{};
  if (statx(fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) throw_errno("cannot read attributes");
  return backing;
}

std::optional<Backing> stat_name(int directory, const std::string& name) {
  Backing backing{};
  if (statx(directory, name.c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &backing) == 0) return backing;
  if (errno == ENOENT) return std::nullopt;
  throw_errno("cannot read attributes of '" + name + "'");
}

bool same_inode(const Backing& a, const Backing& b) {
  return a.stx_ino == b.stx_ino && a.stx_dev_major == b.stx_dev_major && a.stx_dev_minor == b.stx_dev_minor;
}

struct timespec to_timespec(std::int64_t nanoseconds) {
  constexpr std::int64_t kSecond = 1'000'000'000;
  std::int64_t seconds = nanoseconds / kSecond;
  std::int64_t rest = nanoseconds % kSecond;
  if (rest < 0) {  // before 1970: the nanoseconds still count upwards
    rest += kSecond;
    --seconds;
  }
  return {.tv_sec = seconds, .tv_nsec = rest};
}

std::optional<OpenedInode> open_name(int directory, const std::string& name, unsigned type) {
  constexpr int kCommon = O_NOFOLLOW | O_CLOEXEC;
  OpenedInode opened;
  if (type == DT_REG) {
    opened.fd = UniqueFd(openat(directory, name.c_str(), O_RDONLY | O_NONBLOCK | O_NOATIME | kCommon));
    if (!opened.fd && errno == EPERM) {  // O_NOATIME is for the file's owner
      opened.fd = UniqueFd(openat(directory, name.c_str(), O_RDONLY | O_NONBLOCK | kCommon));
    }
    if (!opened.fd && errno == EACCES) throw_errno("cannot read '" + name + "'");
  }
  if (!opened.fd) {
    opened.path_only = true;
    opened.fd = UniqueFd(openat(directory, name.c_str(), O_PATH | kCommon));
  }
  if (!opened.fd) {
    if (errno == ENOENT || errno == ESTALE) return std::nullopt;
    throw_errno("cannot open '" + name + "'");
  }
  opened.backing = stat_inode(opened.fd.get());
  return opened;
}

std::optional<OpenedInode> open_inode(InodeTable& inodes, InodeId id) {
  OpenedInode opened;
  opened.fd = inodes.open(id, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
  if (!opened.fd && (errno == ELOOP || errno == ENXIO)) {
    opened.fd = inodes.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    opened.path_only = true;
  }
  if (opened.fd) {
    opened.backing = stat_inode(opened.fd.get());
    return opened;
  }
  if (errno == ESTALE || errno == ENOENT) return std::nullopt;
  throw_errno("cannot open inode " + std::to_string(id));
}

std::optional<InodeId> identify_opened(InodeTable& inodes, InodeId parent, const std::string& name,
                                       int directory, const OpenedInode& opened) {
  try {
    // By its own descriptor where possible: the name may lead elsewhere by now.
    if (inodes.uses_handles()) return inodes.identify(parent, "", opened.fd.get(), opened.backing);
    return inodes.identify(parent, name, directory, opened.backing);
  } catch (const std::system_error& error) {
    if (error.code().value() == ESTALE || error.code().value() == EXDEV) return std::nullopt;
    throw;
  }
}

void visit_directory(int fd, const std::function<void(std::string_view name, const dirent64&)>& visit) {
  if (lseek(fd, 0, SEEK_SET) < 0) throw_errno("cannot list a directory");
  alignas(struct dirent64) std::array<char, kListingBuffer> buffer;
  for (;;) {
    const ssize_t size = getdents64(fd, buffer.data(), buffer.size());
    if (size < 0 && errno == ENOENT) break;  // removed while open: empty
    if (size < 0) throw_errno("cannot list a directory");
    if (size == 0) break;
    for (ssize_t at = 0; at < size;) {
      const auto* entry = reinterpret_cast<const struct dirent64*>(buffer.data() + at);
      at += entry->d_reclen;
      const std::string_view name(entry->d_name);
      if (name != "." && name != "..") visit(name, *entry);
    }
  }
}

std::vector<ListedName> list_directory(int fd) {
  std::vector<ListedName> names;
  visit_directory(fd, [&](std::string_view name, const dirent64& entry) {
    names.push_back({std::string(name), entry.d_ino, entry.d_type});
  });
  std::sort(names.begin(), names.end(), [](const auto& a, const auto& b) { return a.ino < b.ino; });
  return names;
}

Xattrs read_xattrs(int fd, bool path_only) {
  Xattrs xattrs;
  const XattrAccess access(fd, path_only);
  std::array<char, 1024> first;
  std::string more;
  ssize_t size = access.list(first.data(), first.size());
  if (size < 0 && errno == ERANGE) {
    more.resize(2 * first.size());  // without room the call would only say how much it needs
    size = call_with_room(more, [&](char* data, std::size_t room) { return access.list(data, room); });
  }
  if (size < 0 && no_xattrs_here(errno)) return xattrs;
  if (size < 0) throw_errno("cannot list extended attributes");
  const std::string_view names(more.empty() ? first.data() : more.data(), static_cast<std::size_t>(size));
  for (std::size_t at = 0; at < names.size();) {
    const std::string name(names.data() + at);
    at += name.size() + 1;
    if (machine_bound(name)) continue;
    std::string value(256, '\0');
    const ssize_t length = call_with_room(
        value, [&](char* data, std::size_t room) { return access.get(name.c_str(), data, room); });
    if (length < 0 && errno == ENODATA) continue;  // removed meanwhile
    if (length < 0) throw_errno("cannot read extended attribute " + name);
    value.resize(static_cast<std::size_t>(length));
    xattrs.emplace(name, std::move(value));
  }
  return xattrs;
}

bool write_xattrs(int fd, bool path_only, const Xattrs& wanted) {
  const Xattrs present = read_xattrs(fd, path_only);
  if (present == wanted) return false;
  const XattrAccess access(fd, path_only);
  const auto is_list = [](std::string_view name) { return name.starts_with("system."); };
  std::vector<Xattrs::const_iterator> missing;
  for (auto one = wanted.begin(); one != wanted.end(); ++one) {
    const auto found = present.find(one->first);
    if (found == present.end() || found->second != one->second) missing.push_back(one);
  }
  // Some file systems keep those of an inode in a few KiB, which need not hold old and new ones at once, nor
  // a large one behind small ones.
  for (const auto& [name, value] : present) {
    const auto found = wanted.find(name);
    if (found != wanted.end() && (is_list(name) || found->second == value)) continue;
    if (access.remove(name.c_str()) != 0 && errno != ENODATA)
      throw_errno("cannot remove extended attribute " + name);
  }
  // An access control list may say that the owner may not write, who then sets no others.
  std::sort(missing.begin(), missing.end(), [&](const auto& a, const auto& b) {
    return std::pair(is_list(a->first), b->second.size()) < std::pair(is_list(b->first), a->second.size());
  });
  for (const auto& one : missing) {
    const auto& [name, value] = *one;
    if (access.set(name.c_str(), value) == 0) continue;
    // A disk that has room, and a file system that has not.
    if ((errno == ENOSPC && has_room(fd)) || errno == E2BIG || errno == ERANGE) {
      throw std::runtime_error("this file system cannot hold the extended attribute " + name + " of " +
                               std::to_string(value.size()) + " bytes");
    }
    throw_errno("cannot set extended attribute " + name);
  }
  return true;
}

std::string read_link(int fd) {
  std::array<char, PATH_MAX> target;
  const ssize_t size = readlinkat(fd, "", target.data(), target.size());
  if (size < 0) throw_errno("cannot read a symbolic link");
  return {target.data(), static_cast<std::size_t>(size)};
}

std::string proc_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

Place find_directory(int fd) {
  const Backing backing = stat_inode(fd);
  Place place;
  place.directory = UniqueFd(openat(fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!place.directory) throw_errno("cannot open the parent of a directory");
  // The kernel's idea of the path is right unless the path is longer than it can tell.
  std::array<char, PATH_MAX> path;
  const ssize_t size = readlink(proc_path(fd).c_str(), path.data(), path.size());
  if (size > 0) {
    const std::string_view text(path.data(), static_cast<std::size_t>(size));
    place.name = text.substr(text.rfind('/') + 1);
    if (!place.name.empty() && place.name.size() <= NAME_MAX) {
      const auto found = stat_name(place.directory.get(), place.name);
      if (found && same_inode(*found, backing)) return place;
    }
  }
  for (auto& entry : list_directory(place.directory.get())) {
    const auto found = stat_name(place.directory.get(), entry.name);
    if (found && same_inode(*found, backing)) {
      place.name = std::move(entry.name);
      return place;
    }
  }
  throw_errno(ENOENT, "cannot find a directory in its parent");
}

}  // namespace sharefs
