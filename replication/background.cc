#include "replication/background.h"

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "meta/log.h"

namespace sharefs {
namespace {

// Two threads, as a source has them, weigh an eleventh of one of usual niceness together.
constexpr int kSteps = 14;

bool may_raise() {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3]{};
  return ::syscall(SYS_capget, &header, sets) == 0 && (sets[0].effective >> CAP_SYS_NICE & 1) != 0;
}

// On Linux niceness is a thread's own. Relative to what the daemon was started with.
void be_nicer(const std::vector<pid_t>& threads, int steps) {
  for (const pid_t thread : threads) {
    const auto id = static_cast<id_t>(thread);
    if (::setpriority(PRIO_PROCESS, id, ::getpriority(PRIO_PROCESS, id) + steps) != 0)
      log::warn("the priority of a thread cannot be set");
  }
}

}  // namespace

Background::Background(pid_t another) {
  if (!may_raise() || ::getpriority(PRIO_PROCESS, 0) + kSteps >= 19) return;
  threads_.push_back(::gettid());
  if (another != 0) threads_.push_back(another);
  be_nicer(threads_, kSteps);
}

void Background::end() { be_nicer(std::exchange(threads_, {}), -kSteps); }

}  // namespace sharefs
