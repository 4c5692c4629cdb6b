#include "fs/mounts.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "fs/fuse_helper.h"

namespace sharefs {
namespace fs = std::filesystem;
namespace {

// mountinfo writes space, tab, newline and backslash as \ooo.
std::string unescape(const std::string& field) {
  std::string text;
  for (std::size_t i = 0; i < field.size(); ++i) {
    const bool escaped = field[i] == '\\' && i + 3 < field.size() &&
                         std::all_of(field.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                                     field.begin() + static_cast<std::ptrdiff_t>(i) + 4,
                                     [](char c) { return c >= '0' && c <= '7'; });
    if (!escaped) {
      text += field[i];
      continue;
    }
    text += static_cast<char>((field[i + 1] - '0') * 64 + (field[i + 2] - '0') * 8 + (field[i + 3] - '0'));
    i += 3;
  }
  return text;
}

}  // namespace

std::vector<MountEntry> read_mounts() {
  std::vector<MountEntry> mounts;
  std::ifstream file("/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    MountEntry mount;
    words >> mount.id >> mount.parent >> mount.device >> word >> word;  // and root, mountpoint
    mount.mountpoint = unescape(word);
    while (words >> word && word != "-") {
    }
    words >> mount.type >> word;
    mount.source = unescape(word);
    mounts.push_back(std::move(mount));
  }
  return mounts;
}

std::optional<MountEntry> mount_at(const fs::path& mountpoint) {
  std::optional<MountEntry> found;
  for (auto& mount : read_mounts()) {  // later lines are mounted on top of earlier ones
    if (mount.mountpoint == mountpoint) found = std::move(mount);
  }
  return found;
}

std::optional<MountEntry> fuse_mount_at(const fs::path& mountpoint) {
  auto found = mount_at(mountpoint);
  if (found && !found->type.starts_with("fuse")) found.reset();
  return found;
}

bool is_mounted(const fs::path& mountpoint, const std::string& data_set) {
  const auto mount = mount_at(mountpoint);
  return mount && mount->type == "fuse.sharefs" && mount->source == data_set;
}

std::optional<MountEntry> mount_of(const fs::path& path) {
  std::optional<MountEntry> found;
  for (auto& mount : read_mounts()) {  // later ones hide earlier ones
    if (is_within(path, mount.mountpoint)) found = std::move(mount);
  }
  return found;
}

// Of statfs the kernel keeps no answer; what stat says of a mount that somebody looks at may be from before.
bool is_dead_mount(const fs::path& mountpoint) {
  struct statfs status {};
  return fuse_mount_at(mountpoint) && statfs(mountpoint.c_str(), &status) != 0 &&
         (errno == ENOTCONN || errno == ECONNABORTED);
}

std::string unmount(const fs::path& mountpoint, Unmount how) {
  if (geteuid() != 0) {
    const auto result = run_fusermount({how == Unmount::lazy ? "-uz" : "-u", "--", mountpoint.string()});
    return result.status == 0 ? "" : result.message.empty() ? "fusermount3 fails" : result.message;
  }
  const int flags = UMOUNT_NOFOLLOW | (how == Unmount::lazy ? MNT_DETACH : 0);
  return umount2(mountpoint.c_str(), flags) == 0 ? "" : strerror(errno);
}

bool means_busy(const std::string& why) { return why.ends_with(strerror(EBUSY)); }

SetAside::SetAside(const fs::path& mountpoint) : mountpoint_(resolve_mountpoint(mountpoint)) {
  if (geteuid() != 0 || !is_dead_mount(mountpoint_)) return;
  mount_ = open_tree(AT_FDCWD, mountpoint_.c_str(), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
  const std::string why = mount_ < 0 ? strerror(errno) : unmount(mountpoint_, Unmount::lazy);
  if (why.empty()) return;
  if (mount_ >= 0) close(mount_);
  throw std::runtime_error(mountpoint_.string() +
                           " has a mount whose daemon is gone, and it cannot be set aside: " + why);
}

SetAside::~SetAside() {
  if (mount_ < 0) return;
  move_mount(mount_, "", AT_FDCWD, mountpoint_.c_str(), MOVE_MOUNT_F_EMPTY_PATH);
  close(mount_);
}

fs::path resolve_mountpoint(const fs::path& path) {
  fs::path absolute = fs::absolute(path).lexically_normal();
  if (!absolute.has_filename()) absolute = absolute.parent_path();
  std::error_code error;
  if (!fuse_mount_at(absolute)) {
    if (fs::path whole = fs::canonical(absolute, error); !error) return whole;
  }
  const fs::path parent = fs::weakly_canonical(absolute.parent_path(), error);
  return error ? absolute : parent / absolute.filename();
}

bool is_within(const fs::path& path, const fs::path& folder) {
  const auto [end, rest] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return end == folder.end();
}

}  // namespace sharefs
