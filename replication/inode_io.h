// System calls on inodes that both halves of the image, verify and relocation need: statx, listings, xattrs,
// link targets. All of them work on descriptors, or on one name in a directory descriptor, and never follow a
// symbolic link. On failure they throw std::system_error, whose what() is one clear line.
#pragma once

#include <dirent.h>
#include <sys/stat.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fs/inode_table.h"
#include "fs/stamps.h"
#include "replication/power.h"

namespace sharefs {

constexpr std::uint64_t kMaxFileSize = std::numeric_limits<std::int64_t>::max();

[[noreturn]] void throw_errno(const std::string& what);  // of the current errno
[[noreturn]] void throw_errno(int error, const std::string& what);

Backing stat_inode(int fd);
// nullopt: no such name.
std::optional<Backing> stat_name(int directory, const std::string& name);

inline bool is_regular(const Backing& backing) { return S_ISREG(backing.stx_mode); }
inline bool is_directory(const Backing& backing) { return S_ISDIR(backing.stx_mode); }
bool same_inode(const Backing& a, const Backing& b);
struct timespec to_timespec(std::int64_t nanoseconds);

// An inode opened by its name. What is not a regular file is only opened as a path (O_PATH): opening a device
// or a FIFO does something.
struct OpenedInode {
  UniqueFd fd;
  Backing backing{};
  bool path_only = false;
};
// `type` (DT_*) is a hint. Nothing if there is no such name (any more).
std::optional<OpenedInode> open_name(int directory, const std::string& name, unsigned type);
// The inode for reading if it is a regular file or a directory, otherwise as a path. Nothing if it is gone.
std::optional<OpenedInode> open_inode(InodeTable& inodes, InodeId id);

// The id of what was opened as `name`; nothing if it is gone meanwhile, or of another file system.
std::optional<InodeId> identify_opened(InodeTable& inodes, InodeId parent, const std::string& name,
                                       int directory, const OpenedInode& opened);

struct ListedName {
  std::string name;
  std::uint64_t ino = 0;
  unsigned char type = 0;  // DT_*
};
// Every name in the directory but "." and "..".
void visit_directory(int fd, const std::function<void(std::string_view name, const dirent64&)>& visit);
// Everything in the directory but "." and "..", in order of inode number (the order in which reading them is
// cheapest).
std::vector<ListedName> list_directory(int fd);

using Xattrs = std::map<std::string, std::string>;
// `path_only`: the descriptor is an O_PATH one. Empty where the file system has none.
Xattrs read_xattrs(int fd, bool path_only);
// Makes the xattrs exactly `wanted`, given what is there. Returns whether anything was changed.
bool write_xattrs(int fd, bool path_only, const Xattrs& wanted);

std::string read_link(int fd);  // of a symbolic link opened as a path

// The name by which /proc reaches an open descriptor of this process.
std::string proc_path(int fd);

// Where a directory is now: its parent, and its name there. Throws when it has none (removed).
struct Place {
  UniqueFd directory;
  std::string name;
};
Place find_directory(int fd);

// Keeps the ctime that an inode presents over a change of its names by this site: construct before, restore()
// after.
class CtimeKeeper {
 public:
  // Whose ctime is in `doubtful` keeps the new one: with the old one and the new stamp it would be believed.
  CtimeKeeper(InodeTable& inodes, InodeId id, const Backing& before, const Power::Interval& doubtful = {})
      : inodes_(inodes),
        id_(id),
        ctime_(inodes.presented_ctime(id, before)),
        doubted_(doubtful.contains(timestamp_ns(before.stx_ctime))) {}
  void restore(const Backing& after) {
    if (!doubted_) inodes_.import_ctime(id_, ctime_, after);
  }

 private:
  InodeTable& inodes_;
  InodeId id_;
  std::int64_t ctime_;
  bool doubted_;
};

}  // namespace sharefs
