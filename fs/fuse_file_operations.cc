// The operations on open files: data, durability, locks. See fuse_operations.cc.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>

#include "fs/fuse_server.h"

namespace sharefs {
namespace {

using Op = pb::Request;

constexpr std::uint64_t kEndOfFile = std::numeric_limits<std::int64_t>::max();
constexpr auto kClosePatience = std::chrono::seconds(1);
constexpr auto kWritePatience = std::chrono::seconds(5);
// Of one CopyFileRange: the caller sees how far it came and goes on, so no request takes for ever.
constexpr std::uint64_t kMostCopied = 1ULL << 30;

void on_open(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kOpen, id);
  pending.handle = server.new_handle(file->flags);
  pending.flags = file->flags;
  pb::Open& open = *request.mutable_open();
  open.set_id(id);
  open.set_handle(pending.handle);
  open.set_flags(static_cast<std::uint32_t>(file->flags));
  if (!server.opens_at_once(id, S_IFREG))
    return server.submit(request, {}, pending, &FuseServer::answer_open);
  // The request goes ahead of whatever is asked of the open file.
  const fuse_file_info opened = server.opened_file(pending, id);
  const std::uint64_t handle = pending.handle;
  pending.caller = nullptr;
  pending.opened_early = true;
  request.set_lazy(true);
  server.submit(request, {}, pending, &FuseServer::answer_nobody);
  if (fuse_reply_open(caller, &opened) != 0) server.ask_release(id, handle);
}

void on_read(fuse_req_t caller, fuse_ino_t id, std::size_t size, off_t offset, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  server.used(file->fh);
  auto [pending, request] = server.begin(caller, Op::kRead, id);
  pb::Read& read = *request.mutable_read();
  read.set_id(id);
  read.set_handle(file->fh);
  read.set_offset(static_cast<std::uint64_t>(offset));
  read.set_size(static_cast<std::uint32_t>(size));
  pending.offset = static_cast<std::uint64_t>(offset);
  pending.size = size;
  // A read that fills a page, of a mapping of such a handle, has no owner: kernels name one for reads past
  // their pages.
  const bool fills_pages = !FuseServer::is_direct(file->fh) || file->lock_owner == 0;
  if (!fills_pages) return server.submit_direct(request, {}, pending, &FuseServer::answer_data);
  pending.locks_pages = true;
  server.submit_read(request, pending);
}

void on_write(fuse_req_t caller, fuse_ino_t id, const char* data, std::size_t size, off_t offset,
              fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kWrite, id);
  const bool writeback = file->writepage != 0;
  if (!writeback) server.used(file->fh);  // that may come by any handle, also before its open returns
  pb::Write& write = *request.mutable_write();
  write.set_id(id);
  write.set_handle(file->fh);
  write.set_offset(static_cast<std::uint64_t>(offset));
  write.set_size(static_cast<std::uint32_t>(size));
  write.set_append((file->flags & O_APPEND) != 0 && !writeback);
  write.set_writeback(writeback);
  write.set_kill_suidgid(server.extras().kill_suidgid);
  write.set_sync((file->flags & O_DSYNC) != 0);  // O_SYNC includes its bit
  const bool direct = !writeback && FuseServer::is_direct(file->fh);
  pending.offset = static_cast<std::uint64_t>(offset);
  pending.size = direct && write.append() ? 0 : size;  // 0: to the end, wherever the owner finds it
  pending.locks_pages = !direct;
  pending.writes_back = writeback;
  pending.leaves_attributes = writeback;
  const Bytes bytes = std::as_bytes(std::span(data, size));
  if (direct) return server.submit_direct(request, bytes, pending, &FuseServer::answer_direct_write);
  server.submit(request, bytes, pending,
                write.append() ? &FuseServer::answer_misplaced_write : &FuseServer::answer_count);
}

// Nothing to do but to release POSIX locks, if this mount took any: close(2) is not to wait for another site.
// Where it has to, it does not for long: a process that ends closes its files, and not even SIGKILL ends that
// wait. What this mount asks later comes to the owner after the release all the same.
void on_flush(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  server.used(file->fh);
  const bool locks = server.take_posix_locks(id, file->lock_owner);
  if (!locks && !server.must_flush(id, file->fh)) {
    fuse_reply_err(caller, 0);
    return;
  }
  auto [pending, request] = server.begin(caller, Op::kFlush, id);
  pending.gives_up = true;
  pb::Flush& flush = *request.mutable_flush();
  flush.set_id(id);
  flush.set_handle(file->fh);
  if (locks) flush.set_lock_owner(file->lock_owner);
  server.submit(request, {}, pending, &FuseServer::answer_error);
  // Who has written ahead of an owner that is away is told what was lost, if that is soon.
  server.answer_within(pending, locks ? kClosePatience : kWritePatience);
}

// Answered at once: whoever closed the file does not wait, and the kernel only counts the request.
void on_release(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  server.used(file->fh);
  auto [pending, request] = server.begin(caller, Op::kRelease, id);
  pb::Release& release = *request.mutable_release();
  release.set_id(id);
  release.set_handle(file->fh);
  release.set_lock_owner(file->lock_owner);
  release.set_unlock_flock(file->flock_release != 0);
  if (const std::uint64_t owner = server.take_description_locks(id, file->fh)) {
    if (release.unlock_flock())  // of another owner, the description
      server.ask_flush(id, file->fh, owner);
    else
      release.set_lock_owner(owner);
  }
  request.set_lazy(!release.unlock_flock() && release.lock_owner() == 0);
  server.closed(id);
  pending.caller = nullptr;
  server.submit(request, {}, pending, &FuseServer::answer_nobody);
  fuse_reply_err(caller, 0);
}

void synchronize(fuse_req_t caller, fuse_ino_t id, int data_only, const fuse_file_info& file,
                 bool directory) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSync, id);
  pb::Sync& sync = *request.mutable_sync();
  sync.set_id(id);
  sync.set_handle(file.fh);
  sync.set_data_only(data_only != 0);
  sync.set_directory(directory);
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

void on_fsync(fuse_req_t caller, fuse_ino_t id, int data_only, fuse_file_info* file) {
  synchronize(caller, id, data_only, *file, false);
}

void on_fsyncdir(fuse_req_t caller, fuse_ino_t id, int data_only, fuse_file_info* file) {
  synchronize(caller, id, data_only, *file, true);
}

void on_fallocate(fuse_req_t caller, fuse_ino_t id, int mode, off_t offset, off_t length,
                  fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kFallocate, id);
  pb::Fallocate& fallocate = *request.mutable_fallocate();
  fallocate.set_id(id);
  fallocate.set_handle(file->fh);
  fallocate.set_offset(static_cast<std::uint64_t>(offset));
  fallocate.set_length(static_cast<std::uint64_t>(length));
  fallocate.set_mode(static_cast<std::uint32_t>(mode));
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

void on_copy_file_range(fuse_req_t caller, fuse_ino_t id_in, off_t offset_in, fuse_file_info* file_in,
                        fuse_ino_t id_out, off_t offset_out, fuse_file_info* file_out, std::size_t length,
                        int /*flags*/) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kCopyFileRange, id_out);
  pb::CopyFileRange& copy = *request.mutable_copy_file_range();
  copy.set_id_in(id_in);
  copy.set_offset_in(static_cast<std::uint64_t>(offset_in));
  copy.set_handle_in(file_in->fh);
  copy.set_id_out(id_out);
  copy.set_offset_out(static_cast<std::uint64_t>(offset_out));
  copy.set_handle_out(file_out->fh);
  copy.set_length(std::min<std::uint64_t>(length, kMostCopied));
  server.submit(request, {}, pending, &FuseServer::answer_count);
}

void on_lseek(fuse_req_t caller, fuse_ino_t id, off_t offset, int whence, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSeek, id);
  pb::Seek& seek = *request.mutable_seek();
  seek.set_id(id);
  seek.set_handle(file->fh);
  seek.set_offset(static_cast<std::uint64_t>(offset));
  seek.set_whence(static_cast<std::uint32_t>(whence));
  server.submit_written_back(request, {}, pending, &FuseServer::answer_offset);
}

// ---- locks

void set_range(pb::LockRange& range, const struct flock& lock) {
  const auto start = static_cast<std::uint64_t>(lock.l_start);
  range.set_type(lock.l_type == F_UNLCK   ? pb::LockRange::UNLOCKED
                 : lock.l_type == F_RDLCK ? pb::LockRange::SHARED
                                          : pb::LockRange::EXCLUSIVE);
  range.set_start(start);
  range.set_end(lock.l_len == 0 ? kEndOfFile : start + static_cast<std::uint64_t>(lock.l_len) - 1);
  range.set_pid(static_cast<std::uint32_t>(lock.l_pid));
}

void on_getlk(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file, struct flock* lock) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kGetlock, id);
  pb::GetLock& getlock = *request.mutable_getlock();
  getlock.set_id(id);
  getlock.set_lock_owner(file->lock_owner);
  set_range(*getlock.mutable_range(), *lock);
  server.submit(request, {}, pending, &FuseServer::answer_getlk);
}

void set_lock(fuse_req_t caller, fuse_ino_t id, const fuse_file_info& file, const struct flock& lock,
              bool wait, bool flock) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSetlock, id);
  pb::SetLock& setlock = *request.mutable_setlock();
  setlock.set_id(id);
  setlock.set_handle(file.fh);
  setlock.set_lock_owner(file.lock_owner);
  set_range(*setlock.mutable_range(), lock);
  setlock.set_wait(wait);
  setlock.set_flock(flock);
  pending.owner = file.lock_owner;
  const bool locks = lock.l_type != F_UNLCK;
  pending.posix_lock = !flock && locks;
  pending.gives_up = !locks;
  pending.handle = file.fh;
  if (pending.posix_lock) server.note_posix_lock(id, pending.owner, pending.handle);
  pending.waits_for_lock = wait && locks;
  server.submit(request, {}, pending, locks ? &FuseServer::answer_lock : &FuseServer::answer_error);
}

void on_setlk(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file, struct flock* lock, int wait) {
  set_lock(caller, id, *file, *lock, wait != 0, false);
}

void on_flock(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file, int operation) {
  struct flock lock {};  // the whole file
  lock.l_type = static_cast<short>((operation & LOCK_UN) != 0   ? F_UNLCK
                                   : (operation & LOCK_SH) != 0 ? F_RDLCK
                                                                : F_WRLCK);
  lock.l_pid = fuse_req_ctx(caller)->pid;
  set_lock(caller, id, *file, lock, (operation & LOCK_NB) == 0, true);
}

}  // namespace

void add_file_operations(fuse_lowlevel_ops& operations) {
  operations.open = on_open;
  operations.read = on_read;
  operations.write = on_write;
  operations.flush = on_flush;
  operations.release = on_release;
  operations.fsync = on_fsync;
  operations.fsyncdir = on_fsyncdir;
  operations.getlk = on_getlk;
  operations.setlk = on_setlk;
  operations.flock = on_flock;
  operations.fallocate = on_fallocate;
  operations.copy_file_range = on_copy_file_range;
  operations.lseek = on_lseek;
}

}  // namespace sharefs
