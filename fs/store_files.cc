// The Store: data of files.
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "fs/store_impl.h"

namespace sharefs {
namespace {

// A copy is done in pieces, so that closing the gate never waits for a large one; callers go on by
// themselves.
constexpr std::uint64_t kCopyPiece = 16 << 20;
constexpr std::uint64_t kMaxOffset = INT64_MAX;
constexpr std::uint32_t kMaxRead = 8 << 20;

// Reads until `size` or the end of the file; blocks on the disk. Returns bytes, or -1 and errno: fewer bytes
// than were asked for are the end of the file to whoever asked, so what precedes an error does not count.
ssize_t read_fully(int fd, char* to, std::size_t size, off_t offset) {
  std::size_t have = 0;
  while (have < size) {
    const ssize_t got = ::pread(fd, to + have, size - have, offset + static_cast<off_t>(have));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  return static_cast<ssize_t>(have);
}

}  // namespace

int Store::Impl::open(const pb::Open& op) {
  const bool writing = (op.flags() & O_ACCMODE) != O_RDONLY;
  const auto ref = writing ? descriptors.writable(op.id()) : descriptors.readable(op.id());
  return ref ? 0 : errno;
}

int Store::Impl::opendir(const pb::OpenDir& op) {
  const auto ref = descriptors.readable(op.id());
  if (!ref) return errno == ELOOP || errno == ENXIO ? ENOTDIR : errno;
  return ref.type == S_IFDIR ? 0 : ENOTDIR;
}

// A descriptor for writing would keep others, who use the store directly, from executing the file.
int Store::Impl::release(const pb::Release& op) {
  if (opens.is_open(op.id())) return 0;
  descriptors.drop_writable(op.id());
  inodes.closed(op.id());
  return 0;
}

int Store::Impl::read(const pb::Read& op, StoreCall& call) {
  const auto ref = descriptors.readable(op.id());
  if (!ref) return errno;
  if (ref.type == S_IFDIR) return EISDIR;
  if (op.offset() > kMaxOffset) return EINVAL;
  const std::size_t size = std::min(op.size(), kMaxRead);
  if (call.buffer.size() < size) call.buffer.resize(size);
  std::size_t have = 0;
  while (have < size) {
    const iovec rest{call.buffer.data() + have, size - have};
    const ssize_t got = ::preadv2(ref.fd, &rest, 1, static_cast<off_t>(op.offset() + have), RWF_NOWAIT);
    if (got == 0) break;
    if (got > 0) {
      have += static_cast<std::size_t>(got);
    } else if (errno == EAGAIN) {
      return read_cold(op, call, ref, have);
    } else if (errno == EOPNOTSUPP) {
      const ssize_t blocking = read_fully(ref.fd, call.buffer.data(), size, static_cast<off_t>(op.offset()));
      if (blocking < 0) return errno;
      have = static_cast<std::size_t>(blocking);
      break;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  call.result = as_bytes(std::string_view(call.buffer).substr(0, have));
  return 0;
}

// The rest must come from the disk.
int Store::Impl::read_cold(const pb::Read& op, StoreCall& call, const DescriptorCache::Ref& ref,
                           std::size_t have) {
  const std::size_t size = std::min(op.size(), kMaxRead);
  std::string first = call.buffer.substr(0, have);
  return later_on(call, {{ref, op.id()}},
                  [size, offset = op.offset(), first = std::move(first)](const auto& fds, Job& job) {
                    const std::size_t had = first.size();
                    job.result = first;
                    job.result.resize(size);
                    const ssize_t got = read_fully(fds[0], job.result.data() + had, size - had,
                                                   static_cast<off_t>(offset + had));
                    if (got < 0) return errno;
                    job.result.resize(had + static_cast<std::size_t>(got));
                    return 0;
                  });
}

// A sync has failed.
int Store::Impl::lost(Job& job) {
  job.outcome.set_write_lost(errno == EIO || errno == ENOSPC || errno == EDQUOT);
  return errno;
}

int Store::Impl::write(const pb::Write& op, StoreCall& call) {
  const auto ref = descriptors.writable(op.id());
  if (!ref) return errno;
  std::uint64_t offset = op.offset();
  Backing before{};
  if (op.append() || op.kill_suidgid()) {
    if (::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &before) != 0) return errno;
    if (op.append()) offset = before.stx_size;
  }
  if (offset > kMaxOffset) return EFBIG;
  note_extent(op.id(), offset, call.data.size());
  if (op.kill_suidgid()) {
    if (const int error = strip_privileges(call.request, ref, before); error != 0) return error;
  }
  ssize_t count;
  do {
    count = ::pwrite(ref.fd, call.data.data(), call.data.size(), static_cast<off_t>(offset));
  } while (count < 0 && errno == EINTR);
  if (count < 0) return errno;
  changed(op.id());
  if (static_cast<std::size_t>(count) < call.data.size() && !call.last_try) {
    // All of it again once there is space. It must not be appended twice.
    if (op.append() && ::ftruncate(ref.fd, static_cast<off_t>(offset)) != 0) return errno;
    return ENOSPC;
  }
  call.outcome.set_count(static_cast<std::uint64_t>(count));
  if (op.append()) {
    if (const int error = fill(call, op.id(), ref.fd); error != 0) return error;
  }
  if (!op.sync()) return 0;
  // Written in the order of arrival; only the waiting is done elsewhere.
  return later_on(call, {{ref, op.id()}}, [outcome = call.outcome](const auto& fds, Job& job) {
    if (::fdatasync(fds[0]) != 0) return lost(job);
    job.outcome = outcome;
    return 0;
  });
}

int Store::Impl::seek(const pb::Seek& op, StoreCall& call) {
  if (op.whence() != SEEK_DATA && op.whence() != SEEK_HOLE) return EINVAL;
  if (op.offset() > kMaxOffset) return ENXIO;
  const auto ref = descriptors.readable(op.id());
  if (!ref) return errno;
  const off_t found = ::lseek(ref.fd, static_cast<off_t>(op.offset()), static_cast<int>(op.whence()));
  if (found < 0) return errno;
  call.outcome.set_count(static_cast<std::uint64_t>(found));
  return 0;
}

int Store::Impl::fallocate(const pb::Fallocate& op, StoreCall& call) {
  if (op.offset() > kMaxOffset || op.length() > kMaxOffset) return EFBIG;
  const auto ref = descriptors.writable(op.id());
  if (!ref) return errno;
  Backing backing{};
  if (::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) return errno;
  std::uint64_t length = op.length();
  if ((op.mode() & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) != 0) {
    const std::uint64_t end = backing.stx_size + op.length();  // everything behind the offset moves
    length = end > op.offset() ? end - op.offset() : 0;
  }
  const auto note = [this, id = op.id(), offset = op.offset(), length] { note_extent(id, offset, length); };
  note();
  // FUSE says of writes and truncations whether they drop privileges, but not of these and of copies.
  if (call.request.uid() != 0)
    if (const int error = strip_privileges(call.request, ref, backing); error != 0) return error;
  const auto work = [mode = static_cast<int>(op.mode()), offset = static_cast<off_t>(op.offset()),
                     size = static_cast<off_t>(op.length())](const auto& fds, Job&) {
    return error_of(::fallocate(fds[0], mode, offset, size));
  };
  return later_on(call, {{ref, op.id(), O_WRONLY}}, work, [this, note, id = op.id()](Job& job) {
    if (job.error == 0) changed(id);
    note();
  });
}

int Store::Impl::copy_file_range(const pb::CopyFileRange& op, StoreCall& call) {
  if (op.offset_in() > kMaxOffset || op.offset_out() > kMaxOffset) return EINVAL;
  const auto to = descriptors.writable(op.id_out());
  if (!to) return errno;
  const auto from = descriptors.readable(op.id_in());
  if (!from) return errno;
  Backing source{}, target{};
  if (::statx(from.fd, "", AT_EMPTY_PATH, kBackingMask, &source) != 0) return errno;
  if (::statx(to.fd, "", AT_EMPTY_PATH, kBackingMask, &target) != 0) return errno;
  const std::uint64_t available = source.stx_size > op.offset_in() ? source.stx_size - op.offset_in() : 0;
  const std::size_t length = std::min({op.length(), available, kCopyPiece});
  const auto note = [this, id = op.id_out(), offset = op.offset_out(), length] {
    note_extent(id, offset, length);
  };
  note();
  if (call.request.uid() != 0 && length > 0)
    if (const int error = strip_privileges(call.request, to, target); error != 0) return error;
  const auto work = [offset_in = static_cast<off_t>(op.offset_in()),
                     offset_out = static_cast<off_t>(op.offset_out()),
                     length](const auto& fds, Job& job) mutable {
    const ssize_t count = ::copy_file_range(fds[0], &offset_in, fds[1], &offset_out, length, 0);
    if (count < 0) return errno;
    job.outcome.set_count(static_cast<std::uint64_t>(count));
    return 0;
  };
  return later_on(call, {{from, op.id_in()}, {to, op.id_out(), O_WRONLY}}, work,
                  [this, note, id = op.id_out()](Job& job) {
                    if (job.error == 0) changed(id);
                    note();
                  });
}

int Store::Impl::sync(const pb::Sync& op, StoreCall& call) {
  auto ref = descriptors.any(op.id());
  if (ref && ref.path_only) ref = descriptors.readable(op.id());
  if (!ref) return errno;
  const bool data_only = op.data_only() && !op.directory();
  return later_on(call, {{ref, op.id()}}, [this, data_only, id = op.id()](const auto& fds, Job& job) {
    if ((data_only ? ::fdatasync(fds[0]) : ::fsync(fds[0])) != 0) return lost(job);
    inodes.sync(id);
    return 0;
  });
}

}  // namespace sharefs
