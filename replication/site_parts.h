// The parts of a running site, as the two handoff drivers see them. Owned by Site; all on the reactor thread.
#pragma once

#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "fs/coherence.h"
#include "fs/gate.h"
#include "fs/inode_table.h"
#include "fs/live_state.h"
#include "fs/once.h"
#include "fs/pace.h"
#include "fs/promises.h"
#include "fs/router.h"
#include "fs/store.h"
#include "fs/write_leases.h"
#include "meta/change_log.h"
#include "meta/reactor.h"
#include "meta/state.h"
#include "replication/disk_sync.h"
#include "replication/peer.h"
#include "replication/power.h"
#include "replication/request_server.h"
#include "replication/sent_set.h"
#include "replication/transport.h"

namespace sharefs {

// Setting of an owner: the other sites that had a mount when it ended. As long as it runs, and when it was
// killed, they are not known.
constexpr const char* kMountsSetting = "mounts";
constexpr const char* kMountsUnknown = "?";
// Setting of an owner that has heard of a later one: that one's epoch and name.
constexpr const char* kContestedSetting = "contested";
// Settings of an owner: from which site it took over, and that site's power number (Hello.power) then.
constexpr const char* kTakenFromSetting = "taken_from";
constexpr const char* kTakenAtPowerSetting = "taken_at_power";
// Setting: the client that the last process of this site was.
constexpr const char* kLastClientSetting = "client";

// What this process has received whole, as the target of any number of attempts.
struct Received {
  std::string under;  // what was lost before, at either end: for other losses it begins anew
  std::shared_ptr<SentSet> inodes;
};

struct SiteParts {
  SiteName self;
  std::filesystem::path store_directory;  // through a descriptor: a mount over the store does not hide it
  std::filesystem::path database_file;
  Reactor& reactor;
  State& state;
  Power& power;
  Received& received;
  DiskSync& disk;
  Transport& transport;
  InodeTable& inodes;
  Store& store;
  Once& once;
  ChangeLog& log;
  OpenTable& opens;
  LockTable& locks;
  Promises& promises;
  Coherence& coherence;
  Gate& gate;
  Pace& pace;
  WriteLeases& leases;
  Peer& peer;
  RequestServer& server;
  Router& router;
};

// How many syncs of the store have failed; Power knows of all of them when it returns. Throws DatabaseError.
std::uint64_t note_failed_syncs(const SiteParts& parts);

// Nanoseconds since 1970: what SQLite and JSON keep.
std::int64_t wall_clock_ns();

// Behind the commit point half an owner is none, and nobody but the database knows what holds: the process
// ends, and another one asks it.
[[noreturn]] void end_to_begin_anew(const std::exception& error);

// A handoff as status shows it; the names are a contract with scripts.
nlohmann::json to_json(const HandoffRecord& handoff);

// Live state <-> wire. take_live_state: what this owner knows, complete once its gate is closed and drained.
pb::LiveState take_live_state(const SiteParts& parts);
void restore_live_state(const SiteParts& parts, const pb::LiveState& live);
// After ownership is gone: nothing of the live state is this site's any more. Waiting locks of this site's
// own mount are asked again, under their ids, at the new owner.
void drop_live_state(const SiteParts& parts);

}  // namespace sharefs
