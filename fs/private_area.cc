#include "fs/private_area.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
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

bool takes_two_names_for_one(int area) {
  constexpr const char* kName = "probe-\xc3\xa9";  // é
  const UniqueFd file(::openat(area, kName, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!file) return false;
  const auto is_there = [&](const char* name) {
    struct stat found {};
    return ::fstatat(area, name, &found, AT_SYMLINK_NOFOLLOW) == 0;
  };
  const bool both = is_there("PROBE-\xc3\xa9") || is_there("probe-e\xcc\x81");
  ::unlinkat(area, kName, 0);
  return both;
}

bool lock_private_area(int area) { return ::flock(area, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

bool move_name(int from, const std::string& name, int to, const std::string& new_name) {
  const auto attempt = [&] {
    return ::renameat2(from, name.c_str(), to, new_name.c_str(), RENAME_NOREPLACE) == 0;
  };
  if (attempt()) return true;
  if (errno != EACCES) return false;
  struct stat found {};
  const bool known = ::fstatat(from, name.c_str(), &found, AT_SYMLINK_NOFOLLOW) == 0;
  const mode_t mode = found.st_mode & 07777u;
  if (!known || !S_ISDIR(found.st_mode) || (mode & S_IWUSR) != 0 ||
      ::fchmodat(from, name.c_str(), mode | S_IWUSR, 0) != 0) {
    errno = EACCES;
    return false;
  }
  const bool moved = attempt();
  const int error = errno;
  ::fchmodat(moved ? to : from, (moved ? new_name : name).c_str(), mode, 0);
  errno = error;
  return moved;
}

}  // namespace sharefs
