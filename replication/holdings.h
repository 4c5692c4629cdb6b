// What this site's mount holds at the owner — open handles and locks — remembered here as well, so that it
// can be told again to an owner whose process was another: live state dies with the owner's process, but not
// with the applications that rely on it.
//
// Between the NameCache and the Router, like Unsynced, so it sees the outcome of every request of the mount,
// whoever performed it: the owner, a new one as a record of a handoff, or this site before that. While this
// site owns, its own tables say what the mount holds.
//
// Threads: reactor thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "fs/live_state.h"
#include "meta/executor.h"
#include "replication/wire.pb.h"

namespace sharefs {

// What a request that was performed, with this outcome, has changed of what its client holds.
void hold(const pb::Request& request, const pb::Outcome& outcome, OpenTable& opens, LockTable& locks);

class Holdings final : public Executor {
 public:
  // `far`: another site owns.
  Holdings(Executor& next, std::function<bool()> far) : next_(next), far_(std::move(far)) {}

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // For an owner whose process is another and asks: without what requests that are on their way give up or
  // convert, and with the Opens among them that were answered early (see FrontEnd): their files may be read
  // already.
  void tell(ClientId client, pb::RecallDone& done) const;
  // For an owner that has forgotten the client: the requests that make it know again what the client holds;
  // without seqs, and without locks that requests on their way give up or convert. A lock that somebody else
  // was granted meanwhile cannot be had back.
  std::vector<pb::Request> requests(ClientId client) const;
  const OpenTable& opens() const { return opens_; }

  // This site was the owner until now: its own tables say what its mount holds.
  void take(ClientId client, const OpenTable& opens, const LockTable& locks);
  // It has become the owner.
  void clear();

 private:
  std::vector<LockTable::Lock> sure_locks(ClientId client) const;

  // constant after construction
  Executor& next_;
  const std::function<bool()> far_;
  // reactor thread
  std::uint64_t last_ = 0;
  std::map<std::uint64_t, pb::Request> unanswered_;  // those that concern what is held
  OpenTable opens_;
  LockTable locks_;
};

}  // namespace sharefs
