// Puts a thread behind the applications and the requests that they wait for: making and applying an image
// takes all the time that nobody else needs.
//
// Nothing happens without CAP_SYS_NICE, since the thread could not be put back.
#pragma once

namespace sharefs {

class Background {
 public:
  Background();  // the calling thread, until end() or the destructor on that same thread
  ~Background() { end(); }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  void end();

 private:
  bool active_ = false;
};

}  // namespace sharefs
