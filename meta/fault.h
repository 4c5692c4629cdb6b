// Named fault points: places in production code at which a test can kill, stop or fail the process.
//
// SHAREFS_FAULTS holds `name=action` pairs separated by commas; an action is kill (SIGKILL to self), stop
// (SIGSTOP), sleep:MS, or error (fault_point returns true and the caller takes its error path); `action@N`
// fires at the N-th passage only. A point that is not named costs one load. Points are listed in
// tests/README.md.
#pragma once

namespace sharefs {

// Passes the point `name`. Returns true when the test asked for an error here. Any thread.
bool fault_point(const char* name);

}  // namespace sharefs
