// Leases to write: a mount that has one on an inode acknowledges writes to it before the owner has performed
// them (replication/write_behind.h).
//
// Every look must see them all the same (P10). So a lease is exclusive: it is given with a write, to the only
// client that has the inode open, when nobody else holds a promise on it; and whatever else names the inode,
// leads to it or would tell its attributes waits here until the lease has been called back, which is followed
// when all that was acknowledged has been performed. (Delegations of NFS 4, RFC 8881 section 10.4, and the
// buffer capability of Ceph are the same idea.)
//
// Invariants
//  - While a lease is out, nobody but its client has the inode open, or is told its attributes.
//  - A mount relies on its leases only while its owner has answered a ping sent less than kPromiseTrust ago;
//  the owner waits kLease for it. A client that does not answer for so long loses the lease, and what it had
//  acknowledged comes late: it is performed if nobody has changed the inode's data since, and refused
//  (ESTALE) otherwise, since it would undo what others were told to be done.
//  - Leases survive the owner's process, in a mapped file: the next one waits for their clients as this one
//  would. They do not survive the power, nor a handoff, before which they are called back; those that were
//  broken are handed over.
//  - A lease outlives the process that has it, which may have left what it had acknowledged in its journal:
//  it ends when the site's next mount attaches, behind that.
//  - What waits is performed in the order of arrival, per inode, and not at all when its caller was killed or
//  its client has ended. Listings do not wait: they do not tell the attributes of what is leased. Nor do
//  writebacks, which whoever has the lease may have to wait for.
//
// Position: RequestServer, Router -> WriteLeases -> Pace -> Gate. Threads: reactor thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fs/coherence.h"
#include "fs/live_state.h"
#include "fs/promises.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

class WriteLeases final : public Executor {
 public:
  // A lease that was not waited for any longer.
  struct Broken {
    InodeId id = 0;
    SiteName site{};
    ClientId client = 0;
    std::uint64_t number = 0;
    bool changed = false;  // by somebody else, since then
  };
  struct Options {
    std::filesystem::path file;  // made if missing
    Recall recall;
    CoherenceTiming timing = {};
    // Whether the store has room for whatever may be acknowledged: there is nobody to be told otherwise.
    std::function<bool()> room = [] { return true; };
    // This process does not know yet what clients hold: what a power cut has taken of the file is believed.
    std::function<bool()> recovering = [] { return false; };
    // A mount is being let in, whose requests wait below.
    std::function<bool()> letting_in = [] { return false; };
    // It has not been heard for as long as one is waited for.
    std::function<bool(const SiteName&)> silent = [](const SiteName&) { return false; };
    // Whether the request has been performed (Once::knows).
    std::function<bool(const pb::Request&)> performed = [](const pb::Request&) { return false; };
    // This client has returned all its leases: it has the answers to what it had acknowledged.
    std::function<void(ClientId)> returned = [](ClientId) {};
    ClientId own = 0;  // this site's mount
  };

  // `look`: answers look-ups and attributes at once, and promises nothing to client 0.
  WriteLeases(Executor& next, Executor& look, const OpenTable& opens, const Promises& promises,
              Reactor& reactor, Options options);
  ~WriteLeases() override;

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // Before a handoff closes its gate: gives none and calls all back. Until hold(false), or clear().
  void hold(bool held);
  bool none() const { return leases_.empty(); }

  // Of a record of a handoff, which does not come by here.
  void note_change(const pb::Request& request);
  // Others than `client` have the inode open, as sites that were not heard for a while have said.
  void opened(ClientId client, InodeId id);
  // This client, or every one of the site but `except`, has ended: what it waits for is not performed.
  void detach(ClientId client);
  void expire(const SiteName& site, ClientId except);

  // This site is not the owner any more. Nothing waits.
  void clear();
  // For the next owner, and from the last one.
  std::vector<Broken> broken() const;
  void adopt(Broken broken);
  // Makes what is known of broken leases survive a power cut.
  void sync();
  // The site is not part of the data set any more.
  void forget(const SiteName& site);

  std::size_t size() const { return leases_.size(); }

  static constexpr std::size_t kMost = 4096;  // leases and broken leases

 private:
  struct Slot;
  struct Waiting {
    pb::Request request;
    std::string data;
    Reply reply;
  };
  struct Lease {
    SiteName site{};
    ClientId client = 0;
    std::uint64_t number = 0;
    std::size_t slot = 0;
    bool ordered = false;  // to be returned
    Reactor::TimerId timer = 0;
    Reactor::Clock::time_point since{};  // it is waited for
    std::deque<Waiting> waiting{};
  };
  struct BrokenLease {
    Broken what;
    std::size_t slot = 0;
  };

  void pass(const pb::Request& request, Bytes data, Reply reply);
  void pass_counted(InodeId id, const pb::Request& request, Bytes data, Reply reply);
  void write(const pb::Request& request, Bytes data, Reply reply);
  bool write_early(const pb::Request& request);
  InodeId changed_by(const pb::Request& request);
  InodeId leased_to_another(const pb::Request& request);
  void list(const pb::Request& request, Reply reply);
  bool is_another(ClientId client, InodeId id) const;
  bool cancel(const pb::Request& request);
  void wait(InodeId id, const pb::Request& request, Bytes data, Reply reply);
  void call_back(InodeId id);
  void look_again(InodeId id, Reactor::Clock::duration time);
  void end(InodeId id);
  std::vector<InodeId> leases_of(ClientId client) const;
  void returned(InodeId id);
  void give_up(InodeId id);
  std::uint64_t grant(ClientId client, InodeId id);
  bool add(InodeId id, Lease lease);
  InodeId named(InodeId parent, const std::string& name);
  std::optional<std::size_t> take_slot(std::uint32_t state, const Broken& what);
  void free_slot(std::size_t index);
  void mend(InodeId id);
  void drop_waiting(const std::function<bool(ClientId)>& of);
  void end_earlier(const SiteName& site, ClientId client);
  Slot& at(std::size_t index);
  void load();

  // constant after construction
  Executor& next_;
  Executor& look_;
  const OpenTable& opens_;
  const Promises& promises_;
  Reactor& reactor_;
  const Options options_;
  void* map_ = nullptr;
  // reactor thread
  bool held_ = false;
  std::uint64_t last_number_ = 0;
  std::vector<std::size_t> free_slots_;
  std::unordered_map<InodeId, Lease> leases_;
  std::unordered_map<InodeId, BrokenLease> broken_;
  // Changes by others that have passed, and are not answered: they may open the inode, or tell of it, behind
  // a lease that is given meanwhile.
  std::unordered_multiset<InodeId> passed_;
  std::size_t bytes_ = 0;  // acknowledged ahead since there was room
  std::shared_ptr<const bool> alive_ = std::make_shared<const bool>(true);  // replaced by clear()
};

}  // namespace sharefs
