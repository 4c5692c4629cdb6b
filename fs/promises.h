// Promises to other sites: what they were told of names and attributes stays true until they are called back.
//
// With several mounts the kernels cache no names; the daemons do (fs/name_cache.h), so that a look at what
// was seen before does not cross the network. They lend their kernels the attributes. The owner notes who was
// told what (its own mount like any other: without lent attributes a kernel asks several times for each
// step), and before a change by somebody else is acknowledged, every holder has forgotten it (callback
// promises, as in AFS: Howard et al., «Scale and performance in a distributed file system», 1988).
//
// Invariants
//  - A promise of a directory covers its attributes and all its names, one of any other inode its attributes.
//  - What a mutation changes is what the store reports to the change log: whoever forgets to report loses
//  data in a handoff first.
//  - Stamps order promises and recalls: a holder that has been recalled at stamp s believes no older outcome,
//  however late that arrives.
//  - A holder that does not answer is waited for at most kPromiseLease. It stops believing by itself before
//  that, since it believes only what it was promised by an owner that has answered it within kPromiseTrust.
//  - A new owner knows no promises: until every client has forgotten those of its predecessor, it
//  acknowledges no change.
//
// A recall waits for kernels to drop attributes that they were lent, for which they take no lock that a
// request holds, and for pages only of files which the owner does not know to be open and the mount is not
// changing (FrontEnd::promise_broken): so it cannot deadlock.
//
// Position: Coherence -> Promises -> Once -> Store. Threads: reactor thread only.
#pragma once

#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "fs/coherence.h"
#include "fs/live_state.h"
#include "meta/change_log.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

constexpr auto kPromiseTrust = std::chrono::milliseconds(2000);
constexpr auto kPromiseLease = std::chrono::milliseconds(2500);
static_assert(kPromiseLease > kPromiseTrust);

// A stamp (Outcome.promise, RecallOrder.stamp) only grows, also from owner to owner; another process of an
// owner begins anew.
constexpr unsigned kStampBits = 40;
constexpr Epoch epoch_of_stamp(std::uint64_t stamp) { return stamp >> kStampBits; }

// Whether an entry of a listing tells of its inode as a Lookup would.
inline bool tells_inode(const pb::DirEntry& entry) {
  return entry.attr().nlink() != 0 && entry.name() != "." && entry.name() != "..";
}

// Leaves what a listing without attributes tells.
inline void strip_attributes(pb::DirEntry& entry) {
  pb::Attr bare;
  bare.set_id(entry.attr().id());
  bare.set_mode(entry.attr().mode() & S_IFMT);
  *entry.mutable_attr() = bare;
}

class Promises final : public Executor, public ChangeObserver {
 public:
  // `own`: the client of this site.
  Promises(Executor& store, ChangeObserver& log, const OpenTable& opens, ClientId own, Reactor& reactor,
           Recall recall, Reactor::Clock::duration lease = kPromiseLease);
  ~Promises() override;

  void execute(const pb::Request& request, Bytes data, Reply reply) override;
  void changing(const Change& change) override;
  // The store puts aside what it is performing: its next try is to be made within what this returns.
  std::function<void(const std::function<void()>& attempt)> put_aside();

  // This site owns at `epoch` from now on; `holders` may believe promises of the owner before (client 0:
  // those of all other sites).
  void begin(Epoch epoch, const std::vector<ClientId>& holders);
  // This site is not the owner any more: promises nothing, forgets what it promised.
  void end();

  // Promises nothing for a while: who has been promised something has been told to the next owner.
  void pause(bool paused) { paused_ = paused; }

  // Called when every site has followed the order that begin() gave to client 0, or is not waited for any
  // more.
  void on_recovered(std::function<void()> recovered) { on_recovered_ = std::move(recovered); }

  // For how long the sites that have not followed it are waited for beyond the lease: those that are heard
  // may show what their pages say as long as they are, and their answers may be behind what they write.
  void on_lease(std::function<Reactor::Clock::duration()> more) { more_ = std::move(more); }

  // Whether anybody but this client may rely on a promise of the inode.
  bool promised_to_others(InodeId id, ClientId client) const;

  std::size_t size() const { return holders_.size(); }  // inodes that somebody was promised something of

 private:
  using Mask = std::uint64_t;  // bit i: clients_[i]
  static constexpr std::size_t kMaxClients = 64;
  static constexpr std::size_t kMaxInodes = 200'000;  // about 10 MiB
  using Ids = std::vector<InodeId>;
  struct Waiting;
  class Collecting;
  // An order to forget that has not been followed yet. Whatever else changes one of its inodes waits for it
  // too.
  struct Recalling {
    ClientId client = 0;
    Ids ids;
    bool all = false;
    Reactor::TimerId lease = 0;
    std::vector<std::shared_ptr<Waiting>> waiting;
  };

  bool promises_to(ClientId client) const;
  bool settled(ClientId client) const;
  bool grant(ClientId client, InodeId id);
  void query(const pb::Request& request, Bytes data, Reply reply);
  void performed(ClientId client, const Ids& changed, const pb::Outcome& outcome, Bytes data,
                 const Reply& reply);
  bool tell_changed(ClientId client, const Ids& changed, pb::Outcome& outcome);
  void recall_holders(const Ids& ids, ClientId except);
  void forget_all();
  void order(ClientId client, Ids ids, bool all);
  void wait(std::uint64_t number, Reactor::Clock::duration time);
  void followed(std::uint64_t number);
  Mask bit_of(ClientId client);
  std::uint64_t next_stamp() { return epoch_ << kStampBits | ++stamp_; }

  // constant after construction
  Executor& store_;
  ChangeObserver& log_;
  const OpenTable& opens_;
  const ClientId own_;
  Reactor& reactor_;
  const Recall recall_;
  const Reactor::Clock::duration lease_;
  std::function<void()> on_recovered_;
  std::function<Reactor::Clock::duration()> more_;
  // reactor thread
  Epoch epoch_ = 0;  // 0: not the owner
  std::uint64_t stamp_ = 0;
  bool paused_ = false;
  std::shared_ptr<Ids> collector_;  // of the mutation that the store is performing
  std::vector<ClientId> clients_;
  std::unordered_map<InodeId, Mask> holders_;
  std::map<std::uint64_t, Recalling> recalling_;  // by number
  std::uint64_t last_number_ = 0;
  std::shared_ptr<const bool> alive_ = std::make_shared<const bool>(true);  // replaced by end()
};

}  // namespace sharefs
