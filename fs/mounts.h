// What is mounted where (/proc/self/mountinfo), and unmounting it, with and without privileges.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace sharefs {

struct MountEntry {
  std::uint64_t id = 0, parent = 0;  // of mounts: one that is mounted in another has that as its parent
  std::filesystem::path mountpoint;
  std::string device;  // major:minor, of one mounted file system alone
  std::string type;
  std::string source;
};

std::vector<MountEntry> read_mounts();
// The topmost mount at exactly this path.
std::optional<MountEntry> mount_at(const std::filesystem::path& mountpoint);
// The same, if it is one of FUSE.
std::optional<MountEntry> fuse_mount_at(const std::filesystem::path& mountpoint);
// By this data set, and not covered by another mount.
bool is_mounted(const std::filesystem::path& mountpoint, const std::string& data_set);
// The mount that holds this path.
std::optional<MountEntry> mount_of(const std::filesystem::path& path);
// A mount whose daemon is gone.
bool is_dead_mount(const std::filesystem::path& mountpoint);

enum class Unmount { busy_fails, lazy };
// Returns why it failed, in a line, or "". Never follows a symbolic link at the end; never asks the daemon
// behind the mount.
std::string unmount(const std::filesystem::path& mountpoint, Unmount how);
bool means_busy(const std::string& why);

// For its life a directory is seen without the dead mount that covers it, which is put back in the end: an
// instant in which others see the directory as well. Only for root; does nothing where no mount is dead.
// Throws why in one line if it cannot be done.
class SetAside {
 public:
  explicit SetAside(const std::filesystem::path& mountpoint);
  ~SetAside();
  SetAside(const SetAside&) = delete;
  SetAside& operator=(const SetAside&) = delete;

 private:
  const std::filesystem::path mountpoint_;
  int mount_ = -1;
};

// The absolute path without symbolic links, without touching the last component (it may be a dead mount).
std::filesystem::path resolve_mountpoint(const std::filesystem::path& path);

// Is `path` below `folder` or the same?
bool is_within(const std::filesystem::path& path, const std::filesystem::path& folder);

}  // namespace sharefs
