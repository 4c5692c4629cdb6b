#include "replication/tree_size.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>
#include <unordered_set>
#include <vector>

#include "replication/inode_io.h"

namespace sharefs {

namespace {

constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

// What cannot be changed here cannot be written over when the data set comes back; and everything is read by
// who runs this.
std::string trouble_with(int folder, const std::string& name, const Backing& backing) {
  if ((backing.stx_attributes & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)) != 0)
    return "cannot be moved: chattr -i -a it first";
  const bool directory = is_directory(backing);
  if ((directory || is_regular(backing)) && ::geteuid() != 0 &&
      ::faccessat(folder, name.c_str(), directory ? R_OK | X_OK : R_OK, AT_EACCESS) != 0 && errno == EACCES)
    return std::string("cannot be read by this user: chmod ") + (directory ? "u+rx" : "u+r") + " it first";
  return "";
}

// Two names in a directory elsewhere may be one in it, and one of the files would be lost.
bool folds_case(int directory) {
  int flags = 0;
  return ::ioctl(directory, FS_IOC_GETFLAGS, &flags) == 0 && (flags & FS_CASEFOLD_FL) != 0;
}

// Depth first, with one open directory at a time.
class Measure {
 public:
  explicit Measure(const std::filesystem::path& top) : top_(top) {}

  TreeSize run() {
    UniqueFd at(::open(top_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (at) enter(at.get(), "");
    while (!way_.empty()) {
      if (way_.back().below.empty()) {
        at = back(at.get());
        continue;
      }
      const std::string name = std::move(way_.back().below.back());
      way_.back().below.pop_back();
      UniqueFd child(::openat(at.get(), name.c_str(), kDirectoryFlags));
      if (child && enter(child.get(), name)) at = std::move(child);
    }
    return std::move(size_);
  }

 private:
  struct Level {
    std::string name;
    Backing backing;
    std::vector<std::string> below;  // directories that are still to be walked
  };

  // Entries may vanish while we look.
  bool enter(int directory, const std::string& name) {
    try {
      Level level{.name = name, .backing = stat_inode(directory), .below = {}};
      const Backing root = way_.empty() ? level.backing : way_.front().backing;
      if (folds_case(directory))
        complain(path(name),
                 "takes names that differ in case for one (chattr +F): move its files to another");
      for (auto& entry : list_directory(directory)) {
        if (way_.empty() && entry.name == kPrivateArea) continue;
        const auto backing = stat_name(directory, entry.name);
        if (!backing) continue;
        if (mounted_there(*backing, root)) {
          complain(path(name) + entry.name, "is a mount point: unmount it first");
          continue;
        }
        count(directory, name, entry.name, *backing);
        if (is_directory(*backing)) level.below.push_back(std::move(entry.name));
      }
      way_.push_back(std::move(level));
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  // To the directory above, unless this one has been moved meanwhile, or something is mounted over that one:
  // then by the way that it was reached, as far as that leads.
  UniqueFd back(int directory) {
    way_.pop_back();
    if (way_.empty()) return {};
    UniqueFd above = open_above(directory, kDirectoryFlags);
    if (is(above, way_.back())) return above;
    above = UniqueFd(::open(top_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    std::size_t reached = is(above, way_.front()) ? 1 : 0;
    while (reached > 0 && reached < way_.size()) {
      UniqueFd next(::openat(above.get(), way_[reached].name.c_str(), kDirectoryFlags));
      if (!is(next, way_[reached])) break;
      above = std::move(next);
      ++reached;
    }
    way_.resize(reached);
    return above;
  }

  static bool is(const UniqueFd& directory, const Level& level) {
    return directory && same_inode(stat_inode(directory.get()), level.backing);
  }

  void count(int directory, const std::string& parent, const std::string& name, const Backing& backing) {
    if (const auto what = trouble_with(directory, name, backing); !what.empty())
      complain(path(parent) + name, what);
    const std::uint64_t bytes = backing.stx_blocks * 512;
    // An inode counts once, also if it has names elsewhere; beyond so many, each of its names.
    if (!is_directory(backing) && backing.stx_nlink > 1 && linked_.size() < kMostLinked &&
        !linked_.insert(backing.stx_ino).second)
      return;
    ++size_.files;
    size_.bytes += bytes;
    if (is_regular(backing)) size_.data += std::min<std::uint64_t>(backing.stx_size, bytes);
    size_.devices = size_.devices || S_ISCHR(backing.stx_mode) || S_ISBLK(backing.stx_mode);
    if (size_.owners.size() <= TreeSize::kMaxOwners) size_.owners.insert(backing.stx_uid);
    if (size_.groups.size() <= TreeSize::kMaxOwners) size_.groups.insert(backing.stx_gid);
  }

  void complain(const std::string& entry, const std::string& what) {
    if (size_.trouble.empty()) size_.trouble = "'" + entry + "' in the store " + what;
  }

  std::string path(const std::string& parent) const {
    std::string path;
    for (const auto& level : way_)
      if (!level.name.empty()) path += level.name + "/";
    return parent.empty() ? path : path + parent + "/";
  }

  const std::filesystem::path top_;
  std::vector<Level> way_;
  TreeSize size_;
  static constexpr std::size_t kMostLinked = 500'000;  // about 20 MiB
  std::unordered_set<std::uint64_t> linked_;
};

}  // namespace

TreeSize measure(const std::filesystem::path& directory) { return Measure(directory).run(); }

}  // namespace sharefs
