// The owner's side of a handoff: drives SourceState through its states, attempt after attempt, until
// ownership has moved, or it was aborted, or it cannot be done.
//
// Promise P2: from t1 on a timer of max-pause runs; if it ends before the commit point, the gate is opened,
// the records are performed here, and another attempt follows (a new epoch; the target keeps what it has, so
// little is sent again).
//
// After the commit point this object lives until the target has taken over, across restarts of the process:
// resume().
//
// Threads: reactor thread; the image and the rounds are shipped by one worker.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "replication/catch_up.h"
#include "replication/given_records.h"
#include "replication/handoff_machines.h"
#include "replication/image_source.h"
#include "replication/site_parts.h"
#include "replication/tree_size.h"

namespace sharefs {

// The reason of an attempt that an operator has given up.
constexpr const char* kAborted = "an operator gave it up with sharefs abort";

class HandoffSource {
 public:
  struct Options {
    SiteName target;
    std::chrono::milliseconds max_pause{100};
    std::uint64_t rate = 0;  // bytes per second, 0: unlimited
    TreeSize needed{};       // measured before: what the target must be able to hold
  };
  struct Events {
    // The commit point has passed: this site is not the owner any more; requests must go to `owner` from now
    // on.
    std::function<void(const SiteName& owner, Epoch epoch)> ownership_given;
    std::function<void()> ended;  // destroys this object (later, not within the call)
  };

  HandoffSource(const SiteParts& parts, Options options, Events events);
  // The question that begins an attempt, and a dry run.
  static pb::Envelope prepare(std::uint64_t attempt, Epoch epoch, const TreeSize& needed);
  ~HandoffSource();

  void start();
  // A restarted process whose last attempt was committed but not taken over: sends commit and records again.
  void resume(const HandoffRecord& committed);
  // False with a reason when the commit point has passed.
  bool abort(std::string& why_not);

  void message(const Message& message);  // from the target
  // The target is connected; `interrupted`: messages may have been lost, or its process is another one.
  void connected(bool interrupted);
  void lost();
  // Another site owns, at this epoch: if that is a later one than this attempt's, the target has taken over
  // and handed on. Where it does not come back to tell the outcomes of the records itself, that owner is
  // asked, to which they were handed on. `mount`: this site's own.
  void owned_since(Epoch epoch, ClientId mount);

  const SiteName& target() const { return options_.target; }
  std::uint64_t attempt() const { return record_.attempt; }
  bool committed() const { return !may_give_up(state_); }
  nlohmann::json progress() const;
  // False: it has ended, and its history could not be told so (a full disk).
  bool noted() const { return noted_; }

 private:
  using Clock = Reactor::Clock;

  void begin_attempt();
  void handle(SourceEvent event);
  void enter(SourceState state);
  void start_image(const pb::Prepared& prepared);
  void ship(std::function<void(ImageSource&)> work, std::function<void()> done);
  std::vector<InodeId> open_inodes() const;
  void next_round();
  void round_done(const CatchUp::Round& round);
  CatchUp::Rest rest() const;
  CatchUp::Costs costs() const;
  void close_gate();
  void pause_ran_over();
  void ship_rest();
  void prepare_commit();
  void ask_confirmation();
  void commit_when_ready();
  void commit();
  void hand_over();
  void give(std::vector<Gate::Record> records);
  void taken_over(std::int64_t when);  // ns since 1970; 0: not known
  void finished();
  void give_up(std::string reason, bool retry);
  void roll_back();
  void try_step(const std::function<void()>& step);
  bool try_to_persist();
  void ask_target();
  void conclude(std::string result, std::string error);
  void persist(Durability durability);
  void update_counters();
  void send(const pb::Envelope& envelope, Lane lane = Lane::requests, std::vector<zmq::message_t> parts = {});

  // constant after construction
  SiteParts parts_;
  Options options_;
  Events events_;
  // reactor thread
  std::unique_ptr<Workers> shipper_;
  std::shared_ptr<ImageSource> image_;
  SourceState state_ = SourceState::preparing;
  HandoffRecord record_;
  unsigned attempts_ = 0;
  unsigned overruns_ = 0;  // attempts that the pause ended
  bool waiting_ = false;   // between attempts, or for the connection
  bool ended_ = false;
  bool noted_ = true;
  std::string give_up_reason_;
  bool give_up_retry_ = false;
  std::uint64_t cut_ = 0;  // the log has been shipped up to here
  std::uint64_t entries_at_cut_ = 0;
  CatchUp catch_up_;  // of this attempt
  Clock::duration own_sync_{std::chrono::milliseconds(1)};
  Clock::time_point closed_at_{};
  Clock::time_point still_since_{};  // nothing was changed from then on, until the gate is opened
  Clock::time_point asked_at_{};     // when the target was asked to confirm that it is there
  std::uint64_t confirmation_ = 0;   // number of that question
  bool confirmed_ = false;
  bool queries_drained_ = false;
  Clock::time_point started_at_ = Clock::now();
  Reactor::TimerId pause_timer_ = 0;
  Reactor::TimerId retry_timer_ = 0;
  std::unique_ptr<GivenRecords> given_;  // while committed
  bool live_sent_ = false;
  std::shared_ptr<int> alive_ = std::make_shared<int>();  // expires with this object: for what workers post
};

}  // namespace sharefs
