// How outcomes are answered to the kernel.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "fs/fuse_server.h"
#include "fs/promises.h"

namespace sharefs {
namespace {

// For so long a thread that was answered may not have gone on.
constexpr auto kTakenUp = std::chrono::milliseconds(500);
constexpr std::int64_t kNanoseconds = 1'000'000'000;
constexpr blksize_t kBlockSize = 4096;
constexpr std::uint64_t kEndOfFile = std::numeric_limits<std::int64_t>::max();  // of a lock without an end

timespec time_of(std::int64_t nanoseconds) {
  std::int64_t seconds = nanoseconds / kNanoseconds;
  std::int64_t rest = nanoseconds % kNanoseconds;
  if (rest < 0) {
    --seconds;
    rest += kNanoseconds;
  }
  return {.tv_sec = seconds, .tv_nsec = rest};
}

struct stat stat_of(const pb::Attr& attr) {
  struct stat status {};
  status.st_ino = attr.id();
  status.st_mode = attr.mode();
  status.st_nlink = attr.nlink();
  status.st_uid = attr.uid();
  status.st_gid = attr.gid();
  status.st_rdev = attr.rdev();
  status.st_size = static_cast<off_t>(attr.size());
  status.st_blksize = kBlockSize;
  status.st_blocks = static_cast<blkcnt_t>(attr.blocks());
  status.st_atim = time_of(attr.atime());
  status.st_mtim = time_of(attr.mtime());
  status.st_ctim = time_of(attr.ctime());
  return status;
}

// ENOSYS means to the kernel that the operation need never be tried again; an executor means this request.
int error_of(const pb::Outcome& outcome) {
  return outcome.error() == ENOSYS ? EOPNOTSUPP : static_cast<int>(outcome.error());
}

bool failed(const PendingRequest& pending, const pb::Outcome& outcome) {
  if (outcome.error() == 0) return false;
  fuse_reply_err(pending.caller, error_of(outcome));
  return true;
}

short lock_type(pb::LockRange::Type type) {
  return static_cast<short>(type == pb::LockRange::UNLOCKED ? F_UNLCK
                            : type == pb::LockRange::SHARED ? F_RDLCK
                                                            : F_WRLCK);
}

}  // namespace

fuse_entry_param FuseServer::entry_of(const pb::Attr& attr) const {
  fuse_entry_param entry{};
  entry.ino = attr.id();
  entry.attr = stat_of(attr);
  entry.entry_timeout = entry_timeout_;
  entry.attr_timeout = attr_timeout_;
  return entry;
}

// Kernels before Linux 6.14 may take attributes of a looked-up inode that was dropped and recalled meanwhile.
double FuseServer::attributes_timeout(const PendingRequest& pending, const pb::Attr& attr, bool held) {
  constexpr unsigned kChecksEvicted = 42;
  if (!lend_attributes_ || (!held && session_.protocol_minor() < kChecksEvicted)) return attr_timeout_;
  const pid_t pid = fuse_req_ctx(pending.caller)->pid;
  if (pid == 0) return attr_timeout_;  // of another pid namespace, as others may be
  const auto now = Reactor::Clock::now();
  if (lent_to_.size() >= kMostLent) {
    std::erase_if(lent_to_, [now](const auto& one) { return one.second.until < now; });
    if (lent_to_.size() >= kMostLent) return attr_timeout_;
  }
  const double time = std::chrono::duration<double>(lend_attributes_(attr, held)).count();
  if (time <= attr_timeout_) return attr_timeout_;
  lent_to_[pid] = {attr.id(), now + kTakenUp};
  return time;
}

void FuseServer::answer_lookup(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (outcome.error() == ENOENT && entry_timeout_ > 0) {
    fuse_entry_param nothing{};  // ino 0: the kernel may remember that there is no such name
    nothing.entry_timeout = entry_timeout_;
    fuse_reply_entry(pending.caller, &nothing);
    return;
  }
  answer_entry(pending, outcome, data);
}

void FuseServer::answer_entry(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  fuse_entry_param entry = entry_of(outcome.attr());
  entry.attr_timeout = attributes_timeout(pending, outcome.attr(), false);
  if (fuse_reply_entry(pending.caller, &entry) == 0) known_.add(entry.ino);
}

// What is deleted has no handle any more, also if somebody else keeps it open.
void FuseServer::answer_handle(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (outcome.error() == 0 && outcome.attr().nlink() == 0)
    fuse_reply_err(pending.caller, ESTALE);
  else
    answer_entry(pending, outcome, data);
}

// The caller may be gone (a signal); then nobody will ever release the handle but us.
void FuseServer::answer_create(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const fuse_entry_param entry = entry_of(outcome.attr());
  const fuse_file_info file = opened_file(pending, entry.ino);
  if (fuse_reply_create(pending.caller, &entry, &file) == 0) {
    known_.add(entry.ino);
    known_.opened(entry.ino, sole_period_);
    note_cached(entry.ino, pending.flags);
  } else {
    ask_release(entry.ino, pending.handle);
  }
}

void FuseServer::answer_open(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const fuse_file_info file = opened_file(pending, pending.id);
  if (fuse_reply_open(pending.caller, &file) != 0) ask_release(pending.id, pending.handle);
}

void FuseServer::answer_opendir(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  fuse_file_info file{};
  file.fh = pending.handle;
  if (fuse_reply_open(pending.caller, &file) != 0) ask_releasedir(pending.id, pending.handle);
}

// Append handles are opened direct: the owner resolves the end of the file.
bool writes_directly(int flags) { return (flags & (O_APPEND | O_DIRECT)) != 0; }

// By direct handles the kernel has pages only for mappings. Those that may be stored into are possible where
// it writes them back before what passes by them.
void FuseServer::note_cached(InodeId id, int flags) {
  const bool mappable = (flags & O_ACCMODE) == O_RDWR;
  if (!writes_directly(flags) || (mappable && session_.writes_back_before_direct()))
    known_.note_cached(id, mappable);
}

// A file that is not open is not recalled. So its pages are kept only if this mount has been the only one
// since it opened the file before, or has been promised since then that the file does not change; and not
// before that opener's thread has dropped those from before: it may not even have run yet.
fuse_file_info FuseServer::opened_file(const PendingRequest& pending, InodeId id) {
  fuse_file_info file{};
  file.fh = pending.handle;
  file.direct_io = writes_directly(pending.flags);
  const bool promised = keeps_pages_ && keeps_pages_(id);
  const bool valid = (sole_ && known_.opened(id, sole_period_)) || promised;
  file.keep_cache = valid && std::none_of(dropping_opens_.begin(), dropping_opens_.end(),
                                          [id](const auto& open) { return open.second == id; });
  if (!file.keep_cache && known_.may_be_cached(id)) dropping_opens_[pending.handle] = id;
  note_cached(id, pending.flags);
  return file;
}

void FuseServer::ask_release(InodeId id, std::uint64_t handle) {
  if (dropping_opens_.contains(handle)) drop_pages(id, 0, 0, [this, handle] { used(handle); });
  pb::Request request;
  request.mutable_release()->set_id(id);
  request.mutable_release()->set_handle(handle);
  ask(request);
}

void FuseServer::ask_releasedir(InodeId id, std::uint64_t handle) {
  pb::Request request;
  request.mutable_releasedir()->set_id(id);
  request.mutable_releasedir()->set_handle(handle);
  ask(request);
}

void FuseServer::ask_flush(InodeId id, std::uint64_t handle, std::uint64_t owner) {
  pb::Request request;
  request.mutable_flush()->set_id(id);
  request.mutable_flush()->set_handle(handle);
  request.mutable_flush()->set_lock_owner(owner);
  ask(request);
}

void FuseServer::answer_attr(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const struct stat status = stat_of(outcome.attr());
  fuse_reply_attr(pending.caller, &status, attributes_timeout(pending, outcome.attr(), true));
}

void FuseServer::answer_link_target(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (failed(pending, outcome)) return;
  fuse_reply_buf(pending.caller, as_text(data).data(), data.size());
}

void FuseServer::answer_data(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (failed(pending, outcome)) return;
  fuse_reply_buf(pending.caller, as_text(data).data(), data.size());
}

void FuseServer::answer_xattr(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (failed(pending, outcome)) return;
  if (pending.room == 0) {
    fuse_reply_xattr(pending.caller, data.size());
  } else if (data.size() > pending.room) {
    fuse_reply_err(pending.caller, ERANGE);
  } else {
    fuse_reply_buf(pending.caller, as_text(data).data(), data.size());
  }
}

// Entries carry their own offsets, so those that do not fit are simply asked for again.
void FuseServer::answer_directory(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const auto [bytes, entries] = fill_directory(pending, outcome);
  if (fuse_reply_buf(pending.caller, directory_.data(), bytes) != 0 || !pending.plus) return;
  for (int i = 0; i < entries; ++i) {
    if (tells_inode(outcome.entries(i))) known_.add(outcome.entries(i).attr().id());
  }
}

std::pair<std::size_t, int> FuseServer::fill_directory(const PendingRequest& pending,
                                                       const pb::Outcome& outcome) {
  if (directory_.size() < pending.room) directory_.resize(pending.room);
  std::size_t used = 0;
  int entries = 0;
  for (const pb::DirEntry& entry : outcome.entries()) {
    char* const at = directory_.data() + used;
    const std::size_t room = pending.room - used;
    const auto offset = static_cast<off_t>(entry.offset());
    std::size_t needed = 0;
    if (pending.plus) {
      fuse_entry_param param = entry_of(entry.attr());
      if (!tells_inode(entry)) param.ino = 0;
      needed = fuse_add_direntry_plus(pending.caller, at, room, entry.name().c_str(), &param, offset);
    } else {
      const struct stat status = stat_of(entry.attr());
      needed = fuse_add_direntry(pending.caller, at, room, entry.name().c_str(), &status, offset);
    }
    if (needed > room) break;
    used += needed;
    ++entries;
  }
  return {used, entries};
}

void FuseServer::answer_statfs(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const pb::FsStat& fs = outcome.statfs();
  struct statvfs status {};
  status.f_bsize = fs.block_size();
  status.f_frsize = fs.fragment_size();
  status.f_blocks = fs.blocks();
  status.f_bfree = fs.blocks_free();
  status.f_bavail = fs.blocks_available();
  status.f_files = fs.files();
  status.f_ffree = fs.files_free();
  status.f_favail = fs.files_free();
  status.f_namemax = fs.name_max();
  fuse_reply_statfs(pending.caller, &status);
}

void FuseServer::answer_count(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  fuse_reply_write(pending.caller, outcome.count());
}

// What an append has changed, and what the kernel takes it to have: the end of the file as that knew it may
// be above the one that the owner found, of a file that became shorter meanwhile.
std::uint64_t FuseServer::appended_from(const PendingRequest& pending, const pb::Outcome& outcome) {
  if (!outcome.has_attr() || outcome.attr().size() < outcome.count()) return pending.offset;
  return std::min(pending.offset, outcome.attr().size() - outcome.count());
}

// Kernels drop their pages of the range before a direct write, if at all: another process may have read them
// again while it was on its way, and what that one maps would stay what was before.
void FuseServer::answer_direct_write(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (outcome.error() != 0 || !known_.may_be_cached(pending.id)) return answer_count(pending, outcome, data);
  const std::uint64_t from = pending.size == 0 ? appended_from(pending, outcome) : pending.offset;
  const auto answer = [count = outcome.count()](fuse_req_t caller) { fuse_reply_write(caller, count); };
  answer_late(pending, answer, [&](const auto& done) { drop_pages(pending.id, from, pending.size, done); });
}

void FuseServer::answer_late(PendingRequest& pending, std::function<void(fuse_req_t)> answer,
                             const std::function<void(std::function<void()> done)>& wait) {
  link(pending);  // its caller can be killed meanwhile
  pending.late = true;
  wait([this, p = &pending, seq = pending.seq, answer = std::move(answer)] {
    if (p->server == nullptr || p->seq != seq) return;
    unlink(*p);
    if (p->caller != nullptr) answer(p->caller);
    answered(seq);
    done_with(*p);
  });
}

// The kernel keeps what was appended where it took the end of the file to be, and these pages locked until it
// is answered.
void FuseServer::answer_misplaced_write(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  const InodeId id = pending.id;
  const std::uint64_t offset = appended_from(pending, outcome);
  answer_count(pending, outcome, data);
  drop_pages(id, offset, 0, [] {});
}

void FuseServer::answer_offset(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  fuse_reply_lseek(pending.caller, static_cast<off_t>(outcome.count()));
}

void FuseServer::answer_getlk(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  if (failed(pending, outcome)) return;
  const pb::LockRange& range = outcome.lock();
  struct flock lock {};
  lock.l_type = lock_type(range.type());
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(range.start());
  lock.l_len = range.end() >= kEndOfFile ? 0 : static_cast<off_t>(range.end() - range.start() + 1);
  lock.l_pid = static_cast<pid_t>(range.pid());
  fuse_reply_lock(pending.caller, &lock);
}

// Who has a lock sees what others did while they had it, and be it by another file. They have not waited for
// pages of an inode that this mount itself is changing (another part of it, with another lock).
void FuseServer::answer_lock(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  if (outcome.error() != 0) return answer_error(pending, outcome, data);
  // Noted again: a close by another thread may have released what the owner had while this one was waiting.
  if (pending.posix_lock) note_posix_lock(pending.id, pending.owner, pending.handle);
  const bool met = outcome.changes_met() || concludes_a_change();
  if (!met && locked_pages_.empty() && notifier_->idle()) return answer_error(pending, outcome, data);
  const auto answer = [](fuse_req_t caller) { fuse_reply_err(caller, 0); };
  answer_late(pending, answer, [&](const auto& done) {
    if (met) drop_changing();
    when_pages_are_dropped(met, done);
  });
}

void FuseServer::answer_error(PendingRequest& pending, const pb::Outcome& outcome, Bytes /*data*/) {
  fuse_reply_err(pending.caller, error_of(outcome));
}

void FuseServer::answer_nobody(PendingRequest& /*pending*/, const pb::Outcome& /*outcome*/, Bytes /*data*/) {}

}  // namespace sharefs
