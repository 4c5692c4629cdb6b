// What a power cut may have taken from this site.
//
// Two things follow from one. What was acknowledged and not synced is gone: mounts of other sites have to
// know (Unsynced). And a file of an old image, or of one that was being received, may have the times of what
// was written last without its bytes: journals keep attributes, bytes are written back later. Such files are
// not taken for what their attributes say, but compared.
//
// A sync that fails does the second of them, too.
//
// Threads: that of the State.
#pragma once

#include <chrono>
#include <cstdint>

#include "meta/state.h"

namespace sharefs {

class Power {
 public:
  // At the start of a process.
  explicit Power(State& state);

  // Another one: the machine may have lost what was not synced (Hello.power).
  std::uint64_t number() const { return number_; }

  // Whatever of the store was stamped before `when` (ns since 1970) is on the disk. As durable as a later
  // commit.
  void synced(std::int64_t when);
  // A sync has failed: what was stamped since the last one that did not is doubtful, as after a power cut.
  void sync_failed();
  // The process ends, and everything is on the disk.
  void ends_synced();
  // What the last process has noted; false as long as one runs.
  static bool ended_synced(State& state);

  // Files of the store with a ctime in here may lack what was written last.
  struct Interval {
    std::int64_t from = 0, to = 0;
    bool contains(std::int64_t ctime) const { return from <= ctime && ctime < to; }
  };
  Interval doubtful();
  // The same of all power cuts, also for a store that is the authority: what others received of such files
  // before may be what this one has lost.
  Interval lost();
  // What the site has lost from which this store was taken over: others may have received it from that one.
  void inherit(const Interval& lost);
  // The store is the authority now, whatever it has.
  void trust();

 private:
  Interval interval(const char* setting);
  // `clock_error`: by how much the clock may be behind.
  void extend(const char* setting, std::int64_t from, std::chrono::nanoseconds clock_error);
  void set(const char* setting, const Interval& interval);

  State& state_;
  std::uint64_t number_ = 0;
};

}  // namespace sharefs
