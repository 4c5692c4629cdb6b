// Puts threads behind the applications and the requests that they wait for: making and applying an image
// takes all the time that nobody else needs.
//
// Nothing happens without CAP_SYS_NICE, since a thread could not be put back.
#pragma once

#include <sys/types.h>

#include <vector>

namespace sharefs {

class Background {
 public:
  // The calling thread and, unless it is 0, another one of this process; until end() or the destructor.
  explicit Background(pid_t another = 0);
  ~Background() { end(); }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  void end();

 private:
  std::vector<pid_t> threads_;
};

}  // namespace sharefs
