#include "fs/once.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <spdlog/spdlog.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fs/inode_table.h"
#include "meta/fault.h"

namespace sharefs {

// `state` is written last, so a slot is whole when it says so.
struct Once::Slot {
  // kAside: of this process, for a request that has had no effect yet.
  // kOverwritten: an outcome, of what had no intent.
  enum : std::uint32_t {
    kFree = 0,
    kIntent = 0x1e44,
    kOutcome = 0x2e42,
    kAside = 0x3e43,
    kOverwritten = 0x4e41
  };
  std::uint64_t client;
  std::uint64_t seq;
  std::atomic<std::uint32_t> state;
  std::uint32_t size;         // of the pb::Outcome at the start of body: of what was before, or what came
  char body[kSlotSize - 48];  // behind it what was asked, a pb::Request: of an intent
  std::uint64_t power;        // of the process that has overwritten
  std::uint64_t asked;        // its size
  std::uint64_t number;       // grows from slot to slot
};

namespace {

// What a request that is not idempotent names. Its intent as stored: Outcome.entries[i].attr of each name
// before (id 0: absent), Outcome.count = the size before, or whether there was the extended attribute.
struct Named {
  std::vector<std::pair<std::uint64_t, const std::string*>> names{};
  std::uint64_t sized = 0;  // an inode whose size tells
  std::pair<std::uint64_t, const std::string*> xattr{};
  bool empty() const { return names.empty() && sized == 0 && xattr.first == 0; }
};

bool writes_synced(const pb::Request& request) { return request.has_write() && request.write().sync(); }

bool has_effect(const pb::Request& request) {
  return changes_files(request.op_case()) || changes_data_of(request) != 0;
}

Named named_by(const pb::Request& request) {
  const auto entry = [](const auto& op) { return Named{.names = {{op.parent(), &op.name()}}}; };
  switch (request.op_case()) {
    case pb::Request::kCreate:
      return entry(request.create());
    case pb::Request::kMkdir:
      return entry(request.mkdir());
    case pb::Request::kSymlink:
      return entry(request.symlink());
    case pb::Request::kLink:
      return entry(request.link());
    case pb::Request::kUnlink:
      return entry(request.unlink());
    case pb::Request::kRmdir:
      return entry(request.rmdir());
    case pb::Request::kRename:
      return {.names = {{request.rename().parent(), &request.rename().name()},
                        {request.rename().new_parent(), &request.rename().new_name()}}};
    case pb::Request::kWrite:
      return {.sized = request.write().append() ? request.write().id() : 0};
    case pb::Request::kFallocate:
      return {.sized = request.fallocate().mode() & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)
                           ? request.fallocate().id()
                           : 0};
    case pb::Request::kSetxattr:
      if ((request.setxattr().flags() & XATTR_CREATE) == 0) return {};
      return {.xattr = {request.setxattr().id(), &request.setxattr().name()}};
    case pb::Request::kRemovexattr:
      return {.xattr = {request.removexattr().id(), &request.removexattr().name()}};
    default:
      return {};
  }
}

// A question that the store answers at once (look-ups and attributes never wait).
pb::Outcome ask(Executor& store, const pb::Request& request) {
  std::optional<pb::Outcome> answer;
  store.execute(request, {}, [&](const pb::Outcome& outcome, Bytes) { answer = outcome; });
  if (!answer) throw std::logic_error("a look-up was not answered at once");
  return *answer;
}

pb::Outcome intent_of(Executor& store, const Named& named) {
  pb::Outcome intent;
  for (const auto& [parent, name] : named.names) {
    pb::Request request;
    request.mutable_lookup()->set_parent(parent);
    request.mutable_lookup()->set_name(*name);
    *intent.add_entries()->mutable_attr() = ask(store, request).attr();
  }
  if (named.sized) {
    pb::Request request;
    request.mutable_getattr()->set_id(named.sized);
    intent.set_count(ask(store, request).attr().size());
  }
  if (named.xattr.first) {
    pb::Request request;
    request.mutable_getxattr()->set_id(named.xattr.first);
    request.mutable_getxattr()->set_name(*named.xattr.second);
    intent.set_count(ask(store, request).error() == 0 ? 1 : 0);
  }
  return intent;
}

// The outcome of a request in doubt, if the tree shows that it was performed.
std::optional<pb::Outcome> found_performed(Executor& store, const pb::Request& request, const Named& named,
                                           const pb::Outcome& before) {
  const pb::Outcome now = intent_of(store, named);
  if (before.entries_size() != now.entries_size()) return std::nullopt;
  const auto id = [](const pb::Outcome& which, int i) { return which.entries(i).attr().id(); };
  pb::Outcome outcome;
  switch (request.op_case()) {
    case pb::Request::kCreate:
    case pb::Request::kMkdir:
    case pb::Request::kSymlink:
    case pb::Request::kLink:
      if (id(before, 0) != 0 || id(now, 0) == 0) return std::nullopt;
      *outcome.mutable_attr() = now.entries(0).attr();
      return outcome;
    case pb::Request::kUnlink:
    case pb::Request::kRmdir:
      if (id(before, 0) == 0 || id(now, 0) == id(before, 0)) return std::nullopt;
      return outcome;
    case pb::Request::kRename:
      if (id(before, 0) == 0 || id(now, 0) == id(before, 0) || id(now, 1) != id(before, 0))
        return std::nullopt;
      return outcome;
    case pb::Request::kWrite:
      if (now.count() != before.count() + request.write().size()) return std::nullopt;
      outcome.set_count(request.write().size());
      return outcome;
    case pb::Request::kSetxattr:
      if (before.count() != 0 || now.count() == 0) return std::nullopt;
      return outcome;
    case pb::Request::kRemovexattr:
      if (before.count() == 0 || now.count() != 0) return std::nullopt;
      return outcome;
    default:  // fallocate that shifts data
      if (now.count() == before.count()) return std::nullopt;
      return outcome;
  }
}

}  // namespace

Once::Once(Executor& store, const std::filesystem::path& file, std::uint64_t power)
    : store_(store), power_(power) {
  static_assert(sizeof(Slot) == kSlotSize);
  static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
  UniqueFd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) throw std::runtime_error("cannot open " + file.string() + ": " + std::strerror(errno));
  // Allocated, so that a full disk fails here and not with a signal at a store into the mapping.
  if (const int error = ::posix_fallocate(fd.get(), 0, kSlots * kSlotSize); error != 0)
    throw std::runtime_error("no space for " + file.string() + ": " + std::strerror(error));
  map_ = ::mmap(nullptr, kSlots * kSlotSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (map_ == MAP_FAILED)
    throw std::runtime_error("cannot map " + file.string() + ": " + std::strerror(errno));
  for (std::size_t index = 0; index < kSlots; ++index) {
    Slot& slot = at(index);
    const bool lost = slot.state == Slot::kOverwritten && slot.power != power;
    if (slot.state == Slot::kAside || lost) slot.state = Slot::kFree;
    if (slot.state == Slot::kIntent || has_outcome(slot)) slots_[{slot.client, slot.seq}] = index;
    std::uint64_t& newest = askers_[slot.client].newest;
    newest = std::max(newest, slot.number);
    if (slot.number < last_number_) continue;
    last_number_ = slot.number;
    next_ = (index + 1) % kSlots;
  }
}

Once::~Once() { ::munmap(map_, kSlots * kSlotSize); }

bool Once::has_outcome(const Slot& slot) {
  return slot.state == Slot::kOutcome || slot.state == Slot::kOverwritten;
}

Once::Slot& Once::at(std::size_t index) { return static_cast<Slot*>(map_)[index]; }

void Once::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (request.client() == exempt_ || request.client() == 0 || !has_effect(request))
    return store_.execute(request, data, std::move(reply));
  Asker& asker = askers_[request.client()];
  asker.answered_below = std::max(asker.answered_below, request.answered_below());
  asker.ahead_answered_below = std::max(asker.ahead_answered_below, request.ahead_answered_below());
  const auto known = slots_.find({request.client(), request.seq()});
  if (known != slots_.end() && answer_again(at(known->second), request, reply)) return;
  perform(request, data, std::move(reply));
}

bool Once::knows(std::uint64_t client, std::uint64_t seq) const {
  const auto known = slots_.find({client, seq});
  return known != slots_.end() && has_outcome(static_cast<const Slot*>(map_)[known->second]);
}

bool Once::answer_again(const Slot& slot, const pb::Request& request, const Reply& reply) {
  pb::Request ignored;
  pb::Outcome outcome;
  if (!has_outcome(slot) || !get(slot, ignored, outcome)) return false;
  spdlog::info("request {}:{} was performed before: answered again", request.client(), request.seq());
  answer(request, outcome, {}, reply);
  return true;
}

void Once::settle() {
  std::erase_if(slots_, [this](const auto& one) {
    const std::size_t index = one.second;
    Slot& slot = at(index);
    if (slot.state != Slot::kIntent || performing_[index]) return false;
    pb::Request asked;
    pb::Outcome before;
    const auto outcome =
        get(slot, asked, before) ? found_performed(store_, asked, named_by(asked), before) : std::nullopt;
    if (outcome)
      put(slot, Slot::kOutcome, {}, *outcome);
    else
      slot.state = Slot::kFree;
    return !outcome;
  });
}

void Once::intend(Slot& slot, const pb::Request& request) {
  const pb::Outcome before = intent_of(store_, named_by(request));
  if (!request.has_symlink()) return put(slot, Slot::kIntent, request, before);
  pb::Request asked = request;  // without what may be long
  asked.mutable_symlink()->clear_target();
  put(slot, Slot::kIntent, asked, before);
}

void Once::perform(const pb::Request& request, Bytes data, Reply reply) {
  const Key key{request.client(), request.seq()};
  const bool overwrites = named_by(request).empty();
  if (!overwrites) {
    const std::size_t index = slot_for(key);
    performing_.set(index);
    intend(at(index), request);
    fault_point("once.intent");
  }
  if (!writes_synced(request)) [[likely]]
    return store_.execute(
        request, data,
        [this, key, overwrites, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
          note(key, overwrites, outcome);
          reply(outcome, bytes);
        });
  // The outcome is noted before the disk is waited for: others write meanwhile. (And of two appends that are
  // being synced at the same time, the size would tell of neither whether it was performed.)
  pb::Request write = request;
  write.mutable_write()->set_sync(false);
  store_.execute(
      write, data,
      [this, key, overwrites, request, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
        note(key, overwrites, outcome);
        answer(request, outcome, bytes, reply);
      });
}

void Once::note(const Key& key, bool overwrites, const pb::Outcome& outcome) {
  fault_point("once.effect");
  const auto known = slots_.find(key);
  const std::size_t index = known != slots_.end() ? known->second : slot_for(key);
  performing_.reset(index);
  at(index).power = power_;
  put(at(index), overwrites ? Slot::kOverwritten : Slot::kOutcome, {}, outcome);
  fault_point("once.outcome");
}

void Once::forget(const Key& key) {
  const auto known = slots_.find(key);
  if (known == slots_.end()) return;
  at(known->second).state = Slot::kFree;
  slots_.erase(known);
}

void Once::put_aside(const pb::Request& request, bool aside) {
  const auto found = slots_.find({request.client(), request.seq()});
  if (found == slots_.end()) return;
  if (aside)
    put(at(found->second), Slot::kAside, {}, {});
  else
    intend(at(found->second), request);
}

void Once::answer(const pb::Request& request, const pb::Outcome& outcome, Bytes data, const Reply& reply) {
  if (!writes_synced(request) || outcome.error() != 0) return reply(outcome, data);
  pb::Request sync;
  sync.mutable_sync()->set_id(request.write().id());
  sync.mutable_sync()->set_data_only(true);
  store_.execute(sync, {},
                 [this, key = Key{request.client(), request.seq()}, overwrites = !request.write().append(),
                  outcome, reply](const pb::Outcome& synced, Bytes) {
                   if (synced.error() == 0) return reply(outcome, {});
                   if (overwrites) forget(key);  // a sync of what is lost succeeds the next time
                   reply(synced, {});
                 });
}

std::vector<Once::Known> Once::left(const std::function<bool(std::uint64_t, std::uint64_t)>& may_be_asked) {
  std::vector<Known> all;
  for (const auto& [key, index] : slots_) {
    const Slot& slot = at(index);
    Known known{.client = key.client, .seq = key.seq, .outcome = {}};
    pb::Request ignored;
    if (has_outcome(slot) && may_be_asked(key.client, key.seq) && get(slot, ignored, known.outcome))
      all.push_back(std::move(known));
  }
  return all;
}

void Once::adopt(const Known& known) {
  const Key key{known.client, known.seq};
  if (slots_.contains(key)) return;
  put(at(slot_for(key)), Slot::kOutcome, {}, known.outcome);
}

// Of one that is not asked again, or else the oldest; if possible, of a request that is not under way. What
// was known of this request is over.
std::size_t Once::slot_for(const Key& key) {
  forget(key);
  std::size_t index = next_;
  for (std::size_t tried = 0; tried < kKeptBack && is_needed(index); ++tried) index = (index + 1) % kSlots;
  if (is_needed(index)) {
    index = next_;
    for (std::size_t tried = 0; tried < kSlots && performing_[index]; ++tried) index = (index + 1) % kSlots;
  }
  next_ = (index + 1) % kSlots;
  Slot& slot = at(index);
  if (const auto old = slots_.find({slot.client, slot.seq}); old != slots_.end() && old->second == index)
    slots_.erase(old);
  slot.state = Slot::kFree;
  slot.client = key.client;
  slot.seq = key.seq;
  slot.number = ++last_number_;
  slots_[key] = index;
  askers_[key.client].newest = slot.number;
  return index;
}

// Also of a client that has not been heard in this process: it may have been cut off since before.
bool Once::is_needed(std::size_t index) {
  if (performing_[index]) return true;
  const Slot& slot = at(index);
  if (slot.state == Slot::kFree) return false;
  const Asker& asker = askers_[slot.client];
  const auto below = slot.seq >= kAheadSeqBit ? asker.ahead_answered_below : asker.answered_below;
  return slot.seq >= below && slot.number + kKeptBack >= asker.newest;
}

void Once::put(Slot& slot, std::uint32_t state, const pb::Request& asked, const pb::Outcome& outcome) {
  const auto size = outcome.ByteSizeLong(), asked_size = asked.ByteSizeLong();
  slot.state.store(Slot::kFree, std::memory_order_release);
  if (size + asked_size > sizeof slot.body) return;
  auto* const body = reinterpret_cast<std::uint8_t*>(slot.body);
  asked.SerializeWithCachedSizesToArray(outcome.SerializeWithCachedSizesToArray(body));
  slot.size = static_cast<std::uint32_t>(size);
  slot.asked = asked_size;
  slot.state.store(state, std::memory_order_release);
}

bool Once::get(const Slot& slot, pb::Request& asked, pb::Outcome& outcome) {
  return slot.size <= sizeof slot.body && slot.asked <= sizeof slot.body - slot.size &&
         outcome.ParseFromArray(slot.body, static_cast<int>(slot.size)) &&
         asked.ParseFromArray(slot.body + slot.size, static_cast<int>(slot.asked));
}

}  // namespace sharefs
