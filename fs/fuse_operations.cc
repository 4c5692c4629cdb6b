// What libfuse calls: each operation turns its arguments into a pb::Request.
//
// The request objects are used again, so each operation sets every field of its message, or clears it first.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>
#include <string_view>

#include "fs/fuse_server.h"

namespace sharefs {
namespace {

using Op = pb::Request;

constexpr std::int64_t kNanoseconds = 1'000'000'000;

constexpr unsigned kWanted = FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_DONT_MASK |
                             FUSE_CAP_EXPORT_SUPPORT | FUSE_CAP_FLOCK_LOCKS | FUSE_CAP_PARALLEL_DIROPS |
                             FUSE_CAP_POSIX_LOCKS | FUSE_CAP_READDIRPLUS | FUSE_CAP_READDIRPLUS_AUTO;
// Readahead and other requests without a waiting caller that the kernel sends at once.
constexpr unsigned kMaxBackground = 64;
// All that is written back, where what waits for its turn could not be waited for
// (FuseServer::when_written_back). Such kernels let few pages be stored to at a time.
constexpr unsigned kEverything = 0xffff;

void on_init(void* /*userdata*/, fuse_conn_info* connection) {
  unsigned wanted = kWanted;
  if (::geteuid() == 0) wanted |= FUSE_CAP_POSIX_ACL;
  connection->want = connection->capable & wanted;
  connection->max_write = kMaxTransfer;
  connection->max_read = kMaxTransfer;
  connection->max_background = keeps_written_pages(connection->proto_minor) ? kMaxBackground : kEverything;
}

// ---- names

void on_getattr(fuse_req_t caller, fuse_ino_t id, fuse_file_info* /*file*/) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kGetattr, id);
  request.mutable_getattr()->set_id(id);
  server.submit(request, {}, pending, &FuseServer::answer_attr);
}

void on_lookup(fuse_req_t caller, fuse_ino_t parent, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  // Of a file handle the kernel asks "." for an inode that it does not know any more, and ".." for what is
  // above a directory.
  if (std::string_view(name) == ".") {
    if (server.is_pruner(fuse_req_ctx(caller)->pid)) {  // then it is what it wants
      fuse_reply_err(caller, ESTALE);
      return;
    }
    auto [pending, request] = server.begin(caller, Op::kGetattr, parent);
    request.mutable_getattr()->set_id(parent);
    server.submit(request, {}, pending, &FuseServer::answer_handle);
    return;
  }
  auto [pending, request] = server.begin(caller, Op::kLookup, parent);
  pb::Lookup& lookup = *request.mutable_lookup();
  lookup.set_parent(parent);
  lookup.set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_lookup);
}

void on_forget(fuse_req_t caller, fuse_ino_t id, std::uint64_t times) {
  FuseServer::of(caller).forget(id, times);
  fuse_reply_none(caller);
}

void on_forget_multi(fuse_req_t caller, std::size_t count, fuse_forget_data* forgets) {
  FuseServer& server = FuseServer::of(caller);
  for (const fuse_forget_data& one : std::span(forgets, count)) server.forget(one.ino, one.nlookup);
  fuse_reply_none(caller);
}

void on_readlink(fuse_req_t caller, fuse_ino_t id) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kReadlink, id);
  request.mutable_readlink()->set_id(id);
  server.submit(request, {}, pending, &FuseServer::answer_link_target);
}

void on_mknod(fuse_req_t caller, fuse_ino_t parent, const char* name, mode_t mode, dev_t rdev) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kCreate, parent);
  pb::Create& create = *request.mutable_create();
  create.Clear();
  create.set_parent(parent);
  create.set_name(name);
  create.set_mode(mode);
  create.set_umask(fuse_req_ctx(caller)->umask);
  create.set_rdev(rdev);
  server.submit(request, {}, pending, &FuseServer::answer_entry);
}

void on_create(fuse_req_t caller, fuse_ino_t parent, const char* name, mode_t mode, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kCreate, parent);
  pending.handle = server.new_handle(file->flags);
  pending.flags = file->flags;
  pb::Create& create = *request.mutable_create();
  create.Clear();
  create.set_parent(parent);
  create.set_name(name);
  create.set_mode(mode);
  create.set_umask(fuse_req_ctx(caller)->umask);
  create.set_handle(pending.handle);
  create.set_flags(static_cast<std::uint32_t>(file->flags));
  server.submit(request, {}, pending, &FuseServer::answer_create);
}

void on_mkdir(fuse_req_t caller, fuse_ino_t parent, const char* name, mode_t mode) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kMkdir, parent);
  pb::MkDir& mkdir = *request.mutable_mkdir();
  mkdir.set_parent(parent);
  mkdir.set_name(name);
  mkdir.set_mode(mode);
  mkdir.set_umask(fuse_req_ctx(caller)->umask);
  server.submit(request, {}, pending, &FuseServer::answer_entry);
}

void on_symlink(fuse_req_t caller, const char* target, fuse_ino_t parent, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSymlink, parent);
  pb::SymLink& symlink = *request.mutable_symlink();
  symlink.set_parent(parent);
  symlink.set_name(name);
  symlink.set_target(target);
  server.submit(request, {}, pending, &FuseServer::answer_entry);
}

void on_link(fuse_req_t caller, fuse_ino_t id, fuse_ino_t parent, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kLink, id);
  pb::Link& link = *request.mutable_link();
  link.set_id(id);
  link.set_parent(parent);
  link.set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_entry);
}

void on_unlink(fuse_req_t caller, fuse_ino_t parent, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kUnlink, parent);
  request.mutable_unlink()->set_parent(parent);
  request.mutable_unlink()->set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

void on_rmdir(fuse_req_t caller, fuse_ino_t parent, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kRmdir, parent);
  request.mutable_rmdir()->set_parent(parent);
  request.mutable_rmdir()->set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

void on_rename(fuse_req_t caller, fuse_ino_t parent, const char* name, fuse_ino_t new_parent,
               const char* new_name, unsigned flags) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kRename, parent);
  pb::Rename& rename = *request.mutable_rename();
  rename.set_parent(parent);
  rename.set_name(name);
  rename.set_new_parent(new_parent);
  rename.set_new_name(new_name);
  rename.set_flags(flags);
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

// ---- attributes

std::int64_t nanoseconds_of(const timespec& time) {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max() / kNanoseconds - 1;
  return std::clamp<std::int64_t>(time.tv_sec, -kLargest, kLargest) * kNanoseconds + time.tv_nsec;
}

void on_setattr(fuse_req_t caller, fuse_ino_t id, struct stat* status, int what, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSetattr, id);
  pb::SetAttr& setattr = *request.mutable_setattr();
  setattr.Clear();
  setattr.set_id(id);
  if (file != nullptr) setattr.set_handle(file->fh);
  if ((what & FUSE_SET_ATTR_MODE) != 0) setattr.set_mode(status->st_mode);
  if ((what & FUSE_SET_ATTR_UID) != 0) setattr.set_uid(status->st_uid);
  if ((what & FUSE_SET_ATTR_GID) != 0) setattr.set_gid(status->st_gid);
  if ((what & FUSE_SET_ATTR_SIZE) != 0) setattr.set_size(static_cast<std::uint64_t>(status->st_size));
  if ((what & FUSE_SET_ATTR_ATIME_NOW) != 0) {
    setattr.set_atime_now(true);
  } else if ((what & FUSE_SET_ATTR_ATIME) != 0) {
    setattr.set_atime(nanoseconds_of(status->st_atim));
  }
  if ((what & FUSE_SET_ATTR_MTIME_NOW) != 0) {
    setattr.set_mtime_now(true);
  } else if ((what & FUSE_SET_ATTR_MTIME) != 0) {
    setattr.set_mtime(nanoseconds_of(status->st_mtim));
  }
  setattr.set_kill_suidgid(server.extras().kill_suidgid);
  constexpr int kSaid = FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID | FUSE_SET_ATTR_SIZE |
                        FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME;
  if ((what & kSaid) == 0) {
    // What the kernel lets through of chown(-1, -1), and of what it does before a write or fallocate by a
    // caller who ends the privileges of the file: it keeps the mode that the answer says. ctime changes, too.
    setattr.set_kill_suidgid(true);
    setattr.set_uid(static_cast<std::uint32_t>(-1));
    setattr.set_gid(static_cast<std::uint32_t>(-1));
  }
  // Or the mtime that is set would be followed by that of an earlier store.
  if (setattr.has_mtime() || setattr.mtime_now())
    server.submit_written_back(request, {}, pending, &FuseServer::answer_attr);
  else
    server.submit(request, {}, pending, &FuseServer::answer_attr);
}

void on_statfs(fuse_req_t caller, fuse_ino_t id) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kStatfs, id);
  request.mutable_statfs();
  server.submit(request, {}, pending, &FuseServer::answer_statfs);
}

void on_getxattr(fuse_req_t caller, fuse_ino_t id, const char* name, std::size_t size) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kGetxattr, id);
  pending.room = size;
  request.mutable_getxattr()->set_id(id);
  request.mutable_getxattr()->set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_xattr);
}

void on_listxattr(fuse_req_t caller, fuse_ino_t id, std::size_t size) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kListxattr, id);
  pending.room = size;
  request.mutable_listxattr()->set_id(id);
  server.submit(request, {}, pending, &FuseServer::answer_xattr);
}

void on_setxattr(fuse_req_t caller, fuse_ino_t id, const char* name, const char* value, std::size_t size,
                 int flags) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kSetxattr, id);
  pb::SetXattr& setxattr = *request.mutable_setxattr();
  setxattr.set_id(id);
  setxattr.set_name(name);
  setxattr.set_flags(static_cast<std::uint32_t>(flags));
  setxattr.set_kill_sgid(server.extras().kill_sgid);
  server.submit(request, std::as_bytes(std::span(value, size)), pending, &FuseServer::answer_error);
}

void on_removexattr(fuse_req_t caller, fuse_ino_t id, const char* name) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kRemovexattr, id);
  request.mutable_removexattr()->set_id(id);
  request.mutable_removexattr()->set_name(name);
  server.submit(request, {}, pending, &FuseServer::answer_error);
}

// ---- directories

void on_opendir(fuse_req_t caller, fuse_ino_t id, fuse_file_info* /*file*/) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kOpendir, id);
  pending.handle = server.new_handle(0);
  request.mutable_opendir()->set_id(id);
  request.mutable_opendir()->set_handle(pending.handle);
  if (!server.opens_at_once(id, S_IFDIR))
    return server.submit(request, {}, pending, &FuseServer::answer_opendir);
  fuse_file_info opened{};
  opened.fh = pending.handle;
  pending.caller = nullptr;
  request.set_lazy(true);
  server.submit(request, {}, pending, &FuseServer::answer_nobody);
  if (fuse_reply_open(caller, &opened) != 0) server.ask_releasedir(id, opened.fh);
}

void read_directory(fuse_req_t caller, fuse_ino_t id, std::size_t size, off_t offset,
                    const fuse_file_info& file, bool plus) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kReaddir, id);
  pending.room = size;
  pending.plus = plus;
  pb::ReadDir& readdir = *request.mutable_readdir();
  readdir.set_id(id);
  readdir.set_handle(file.fh);
  readdir.set_offset(static_cast<std::uint64_t>(offset));
  readdir.set_max_bytes(static_cast<std::uint32_t>(size));
  readdir.set_plus(plus);
  server.submit(request, {}, pending, &FuseServer::answer_directory);
}

void on_readdir(fuse_req_t caller, fuse_ino_t id, std::size_t size, off_t offset, fuse_file_info* file) {
  read_directory(caller, id, size, offset, *file, false);
}

void on_readdirplus(fuse_req_t caller, fuse_ino_t id, std::size_t size, off_t offset, fuse_file_info* file) {
  read_directory(caller, id, size, offset, *file, true);
}

// As on_release.
void on_releasedir(fuse_req_t caller, fuse_ino_t id, fuse_file_info* file) {
  FuseServer& server = FuseServer::of(caller);
  auto [pending, request] = server.begin(caller, Op::kReleasedir, id);
  request.mutable_releasedir()->set_id(id);
  request.mutable_releasedir()->set_handle(file->fh);
  server.closed(id);
  request.set_lazy(true);
  pending.caller = nullptr;
  server.submit(request, {}, pending, &FuseServer::answer_nobody);
  fuse_reply_err(caller, 0);
}

// Left out: access (permissions are checked by the kernel), ioctl, poll, bmap.
fuse_lowlevel_ops make_operations() {
  fuse_lowlevel_ops operations{};
  operations.init = on_init;
  operations.lookup = on_lookup;
  operations.forget = on_forget;
  operations.forget_multi = on_forget_multi;
  operations.getattr = on_getattr;
  operations.setattr = on_setattr;
  operations.readlink = on_readlink;
  operations.mknod = on_mknod;
  operations.mkdir = on_mkdir;
  operations.unlink = on_unlink;
  operations.rmdir = on_rmdir;
  operations.symlink = on_symlink;
  operations.rename = on_rename;
  operations.link = on_link;
  operations.create = on_create;
  operations.opendir = on_opendir;
  operations.readdir = on_readdir;
  operations.readdirplus = on_readdirplus;
  operations.releasedir = on_releasedir;
  operations.statfs = on_statfs;
  operations.setxattr = on_setxattr;
  operations.getxattr = on_getxattr;
  operations.listxattr = on_listxattr;
  operations.removexattr = on_removexattr;
  add_file_operations(operations);
  return operations;
}

}  // namespace

const fuse_lowlevel_ops& fuse_operations() {
  static const fuse_lowlevel_ops operations = make_operations();
  return operations;
}

}  // namespace sharefs
