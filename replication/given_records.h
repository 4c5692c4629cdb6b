// The source's side behind the commit point: what it owes the target. The commit is sent again until the
// target has taken over, since that may fail there (a full disk). The records arrive, unless the connection
// breaks: on a slow link they take longer than anybody could wait before sending them again, and whatever is
// asked next would come behind all copies.
//
// Promise P1: a caller whose request became a record gets the outcome that the new owner tells. All records
// are kept until the target has taken over durably: one that loses its power may have to perform them again.
//
// Threads: reactor thread.
#pragma once

#include <map>
#include <set>
#include <string_view>
#include <vector>

#include "replication/site_parts.h"

namespace sharefs {

class GivenRecords {
 public:
  // `committed` with its figures so far, which go into the new owner's history. Sends nothing yet.
  GivenRecords(const SiteParts& parts, HandoffRecord committed, std::vector<Gate::Record> records);
  ~GivenRecords();

  // Commit and all records. Again whenever the connection has broken or the target's process is another one.
  void send();
  void done(const pb::RecordDone& message, const Message& raw);
  bool all_answered() const { return outstanding_.empty(); }
  // The target has served, and handed on what it had answered: this mount's records are asked for at the
  // owner that there is now. Those of others are by their own sites.
  void ask_again(ClientId mount);

  // What is not a record, but asked again at the new owner: requests that may wait for others, which the
  // sequence of records must not, and queries, since a record may have to wait for a page that is being read.
  static bool is_asked_again(const pb::Request& request);

 private:
  using Number = std::uint64_t;

  void send_commit();
  void send(const pb::Envelope& envelope, std::string_view part);

  // constant after construction
  const SiteParts& parts_;
  const HandoffRecord committed_;
  // reactor thread
  std::map<Number, Gate::Record> records_;
  std::set<Number> outstanding_;  // those without an outcome
  bool sent_ = false;
  Reactor::TimerId retry_timer_ = 0;
};

}  // namespace sharefs
