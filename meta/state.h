// The state of one site and data set in SQLite, as typed calls: settings, sites, ownership, handoffs,
// records. The tables are plain columns, meant to be read with the sqlite3 shell too (see meta/README.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "meta/database.h"
#include "meta/types.h"

namespace sharefs {

// Who owns the data set, as far as this site knows. The one interface through which ownership is decided.
struct Ownership {
  Epoch epoch = 0;
  SiteName owner;
  Epoch burnt = 0;  // the highest epoch that any attempt known here was given
};

struct SiteRecord {
  SiteName name;
  std::string endpoint;    // tcp://HOST:PORT, empty if it does not listen
  std::string public_key;  // CURVE, Z85
};

// One attempt to hand ownership over, as kept by each of its two sites. Times are nanoseconds since 1970, 0:
// not yet.
struct HandoffRecord {
  std::uint64_t attempt = 0;  // random
  Epoch epoch = 0;            // that the target would own at
  SiteName source{}, target{};
  std::string role{};   // "source" or "target"
  std::string phase{};  // the state machine's state, by name
  std::int64_t started = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0, ended = 0;
  std::uint64_t image_files = 0, image_bytes = 0, image_bytes_sent = 0;
  std::uint64_t log_entries = 0, log_bytes = 0, rounds = 0, records = 0;
  double pause_ms = 0;
  std::string result{};  // "", "done", "aborted", "failed"
  std::string error{};
  std::uint64_t tries = 1;  // this attempt is so many'th of its handoff
};

// Calls that are durable when they return may also be made inside a Transaction of Durability::full, and are
// then durable with its commit; the others inside any, several of them for one commit. One thread, that of
// `database`.
class State {
 public:
  explicit State(Database& database);

  // Settings known: data_set, data_set_id, site, store, listen, endpoint, public_key, secret_key, mountpoint.
  std::string setting(std::string_view key);  // empty if unset
  void set_setting(std::string_view key, std::string_view value);

  Ownership ownership();
  // The commit point and every other change of owner: durable (synchronous=FULL) when it returns. Refuses to
  // go back to an older epoch, or to change the owner within one (std::logic_error). `burnt` never falls.
  void set_ownership(const Ownership& ownership);

  std::vector<SiteRecord> sites();  // the others, not setting("site")
  void put_site(const SiteRecord& site);
  // The key of this site is not accepted ever again, whoever still names it; durable.
  void remove_site(const SiteName& name, const std::string& public_key);
  std::vector<SiteRecord> removed_sites();                                   // without endpoints
  void add_invitation(const std::string& public_key, std::int64_t expires);  // seconds since 1970
  std::vector<std::string> invitations(std::int64_t now);                    // now: seconds since 1970
  // The invitation is used up, and the site known, at once and durably; it takes the place of one with the
  // same key. False, and nothing has changed: the invitation is unknown, used, or has expired.
  bool admit_site(const std::string& invitation, std::int64_t now, const SiteRecord& site);

  void put_handoff(const HandoffRecord& handoff, Durability durability);
  std::optional<HandoffRecord> handoff(std::uint64_t attempt);
  std::vector<HandoffRecord> handoffs(unsigned newest);  // newest first

  // Records of an attempt: the requests held between t1 and the commit point.
  struct StoredRecord {
    std::uint64_t number = 0;
    std::string request{}, data{};  // serialized pb::Request; bytes beside it
    bool done = false;
    std::string outcome{}, outcome_data{};
  };
  // A record that is there already (sent twice) stays as it is, done or not.
  void put_record(std::uint64_t attempt, const StoredRecord& record, std::uint64_t client, std::uint64_t seq,
                  std::string_view op);
  void finish_record(std::uint64_t attempt, std::uint64_t number, std::string_view outcome,
                     std::string_view data);
  std::vector<StoredRecord> records(std::uint64_t attempt);
  void drop_records(std::uint64_t attempt);
  // What must be known of a committed attempt until the other side has it (serialized pb::LiveState, batch
  // count ...). An empty value removes it; unset reads as empty.
  void put_blob(std::string_view key, std::string_view value);
  std::string blob(std::string_view key);

  Database& database() { return database_; }

 private:
  Database& database_;
  // Prepared at first use: they run once per record within the pause of a handoff.
  std::optional<Statement> insert_record_;
  std::optional<Statement> finish_record_;
};

}  // namespace sharefs
