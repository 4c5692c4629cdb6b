// New files belong to who asked for them: the thread that makes them takes on the caller's file-system
// identity, and the backing file system does the rest (setgid directories, default ACLs, quotas).
//
// The identity stays until another caller comes, so a steady stream of one user costs no system call.
// Capabilities are kept all along: who may do what was decided by the caller's kernel.
//
// Threads: the identity is the thread's own; used on the reactor thread.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace sharefs {

// Becomes the caller as far as making files goes: fsuid, fsgid and umask. Without privilege only the umask.
void become_caller(std::uint32_t uid, std::uint32_t gid, std::uint32_t umask);

// Becomes the process itself again, with umask 077. Before this thread makes files of its own.
void become_self();

}  // namespace sharefs
