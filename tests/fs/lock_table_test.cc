#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "fs/live_state.h"

namespace sharefs {
namespace {

using Lock = LockTable::Lock;
using Type = pb::LockRange::Type;
constexpr Type kNone = pb::LockRange::UNLOCKED;
constexpr Type kShared = pb::LockRange::SHARED;
constexpr Type kExclusive = pb::LockRange::EXCLUSIVE;
constexpr InodeId kFile = 5;

Lock posix(ClientId client, std::uint64_t owner, Type type, std::uint64_t start, std::uint64_t end,
           InodeId id = kFile) {
  Lock lock{client, owner, id, {}, false};
  lock.range.set_type(type);
  lock.range.set_start(start);
  lock.range.set_end(end);
  return lock;
}

Lock whole(ClientId client, std::uint64_t owner, Type type) {
  Lock lock = posix(client, owner, type, 0, 0);
  lock.flock = true;
  return lock;
}

constexpr int kWaits = -1;

// Asks and notes the result in `result`.
void ask(LockTable& table, Lock lock, std::uint64_t seq, int& result) {
  result = kWaits;
  table.wait({std::move(lock), seq,
              [&result](const pb::Outcome& outcome, Bytes) { result = static_cast<int>(outcome.error()); }});
}

TEST(LockTable, ExclusiveKeepsOthersOutAndNotItsOwner) {
  LockTable table;
  EXPECT_EQ(table.set(posix(1, 1, kExclusive, 0, 9)), 0);
  EXPECT_EQ(table.set(posix(1, 1, kExclusive, 5, 14)), 0);
  EXPECT_EQ(table.set(posix(1, 2, kShared, 9, 9)), EAGAIN);
  EXPECT_EQ(table.set(posix(2, 1, kShared, 9, 9)), EAGAIN) << "an owner belongs to its client";
  EXPECT_EQ(table.set(posix(2, 1, kShared, 15, 15)), 0);
  EXPECT_EQ(table.set(posix(2, 1, kExclusive, 0, 0, kFile + 1)), 0) << "another file";
  ASSERT_EQ(table.conflict(posix(2, 1, kShared, 3, 3))->range.end(), 14U) << "merged";
}

TEST(LockTable, UnlockInTheMiddleSplits) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, std::numeric_limits<std::uint64_t>::max()));
  table.set(posix(1, 1, kNone, 10, 19));
  EXPECT_EQ(table.held().size(), 2U);
  EXPECT_EQ(table.set(posix(2, 1, kExclusive, 10, 19)), 0);
  EXPECT_EQ(table.set(posix(2, 1, kExclusive, 9, 9)), EAGAIN);
  EXPECT_EQ(table.set(posix(2, 1, kExclusive, 20, 20)), EAGAIN);
}

TEST(LockTable, WaitersGoInTheOrderOfArrival) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 9));
  int second = 0, third = 0, reader = 0;
  ask(table, posix(1, 2, kExclusive, 0, 0), 100, second);
  ask(table, posix(1, 3, kExclusive, 0, 0), 101, third);
  ask(table, posix(1, 4, kShared, 5, 5), 102, reader);
  EXPECT_EQ(second, kWaits);
  table.set(posix(1, 1, kShared, 0, 9));
  EXPECT_EQ(reader, 0) << "a downgrade wakes readers";
  EXPECT_EQ(second, kWaits);
  table.set(posix(1, 1, kNone, 0, 9));
  EXPECT_EQ(second, 0);
  EXPECT_EQ(third, kWaits);
  table.release_posix(1, 2, kFile);
  EXPECT_EQ(third, 0);
  EXPECT_TRUE(table.waiting().empty());
}

TEST(LockTable, AGrantMayEnableAnEarlierWaiter) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 9));
  table.set(posix(1, 2, kExclusive, 10, 10));
  int early = 0, late = 0;
  ask(table, posix(1, 3, kShared, 10, 10), 100, early);
  ask(table, posix(1, 2, kShared, 0, 10), 101, late);  // will weaken 10
  table.set(posix(1, 1, kNone, 0, 9));
  EXPECT_EQ(late, 0);
  EXPECT_EQ(early, 0);
}

TEST(LockTable, CirclesOfPosixOwnersAreRefused) {
  LockTable table;
  for (std::uint64_t owner : {1U, 2U, 3U}) table.set(posix(owner, 1, kExclusive, owner, owner));
  int first = 0, second = 0, third = 0;
  ask(table, posix(1, 1, kExclusive, 2, 2), 100, first);
  ask(table, posix(2, 1, kExclusive, 3, 3), 100, second);
  ask(table, posix(3, 1, kExclusive, 1, 1), 100, third);
  EXPECT_EQ(first, kWaits);
  EXPECT_EQ(second, kWaits);
  EXPECT_EQ(third, EDEADLK);
  table.detach(3);
  EXPECT_EQ(second, 0);
}

TEST(LockTable, ACircleAcrossFilesIsRefused) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 0, 8));
  table.set(posix(2, 1, kExclusive, 0, 0, 9));
  int first = 0, second = 0;
  ask(table, posix(1, 1, kShared, 0, 0, 9), 100, first);
  ask(table, posix(2, 1, kShared, 0, 0, 8), 100, second);
  EXPECT_EQ(second, EDEADLK);
  EXPECT_EQ(first, kWaits);
}

TEST(LockTable, ACircleClosedByAGrantIsFound) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 0));    // A holds 0
  table.set(posix(2, 1, kExclusive, 10, 10));  // B holds 10
  int a_thread = 0, b_waits = 0, c_waits = 0;
  ask(table, posix(3, 1, kExclusive, 0, 0), 100, c_waits);     // C wants 0
  ask(table, posix(2, 1, kExclusive, 0, 0), 100, b_waits);     // B wants 0, holds 10
  ask(table, posix(3, 1, kExclusive, 10, 10), 101, a_thread);  // another thread of C wants 10
  EXPECT_EQ(a_thread, kWaits);
  table.set(posix(1, 1, kNone, 0, 0));  // C gets 0; now B waits for C and C for B
  EXPECT_EQ(c_waits, 0);
  EXPECT_EQ(b_waits, EDEADLK);
  EXPECT_EQ(a_thread, kWaits);
}

TEST(LockTable, ACircleClosedByALockThatNobodyHadToWaitForIsFound) {
  for (const bool asks : {false, true}) {
    LockTable table;
    table.set(posix(1, 1, kExclusive, 0, 0));  // W holds 0
    table.set(posix(2, 1, kShared, 10, 10));   // Q reads 10
    int w_waits = 0, p_waits = 0, p_reads = 0;
    ask(table, posix(1, 1, kExclusive, 10, 10), 100, w_waits);
    ask(table, posix(3, 1, kExclusive, 0, 0), 100, p_waits);  // P wants 0
    EXPECT_EQ(w_waits, kWaits);
    if (asks)
      ask(table, posix(3, 1, kShared, 10, 10), 101, p_reads);  // another thread of P gets 10 beside Q
    else
      p_reads = table.set(posix(3, 1, kShared, 10, 10));
    EXPECT_EQ(p_reads, 0);
    EXPECT_EQ(w_waits, EDEADLK) << "it waits for P, and P for it";
    EXPECT_EQ(p_waits, kWaits);
  }
}

TEST(LockTable, FlockIsASpaceOfItsOwnAndConvertsByGivingUp) {
  LockTable table;
  EXPECT_EQ(table.set(posix(1, 1, kExclusive, 0, 9)), 0);
  EXPECT_EQ(table.set(whole(2, 7, kShared)), 0);
  EXPECT_EQ(table.set(whole(1, 7, kShared)), 0);
  EXPECT_EQ(table.set(whole(1, 7, kExclusive)), EAGAIN);
  EXPECT_EQ(table.set(whole(2, 7, kExclusive)), 0) << "the failed conversion gave the lock of client 1 up";
  int waiting = 0;
  ask(table, whole(1, 7, kShared), 100, waiting);
  EXPECT_EQ(waiting, kWaits);
  EXPECT_EQ(table.set(whole(2, 7, kShared)), 0);
  EXPECT_EQ(waiting, 0);
  table.release_flock(1, 7, kFile);
  table.release_flock(2, 7, kFile);
  EXPECT_EQ(table.held().size(), 1U);
}

TEST(LockTable, AConversionThatWaitsLetsAnotherOneThrough) {
  LockTable table;
  table.set(whole(1, 7, kShared));
  table.set(whole(2, 7, kShared));
  int first = 0, second = 0;
  ask(table, whole(1, 7, kExclusive), 100, first);
  EXPECT_EQ(first, kWaits);
  ask(table, whole(2, 7, kExclusive), 100, second);
  EXPECT_EQ(second, 0);
  table.set(whole(2, 7, kNone));
  EXPECT_EQ(first, 0);
}

TEST(LockTable, CancelEndsTheOneThatWaits) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 9));
  int result = 0;
  ask(table, posix(2, 1, kExclusive, 0, 9), 100, result);
  table.cancel(1, 100);
  EXPECT_EQ(result, kWaits);
  table.cancel(2, 100);
  EXPECT_EQ(result, EINTR);
  table.cancel(2, 100);
  table.set(posix(1, 1, kNone, 0, 9));
  EXPECT_TRUE(table.held().empty());
}

TEST(LockTable, ARestoredWaiterAnswersWhenItIsAskedAgain) {
  LockTable old_owner, table;
  old_owner.set(posix(1, 1, kExclusive, 0, 9));
  int lost = 0;
  for (std::uint64_t seq : {100U, 101U, 102U})
    ask(old_owner, posix(2, seq, kExclusive, seq % 10, seq % 10), seq, lost);
  std::vector<LockTable::Waiter> waiting;
  for (const auto& waiter : old_owner.waiting()) waiting.push_back({waiter.lock, waiter.seq, nullptr});
  table.restore(old_owner.held(), std::move(waiting));

  int granted = 0, cancelled = 0, asked_before = 0;
  ask(table, posix(2, 102, kExclusive, 2, 2), 102, asked_before);
  EXPECT_EQ(asked_before, kWaits);
  EXPECT_EQ(table.waiting().size(), 3U) << "the same request, not another one";
  table.cancel(2, 101);
  table.set(posix(1, 1, kNone, 0, 9));
  EXPECT_EQ(asked_before, 0);
  ask(table, posix(2, 100, kExclusive, 0, 0), 100, granted);
  ask(table, posix(2, 101, kExclusive, 1, 1), 101, cancelled);
  EXPECT_EQ(granted, 0);
  EXPECT_EQ(cancelled, EINTR);
  EXPECT_EQ(table.held().size(), 2U);
  EXPECT_TRUE(table.waiting().empty());
}

// Cancelled at an owner before this one, or granted there, or waiting still.
TEST(LockTable, WhatIsGivenUpIsNotGrantedAnyMore) {
  LockTable table;
  const auto given_up = [&](const Lock& lock, std::uint64_t seq) {
    int result = kWaits;
    table.wait({lock, seq,
                [&](const pb::Outcome& outcome, Bytes) { result = static_cast<int>(outcome.error()); },
                true});
    return result;
  };
  EXPECT_EQ(given_up(posix(1, 1, kExclusive, 0, 9), 100), EINTR);
  EXPECT_TRUE(table.held().empty());
  table.set(posix(1, 1, kExclusive, 0, 9));
  EXPECT_EQ(given_up(posix(1, 1, kExclusive, 2, 4), 102), 0);
  int other = 0;
  ask(table, posix(2, 1, kExclusive, 5, 5), 100, other);
  EXPECT_EQ(given_up(posix(2, 1, kExclusive, 5, 5), 100), EINTR);
  EXPECT_TRUE(table.waiting().empty());
}

// The client takes the old one for lost, and nothing else would give it up before the file is closed.
TEST(LockTable, AFlockThatIsGivenUpForAnotherKindIsGone) {
  LockTable table;
  ASSERT_EQ(table.set(whole(1, 1, kShared)), 0);
  int other = 0, converted = kWaits;
  ask(table, whole(2, 1, kExclusive), 100, other);
  ASSERT_EQ(other, kWaits);
  table.wait({whole(1, 1, kExclusive), 101,
              [&](const pb::Outcome& outcome, Bytes) { converted = static_cast<int>(outcome.error()); },
              true});
  EXPECT_EQ(converted, EINTR);
  EXPECT_EQ(other, 0) << "granted to who has waited for it";
}

// A description that several processes share.
TEST(LockTable, AFlockThatWasTakenWhileAnotherKindWasWaitedForStays) {
  LockTable table;
  ASSERT_EQ(table.set(whole(2, 1, kShared)), 0);
  int waits = 0, given_up = kWaits;
  ask(table, whole(1, 1, kExclusive), 100, waits);
  ASSERT_EQ(waits, kWaits);
  ASSERT_EQ(table.set(whole(1, 1, kShared)), 0);
  table.wait({whole(1, 1, kExclusive), 100,
              [&](const pb::Outcome& outcome, Bytes) { given_up = static_cast<int>(outcome.error()); },
              true});
  EXPECT_EQ(given_up, EINTR);
  EXPECT_EQ(table.set(whole(3, 1, kExclusive)), EAGAIN);
  table.release_flock(2, 1, kFile);
  EXPECT_EQ(table.set(whole(3, 1, kExclusive)), EAGAIN) << "the description has it still";
}

TEST(LockTable, DetachDropsLocksAndWaitersOfTheClient) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 9));
  table.set(posix(3, 1, kExclusive, 0, 9, 8));
  int own = 0, other = 0;
  ask(table, posix(1, 2, kExclusive, 0, 0, 8), 100, own);
  ask(table, posix(2, 1, kExclusive, 0, 9), 100, other);
  table.detach(1);
  EXPECT_EQ(own, EINTR);
  EXPECT_EQ(other, 0);
  EXPECT_EQ(table.held().size(), 2U);
}

TEST(LockTable, AReplyMayComeBackIn) {
  LockTable table;
  table.set(posix(1, 1, kExclusive, 0, 9));
  int third = 0;
  table.wait({posix(2, 1, kExclusive, 0, 9), 100,
              [&](const pb::Outcome&, Bytes) { table.set(posix(2, 1, kNone, 0, 9)); }});
  ask(table, posix(3, 1, kExclusive, 0, 9), 100, third);
  table.set(posix(1, 1, kNone, 0, 9));
  EXPECT_EQ(third, 0);
}

// The model: for each owner, the type of every byte. Nobody waits in it.
class ByteModel {
 public:
  static constexpr std::uint64_t kBytes = 24;
  using Owner = std::pair<ClientId, std::uint64_t>;

  int set(const Lock& lock) {
    for (const auto& [owner, bytes] : owners_) {
      if (owner == Owner{lock.client, lock.owner}) continue;
      for (auto i = lock.range.start(); i <= lock.range.end(); ++i) {
        if (clash(bytes[i], lock.range.type())) return EAGAIN;
      }
    }
    auto& mine = owners_[{lock.client, lock.owner}];
    for (auto i = lock.range.start(); i <= lock.range.end(); ++i) mine[i] = lock.range.type();
    return 0;
  }
  void release(const Owner& owner) { owners_.erase(owner); }
  std::map<Owner, std::array<int, kBytes>> owners() const {
    auto some = owners_;
    std::erase_if(some, [](const auto& entry) { return entry.second == std::array<int, kBytes>{}; });
    return some;
  }

 private:
  static bool clash(int held, int wanted) {
    return held != kNone && wanted != kNone && (held == kExclusive || wanted == kExclusive);
  }
  std::map<Owner, std::array<int, kBytes>> owners_;
};

// The table's locks, byte by byte; fails on locks that overlap or that should be one.
std::map<ByteModel::Owner, std::array<int, ByteModel::kBytes>> bytes_of(const LockTable& table) {
  std::map<ByteModel::Owner, std::array<int, ByteModel::kBytes>> owners;
  const auto held = table.held();
  for (const Lock& lock : held) {
    auto& bytes = owners[{lock.client, lock.owner}];
    for (auto i = lock.range.start(); i <= lock.range.end(); ++i) {
      EXPECT_EQ(bytes[i], kNone) << "two locks of one owner at byte " << i;
      bytes[i] = lock.range.type();
    }
    for (const Lock& other : held) {
      EXPECT_FALSE(other.client == lock.client && other.owner == lock.owner &&
                   other.range.type() == lock.range.type() && other.range.start() == lock.range.end() + 1)
          << "touching locks of one type are not merged";
    }
  }
  return owners;
}

TEST(LockTable, AgreesWithAModelOfSingleBytes) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  LockTable table;
  ByteModel model;
  struct Waiting {
    Lock lock;
    int result = kWaits;
  };
  std::map<std::uint64_t, Waiting> waiting;  // in the order of arrival; std::map keeps addresses
  for (std::uint64_t step = 1; step <= 30000; ++step) {
    const ClientId client = 1 + random() % 3;
    const std::uint64_t owner = 1 + random() % 2;
    if (random() % 50 == 0) {
      table.release_posix(client, owner, kFile);
      model.release({client, owner});
    } else {
      const std::uint64_t start = random() % ByteModel::kBytes;
      const std::uint64_t end = start + random() % (ByteModel::kBytes - start);
      const Lock lock = posix(client, owner, static_cast<Type>(random() % 3), start, end);
      if (lock.range.type() != kNone && random() % 4 == 0) {
        Waiting& mine = waiting[step];
        mine.lock = lock;
        ask(table, lock, step, mine.result);
      } else {
        ASSERT_EQ(table.set(lock), model.set(lock)) << "step " << step;
      }
    }
    // What the table granted to waiters must be possible in the model too, in the order of arrival.
    for (bool again = true; again;) {
      again = false;
      for (auto it = waiting.begin(); it != waiting.end();) {
        Waiting& one = it->second;
        if (one.result == EDEADLK || (one.result == 0 && model.set(one.lock) == 0)) {
          again = again || one.result == 0;
          it = waiting.erase(it);
        } else {
          ++it;
        }
      }
    }
    for (const auto& [seq, one] : waiting) {
      ASSERT_EQ(one.result, kWaits) << "step " << step << ": granted against the model, asked in step "
                                    << seq;
      ASSERT_TRUE(table.conflict(one.lock))
          << "step " << step << ": waits for nothing, asked in step " << seq;
    }
    ASSERT_EQ(bytes_of(table), model.owners()) << "step " << step;
  }
}

}  // namespace
}  // namespace sharefs
