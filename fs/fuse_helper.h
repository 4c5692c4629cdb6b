// fusermount3, which mounts and unmounts for ordinary users.
#pragma once

#include <string>
#include <vector>

namespace sharefs {

struct FusermountResult {
  int status = 0;  // 0: it worked
  std::string message;
};

// Returns its first line of error output, in English. `socket`, if not -1, is where it sends the device. Any
// thread; waits for it.
FusermountResult run_fusermount(std::vector<std::string> arguments, int socket = -1);

}  // namespace sharefs
