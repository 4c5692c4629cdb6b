#include "fs/fuse_pruner.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <string>
#include <utility>

#include "fs/fuse_session.h"
#include "fs/inode_table.h"
#include "meta/caller.h"
#include "meta/fault.h"

namespace sharefs {
namespace {

// As the kernel makes them of FUSE inodes (fs/fuse/inode.c); the generation is always 0 here.
struct Handle {
  file_handle head;
  std::array<std::uint32_t, 3> body;  // the id's upper half, its lower half, the generation
};
constexpr int kHandleType = 0x81;  // FILEID_INO64_GEN

Handle handle_of(InodeId id) {
  Handle handle{};
  handle.head.handle_bytes = sizeof handle.body;
  handle.head.handle_type = kHandleType;
  handle.body = {static_cast<std::uint32_t>(id >> 32), static_cast<std::uint32_t>(id), 0};
  return handle;
}

bool has_such_handles(int root) {
  const Handle expected = handle_of(FUSE_ROOT_ID);
  Handle handle = expected;
  int mount = 0;
  return ::name_to_handle_at(root, "", &handle.head, &mount, AT_EMPTY_PATH) == 0 &&
         std::memcmp(&handle, &expected, sizeof handle) == 0;
}

// From now on this thread has a table of descriptors of its own, without those that the process has open.
bool leave_descriptors() {
  constexpr unsigned kFirst = STDERR_FILENO + 1;
  return ::syscall(SYS_close_range, kFirst, ~0U, CLOSE_RANGE_UNSHARE) == 0;
}

std::string path_of(int descriptor) {
  std::string path(PATH_MAX, '\0');
  // Of this thread: the process has other descriptors.
  const std::string link = "/proc/thread-self/fd/" + std::to_string(descriptor);
  const ssize_t length = ::readlink(link.c_str(), path.data(), path.size());
  path.resize(static_cast<std::size_t>(std::max<ssize_t>(length, 0)));
  return path;
}

void look_at(const std::string& path) {
  struct statx found {};
  [[maybe_unused]] const int result =
      ::statx(AT_FDCWD, path.c_str(), AT_SYMLINK_NOFOLLOW | AT_STATX_DONT_SYNC, 0, &found);
}

}  // namespace

FusePruner::FusePruner(const FuseSession& session, std::filesystem::path mountpoint)
    : session_(session), mountpoint_(std::move(mountpoint)) {}

FusePruner::~FusePruner() {
  end();
  if (thread_.joinable()) thread_.join();
}

void FusePruner::prune(std::vector<InodeId> ids) {
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return;
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }
  if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  wanted_.notify_one();
}

void FusePruner::end() {
  const std::lock_guard lock(mutex_);
  ending_ = true;
  ids_.clear();
  wanted_.notify_one();
}

bool FusePruner::idle() const {
  const std::lock_guard lock(mutex_);
  return ids_.empty() && !busy_;
}

bool FusePruner::ending() const {
  const std::lock_guard lock(mutex_);
  return ending_;
}

// Logs nothing: where the log goes is not open here.
void FusePruner::work() {
  const bool told = session_.can_prune();
  const int device = told ? session_.part_device() : -1;
  const bool looks = !told && leave_descriptors();
  if (looks) become_caller(::geteuid(), ::getegid());  // whoever asked last made this thread
  thread_id_ = ::gettid();
  std::unique_lock lock(mutex_);
  while (true) {
    wanted_.wait(lock, [this] { return ending_ || !ids_.empty(); });
    if (ending_) return;
    const auto ids = std::exchange(ids_, {});
    busy_ = true;
    lock.unlock();
    fault_point("fuse.pruning");
    if (told)
      FuseSession::prune(device, ids);
    else if (looks)
      look_again(ids);
    lock.lock();
    busy_ = false;
  }
}

void FusePruner::look_again(const std::vector<InodeId>& ids) const {
  const UniqueFd root(::open(mountpoint_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!root || !has_such_handles(root.get())) return;  // something else is mounted there
  for (const InodeId id : ids) {
    std::string last;
    while (!ending()) {  // once for each name
      Handle handle = handle_of(id);
      const UniqueFd inode(::open_by_handle_at(root.get(), &handle.head, O_PATH | O_CLOEXEC));
      if (!inode) break;  // forgotten
      std::string path = path_of(inode.get());
      if (!path.starts_with('/') || path == last) break;  // used
      look_at(path);
      last = std::move(path);
    }
  }
}

}  // namespace sharefs
