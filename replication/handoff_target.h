// The new owner's side of a handoff: receives, becomes prepared, and — told so by the source, never by itself
// — owner.
//
// Records are performed one after the other, each marked done in SQLite with its outcome before the next one
// starts (record_performer.h); nobody else is served before the last.
//
// Threads: reactor thread.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "replication/handoff_machines.h"
#include "replication/image_target.h"
#include "replication/record_performer.h"
#include "replication/site_parts.h"
#include "replication/tree_size.h"

namespace sharefs {

class HandoffTarget {
 public:
  struct Events {
    // Commit: this site owns at `epoch`; the tree must become the served one and requests be held until
    // serving().
    std::function<void(Epoch epoch)> ownership_taken;
    // The records are performed: everybody may be served.
    std::function<void()> serving;
    std::function<void()> abandoned;
  };

  // Checks whether this site may and can take the data set: empty, or why not in one line.
  static std::string refusal(const SiteParts& parts, const pb::Prepare& prepare);
  // Whether it has room for it, `held` being what an old image takes already: this handoff need not find that
  // again.
  static std::string lack_of_space(const SiteParts& parts, const pb::Prepare& prepare, const TreeSize& held);

  // What was kept of an attempt goes: it was given up, or the source knows the outcome and need not be told
  // again.
  static void forget(State& state, std::uint64_t attempt);

  HandoffTarget(const SiteParts& parts, SiteName source, const pb::Prepare& prepare, bool holds_image,
                Events events);
  // After a restart in `prepared` or `performing`.
  HandoffTarget(const SiteParts& parts, const HandoffRecord& stored, Events events);
  ~HandoffTarget();

  // Whether a message is for this attempt, and the attempt not over.
  bool concerns(const SiteName& from, const pb::Envelope& head) const;
  void message(Message message);
  void connected(const SiteName& site, bool another_process);
  // The operator's or the source's abandon, or a newer attempt replaces this one.
  void abandon(const std::string& reason);

  std::uint64_t attempt() const { return record_.attempt; }
  Epoch epoch() const { return record_.epoch; }
  const SiteName& source() const { return source_; }
  TargetState state() const { return state_; }

 private:
  bool handle(TargetEvent event);
  void final_end(const pb::FinalEnd& message);
  void everything_applied(std::int64_t synced);
  void find_orphans();
  void become_prepared();
  void say_log_applied(std::uint64_t number);
  void note_figures(std::string_view json);
  void commit(const pb::Commit& message);
  void make_performer();
  void take_over();
  void record(Message message);
  void perform();
  void perform_next();
  void perform_later(const std::exception& why);
  bool performed() const;  // all records are
  void was_performed(const State::StoredRecord& record);
  void performed(std::uint64_t number, const pb::Outcome& outcome, Bytes data);
  void all_performed();
  void say_taken_over();
  void answer(std::uint64_t number, const pb::Outcome& outcome, Bytes data);
  void fail(const std::string& reason);
  void persist(Durability durability);
  void send(const pb::Envelope& envelope, std::vector<zmq::message_t> parts = {});

  // constant after construction
  SiteParts parts_;
  SiteName source_;
  // Of Prepare; after a restart not known any more.
  std::string source_losses_;
  Power::Interval source_lost_;
  Events events_;
  // reactor thread
  std::unique_ptr<ImageTarget> image_;
  std::unique_ptr<Executor> once_;  // performs the records
  std::unique_ptr<RecordPerformer> performer_;
  TargetState state_ = TargetState::receiving;
  HandoffRecord record_;
  pb::LiveState live_;
  std::uint64_t records_total_ = 0;
  std::uint64_t next_ = 1;   // the record to be performed next
  bool performing_ = false;  // one is under way
  Reactor::TimerId retry_timer_ = 0;
  struct Arrived {
    pb::Request request;
    std::string data;
  };
  std::map<std::uint64_t, Arrived> arrived_;
  std::shared_ptr<int> alive_ = std::make_shared<int>();  // expires with this object: for posted tasks
};

}  // namespace sharefs
