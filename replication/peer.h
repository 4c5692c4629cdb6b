// The Executor of a site that is not the owner: asks the owner, pipelined, and waits out every interruption.
//
// Invariants
//  - A request keeps its (client, seq) through every resend, so the owner performs it once.
//  - Requests are sent again, in their first order, when a connection that broke is back and when the owner
//  has moved.
//  - What was not sent yet is not sent for a caller that was killed (Cancel); what is sent again for one says
//  so (Request.given_up): done later, it would overtake what others have written since.
//  - A lock that was asked for again says that changes were met (Outcome.changes_met): the owner cannot know
//  in which order its client learns of what was lost.
//  - A reply is given exactly once; a late second answer is dropped, and so is one of a site that was not
//  asked.
//  - An owner that does not know a client (it lost its memory in a crash) says «moved» to itself: the client
//  is attached
//    again, and everything sent again behind that.
//
// Threads: reactor thread only.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "fs/live_state.h"
#include "meta/executor.h"
#include "replication/transport.h"

namespace sharefs {

// The reply to a lock that is asked for again: it may be granted before a change that was asked for behind
// it, and is asked for again, too, tells that pages are old (Outcome.changes_met).
Reply telling_of_changes(Reply granted);

class Peer final : public Executor {
 public:
  struct Options {
    // Requests fail with ETIMEDOUT after; unset: wait for ever. Waiting for a lock of a connected owner does
    // not count.
    std::optional<std::chrono::milliseconds> timeout;
  };
  Peer(Options options, Transport& transport, Reactor& reactor);
  ~Peer() override;

  void execute(const pb::Request& request, Bytes data, Reply reply) override;
  // What this site, which was the owner, has begun, and left to the new one.
  void execute_again(const pb::Request& request, Bytes data, Reply reply);

  // The new owner performs the Cancel of this lock, which is asked there, too, before it serves.
  void cancelled(std::uint64_t client, std::uint64_t seq);
  // Who is asked from now on; whatever is unanswered is sent again to it. An older epoch than known is
  // ignored.
  void set_owner(const SiteName& owner, Epoch epoch);
  // This site has become the owner, and has records to perform: queries and writebacks do not wait for those,
  // which may wait for the pages that a kernel keeps locked until these are answered.
  void resubmit_urgent_to(Executor& local);
  // This site becomes the owner: hands every unanswered request, in order, to `local` and sends nothing more.
  void resubmit_to(Executor& local);
  // Called when an outcome comes that nobody waits for any more, and that promises something: whoever asked
  // knows nothing of what it says.
  void on_stray_promise(std::function<void()> stray);
  // Called when an owner answers «moved».
  void on_moved(std::function<void(const SiteName& owner, Epoch epoch)> moved);

  // Feed from the Transport: Answer, Moved, and whom requests can be sent to (again). `broken`: what has been
  // sent may be lost.
  void answer(const SiteName& from, const Message& message);
  void connected(const SiteName& site, bool broken);

  // What an owner that has forgotten the client is asked again, behind the Attach (Holdings::requests).
  void remember(std::function<std::vector<pb::Request>(ClientId)> holdings);

  std::size_t unanswered() const;
  void for_each_unanswered(const std::function<void(const pb::Request&)>& visit);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
