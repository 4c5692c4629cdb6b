// A FUSE mount as the kernel knows it: the device its requests come from, and how to end it.
//
// Root mounts it itself; an ordinary user gets the device from fusermount3. The mount takes the place of a
// dead one that a killed process left there: applications go on without an error where nothing is mounted, in
// the directory below, so there is no such instant for root since Linux 6.5, and a short one otherwise. The
// mountpoint need not be empty.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "fs/inode_table.h"

namespace sharefs {

class FuseMount {
 public:
  // `source` is shown as the mounted device; `options` are as for mount -o, one or several per element.
  // Throws std::runtime_error with one line that says what to do.
  FuseMount(const std::filesystem::path& mountpoint, const std::string& source,
            const std::vector<std::string>& options);
  ~FuseMount();
  FuseMount(const FuseMount&) = delete;
  FuseMount& operator=(const FuseMount&) = delete;

  int device() const { return device_.get(); }
  const std::filesystem::path& mountpoint() const { return mountpoint_; }

  // Takes the mount out of the tree, once; what still uses it goes on until the device is closed. Any thread,
  // but not the one that serves the device: the kernel may write back dirty pages first.
  void detach();

 private:
  std::filesystem::path mountpoint_;  // canonical
  std::string mounted_as_;            // MountEntry::device
  UniqueFd device_;
};

}  // namespace sharefs
