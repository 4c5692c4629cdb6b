#include "replication/tree_size.h"

#include <sys/stat.h>

#include <algorithm>
#include <system_error>

#include "meta/types.h"

namespace sharefs {

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
