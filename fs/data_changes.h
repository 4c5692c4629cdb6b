// Changes to the data of inodes that several clients may have cached: who is recalled, and who is not waited
// for.
//
// A change goes through these stages: dirty pages of others are written back (recalling_dirty), the store
// performs it (performing), the pages of others are dropped (recalling_cached), it is answered. A stage in
// which nobody has to be waited for takes no time. From its arrival to its answer it is the unanswered change
// of its client on its inode, which is what the deadlock rules of fs/coherence.h speak about.
//
// A change to an inode that nobody else has open is not seen here, unless it runs on a worker: another client
// can then open the inode and read it before the effect.
//
// Threads: reactor thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fs/coherence.h"

namespace sharefs {

class DataChanges {
 public:
  // What of an inode's data a request changes.
  struct Range {
    InodeId id = 0;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;  // 0: to the end
    bool worker = false;       // may be performed on a worker, after execute() returned; in part if it fails
    bool writeback = false;
  };
  using Perform = std::function<void(const pb::Request&, Bytes, Reply)>;

  // `perform`: the way to the store.
  DataChanges(const OpenTable& opens, Reactor& reactor, Recall recall, Perform perform,
              CoherenceTiming timing);
  ~DataChanges();
  DataChanges(const DataChanges&) = delete;
  DataChanges& operator=(const DataChanges&) = delete;

  // All that a request says by itself; see Coherence about a Create, which may truncate what exists.
  static std::optional<Range> changed(const pb::Request& request);

  // Takes the request over, or returns false: nobody need be recalled and the request goes straight to the
  // store.
  bool take(const pb::Request& request, const Range& range, Bytes data, Reply& reply);
  // Whether the answer to this request, which is being performed, waits for what others have of the inode.
  bool performs(ClientId client, std::uint64_t seq, InodeId id) const;
  // A request changed data of an inode that was not known before: recalls, then replies with the outcome.
  void performed(ClientId client, const Range& range, const pb::Outcome& outcome, Bytes data, Reply reply);

  // The caller of this request was killed. True: it had not been performed, and is not going to be. (Done
  // later it would overtake what others write then: no caller holds them up any more.)
  bool cancel(ClientId client, std::uint64_t seq);

  void held(const pb::Request& request);
  // Somebody has not waited for pages of this client, because of an unanswered change of its own.
  bool met(ClientId client) const;
  // One of those that were held has arrived, or is not going to.
  void not_held(ClientId client, const Range& range);
  void none_held() { held_.clear(); }
  bool awaits(ClientId client, InodeId id) const;
  // Of which inodes clients have not dropped their pages though they should have.
  std::map<ClientId, std::set<InodeId>> missed() const;
  // Orders them to.
  void tell(ClientId client, const std::set<InodeId>& ids);
  void detach(ClientId client);
  // Orders what it missed, if it did, which may never arrive.
  void remind(ClientId client);
  // A request of this client arrived: if it missed recalls, they are ordered again.
  void heard(ClientId client) {
    if (!lapsed_.empty()) tell_lapsed(client);
  }
  void clear();

 private:
  enum class Stage { recalling_dirty, performing, recalling_cached, answered };
  struct Change;
  using ChangePtr = std::shared_ptr<Change>;

  void stop_waiting_for(ClientId client, InodeId id);
  void perform(const ChangePtr& change, const pb::Request& request, Bytes data);
  void recall_cached(const ChangePtr& change);
  void ask(const ChangePtr& change, Stage stage, const std::vector<ClientId>& clients);
  void followed(const ChangePtr& change, Stage stage, ClientId client);
  void wait(const ChangePtr& change, Stage stage, Reactor::Clock::duration time);
  void expired(const ChangePtr& change, Stage stage);
  void proceed(const ChangePtr& change);
  void answer(const ChangePtr& change);
  void tell_lapsed(ClientId client);
  void order(const RecallOrder& order, std::function<void()> done);

  // constant after construction
  const OpenTable& opens_;
  Reactor& reactor_;
  const Recall recall_;
  const Perform perform_;
  const CoherenceTiming timing_;
  // reactor thread
  std::unordered_map<InodeId, std::vector<ChangePtr>> unanswered_;
  // Changes that will arrive: the gate holds them, or they are records of a handoff.
  std::multiset<std::pair<ClientId, InodeId>> held_;
  std::map<ClientId, std::set<InodeId>> lapsed_;  // clients that let a lease run out, and what they missed
  std::multiset<std::pair<ClientId, InodeId>> ordered_;  // orders that have not been followed, awaited or not
  std::shared_ptr<const bool> alive_ = std::make_shared<const bool>(true);  // replaced by clear()
};

}  // namespace sharefs
