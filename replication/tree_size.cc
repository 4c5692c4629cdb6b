#include "replication/tree_size.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>

#include "meta/types.h"

namespace sharefs {

namespace {

// An entry of the root is moved when ownership changes; everything is read by who runs this.
std::string trouble_with(const std::filesystem::path& path, const struct stat& st, bool top) {
  struct statx found {};
  if (top && ::statx(AT_FDCWD, path.c_str(), AT_SYMLINK_NOFOLLOW, STATX_TYPE, &found) == 0 &&
      (found.stx_attributes & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)) != 0)
    return "cannot be moved: chattr -i -a it first";
  const bool directory = S_ISDIR(st.st_mode);
  if ((directory || S_ISREG(st.st_mode)) && ::geteuid() != 0 &&
      ::faccessat(AT_FDCWD, path.c_str(), directory ? R_OK | X_OK : R_OK, AT_EACCESS) != 0 && errno == EACCES)
    return std::string("cannot be read by this user: chmod ") + (directory ? "u+rx" : "u+r") + " it first";
  return "";
}

}  // namespace

TreeSize measure(const std::filesystem::path& directory) {
  namespace stdfs = std::filesystem;
  TreeSize size;
  std::error_code ignored;  // entries may vanish while we look
  for (stdfs::recursive_directory_iterator
           it(directory, stdfs::directory_options::skip_permission_denied, ignored),
       end;
       it != end; it.increment(ignored)) {
    struct stat st {};
    if (::lstat(it->path().c_str(), &st) != 0) continue;
    if (it.depth() == 0 && it->path().filename() == kPrivateArea) {
      it.disable_recursion_pending();
      continue;
    }
    if (size.trouble.empty())
      if (const auto what = trouble_with(it->path(), st, it.depth() == 0); !what.empty())
        size.trouble = "'" + it->path().lexically_relative(directory).string() + "' in the store " + what;
    ++size.files;
    size.bytes += static_cast<std::uint64_t>(st.st_blocks) * 512;
    if (S_ISREG(st.st_mode))
      size.data +=
          std::min(static_cast<std::uint64_t>(st.st_size), static_cast<std::uint64_t>(st.st_blocks) * 512);
    size.devices = size.devices || S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode);
    if (size.owners.size() <= TreeSize::kMaxOwners) size.owners.insert(st.st_uid);
    if (size.groups.size() <= TreeSize::kMaxOwners) size.groups.insert(st.st_gid);
  }
  return size;
}

}  // namespace sharefs
