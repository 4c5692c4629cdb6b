// What clients hold: open handles and locks. Owned by the owner of the data set and handed over with it.
//
// A client is one incarnation of one site's mount. Handles are named by the client. Everything here is small,
// serialisable (replication/wire.proto LiveState) and lives on the reactor thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meta/executor.h"
#include "meta/types.h"

namespace sharefs {

using ClientId = std::uint64_t;

struct OpenHandle {
  ClientId client = 0;
  std::uint64_t handle = 0;
  InodeId id = 0;
  std::uint32_t flags = 0;
  bool directory = false;
};

// Which client has what open. Opening and closing cost two hash look-ups, whatever the number of handles.
class OpenTable {
 public:
  void attach(ClientId client, SiteName site);
  // Forgets the client and returns what it had open.
  std::vector<OpenHandle> detach(ClientId client);
  const std::map<ClientId, SiteName>& clients() const { return clients_; }

  void open(const OpenHandle& handle);                // a known (client, handle) is replaced
  bool close(ClientId client, std::uint64_t handle);  // false: unknown
  const OpenHandle* find(ClientId client, std::uint64_t handle) const;
  bool is_open(InodeId id) const { return by_inode_.contains(id); }
  // The clients that have the inode open, `except` not among them; with `writable_only` those that may have
  // dirty pages of it: only a descriptor open for reading and writing can be mapped shared and stored into.
  std::vector<ClientId> openers(InodeId id, ClientId except, bool writable_only) const;
  std::vector<OpenHandle> all() const;
  void clear();

 private:
  struct Key {
    ClientId client;
    std::uint64_t handle;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const { return key.client * 0x9e3779b97f4a7c15u ^ key.handle; }
  };
  // The handles that one client has on an inode.
  struct Use {
    ClientId client = 0;
    std::uint32_t handles = 0;
    std::uint32_t writable = 0;
  };
  // Nearly every inode is open at one client only, so the first use needs no vector.
  struct Uses {
    Use first;
    std::vector<Use> others;
  };
  void count(const OpenHandle& handle);
  void uncount(const OpenHandle& handle);

  std::map<ClientId, SiteName> clients_;
  std::unordered_map<Key, OpenHandle, KeyHash> handles_;
  std::unordered_map<InodeId, Uses> by_inode_;
};

// POSIX record locks and flock locks, held and waited for.
//
// Invariants
//  - Held locks of one space (POSIX or flock) on one inode never conflict; those of one owner never overlap,
//  and
//    touching ones of one type are one.
//  - No waiter could be granted: whatever releases or weakens a lock wakes, in the order of arrival.
//  - Replies are called when the tables are consistent, so they may come back in.
class LockTable {
 public:
  struct Lock {
    ClientId client = 0;
    std::uint64_t owner = 0;  // the kernel's lock owner, unique within the client
    InodeId id = 0;
    pb::LockRange range;
    bool flock = false;  // the range is then the whole file
  };
  struct Waiter {
    Lock lock;
    std::uint64_t seq = 0;  // of the request that waits: Cancel names it
    Reply reply;            // empty after a handoff until the client's site asks again with the same seq
    bool given_up = false;  // only what came of it is asked: it was cancelled, perhaps at an earlier owner
  };

  // The first held lock that conflicts, or nullopt.
  std::optional<Lock> conflict(const Lock& wanted) const;
  // Sets or removes at once (0), or EAGAIN. Splits and merges ranges as POSIX says. Wakes whoever can go on.
  // As flock(2) has it, a conversion gives up the old lock first, and does not get it back when it fails.
  int set(const Lock& lock);
  // The same of what another table has granted or taken, whatever is held here: that who had it before has
  // given it up may be heard later.
  void note(const Lock& lock);
  // Waits: `reply` is called with 0, EINTR (cancelled, detached) or EDEADLK. Asked again with a known
  // (client, seq), only the reply is replaced; a waiter that ended while it had no reply answers then. What
  // is given up ends at once: 0 if the lock is held, EINTR otherwise.
  void wait(Waiter waiter);
  void cancel(ClientId client, std::uint64_t seq);
  // close(2) of any descriptor drops the POSIX locks of (client, owner) on the inode.
  void release_posix(ClientId client, std::uint64_t owner, InodeId id) { release(client, owner, id, false); }
  void release_flock(ClientId client, std::uint64_t owner, InodeId id) { release(client, owner, id, true); }
  void detach(ClientId client);

  std::vector<Lock> held() const;
  const std::vector<Waiter>& waiting() const { return waiting_; }
  void restore(std::vector<Lock> held, std::vector<Waiter> waiting);  // at a takeover
  void clear();

 private:
  using Ended = std::vector<std::pair<Waiter, int>>;
  int try_set(const Lock& lock, bool& weakened);
  bool deadlock(const Lock& wanted) const;
  bool holds(const Lock& lock) const;
  bool may_close_circle(const Lock& granted) const;
  void release(ClientId client, std::uint64_t owner, InodeId id, bool flock);
  void wake(InodeId id, bool look_for_circles = false);
  void answer(const Ended& ended);

  std::unordered_map<InodeId, std::vector<Lock>> held_;
  std::vector<Waiter> waiting_;  // in the order of arrival
  // What came of waiters that had no reply when they ended, until they are asked for again.
  std::map<std::pair<ClientId, std::uint64_t>, int> ended_;
};

}  // namespace sharefs
