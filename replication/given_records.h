// The source's side behind the commit point: what it owes the target, sent again until all of it is answered.
//
// Promise P1: a caller whose request became a record gets the outcome that the new owner tells. All records
// are kept until the target has taken over durably: one that loses its power may have to perform them again.
//
// Threads: reactor thread.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <vector>

#include "replication/site_parts.h"

namespace sharefs {

class GivenRecords {
 public:
  // `committed` with its figures so far, which go into the new owner's history. Sends nothing yet.
  GivenRecords(const SiteParts& parts, HandoffRecord committed, std::vector<Gate::Record> records);
  ~GivenRecords();

  // Commit and all records. Again whenever the target may have missed some; harmless at any time.
  void send();
  void done(const pb::RecordDone& message, const Message& raw);
  bool all_answered() const { return outstanding_.empty(); }

  // What is not a record, but asked again at the new owner: requests that may wait for others, which the
  // sequence of records must not, and queries, since a record may have to wait for a page that is being read.
  static bool is_asked_again(const pb::Request& request);

 private:
  using Number = std::uint64_t;

  void send_if(const std::function<bool(Number)>& wanted);

  // constant after construction
  const SiteParts& parts_;
  const HandoffRecord committed_;
  // reactor thread
  std::map<Number, Gate::Record> records_;
  std::set<Number> outstanding_;  // those without an outcome
  Reactor::TimerId retry_timer_ = 0;
};

}  // namespace sharefs
