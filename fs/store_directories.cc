// The Store: looking up and making names.
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "fs/store_impl.h"
#include "meta/caller.h"

namespace sharefs {
namespace {

// Whether the caller may open the file, by its mode. All groups of the caller are not known here, nor whom an
// ACL names: when in doubt, no.
bool may_open(const pb::Request& request, const Backing& backing, std::uint32_t flags, int fd) {
  if (request.uid() == 0) return true;
  const std::uint32_t access = flags & O_ACCMODE;
  std::uint32_t wanted = access == O_RDONLY ? 4 : access == O_WRONLY ? 2 : 6;
  if ((flags & O_TRUNC) != 0) wanted |= 2;
  const std::uint32_t mode = backing.stx_mode;
  if (request.uid() == backing.stx_uid) return (mode >> 6 & wanted) == wanted;
  if ((mode >> 3 & mode & wanted) != wanted) return false;
  return ::fgetxattr(fd, "system.posix_acl_access", nullptr, 0) < 0 &&
         (errno == ENODATA || errno == EOPNOTSUPP);
}

// What a directory says of the one above: 0 if it cannot be read. It is among its first entries.
ino_t inode_above(int directory_fd) {
  const UniqueFd fd(::openat(directory_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  alignas(dirent64) char buffer[2048];
  const ssize_t size = fd ? ::getdents64(fd.get(), buffer, sizeof buffer) : 0;
  for (ssize_t at = 0; at < size;) {
    const auto* entry = reinterpret_cast<const dirent64*>(buffer + at);
    if (std::strcmp(entry->d_name, "..") == 0) return entry->d_ino;
    at += entry->d_reclen;
  }
  return 0;
}

}  // namespace

// The directory above an open one, which must not be the root. Whoever found that one by a name was told of
// this one before, so what has no id lies elsewhere: somebody has moved the directory out of the store.
int Store::Impl::parent_of(int directory_fd, InodeId& id, Backing& backing) {
  const UniqueFd parent = open_above(directory_fd, O_PATH);
  const bool covered = !parent && errno == EXDEV;
  const int above = covered ? inodes.root() : parent.get();
  if (above < 0 || ::statx(above, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) return errno;
  if (covered && backing.stx_ino != inode_above(directory_fd)) return ESTALE;
  id = inodes.find(backing).value_or(0);
  return id != 0 ? 0 : ESTALE;
}

int Store::Impl::lookup(const pb::Lookup& op, StoreCall& call) {
  const std::string& name = op.name();
  if (name == "." || name == "..") {
    // Asked by kernels that export the mount over NFS.
    const auto ref = descriptors.readable(op.parent());
    if (!ref) return errno;
    if (ref.type != S_IFDIR) return ENOTDIR;
    if (name == "." || op.parent() == kRootInode) return fill(call, op.parent(), ref.fd);
    if (inodes.is_orphan(op.parent())) return ENOENT;
    InodeId id = 0;
    Backing backing{};
    if (const int error = parent_of(ref.fd, id, backing); error != 0) return error;
    fill(*call.outcome.mutable_attr(), id, backing);
    return 0;
  }
  if (const int error = check_name(op.parent(), name, false); error != 0) return error;
  const auto ref = descriptors.any(op.parent());
  if (!ref) return errno;
  Backing backing{};
  if (::statx(ref.fd, name.c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &backing) != 0) return errno;
  if (foreign(backing)) return EXDEV;  // something else is mounted there: not part of the data set
  fill_named(*call.outcome.mutable_attr(), inodes.identify(op.parent(), name, ref.fd, backing), backing);
  return 0;
}

int Store::Impl::readlink(const pb::ReadLink& op, StoreCall& call) {
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  if (ref.type != S_IFLNK) return EINVAL;
  if (call.buffer.size() < PATH_MAX) call.buffer.resize(PATH_MAX);
  const ssize_t size = ::readlinkat(ref.fd, "", call.buffer.data(), call.buffer.size());
  if (size < 0) return errno;
  call.result = as_bytes(std::string_view(call.buffer).substr(0, static_cast<std::size_t>(size)));
  return 0;
}

// The end of every operation that made a name for a new inode (`fd`: open as that inode, or -1).
int Store::Impl::made(StoreCall& call, InodeId parent, const std::string& name, int directory_fd, int fd) {
  Backing backing{};
  const int result = fd >= 0
                         ? ::statx(fd, "", AT_EMPTY_PATH, kBackingMask, &backing)
                         : ::statx(directory_fd, name.c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &backing);
  if (result != 0) return errno;
  const InodeId id = inodes.issue(parent, name, directory_fd, fd, backing);
  changed(parent);
  fill(*call.outcome.mutable_attr(), id, backing);
  return 0;
}

int Store::Impl::create(const pb::Create& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), true); error != 0) return error;
  int error = 0;
  const auto ref = directory(op.parent(), error);
  if (error != 0) return error;
  note_entry(op.parent(), op.name());
  become_caller(call.request.uid(), call.request.gid(), op.umask());
  const std::uint32_t type = op.mode() & static_cast<std::uint32_t>(S_IFMT);
  if (op.has_handle() && (type == S_IFREG || type == 0)) return create_open(op, call, ref.fd);
  if (::mknodat(ref.fd, op.name().c_str(), op.mode(), op.rdev()) != 0) return errno;
  return made(call, op.parent(), op.name(), ref.fd, -1);
}

int Store::Impl::create_open(const pb::Create& op, StoreCall& call, int directory_fd) {
  constexpr int kFlags = O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  const char* name = op.name().c_str();
  UniqueFd fd(::openat(directory_fd, name, kFlags, op.mode() & 07777));
  if (!fd && errno == EEXIST && (op.flags() & O_EXCL) == 0) return open_existing(op, call, directory_fd);
  if (!fd) return errno;
  if (const int error = made(call, op.parent(), op.name(), directory_fd, fd.get()); error != 0) return error;
  descriptors.adopt(call.outcome.attr().id(), S_IFREG, std::move(fd));
  return 0;
}

// Another site made the file after this caller's kernel had found no such name. That kernel will not check
// what the caller may do with it; where that is not plain, ESTALE makes it look again and open the file the
// ordinary way.
int Store::Impl::open_existing(const pb::Create& op, StoreCall& call, int directory_fd) {
  Backing backing{};
  if (::statx(directory_fd, op.name().c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &backing) != 0)
    return errno == ENOENT ? ESTALE : errno;
  if (foreign(backing) || !S_ISREG(backing.stx_mode)) return ESTALE;
  const InodeId id = inodes.identify(op.parent(), op.name(), directory_fd, backing);
  const auto ref = (op.flags() & O_ACCMODE) != O_RDONLY ? descriptors.writable(id) : descriptors.readable(id);
  if (!ref) return errno;
  if (!may_open(call.request, backing, op.flags(), ref.fd)) return ESTALE;
  if ((op.flags() & O_TRUNC) != 0) {
    if (data_changes.contains(id)) return ESTALE;  // an ordinary truncation takes its turn
    note_attributes(id);
    if (call.request.uid() != 0)
      if (const int error = strip_privileges(call.request, ref, backing); error != 0) return error;
    pb::SetAttr truncate;
    truncate.set_id(id);
    truncate.set_size(0);
    if (const int error = change_size(truncate); error != 0) return error;
    changed(id);
  }
  return fill(call, id, ref.fd);
}

int Store::Impl::mkdir(const pb::MkDir& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), true); error != 0) return error;
  int error = 0;
  const auto ref = directory(op.parent(), error);
  if (error != 0) return error;
  note_entry(op.parent(), op.name());
  become_caller(call.request.uid(), call.request.gid(), op.umask());
  if (::mkdirat(ref.fd, op.name().c_str(), op.mode() & 07777) != 0) return errno;
  return made(call, op.parent(), op.name(), ref.fd, -1);
}

int Store::Impl::symlink(const pb::SymLink& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), true); error != 0) return error;
  if (op.target().find('\0') != std::string::npos) return EINVAL;
  int error = 0;
  const auto ref = directory(op.parent(), error);
  if (error != 0) return error;
  note_entry(op.parent(), op.name());
  become_caller(call.request.uid(), call.request.gid(), 0);
  if (::symlinkat(op.target().c_str(), ref.fd, op.name().c_str()) != 0) return errno;
  return made(call, op.parent(), op.name(), ref.fd, -1);
}

int Store::Impl::link(const pb::Link& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), true); error != 0) return error;
  int error = 0;
  const auto directory_ref = directory(op.parent(), error);
  if (error != 0) return error;
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  if (ref.type == S_IFDIR) return EPERM;
  if (inodes.is_orphan(op.id())) return ENOENT;
  note_entry(op.parent(), op.name());
  note_attributes(op.id());
  const int result =
      inodes.uses_handles()
          ? ::linkat(ref.fd, "", directory_ref.fd, op.name().c_str(), AT_EMPTY_PATH)
          : ::linkat(AT_FDCWD, ProcPath(ref.fd).path, directory_ref.fd, op.name().c_str(), AT_SYMLINK_FOLLOW);
  if (result != 0) return errno;
  inodes.linked(op.id(), op.parent(), op.name());
  changed(op.parent());
  changed(op.id());
  return fill(call, op.id(), ref.fd);
}

}  // namespace sharefs
