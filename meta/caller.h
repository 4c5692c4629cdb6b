// Who changes files: the thread takes on the caller's file-system identity, and the backing file system does
// the rest. New files belong to who asked for them (setgid directories, default ACLs), and only root gets the
// blocks that are reserved for it and goes beyond quotas.
//
// The identity stays until another caller comes, so a steady stream of one user costs no system call.
// Capabilities are kept all along but CAP_SYS_RESOURCE: who may do what was decided by the caller's kernel.
//
// Threads: the identity is the thread's own; used on the reactor thread and on workers.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace sharefs {

// Becomes the caller as far as files are concerned: fsuid, fsgid, and what only root may use. Without
// privilege nothing.
void become_caller(std::uint32_t uid, std::uint32_t gid);

// Before files are made also their umask. Without privilege only that.
void become_caller(std::uint32_t uid, std::uint32_t gid, std::uint32_t umask);

// Becomes the process itself again, with umask 077. Before this thread writes files of its own; what is
// written to a Database does it by itself.
void become_self();

// In the middle of what a caller asked: the thread is that caller again when this goes.
class CallerKept {
 public:
  CallerKept();
  ~CallerKept();
  CallerKept(const CallerKept&) = delete;
  CallerKept& operator=(const CallerKept&) = delete;

 private:
  std::uint32_t uid_, gid_, umask_;
};

}  // namespace sharefs
