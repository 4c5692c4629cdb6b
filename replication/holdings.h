// What this site's mount holds at the owner — open handles and locks — remembered here as well, so that it
// can be told again to an owner whose process was another: live state dies with the owner's process, but not
// with the applications that rely on it.
//
// Threads: reactor thread only.
#pragma once

#include <vector>

#include "fs/live_state.h"
#include "meta/executor.h"

namespace sharefs {

class Holdings {
 public:
  // True if the outcome of such a request must be told to answered().
  static bool concerns(const pb::Request& request);
  void answered(const pb::Request& request, const pb::Outcome& outcome);

  // The requests that make an owner know again what `client` holds; without seqs. A lock that somebody else
  // was granted meanwhile cannot be had back.
  std::vector<pb::Request> requests(ClientId client) const;
  const OpenTable& opens() const { return opens_; }
  const LockTable& locks() const { return locks_; }

  // This site was the owner until now: its own tables say what its mount holds.
  void take(ClientId client, const OpenTable& opens, const LockTable& locks);
  void clear();

 private:
  OpenTable opens_;
  LockTable locks_;
};

}  // namespace sharefs
