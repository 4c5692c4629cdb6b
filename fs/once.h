// Performs what other sites ask at most once, across the end of this process.
//
// A crash can fall between an effect and its reply, and the request then comes again under the same (client,
// seq): from another site's Peer, from the records of a handoff, from a kernel that resends. Repeating a
// create, unlink, rename or append would show the application an error or a doubled effect. So, for those:
//
//   intent (what its names led to, the size before) -> effect -> outcome (-> sync) -> reply
//
// in slots of a file mapped MAP_SHARED, which survives the process. Asked again: a slot with an outcome
// answers. What an earlier process left with an intent only is decided by comparing the tree with the intent,
// before anybody changes what would tell.
//
// All other changes are idempotent, but not for ever: a site that was cut off before it was answered asks
// again much later, and would undo what others have written since. Of them the outcome is noted, too, without
// an intent: between effect and outcome nobody else comes. After a power cut the file may be stale: then an
// operation that was not fsynced may be lost, as on any local disk. Or it is newer than the bytes: what it
// says of overwrites from before a power cut counts for nothing, and they are performed again.
//
// File: kSlots slots of kSlotSize bytes, used in a ring that the next process goes on with; see Slot in
// once.cc. What a client has said to have the answer to goes first (Request.answered_below), and
// what is far behind its newest; then the oldest.
// Threads: reactor thread only.
#pragma once

#include <bitset>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <unordered_map>
#include <vector>

#include "meta/executor.h"

namespace sharefs {

class Once final : public Executor {
 public:
  // Maps `file`, made if missing, and reads the slots that an earlier process left. `power`: another one than
  // that process had if the machine may have lost what was not synced (Power::number).
  Once(Executor& store, const std::filesystem::path& file, std::uint64_t power = 0);
  ~Once() override;

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // Decides what an earlier process left in doubt. Before anything is performed at the store, which must
  // answer already.
  void settle();

  // Requests of this client (the mount of this very process, which ends with it) pass without a slot from now
  // on; 0: nobody's do. Nobody's may while records are performed: another process sends those again.
  void exempt(std::uint64_t client) { exempt_ = client; }

  // The store has put a request aside that has had no effect yet, or takes it up again: its intent is of the
  // moment before the effect. (Of two appends that waited, the size that both found when they came would tell
  // of neither whether it was performed.)
  void put_aside(const pb::Request& request, bool aside);

  // Whether it has been performed, as far as the slots tell.
  bool knows(std::uint64_t client, std::uint64_t seq) const;

  // What came of a request.
  struct Known {
    std::uint64_t client = 0, seq = 0;
    pb::Outcome outcome;
  };
  // For the next owner: of those that `may_be_asked` again.
  std::vector<Known> left(const std::function<bool(std::uint64_t client, std::uint64_t seq)>& may_be_asked);
  // What the last owner knew, whose names, ids and sizes are those of this store.
  void adopt(const Known& known);

  static constexpr std::size_t kSlots = 4096;
  static constexpr std::size_t kSlotSize = 1024;  // two names and their attributes fit
  // More than a mount leaves unanswered, one behind the other. (What it asked long before its newest is
  // answered even if it waits for something older, as a lock.)
  static constexpr std::size_t kKeptBack = 1024;

 private:
  struct Slot;
  struct Key {
    std::uint64_t client, seq;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const { return key.client * 0x9e3779b97f4a7c15u ^ key.seq; }
  };

  // True if the request was answered from its slot.
  bool answer_again(const Slot& slot, const pb::Request& request, const Reply& reply);
  void perform(const pb::Request& request, Bytes data, Reply reply);
  void note(const Key& key, bool overwrites, const pb::Outcome& outcome);
  void forget(const Key& key);
  void answer(const pb::Request& request, const pb::Outcome& outcome, Bytes data, const Reply& reply);
  std::size_t slot_for(const Key& key);
  bool is_needed(std::size_t index);
  static bool has_outcome(const Slot& slot);
  void intend(Slot& slot, const pb::Request& request);
  static void put(Slot& slot, std::uint32_t state, const pb::Request& asked, const pb::Outcome& outcome);
  static bool get(const Slot& slot, pb::Request& asked, pb::Outcome& outcome);
  Slot& at(std::size_t index);

  // constant after construction
  Executor& store_;
  const std::uint64_t power_;
  void* map_ = nullptr;
  // reactor thread
  std::uint64_t exempt_ = 0;
  std::size_t next_ = 0;
  std::uint64_t last_number_ = 0;                        // of a slot
  std::unordered_map<Key, std::size_t, KeyHash> slots_;  // those in use
  std::bitset<kSlots> performing_;                       // those of requests under way
  struct Asker {
    std::uint64_t answered_below = 0;  // as far as heard
    std::uint64_t ahead_answered_below = 0;
    std::uint64_t newest = 0;  // the number of its newest slot
  };
  std::unordered_map<std::uint64_t, Asker> askers_;  // by client
};

}  // namespace sharefs
