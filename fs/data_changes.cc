#include "fs/data_changes.h"

#include <fcntl.h>
#include <linux/falloc.h>

#include <algorithm>
#include <cerrno>

namespace sharefs {

struct DataChanges::Change {
  ClientId client = 0;
  std::uint64_t seq = 0;
  Range range;
  bool append = false;
  Reply reply;
  // owned copies, made only when the change has to wait
  pb::Request request;
  std::string data;
  pb::Outcome outcome;
  std::string result;

  Stage stage = Stage::recalling_dirty;
  bool asking = false;      // orders are being sent: answers that come at once are only counted
  bool invalidate = false;  // the reply tells the client to drop its pages
  std::vector<ClientId> awaited;
  Reactor::Clock::time_point asked;  // the awaited ones
  Reactor::TimerId lease = 0;
};

DataChanges::DataChanges(const OpenTable& opens, Reactor& reactor, Recall recall, Perform perform,
                         CoherenceTiming timing)
    : opens_(opens),
      reactor_(reactor),
      recall_(std::move(recall)),
      perform_(std::move(perform)),
      timing_(std::move(timing)) {}

DataChanges::~DataChanges() { clear(); }

std::optional<DataChanges::Range> DataChanges::changed(const pb::Request& request) {
  switch (request.op_case()) {
    case pb::Request::kWrite: {
      const pb::Write& write = request.write();
      if (write.size() == 0) return std::nullopt;
      if (write.writeback()) return Range{write.id(), write.offset(), write.size(), false, true};
      if (write.append()) return Range{write.id(), 0, 0, write.sync()};
      return Range{write.id(), write.offset(), write.size(), write.sync()};
    }
    case pb::Request::kSetattr:
      if (!request.setattr().has_size()) return std::nullopt;
      return Range{request.setattr().id(), request.setattr().size(), 0, false};
    case pb::Request::kFallocate: {
      const pb::Fallocate& allocate = request.fallocate();
      constexpr std::uint32_t kInPlace = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
      const bool moves = (allocate.mode() & ~kInPlace) != 0;  // collapse, insert: everything behind moves
      return Range{allocate.id(), allocate.offset(), moves ? 0 : allocate.length(), true};
    }
    case pb::Request::kCopyFileRange: {
      const pb::CopyFileRange& copy = request.copy_file_range();
      return Range{copy.id_out(), copy.offset_out(), copy.length(), true};
    }
    case pb::Request::kOpen:
      if ((request.open().flags() & O_TRUNC) == 0) return std::nullopt;
      return Range{request.open().id(), 0, 0, false};
    default:
      return std::nullopt;
  }
}

bool DataChanges::take(const pb::Request& request, const Range& range, Bytes data, Reply& reply) {
  const ClientId client = request.client();
  if (changed(request)) not_held(client, range);  // as held() has counted it
  if (!range.worker &&
      (opens_.clients().size() < 2 || opens_.openers(range.id, client, /*writable_only=*/false).empty())) {
    return false;
  }
  const auto change = std::make_shared<Change>();
  change->client = client;
  change->seq = request.seq();
  change->range = range;
  change->append = request.op_case() == pb::Request::kWrite && request.write().append();
  change->reply = std::move(reply);
  unanswered_[range.id].push_back(change);
  if (range.writeback) {
    perform(change, request, data);
    return true;
  }
  // Recalls that are out may not wait for this client any more; their pages are dropped with our reply.
  change->invalidate = awaits(client, range.id);
  if (change->invalidate) stop_waiting_for(client, range.id);
  ask(change, Stage::recalling_dirty, opens_.openers(range.id, client, /*writable_only=*/true));
  if (change->awaited.empty()) {
    perform(change, request, data);
  } else {
    change->request = request;
    change->data = as_text(data);
  }
  return true;
}

bool DataChanges::performs(ClientId client, std::uint64_t seq, InodeId id) const {
  const auto it = unanswered_.find(id);
  return it != unanswered_.end() &&
         std::any_of(it->second.begin(), it->second.end(), [&](const ChangePtr& change) {
           return change->stage == Stage::performing && change->client == client && change->seq == seq;
         });
}

void DataChanges::performed(ClientId client, const Range& range, const pb::Outcome& outcome, Bytes data,
                            Reply reply) {
  if (opens_.openers(range.id, client, /*writable_only=*/false).empty()) {
    reply(outcome, data);
    return;
  }
  const auto change = std::make_shared<Change>();
  change->client = client;
  change->range = range;
  change->reply = std::move(reply);
  change->outcome = outcome;
  change->result = as_text(data);
  unanswered_[range.id].push_back(change);
  recall_cached(change);
}

void DataChanges::perform(const ChangePtr& change, const pb::Request& request, Bytes data) {
  change->stage = Stage::performing;
  perform_(request, data,
           [this, change, alive = std::weak_ptr(alive_)](const pb::Outcome& outcome, Bytes result) {
             if (alive.expired()) return;
             change->outcome = outcome;
             change->result = as_text(result);
             if (outcome.error() != 0) {
               // Without an effect nobody's pages are wrong. What a worker does may end in its middle: then
               // its caller's kernel does not drop pages by itself either.
               if (!change->range.worker) return answer(change);
               change->invalidate = true;
             }
             if (change->append && outcome.has_attr() && outcome.attr().size() >= outcome.count()) {
               change->range.offset = outcome.attr().size() - outcome.count();
             }
             recall_cached(change);
           });
}

// The others may have read pages again since the dirty ones were recalled, and those who only read were not
// asked.
void DataChanges::recall_cached(const ChangePtr& change) {
  ask(change, Stage::recalling_cached,
      opens_.openers(change->range.id, change->client, /*writable_only=*/false));
  if (change->awaited.empty()) answer(change);
}

void DataChanges::ask(const ChangePtr& change, Stage stage, const std::vector<ClientId>& clients) {
  change->stage = stage;
  const InodeId id = change->range.id;
  std::vector<ClientId> asked;
  for (const ClientId client : clients) {
    bool busy = false;
    for (const ChangePtr& other : unanswered_[id]) {
      if (other->client != client) continue;
      // What writes back does not wait for whoever writes back: that would be for each other. All else may:
      // it is answered without waiting for this change.
      if (other->range.writeback && !change->range.writeback) continue;
      other->invalidate = true;
      busy = true;
    }
    if (busy) continue;
    if (const auto missed = lapsed_.find(client); missed != lapsed_.end()) {
      missed->second.insert(id);
      continue;
    }
    asked.push_back(client);
    // What the gate holds is performed later, here or elsewhere, and by then the kernel has followed the
    // order.
    if (!held_.contains({client, id})) change->awaited.push_back(client);
  }
  if (asked.empty()) return;
  change->asking = true;
  for (const ClientId client : asked)
    order({.client = client, .id = id, .offset = change->range.offset, .length = change->range.length},
          [this, change, stage, client] { followed(change, stage, client); });
  change->asking = false;
  if (change->awaited.empty()) return;
  change->asked = Reactor::Clock::now();
  wait(change, stage, timing_.lease);
}

void DataChanges::order(const RecallOrder& order, std::function<void()> done) {
  ordered_.insert({order.client, order.id});
  recall_(order, [this, one = std::pair(order.client, order.id), done = std::move(done),
                  alive = std::weak_ptr(alive_)](bool) {
    if (alive.expired()) return;
    if (const auto found = ordered_.find(one); found != ordered_.end()) ordered_.erase(found);
    done();
  });
}

void DataChanges::wait(const ChangePtr& change, Stage stage, Reactor::Clock::duration time) {
  change->lease = reactor_.after(time, [this, change, stage, alive = std::weak_ptr(alive_)] {
    if (!alive.expired()) expired(change, stage);
  });
}

void DataChanges::followed(const ChangePtr& change, Stage stage, ClientId client) {
  heard(client);
  if (change->stage != stage || std::erase(change->awaited, client) == 0) return;
  if (!change->asking) proceed(change);
}

void DataChanges::expired(const ChangePtr& change, Stage stage) {
  if (change->stage != stage) return;
  const auto ago = Reactor::Clock::now() - change->asked;
  Reactor::Clock::duration longest{};
  std::erase_if(change->awaited, [&](ClientId client) {
    const auto extension = timing_.extension ? timing_.extension(client, ago) : longest.zero();
    longest = std::max(longest, extension);
    if (extension <= longest.zero()) lapsed_[client].insert(change->range.id);
    return extension <= longest.zero();
  });
  if (!change->awaited.empty()) return wait(change, stage, longest);
  proceed(change);
}

void DataChanges::stop_waiting_for(ClientId client, InodeId id) {
  const auto it = unanswered_.find(id);
  if (it == unanswered_.end()) return;
  const std::vector<ChangePtr> changes = it->second;  // proceed() removes those that are answered
  for (const ChangePtr& change : changes) {
    if (std::erase(change->awaited, client) > 0 && !change->asking) proceed(change);
  }
}

void DataChanges::proceed(const ChangePtr& change) {
  if (!change->awaited.empty()) return;
  reactor_.cancel(change->lease);
  if (change->stage == Stage::recalling_dirty) {
    perform(change, change->request, as_bytes(change->data));
  } else if (change->stage == Stage::recalling_cached) {
    answer(change);
  }
}

void DataChanges::answer(const ChangePtr& change) {
  change->stage = Stage::answered;
  const auto it = unanswered_.find(change->range.id);
  std::erase(it->second, change);
  if (it->second.empty()) unanswered_.erase(it);
  if (change->invalidate) change->outcome.set_invalidate(true);
  change->reply(change->outcome, as_bytes(change->result));
}

bool DataChanges::cancel(ClientId client, std::uint64_t seq) {
  for (const auto& [id, changes] : unanswered_) {
    const auto found = std::find_if(changes.begin(), changes.end(), [&](const ChangePtr& change) {
      return change->stage == Stage::recalling_dirty && change->client == client && change->seq == seq;
    });
    if (found == changes.end()) continue;
    // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): answer() takes that one away.
    const ChangePtr change = *found;
    change->awaited.clear();
    reactor_.cancel(change->lease);
    change->outcome.set_error(EINTR);
    answer(change);
    return true;
  }
  return false;
}

void DataChanges::held(const pb::Request& request) {
  const auto range = changed(request);
  if (!range || range->writeback) return;
  held_.insert({request.client(), range->id});
  stop_waiting_for(request.client(), range->id);
}

void DataChanges::not_held(ClientId client, const Range& range) {
  if (const auto held = held_.find({client, range.id}); !range.writeback && held != held_.end())
    held_.erase(held);
}

bool DataChanges::met(ClientId client) const {
  return std::ranges::any_of(unanswered_, [client](const auto& of_inode) {
    return std::ranges::any_of(of_inode.second, [client](const ChangePtr& change) {
      return change->client == client && change->invalidate;
    });
  });
}

bool DataChanges::awaits(ClientId client, InodeId id) const {
  const auto it = unanswered_.find(id);
  if (it == unanswered_.end()) return false;
  return std::any_of(it->second.begin(), it->second.end(), [&](const ChangePtr& change) {
    return std::find(change->awaited.begin(), change->awaited.end(), client) != change->awaited.end();
  });
}

void DataChanges::detach(ClientId client) {
  lapsed_.erase(client);
  std::erase_if(ordered_, [&](const auto& one) { return one.first == client; });
  std::erase_if(held_, [&](const auto& held) { return held.first == client; });
  std::vector<InodeId> awaiting;
  for (const auto& [id, changes] : unanswered_) {
    if (awaits(client, id)) awaiting.push_back(id);
  }
  for (const InodeId id : awaiting) stop_waiting_for(client, id);
}

std::map<ClientId, std::set<InodeId>> DataChanges::missed() const {
  auto all = lapsed_;
  for (const auto& [client, id] : ordered_) all[client].insert(id);
  return all;
}

void DataChanges::tell(ClientId client, const std::set<InodeId>& ids) {
  for (const InodeId id : ids) order({.client = client, .id = id}, [this, client] { heard(client); });
}

void DataChanges::remind(ClientId client) {
  if (const auto lapsed = lapsed_.find(client); lapsed != lapsed_.end())
    tell(client, std::set(lapsed->second));
}

void DataChanges::tell_lapsed(ClientId client) {
  const auto lapsed = lapsed_.extract(client);
  if (!lapsed.empty()) tell(client, lapsed.mapped());
}

void DataChanges::clear() {
  alive_ = std::make_shared<const bool>(true);
  for (const auto& [id, changes] : unanswered_) {
    for (const ChangePtr& change : changes) reactor_.cancel(change->lease);
  }
  unanswered_.clear();
  held_.clear();
  lapsed_.clear();
  ordered_.clear();
}

}  // namespace sharefs
