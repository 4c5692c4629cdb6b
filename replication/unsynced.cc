#include "replication/unsynced.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

namespace sharefs {

void Unsynced::execute(const pb::Request& request, Bytes data, Reply reply) {
  const Part part = part_of(request);
  if (part.empty()) return next_.execute(request, data, std::move(reply));
  next_.execute(request, data,
                [this, part, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
                  const int lost = outcome.error() == 0 ? answered(part) : 0;
                  if (lost != 0) return reply_errno(reply, lost);
                  reply(outcome, bytes);
                });
}

Unsynced::Part Unsynced::part_of(const pb::Request& request) const {
  const auto changes = [](InodeId id, InodeId other = 0) {
    return Part{.changed = id, .also_changed = other};
  };
  switch (request.op_case()) {
    case pb::Request::kWrite:
      return changes(request.write().sync() ? 0 : request.write().id());
    case pb::Request::kSetattr:
      return changes(request.setattr().id());
    case pb::Request::kFallocate:
      return changes(request.fallocate().id());
    case pb::Request::kCopyFileRange:
      return changes(request.copy_file_range().id_out());
    case pb::Request::kSetxattr:
      return changes(request.setxattr().id());
    case pb::Request::kRemovexattr:
      return changes(request.removexattr().id());
    case pb::Request::kOpen:
      return changes((request.open().flags() & O_TRUNC) != 0 ? request.open().id() : 0);
    case pb::Request::kCreate:
      return changes(request.create().parent());
    case pb::Request::kMkdir:
      return changes(request.mkdir().parent());
    case pb::Request::kSymlink:
      return changes(request.symlink().parent());
    case pb::Request::kLink:
      return changes(request.link().parent(), request.link().id());
    case pb::Request::kUnlink:
      return changes(request.unlink().parent());
    case pb::Request::kRmdir:
      return changes(request.rmdir().parent());
    case pb::Request::kRename:
      return changes(request.rename().parent(), request.rename().new_parent());
    case pb::Request::kSync:
      return {.synced = request.sync().id(), .asked = changes_};
    default:
      return {};
  }
}

int Unsynced::answered(const Part& part) {
  if (part.changed != 0) note(part.changed);
  if (part.also_changed != 0) note(part.also_changed);
  if (part.synced == 0) return 0;
  if (lost_.erase(part.synced) > 0) return EIO;
  const auto here = changed_.find(owner_());
  if (here == changed_.end()) return 0;
  const auto found = here->second.find(part.synced);
  if (found != here->second.end() && found->second <= part.asked) here->second.erase(found);
  return 0;
}

void Unsynced::lost(const SiteName& site) {
  const auto node = changed_.extract(site);
  if (node.empty()) return;
  for (const auto& [id, change] : node.mapped())
    if (lost_.size() < kMost) lost_.insert(id);
}

void Unsynced::note(InodeId id) {
  changed_[owner_()][id] = ++changes_;
  if (changes() > kMost) forget_old();
}

std::size_t Unsynced::changes() const {
  std::size_t all = 0;
  for (const auto& [site, changed] : changed_) all += changed.size();
  return all;
}

void Unsynced::forget_old() {
  std::vector<std::uint64_t> numbers;
  numbers.reserve(changes());
  for (const auto& [site, changed] : changed_)
    for (const auto& [id, number] : changed) numbers.push_back(number);
  const auto middle = numbers.begin() + static_cast<std::ptrdiff_t>(numbers.size() / 2);
  std::nth_element(numbers.begin(), middle, numbers.end());
  for (auto& [site, changed] : changed_)
    std::erase_if(changed, [oldest_kept = *middle](const auto& one) { return one.second < oldest_kept; });
}

}  // namespace sharefs
