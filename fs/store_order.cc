// The Store: the order of changes to the data of one inode.
//
// Nothing here depends on a kernel: workers and the waiting for space come to an end by themselves, so
// whatever waits is performed, or dropped with its caller, and a recall that waits for its caller's pages
// waits no longer than that.
#include <algorithm>
#include <cerrno>

#include "fs/store_impl.h"

namespace sharefs {

InodeId ordered_inode(const pb::Request& request) {
  return request.write().writeback() ? 0 : changes_data_of(request);
}

void Store::Impl::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (!data_changes.empty()) {
    const auto before = data_changes.find(ordered_inode(request));
    if (before != data_changes.end()) {
      // What is going to be changed is reported before this returns (Promises).
      note_attributes(before->first);
      Attempt waits{request, std::string(as_text(data)), std::move(reply)};
      waits.take_up = put_aside(request);
      before->second.waiting.push_back(std::move(waits));
      return;
    }
  }
  attempt(request, data, std::move(reply), 0, false);
}

// The caller of a change that waits was killed: done later it would overtake what is written back of pages
// that the caller had locked.
int Store::Impl::cancel(const pb::Request& request) {
  for (auto& [id, changes] : data_changes) {
    const auto found = std::find_if(changes.waiting.begin(), changes.waiting.end(), [&](const Attempt& one) {
      return one.request.client() == request.client() && one.request.seq() == request.cancel().seq();
    });
    if (found == changes.waiting.end()) continue;
    const Reply reply = std::move(found->reply);
    changes.waiting.erase(found);
    reply_errno(reply, EINTR);
    break;
  }
  return 0;
}

Reply Store::Impl::in_order(InodeId id, Reply reply) {
  data_changes[id].under_way = true;
  return [this, id, reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
    reply(outcome, result);
    go_on(id);
  };
}

// A loop, not a recursion: the next one may end at once, from within attempt().
void Store::Impl::go_on(InodeId id) {
  OrderedChanges& changes = data_changes.at(id);
  changes.under_way = false;
  if (changes.going_on) return;
  changes.going_on = true;
  while (!changes.under_way && !changes.waiting.empty()) {
    Attempt next = std::move(changes.waiting.front());
    changes.waiting.pop_front();
    // All that wait for one disk to have room wait together.
    const auto waited = (std::chrono::steady_clock::now() - next.arrived) / kSpacePoll;
    next.take_up(next.request, [&] {
      attempt(next.request, as_bytes(next.data), std::move(next.reply),
              static_cast<unsigned>(std::min<std::int64_t>(waited, kTriesForSpace)), false);
    });
  }
  changes.going_on = false;
  if (!changes.under_way) data_changes.erase(id);
}

}  // namespace sharefs
