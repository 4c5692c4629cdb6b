#include "meta/caller.h"

#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

namespace sharefs {
namespace {

// Of the thread itself. Both halves of 32 capabilities.
using Capabilities = std::array<__user_cap_data_struct, 2>;

struct ThreadIdentity {
  bool prepared = false;
  bool privileged = false;
  bool has_reserves = false;  // can CAP_SYS_RESOURCE be had
  std::uint32_t uid = 0, gid = 0, umask = 0;
  Capabilities capabilities{};
};
thread_local ThreadIdentity current;

constexpr std::uint32_t kOwnUmask = 077;
constexpr std::uint32_t kReserves = 1U << CAP_SYS_RESOURCE;
static_assert(CAP_SYS_RESOURCE < 32);

bool capability_call(long call) {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  return ::syscall(call, &header, current.capabilities.data()) == 0;
}

// With it file systems give out their last blocks, and more than a quota.
void use_reserves(bool allowed) {
  auto& effective = current.capabilities[0].effective;
  const std::uint32_t wanted = allowed ? effective | kReserves : effective & ~kReserves;
  if (!current.has_reserves || std::exchange(effective, wanted) == wanted) return;
  if (!capability_call(SYS_capset))
    throw std::system_error(errno, std::generic_category(), "the capabilities of a thread");
}

// glibc's umask and setfs*id: the umask is shared between threads until CLONE_FS is undone; setfs*id of the
// kernel are per thread.
void prepare() {
  if (::unshare(CLONE_FS) != 0)
    throw std::system_error(errno, std::generic_category(), "a umask of its own for a thread");
  current.privileged = ::geteuid() == 0;
  // Without, everybody's new files would be root's.
  if (current.privileged &&
      ::prctl(PR_SET_SECUREBITS, ::prctl(PR_GET_SECUREBITS) | SECBIT_NO_SETUID_FIXUP) != 0)
    throw std::system_error(errno, std::generic_category(), "root without CAP_SETPCAP cannot serve others");
  current.has_reserves = current.privileged && capability_call(SYS_capget) &&
                         (current.capabilities[0].effective & kReserves) != 0;
  current.uid = ::geteuid();
  current.gid = ::getegid();
  if (current.privileged) {  // a thread begins as the caller that its maker is at the moment
    ::syscall(SYS_setfsuid, current.uid);
    ::syscall(SYS_setfsgid, current.gid);
  }
  current.umask = kOwnUmask;
  ::umask(kOwnUmask);
  current.prepared = true;
}

}  // namespace

void become_caller(std::uint32_t uid, std::uint32_t gid) {
  if (!current.prepared) prepare();
  if (!current.privileged) return;
  if (current.uid != uid) {
    ::syscall(SYS_setfsuid, uid);
    current.uid = uid;
    use_reserves(uid == 0);
  }
  if (current.gid != gid) ::syscall(SYS_setfsgid, gid);
  current.gid = gid;
}

void become_caller(std::uint32_t uid, std::uint32_t gid, std::uint32_t umask) {
  become_caller(uid, gid);
  if (current.umask != umask) ::umask(umask & 0777);
  current.umask = umask;
}

void become_self() {
  if (current.prepared) become_caller(::geteuid(), ::getegid(), kOwnUmask);
}

CallerKept::CallerKept() {
  if (!current.prepared) prepare();
  uid_ = current.uid;
  gid_ = current.gid;
  umask_ = current.umask;
}

CallerKept::~CallerKept() { become_caller(uid_, gid_, umask_); }

}  // namespace sharefs
