#include "fs/caller.h"

#include <linux/securebits.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace sharefs {
namespace {

struct ThreadIdentity {
  bool prepared = false;
  bool privileged = false;
  std::uint32_t uid = 0, gid = 0, umask = 0;
};
thread_local ThreadIdentity current;

constexpr std::uint32_t kOwnUmask = 077;

// glibc's umask and setfs*id: the umask is shared between threads until CLONE_FS is undone; setfs*id of the
// kernel are per thread.
void prepare() {
  if (::unshare(CLONE_FS) != 0)
    throw std::system_error(errno, std::generic_category(), "a umask of its own for a thread");
  current.privileged = ::geteuid() == 0 &&
                       ::prctl(PR_SET_SECUREBITS, ::prctl(PR_GET_SECUREBITS) | SECBIT_NO_SETUID_FIXUP) == 0;
  current.uid = ::geteuid();
  current.gid = ::getegid();
  current.umask = kOwnUmask;
  ::umask(kOwnUmask);
  current.prepared = true;
}

}  // namespace

void become_caller(std::uint32_t uid, std::uint32_t gid, std::uint32_t umask) {
  if (!current.prepared) prepare();
  if (current.privileged) {
    if (current.uid != uid) ::syscall(SYS_setfsuid, uid);
    if (current.gid != gid) ::syscall(SYS_setfsgid, gid);
    current.uid = uid;
    current.gid = gid;
  }
  if (current.umask != umask) ::umask(umask & 0777);
  current.umask = umask;
}

void become_self() {
  if (current.prepared) become_caller(::geteuid(), ::getegid(), kOwnUmask);
}

}  // namespace sharefs
