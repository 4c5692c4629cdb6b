// The Store: attributes, extended attributes, the file system as a whole.
#include <fcntl.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "fs/store_impl.h"

namespace sharefs {
namespace {

constexpr std::size_t kMaxXattr = 64 << 10;  // XATTR_SIZE_MAX, XATTR_LIST_MAX
constexpr long kFchmodat2 = 452;             // since Linux 6.6; unknown to older headers

timespec time_to_set(bool set, std::int64_t nanoseconds, bool now) {
  if (now) return {0, UTIME_NOW};
  if (!set) return {0, UTIME_OMIT};
  constexpr std::int64_t kSecond = 1'000'000'000;
  const std::int64_t rest = ((nanoseconds % kSecond) + kSecond) % kSecond;
  return {(nanoseconds - rest) / kSecond, rest};
}

// Calls on extended attributes exist for paths and for real descriptors.
template <class OnDescriptor, class OnPath>
auto on_xattrs(const DescriptorCache::Ref& ref, OnDescriptor on_descriptor, OnPath on_path) {
  return ref.path_only ? on_path(static_cast<const char*>(ProcPath(ref.fd).path)) : on_descriptor(ref.fd);
}

}  // namespace

int Store::Impl::getattr(const pb::GetAttr& op, StoreCall& call) {
  const auto ref = descriptors.any(op.id());
  return ref ? fill(call, op.id(), ref.fd) : errno;
}

int Store::Impl::change_owner(const pb::SetAttr& op, const DescriptorCache::Ref& ref) {
  const uid_t uid = op.has_uid() ? op.uid() : static_cast<uid_t>(-1);
  const gid_t gid = op.has_gid() ? op.gid() : static_cast<gid_t>(-1);
  return error_of(::fchownat(ref.fd, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW));
}

int Store::Impl::change_mode(const DescriptorCache::Ref& ref, std::uint32_t mode) {
  mode &= 07777;
  if (ref.type == S_IFLNK) return EOPNOTSUPP;
  if (!ref.path_only) return error_of(::fchmod(ref.fd, mode));
  static std::atomic<bool> direct{true};
  if (direct.load(std::memory_order_relaxed)) {
    if (::syscall(kFchmodat2, ref.fd, "", mode, AT_EMPTY_PATH) == 0) return 0;
    if (errno != ENOSYS && errno != EINVAL) return errno;
    direct = false;
  }
  return error_of(::chmod(ProcPath(ref.fd).path, mode));
}

int Store::Impl::change_size(const pb::SetAttr& op) {
  if (op.size() > static_cast<std::uint64_t>(INT64_MAX)) return EFBIG;
  const auto file = descriptors.writable(op.id());
  if (!file) return errno;
  if (observer != nullptr) {
    Backing backing{};
    if (::statx(file.fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) return errno;
    const std::uint64_t size = backing.stx_size;
    note_extent(op.id(), std::min(size, op.size()), std::max(size, op.size()) - std::min(size, op.size()));
  }
  return error_of(::ftruncate(file.fd, static_cast<off_t>(op.size())));
}

int Store::Impl::change_times(const pb::SetAttr& op, const DescriptorCache::Ref& ref) {
  const timespec times[] = {time_to_set(op.has_atime(), op.atime(), op.atime_now()),
                            time_to_set(op.has_mtime(), op.mtime(), op.mtime_now())};
  if (!ref.path_only) return error_of(::futimens(ref.fd, times));
  return error_of(::utimensat(ref.fd, "", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW));
}

// What the kernel does when others than root write to a file; the store itself may always keep those bits.
// Set-group-id without execution by the group stays only for members of the group, and a request does not say
// which other groups the caller is in.
int Store::Impl::strip_privileges(const pb::Request& request, const DescriptorCache::Ref& ref,
                                  const Backing& backing) {
  std::uint32_t mode = backing.stx_mode;
  if (ref.type != S_IFREG || (mode & (S_ISUID | S_ISGID)) == 0) return 0;
  mode &= ~static_cast<std::uint32_t>(S_ISUID);
  const bool member = request.uid() == 0 || request.gid() == backing.stx_gid;
  if ((mode & S_IXGRP) != 0 || !member) mode &= ~static_cast<std::uint32_t>(S_ISGID);
  return mode == backing.stx_mode ? 0 : change_mode(ref, mode);
}

int Store::Impl::setattr(const pb::SetAttr& op, StoreCall& call) {
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  if (op.has_mode() && ref.type == S_IFLNK) return EOPNOTSUPP;
  note_attributes(op.id());
  int error = 0;
  if (op.kill_suidgid() && !op.has_mode()) {
    Backing backing{};
    error = error_of(::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &backing));
    if (error == 0) error = strip_privileges(call.request, ref, backing);  // the group that it has before
  }
  if (error == 0 && (op.has_uid() || op.has_gid())) error = change_owner(op, ref);
  if (error == 0 && op.has_mode()) error = change_mode(ref, op.mode());
  if (error == 0 && op.has_size()) error = change_size(op);
  if (error == 0 && (op.has_atime() || op.has_mtime() || op.atime_now() || op.mtime_now()))
    error = change_times(op, ref);
  changed(op.id());  // also if only some of it was done
  return error != 0 ? error : fill(call, op.id(), ref.fd);
}

int Store::Impl::statfs(StoreCall& call) {
  delete_doomed();
  struct statfs status {};
  if (::fstatfs(inodes.root(), &status) != 0) return errno;
  pb::FsStat& result = *call.outcome.mutable_statfs();
  result.set_block_size(static_cast<std::uint64_t>(status.f_bsize));
  result.set_fragment_size(static_cast<std::uint64_t>(status.f_frsize));
  result.set_blocks(status.f_blocks);
  result.set_blocks_free(status.f_bfree);
  result.set_blocks_available(status.f_bavail);
  result.set_files(status.f_files);
  result.set_files_free(status.f_ffree);
  result.set_name_max(static_cast<std::uint64_t>(status.f_namelen));
  return 0;
}

int Store::Impl::getxattr(const pb::GetXattr& op, StoreCall& call) {
  if (op.name().find('\0') != std::string::npos) return EINVAL;
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  if (call.buffer.size() < kMaxXattr) call.buffer.resize(kMaxXattr);
  const char* name = op.name().c_str();
  const ssize_t size = on_xattrs(
      ref, [&](int fd) { return ::fgetxattr(fd, name, call.buffer.data(), call.buffer.size()); },
      [&](const char* path) { return ::getxattr(path, name, call.buffer.data(), call.buffer.size()); });
  if (size < 0) return errno;
  call.result = as_bytes(std::string_view(call.buffer).substr(0, static_cast<std::size_t>(size)));
  return 0;
}

int Store::Impl::listxattr(const pb::ListXattr& op, StoreCall& call) {
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  if (call.buffer.size() < kMaxXattr) call.buffer.resize(kMaxXattr);
  const ssize_t size = on_xattrs(
      ref, [&](int fd) { return ::flistxattr(fd, call.buffer.data(), call.buffer.size()); },
      [&](const char* path) { return ::listxattr(path, call.buffer.data(), call.buffer.size()); });
  if (size < 0) return errno;
  std::string_view names(call.buffer.data(), static_cast<std::size_t>(size));
  if (call.request.uid() != 0) {
    // trusted.* is for root alone, and this process may be root where the caller is not.
    std::string visible;
    for (std::size_t end; !names.empty(); names.remove_prefix(end + 1)) {
      end = names.find('\0');
      if (!names.starts_with("trusted.")) visible.append(names.substr(0, end + 1));
    }
    call.buffer.replace(0, visible.size(), visible);
    names = std::string_view(call.buffer.data(), visible.size());
  }
  call.result = as_bytes(names);
  return 0;
}

int Store::Impl::setxattr(const pb::SetXattr& op, StoreCall& call) {
  if (op.name().find('\0') != std::string::npos) return EINVAL;
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  note_attributes(op.id());
  const char* name = op.name().c_str();
  const int flags = static_cast<int>(op.flags());
  int error = error_of(on_xattrs(
      ref, [&](int fd) { return ::fsetxattr(fd, name, call.data.data(), call.data.size(), flags); },
      [&](const char* path) { return ::setxattr(path, name, call.data.data(), call.data.size(), flags); }));
  if (error == 0 && op.kill_sgid()) {
    Backing backing{};
    error = error_of(::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &backing));
    if (error == 0 && (backing.stx_mode & S_ISGID) != 0)
      error = change_mode(ref, backing.stx_mode & ~static_cast<std::uint32_t>(S_ISGID));
  }
  changed(op.id());
  return error;
}

int Store::Impl::removexattr(const pb::RemoveXattr& op) {
  if (op.name().find('\0') != std::string::npos) return EINVAL;
  const auto ref = descriptors.any(op.id());
  if (!ref) return errno;
  note_attributes(op.id());
  const char* name = op.name().c_str();
  const int error = error_of(on_xattrs(
      ref, [&](int fd) { return ::fremovexattr(fd, name); },
      [&](const char* path) { return ::removexattr(path, name); }));
  if (error == 0) changed(op.id());
  return error;
}

}  // namespace sharefs
