#include <algorithm>
#include <cerrno>
#include <iterator>
#include <limits>
#include <set>
#include <utility>

#include "fs/live_state.h"

namespace sharefs {
namespace {

using Lock = LockTable::Lock;

constexpr std::uint64_t kEnd = std::numeric_limits<std::uint64_t>::max();

bool same_owner(const Lock& a, const Lock& b) { return a.client == b.client && a.owner == b.owner; }

// Whether both are locks of one owner in the same space.
bool related(const Lock& a, const Lock& b) { return a.flock == b.flock && same_owner(a, b); }

bool overlap(const pb::LockRange& a, const pb::LockRange& b) {
  return a.start() <= b.end() && b.start() <= a.end();
}

// `a` ends just before `b`.
bool precedes(const pb::LockRange& a, const pb::LockRange& b) {
  return a.end() != kEnd && a.end() + 1 == b.start();
}

bool conflicts(const Lock& held, const Lock& wanted) {
  return wanted.range.type() != pb::LockRange::UNLOCKED && held.flock == wanted.flock &&
         !same_owner(held, wanted) && overlap(held.range, wanted.range) &&
         (held.range.type() == pb::LockRange::EXCLUSIVE || wanted.range.type() == pb::LockRange::EXCLUSIVE);
}

Lock whole_if_flock(Lock lock) {
  if (lock.flock) {
    lock.range.set_start(0);
    lock.range.set_end(kEnd);
  }
  return lock;
}

// Gives the owner's range the wanted type: what it had there goes, the rest of it stays, touching locks of
// the wanted type become one. Returns whether anything was given up that somebody else may wait for.
bool give(std::vector<Lock>& locks, const Lock& wanted) {
  bool weakened = false;
  Lock merged = wanted;
  std::vector<Lock> next;
  next.reserve(locks.size() + 2);
  for (Lock& lock : locks) {
    const bool same_type = lock.range.type() == wanted.range.type();
    const bool apart = !overlap(lock.range, wanted.range);
    const bool touches = precedes(lock.range, wanted.range) || precedes(wanted.range, lock.range);
    if (!related(lock, wanted) || (apart && !(same_type && touches))) {
      next.push_back(std::move(lock));
    } else if (same_type) {
      merged.range.set_start(std::min(merged.range.start(), lock.range.start()));
      merged.range.set_end(std::max(merged.range.end(), lock.range.end()));
    } else {
      weakened = weakened || wanted.range.type() != pb::LockRange::EXCLUSIVE;
      if (lock.range.start() < wanted.range.start()) {
        next.push_back(lock);
        next.back().range.set_end(wanted.range.start() - 1);
      }
      if (lock.range.end() > wanted.range.end()) {
        next.push_back(lock);
        next.back().range.set_start(wanted.range.end() + 1);
      }
    }
  }
  if (wanted.range.type() != pb::LockRange::UNLOCKED) next.push_back(std::move(merged));
  locks = std::move(next);
  return weakened;
}

}  // namespace

std::optional<Lock> LockTable::conflict(const Lock& wanted) const {
  const auto it = held_.find(wanted.id);
  if (it == held_.end()) return std::nullopt;
  const Lock* first = nullptr;  // by offset, as the kernel's own table answers F_GETLK
  for (const Lock& lock : it->second) {
    if (conflicts(lock, wanted) && (first == nullptr || lock.range.start() < first->range.start()))
      first = &lock;
  }
  return first != nullptr ? std::optional(*first) : std::nullopt;
}

// Sets without waking; `weakened`: somebody who waits may now go on.
int LockTable::try_set(const Lock& lock, bool& weakened) {
  std::vector<Lock>& locks = held_[lock.id];
  int result = 0;
  if (lock.flock && lock.range.type() != pb::LockRange::UNLOCKED) {
    const auto own =
        std::find_if(locks.begin(), locks.end(), [&](const Lock& held) { return related(held, lock); });
    if (own != locks.end()) {
      if (own->range.type() == lock.range.type()) return 0;
      locks.erase(own);
      weakened = true;
    }
  }
  if (conflict(lock)) {
    result = EAGAIN;
  } else if (give(locks, lock)) {
    weakened = true;
  }
  if (locks.empty()) held_.erase(lock.id);
  return result;
}

int LockTable::set(const Lock& asked) {
  const Lock lock = whole_if_flock(asked);
  bool weakened = false;
  const int result = try_set(lock, weakened);
  const bool circle = result == 0 && may_close_circle(lock);
  if (weakened || circle) wake(lock.id, circle);
  return result;
}

void LockTable::note(const Lock& noted) {
  const Lock lock = whole_if_flock(noted);
  std::vector<Lock>& locks = held_[lock.id];
  const bool weakened = give(locks, lock);
  if (locks.empty()) held_.erase(lock.id);
  if (weakened) wake(lock.id);
}

// Whether all of it is held as it was asked for.
bool LockTable::holds(const Lock& lock) const {
  const auto it = held_.find(lock.id);
  return it != held_.end() && std::any_of(it->second.begin(), it->second.end(), [&](const Lock& held) {
           return related(held, lock) && held.range.type() == lock.range.type() &&
                  held.range.start() <= lock.range.start() && held.range.end() >= lock.range.end();
         });
}

void LockTable::wait(Waiter waiter) {
  if (waiter.given_up) {
    const auto waited = std::erase_if(waiting_, [&](const Waiter& other) {
      return other.lock.client == waiter.lock.client && other.seq == waiter.seq;
    });
    const bool known = ended_.erase({waiter.lock.client, waiter.seq}) + waited > 0;
    const Lock lock = whole_if_flock(std::move(waiter.lock));
    const bool held = holds(lock);
    // As on a local disk: who asks for another kind of flock gives the one it has up first. If it has done so
    // already, what is there is newer.
    if (lock.flock && !held && !known) release(lock.client, lock.owner, lock.id, true);
    return reply_errno(waiter.reply, held ? 0 : EINTR);
  }
  const auto known = std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiter& other) {
    return other.lock.client == waiter.lock.client && other.seq == waiter.seq;
  });
  if (known != waiting_.end()) {
    known->reply = std::move(waiter.reply);
    return;
  }
  if (const auto past = ended_.find({waiter.lock.client, waiter.seq}); past != ended_.end()) {
    const int result = past->second;
    ended_.erase(past);
    reply_errno(waiter.reply, result);
    return;
  }
  waiter.lock = whole_if_flock(std::move(waiter.lock));
  const InodeId id = waiter.lock.id;
  bool weakened = false;
  int result = try_set(waiter.lock, weakened);
  if (result == EAGAIN && deadlock(waiter.lock)) result = EDEADLK;
  if (result == EAGAIN) {
    waiting_.push_back(std::move(waiter));  // before the wake: it may be the one who can go on
    if (weakened) wake(id);
    return;
  }
  const bool circle = result == 0 && may_close_circle(waiter.lock);
  if (weakened || circle) wake(id, circle);
  reply_errno(waiter.reply, result);
}

void LockTable::cancel(ClientId client, std::uint64_t seq) {
  const auto it = std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiter& waiter) {
    return waiter.lock.client == client && waiter.seq == seq;
  });
  if (it == waiting_.end()) return;
  Ended ended;
  ended.emplace_back(std::move(*it), EINTR);
  waiting_.erase(it);
  answer(ended);
}

void LockTable::release(ClientId client, std::uint64_t owner, InodeId id, bool flock) {
  const auto it = held_.find(id);
  if (it == held_.end()) return;
  const auto gone = std::erase_if(it->second, [&](const Lock& lock) {
    return lock.client == client && lock.owner == owner && lock.flock == flock;
  });
  if (it->second.empty()) held_.erase(it);
  if (gone > 0) wake(id);
}

void LockTable::detach(ClientId client) {
  Ended ended;
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (it->lock.client == client) {
      ended.emplace_back(std::move(*it), EINTR);
      it = waiting_.erase(it);
    } else {
      ++it;
    }
  }
  std::vector<InodeId> released;
  for (auto it = held_.begin(); it != held_.end();) {
    if (std::erase_if(it->second, [&](const Lock& lock) { return lock.client == client; }) > 0) {
      released.push_back(it->first);
    }
    it = it->second.empty() ? held_.erase(it) : std::next(it);
  }
  answer(ended);
  std::erase_if(ended_, [&](const auto& past) { return past.first.first == client; });
  for (const InodeId id : released) wake(id);
}

std::vector<Lock> LockTable::held() const {
  std::vector<Lock> all;
  for (const auto& [id, locks] : held_) all.insert(all.end(), locks.begin(), locks.end());
  return all;
}

void LockTable::restore(std::vector<Lock> held, std::vector<Waiter> waiting) {
  clear();
  for (Lock& lock : held) held_[lock.id].push_back(std::move(lock));
  waiting_ = std::move(waiting);
}

void LockTable::clear() {
  held_.clear();
  waiting_.clear();
  ended_.clear();
}

// A POSIX lock that was granted: whether its owner waits for another one.
bool LockTable::may_close_circle(const Lock& granted) const {
  return !granted.flock && granted.range.type() != pb::LockRange::UNLOCKED &&
         std::any_of(waiting_.begin(), waiting_.end(), [&](const Waiter& waiter) {
           return !waiter.lock.flock && same_owner(waiter.lock, granted);
         });
}

// Whether `wanted` would wait, through the owners of the locks in its way and what those wait for, for its
// own owner. As everywhere, only POSIX locks take part: an flock owner is a description, which may be shared
// by processes.
bool LockTable::deadlock(const Lock& wanted) const {
  if (wanted.flock || waiting_.empty()) return false;
  std::set<std::pair<ClientId, std::uint64_t>> seen;
  std::vector<const Lock*> blocked{&wanted};
  while (!blocked.empty()) {
    const Lock& lock = *blocked.back();
    blocked.pop_back();
    const auto it = held_.find(lock.id);
    if (it == held_.end()) continue;
    for (const Lock& holder : it->second) {
      if (!conflicts(holder, lock)) continue;
      if (same_owner(holder, wanted)) return true;
      if (!seen.insert({holder.client, holder.owner}).second) continue;
      for (const Waiter& waiter : waiting_) {
        if (!waiter.lock.flock && same_owner(waiter.lock, holder)) blocked.push_back(&waiter.lock);
      }
    }
  }
  return false;
}

// Grants what can be granted now, in the order of arrival. A grant to an owner that also waits elsewhere can
// close a circle, so then those who still wait are looked at again.
void LockTable::wake(InodeId id, bool look_for_circles) {
  if (waiting_.empty()) return;
  Ended ended;
  for (bool again = true; again;) {
    again = false;
    for (std::size_t i = 0; i < waiting_.size();) {
      const Lock& lock = waiting_[i].lock;
      bool weakened = false;
      int result = lock.id != id ? EAGAIN : try_set(lock, weakened);
      if (result == EAGAIN && lock.id == id && look_for_circles && deadlock(lock)) result = EDEADLK;
      if (result == EAGAIN) {
        ++i;
        continue;
      }
      again = true;
      ended.emplace_back(std::move(waiting_[i]), result);
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
      const Lock& done = ended.back().first.lock;
      look_for_circles = look_for_circles || (result == 0 && may_close_circle(done));
    }
  }
  answer(ended);
}

void LockTable::answer(const Ended& ended) {
  for (const auto& [waiter, result] : ended) {
    if (!waiter.reply) ended_[{waiter.lock.client, waiter.seq}] = result;
  }
  for (const auto& [waiter, result] : ended) {
    if (waiter.reply) reply_errno(waiter.reply, result);
  }
}

}  // namespace sharefs
