// Keeps what the kernels of several sites have cached equal to the owner's files (P10).
//
// With several mounts, kernels cache no names (timeouts 0), and attributes only as promises allow
// (fs/promises.h). What they do cache are pages of open and mapped files. So before a change to the data of
// an inode is acknowledged, every other client that has it open drops its pages; and before it is performed,
// those that may have dirty mapped pages write them back.
//
// Deadlock rules (the kernel holds page locks while a WRITE waits for its reply)
//  - No acknowledgement waits for a client that itself has an unanswered change to the data of that inode;
//  the reply to
//    that change carries Outcome.invalidate, and its site drops the pages then. The same when such a change
//    arrives while the recall is out, or is held by the gate.
//  - A writeback is performed at once, since a recall may wait for it. Before it is acknowledged (msync), the
//  others drop their pages like those of any other change; but it does not wait for a client that itself
//  writes back, while a change waits for such a client, whose pages are not all written yet. Queries never
//  wait.
//  - A client that does not answer within the lease is not waited for, unless it is heard and the order may
//  still be on its way; it is told what it missed once it is heard.
//
// Sole and shared: a client starts as shared. The only one attached is told so (RecallOrder.sole) and may
// then cache names and attributes; a second one is let in when that has been taken back and has run out.
//
// After a restart: the owner's process knows nothing of what clients hold. Until every site has said so again
// (or its lease is over), nobody is granted a lock, and nobody is told to be the only mount.
//
// It also decides when an orphan (an inode without a name) may go (fs/orphans.h).
//
// Position: Router -> Gate -> Coherence -> Store; the records of a handoff enter here. Threads: reactor
// thread only.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "fs/front_end.h"
#include "fs/live_state.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

// What a client's site is asked to do; see FrontEnd::invalidate, watch_orphan and set_policy.
struct RecallOrder {
  ClientId client = 0;
  InodeId id = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;  // 0: to the end
  bool orphan = false;
  std::optional<bool> sole{};  // the client is (no longer) the only mount
  // Promises of names and attributes that are broken (fs/promises.h).
  std::vector<InodeId> names{};
  bool all_names = false;   // all of them; with client 0 the site also says what its mount holds
  std::uint64_t stamp = 0;  // what was promised before is broken
  // Of a lease to write `id` (fs/write_leases.h): followed when all that was acknowledged under it is done.
  std::uint64_t lease = 0;
};
// Carries an order to the client's site and calls `done(referenced)` once it has been followed.
using Recall = std::function<void(const RecallOrder&, std::function<void(bool referenced)> done)>;

// How long a client is waited for. Longer than a lost connection takes to be noticed and made again.
constexpr auto kLease = std::chrono::seconds(5);

// The waits, so that tests need not sit them out.
struct CoherenceTiming {
  Reactor::Clock::duration lease = kLease;
  // Its kernel counts from when the thread that asked goes on, on a busy machine some time after the answer.
  Reactor::Clock::duration sole_timeout =
      std::max(kSoleMount.entry_timeout, kSoleMount.attr_timeout) + std::chrono::milliseconds(500);
  // For how long a client is waited for beyond the lease that it was given so long ago: its kernel shows what
  // it has as long as it hears the owner, so its lease begins when the order has arrived.
  std::function<Reactor::Clock::duration(ClientId, Reactor::Clock::duration ago)> extension = {};
};

class Coherence final : public Executor {
 public:
  Coherence(Executor& store, OpenTable& opens, LockTable& locks, Reactor& reactor, Recall recall,
            CoherenceTiming timing = {});
  ~Coherence() override;

  // Handles Attach, Detach and Forget; Open, OpenDir, Release*, Flush, *Lock and Cancel keep the tables up to
  // date (Open and OpenDir also pass through the store, which may refuse them). Everything else goes to the
  // store. An Attach of a second client is answered only after the first one has dropped what it cached
  // alone.
  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // For the gate (Gate::Hooks) and a new owner: the gate holds this request, or it is a record that waits for
  // its turn. If it changes data, no recall waits for its client's kernel any more, which keeps the pages
  // locked that it writes. If it is an Open that was answered already (FrontEnd), its file is being read: it
  // counts as open.
  void held(const pb::Request& request);
  // It is not going to be performed: its caller was killed.
  void dropped(const pb::Request& request);
  void none_held();
  // A recall waits for this client to write back dirty pages of this inode.
  bool awaits(const pb::Request& writeback) const;

  // This process has not been the owner before, and nobody has handed the live state over. `orphans`: those
  // of the store, which a mount of any of the other `sites` may refer to. Followed by recovered().
  void recover(const std::vector<InodeId>& orphans, std::set<SiteName> sites);
  // What a site's mount (0: it has none) holds since an earlier process of the owner. Also after recovered():
  // then what somebody else was given meanwhile cannot be had back.
  void reassert(ClientId client, const SiteName& site, const std::vector<OpenHandle>& handles,
                const std::vector<LockTable::Lock>& locks);
  // All sites have said what they hold, or are not waited for any longer.
  void recovered();
  bool recovering() const;
  // A mount has attached, or said what it holds, and waits until the one that cached alone has forgotten
  // that: for a second, or a lease and a second if that one is silent.
  bool letting_in() const;

  // The site is away, for longer than it is waited for; it is back, and hears what its mount has missed. That
  // does not count as referring to orphans meanwhile, but for what it has open: otherwise nothing that is
  // deleted would make room.
  void away(const SiteName& site);
  void back(const SiteName& site);

  // Live state for a handoff: each orphan with the clients that may refer to it, the inodes whose pages
  // clients have not dropped though they should have (they were not waited for, or tell_missed() has ordered
  // them to), and the sites that have not said yet what their mounts hold, since an owner was restarted.
  const std::map<InodeId, std::set<ClientId>>& orphans() const;
  std::map<ClientId, std::set<InodeId>> missed() const;
  const std::set<SiteName>& unheard() const;
  // Asks the holders and the sites again, since their answers may have gone to the owner before. The open
  // table has been restored. What recover() was told of stays known.
  void restore_orphans(std::map<InodeId, std::set<ClientId>> orphans, std::set<SiteName> unheard = {});
  // Orders anew what the owner before has ordered in vain; whoever is away is told when it is back.
  void tell_missed(ClientId client, std::set<InodeId> ids);
  // Another site is the owner: forgets everything; late answers change nothing. No change is in flight.
  void clear();
  // A site's process has ended: as a Detach of each of its clients, but for `except`.
  void expire_site(const SiteName& site, ClientId except = 0);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
