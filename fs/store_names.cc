// The Store: removing and moving names, and the inodes that are left without one.
//
// Such an inode (an orphan) moves to `orphans/<id in hex>` of the private area. Whatever the steps are, a
// process that dies between them leaves either the old or the new name in place, and asking again gives the
// wanted result; recover_orphans() tidies up.
#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "fs/private_area.h"
#include "fs/store_impl.h"
#include "meta/fault.h"
#include "meta/log.h"

namespace sharefs {
namespace {

constexpr std::uint64_t kSmallOrphan = 128;  // blocks of 512 bytes
constexpr std::size_t kDoomedBatch = 64;     // small orphans whose deletion may be put off

struct OrphanName {
  explicit OrphanName(InodeId id) {
    std::snprintf(name, sizeof name, "%llx", static_cast<unsigned long long>(id));
  }
  char name[17];
};

void unlink_orphans(int orphans, const std::vector<std::string>& names) {
  fault_point("store-delete-orphans");
  for (const std::string& name : names) {
    if (::unlinkat(orphans, name.c_str(), 0) == 0 || errno == ENOENT) continue;
    if (::unlinkat(orphans, name.c_str(), AT_REMOVEDIR) != 0)
      log::error("the orphan {} cannot be removed: {}", name, std::strerror(errno));
  }
}

// An ordinary user may remove a directory that may not be read.
UniqueFd open_to_list(int directory_fd, const char* name, const Backing& backing) {
  constexpr int kFlags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  UniqueFd fd(::openat(directory_fd, name, kFlags));
  const mode_t mode = backing.stx_mode & 07777u;
  if (fd || errno != EACCES || (mode & S_IRUSR) != 0) return fd;
  if (::fchmodat(directory_fd, name, mode | S_IRUSR, 0) != 0) return fd;
  fd = UniqueFd(::openat(directory_fd, name, kFlags));
  const int error = errno;
  ::fchmodat(directory_fd, name, mode, 0);
  errno = error;
  return fd;
}

// ENOTEMPTY, 0, or what reading it said.
int check_empty(int directory_fd, const char* name, const Backing& backing) {
  const UniqueFd fd = open_to_list(directory_fd, name, backing);
  if (!fd) return errno;
  alignas(dirent64) char buffer[2048];
  ssize_t size;
  while ((size = ::getdents64(fd.get(), buffer, sizeof buffer)) > 0) {
    for (ssize_t at = 0; at < size;) {
      const auto* entry = reinterpret_cast<const dirent64*>(buffer + at);
      if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0) return ENOTEMPTY;
      at += entry->d_reclen;
    }
  }
  return size < 0 ? errno : 0;
}

// What lies there may also be a left-over of somebody else, from before a power cut.
bool is_inode(int directory, const char* name, const Backing& backing) {
  Backing found{};
  return ::statx(directory, name, AT_SYMLINK_NOFOLLOW, kBackingMask, &found) == 0 &&
         found.stx_ino == backing.stx_ino;
}

// Nor need he be able to write it, though moving it changes what is in it.
bool move_to_orphans(int directory_fd, const char* name, int orphans, InodeId id) {
  const OrphanName kept(id);
  return ::renameat(directory_fd, name, orphans, kept.name) == 0 ||
         (errno == EACCES && move_name(directory_fd, name, orphans, kept.name));
}

}  // namespace

int Store::Impl::find_victim(int directory_fd, const std::string& name, Victim& victim) {
  if (::statx(directory_fd, name.c_str(), AT_SYMLINK_NOFOLLOW, kBackingMask, &victim.backing) != 0)
    return errno;
  if (foreign(victim.backing)) return EBUSY;
  victim.exists = true;
  victim.directory = S_ISDIR(victim.backing.stx_mode);
  victim.last_name = victim.directory || victim.backing.stx_nlink <= 1;
  victim.id = inodes.find(victim.backing).value_or(0);
  return 0;
}

// It has other names. One of them is looked up before anybody asks for the inode, unless it is open, or a
// round of a handoff reads what has been written to it. Names are held meanwhile: who saw this one in between
// would take it for the one by which the inode is reached.
void Store::Impl::keep_in_reach(InodeId parent, const std::string& name, int directory_fd,
                                const Victim& victim) {
  if (victim.id != 0 && !victim.last_name)
    inodes.losing(victim.id, parent, name, directory_fd, opens.is_open(victim.id));
}

// The victim has just lost its last name and lies in the private area.
void Store::Impl::orphan(StoreCall& call, const Victim& victim) {
  inodes.moved(victim.id, 0, std::string("orphans/") + OrphanName(victim.id).name);
  inodes.set_orphan(victim.id, true);
  call.outcome.add_orphaned(victim.id);
}

int Store::Impl::remove_name(StoreCall& call, InodeId parent, const std::string& name, int directory_fd,
                             const Victim& victim) {
  note_entry(parent, name);
  if (victim.id != 0) note_attributes(victim.id);
  const bool orphans_victim = victim.last_name && victim.id != 0;
  int error = 0;
  const int orphans = orphans_victim ? private_area(error) : -1;
  if (orphans_victim && orphans < 0) return error;
  const auto changing = inodes.change_names();
  if (orphans_victim) {
    if (!move_to_orphans(directory_fd, name.c_str(), orphans, victim.id)) return errno;
    fault_point("store-orphan-moved");
    orphan(call, victim);
  } else {
    keep_in_reach(parent, name, directory_fd, victim);
    if (::unlinkat(directory_fd, name.c_str(), victim.directory ? AT_REMOVEDIR : 0) != 0) return errno;
  }
  changed(parent);
  if (victim.id != 0) changed(victim.id);
  return 0;
}

int Store::Impl::unlink(const pb::Unlink& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), false); error != 0) return error;
  int error = 0;
  const auto ref = directory(op.parent(), error);
  if (error != 0) return error;
  Victim victim;
  if (error = find_victim(ref.fd, op.name(), victim); error != 0) return error;
  if (victim.directory) return EISDIR;
  return remove_name(call, op.parent(), op.name(), ref.fd, victim);
}

int Store::Impl::rmdir(const pb::RmDir& op, StoreCall& call) {
  if (const int error = check_name(op.parent(), op.name(), false); error != 0) return error;
  int error = 0;
  const auto ref = directory(op.parent(), error);
  if (error != 0) return error;
  Victim victim;
  if (error = find_victim(ref.fd, op.name(), victim); error != 0) return error;
  if (!victim.directory) return ENOTDIR;
  if (error = check_empty(ref.fd, op.name().c_str(), victim.backing); error != 0) return error;
  return remove_name(call, op.parent(), op.name(), ref.fd, victim);
}

// Renames over the last name of another inode. A file keeps a second name in the private area from before the
// rename, so that the target name exists at every instant. What cannot have two names (a directory) moves
// away first.
int Store::Impl::rename_over(const pb::Rename& op, int from, int to, const Victim& victim) {
  int error = 0;
  const int orphans = private_area(error);
  if (orphans < 0) return error;
  const OrphanName kept(victim.id);
  const char* target = op.new_name().c_str();
  if (victim.directory) {
    if (error = check_empty(to, target, victim.backing); error != 0) return error;
  }
  const bool two_names =
      !victim.directory && (::linkat(to, target, orphans, kept.name, 0) == 0 ||
                            (errno == EEXIST && is_inode(orphans, kept.name, victim.backing)));
  if (!two_names && !move_to_orphans(to, target, orphans, victim.id)) return errno;
  fault_point("store-rename-kept");
  if (::renameat(from, op.name().c_str(), to, target) == 0) return 0;
  error = errno;
  if (two_names) {
    ::unlinkat(orphans, kept.name, 0);
  } else {
    move_name(orphans, kept.name, to, target);
  }
  return error;
}

int Store::Impl::rename(const pb::Rename& op, StoreCall& call) {
  const unsigned flags = op.flags();
  if ((flags & ~static_cast<unsigned>(RENAME_NOREPLACE | RENAME_EXCHANGE)) != 0 ||
      flags == (RENAME_NOREPLACE | RENAME_EXCHANGE))
    return EINVAL;
  if (const int error = check_name(op.parent(), op.name(), false); error != 0) return error;
  if (const int error = check_name(op.new_parent(), op.new_name(), true); error != 0) return error;
  int error = 0;
  const auto from = directory(op.parent(), error);
  if (error != 0) return error;
  const auto to = directory(op.new_parent(), error);
  if (error != 0) return error;
  Victim source, target;
  if (error = find_victim(from.fd, op.name(), source); error != 0) return error;
  if (error = find_victim(to.fd, op.new_name(), target); error != 0 && error != ENOENT) return error;
  const bool exchange = (flags & RENAME_EXCHANGE) != 0;
  if (target.exists && (flags & RENAME_NOREPLACE) != 0) return EEXIST;
  if (target.exists && !exchange && source.directory != target.directory)
    return target.directory ? EISDIR : ENOTDIR;
  const bool same = target.exists && source.backing.stx_ino == target.backing.stx_ino;

  note_entry(op.parent(), op.name());
  note_entry(op.new_parent(), op.new_name());
  if (source.id != 0) note_attributes(source.id);
  if (target.id != 0) note_attributes(target.id);
  const bool orphans_target = target.exists && !exchange && !same && target.last_name && target.id != 0;
  int ignored = 0;
  if (orphans_target) private_area(ignored);  // opened before names change
  const auto changing = inodes.change_names();
  if (target.exists && !exchange && !same) keep_in_reach(op.new_parent(), op.new_name(), to.fd, target);
  if (orphans_target) {
    error = rename_over(op, from.fd, to.fd, target);
  } else {
    error = error_of(::renameat2(from.fd, op.name().c_str(), to.fd, op.new_name().c_str(), flags));
  }
  if (error != 0) return error;
  if (same && !exchange) return 0;  // two names of one inode: nothing happens
  if (orphans_target) orphan(call, target);
  if (source.id != 0) inodes.moved(source.id, op.new_parent(), op.new_name());
  if (exchange && target.id != 0) inodes.moved(target.id, op.parent(), op.name());
  for (const InodeId id : {op.parent(), op.new_parent(), source.id, target.id})
    if (id != 0) changed(id);
  return 0;
}

// No kernel refers to these orphans any more. Deleting costs as much as making, and nobody waits for it:
// workers do it, small ones in batches.
int Store::Impl::forget(const pb::Forget& op) {
  int error = 0;
  const int orphans = private_area(error);
  if (orphans < 0) return error;
  bool large = false;
  for (const InodeId id : op.ids()) {
    if (!inodes.is_orphan(id)) continue;
    const auto ref = descriptors.any(id);
    Backing backing{};
    if (ref && ::statx(ref.fd, "", AT_EMPTY_PATH, kBackingMask, &backing) == 0)
      large = large || backing.stx_blocks > kSmallOrphan;
    if (observer != nullptr) observer->changing({.kind = Change::Kind::freed, .id = id});
    descriptors.drop(id);
    inodes.erase(id);
    doomed.emplace_back(OrphanName(id).name);
  }
  if (large || doomed.size() >= kDoomedBatch) delete_doomed();
  return 0;
}

void Store::Impl::delete_doomed() {
  if (doomed.empty()) return;
  const auto own = std::make_shared<UniqueFd>(::fcntl(orphans_directory.get(), F_DUPFD_CLOEXEC, 0));
  if (!*own) return;  // out of descriptors: with the next batch
  ++deleting;
  workers.submit([own, names = std::exchange(doomed, {})] { unlink_orphans(own->get(), names); },
                 [this, still_there = std::weak_ptr<bool>(alive)] {
                   if (!still_there.expired()) --deleting;
                 });
}

void Store::Impl::delete_doomed_now() {
  if (!doomed.empty()) unlink_orphans(orphans_directory.get(), std::exchange(doomed, {}));
}

}  // namespace sharefs
