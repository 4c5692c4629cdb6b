// Serves the requests of other sites: the owner's end of Peer.
//
// Exactly once: per client a window of the replies to its non-queries, freed by Request.answered_below. A
// request whose seq is in the window is answered from it; one that is being performed (or is held as a
// record) is not started again, its reply goes to where it was asked from last. The windows are live state
// and are handed over. A request below answered_below is a late copy and is refused (ESTALE). One that its
// caller has given up, and that is not in the window, gets EINTR there, for copies that come later still.
//
// A client belongs to the site that attached it; a request of another site's client is refused (EPERM). A
// request of an unknown client is answered «moved» to this very site: its Peer attaches it again (the owner's
// process was another), and what was on its way behind it.
//
// A site has one mount. Its ids grow from mount to mount: an Attach ends the clients before it, is answered
// when what they asked has been performed, and is itself refused (ESTALE) if it comes after a later one. So
// what a dead process had handed to its kernel's connections, and arrives minutes later, changes nothing.
//
// Takeover: restore() begins it, once() ends it. In between, requests of other sites wait here, because any
// of them may be a record that is performed meanwhile. Beyond some number and bytes they are sent away as
// before: «moved» to the former owner has their Peers ask again soon.
//
// Threads: reactor thread only.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "meta/executor.h"
#include "replication/transport.h"

namespace sharefs {

class RequestServer {
 public:
  // `local`: where requests are performed (the Gate). It is asked only while this site is the owner.
  RequestServer(Transport& transport, Executor& local);
  ~RequestServer();

  // Serves from now on (owner), or answers «moved» (not the owner; also the state after construction).
  // While this site takes over. `waits`: the request is kept back until the records have been performed.
  // This client has the answers to all its writes that it acknowledged ahead.
  void ahead_answered(std::uint64_t client);
  // Writebacks are not: a record may wait for them.
  void on_takeover(std::function<void(const pb::Request&)> waits);
  void serve();
  void redirect(const SiteName& owner, Epoch epoch);
  // A client of this site is served from now on, as after an Attach. False: the site has a later mount.
  bool admit(const SiteName& site, std::uint64_t client);
  // The site's process has ended: none of its clients but `except` is served any more.
  void expire(const SiteName& site, std::uint64_t except = 0);

  // An Ask of another site.
  void ask(const SiteName& from, Message message);

  std::vector<pb::Client> windows() const;  // live state
  void restore(const std::vector<pb::Client>& windows);
  // A record of a handoff has been performed here: its reply belongs into the window.
  void note(const pb::Request& request, const pb::Outcome& outcome, Bytes data);
  // Answers from the windows what they know, and performs everything else at `local`: for records, and for
  // what this site's own mount asked the old owner. Lives no longer than this and `local`.
  std::unique_ptr<Executor> once(Executor& local);
  // Answers from the window if the request has been performed; false: it has not.
  bool answer_known(const SiteName& site, const pb::Request& request);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
