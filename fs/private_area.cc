#include "fs/private_area.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "meta/types.h"

namespace sharefs {

bool is_private(int directory) {
  constexpr mode_t kOthers = S_IRWXG | S_IRWXO;
  struct stat found {};
  if (::fstat(directory, &found) != 0) return false;
  const bool ours = S_ISDIR(found.st_mode) && found.st_uid == ::geteuid() && (found.st_mode & kOthers) == 0;
  if (!ours) errno = EPERM;
  return ours;
}

UniqueFd open_private_area(int store) {
  UniqueFd area(
      ::openat(store, std::string(kPrivateArea).c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!area && (errno == ELOOP || errno == ENOTDIR || errno == EACCES)) errno = EPERM;
  return area && is_private(area.get()) ? std::move(area) : UniqueFd();
}

bool lock_private_area(int area) { return ::flock(area, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

}  // namespace sharefs
