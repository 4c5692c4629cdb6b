#include "replication/holdings.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace sharefs {
namespace {

constexpr ClientId kClient = 7;
constexpr InodeId kFile = 5;

class HoldingsTest : public testing::Test {
 protected:
  // An owner that answers when it is told to.
  class Owner final : public Executor {
   public:
    void execute(const pb::Request&, Bytes, Reply reply) override { asked_.push_back(std::move(reply)); }
    void answer() { asked_.back()({}, {}); }
    void answer(std::size_t number) { asked_.at(number)({}, {}); }

   private:
    std::vector<Reply> asked_;
  };
  using Owners = std::vector<std::uint64_t>;  // of locks

  static pb::Request flock(std::uint64_t owner, pb::LockRange::Type type) {
    pb::Request request;
    request.set_client(kClient);
    auto* lock = request.mutable_setlock();
    lock->set_id(kFile);
    lock->set_lock_owner(owner);
    lock->set_flock(true);
    lock->set_wait(true);
    lock->mutable_range()->set_type(type);
    lock->mutable_range()->set_end(~std::uint64_t{0});
    return request;
  }
  static pb::Request record_lock(std::uint64_t owner, pb::LockRange::Type type) {
    pb::Request request = flock(owner, type);
    request.mutable_setlock()->set_flock(false);
    return request;
  }
  void ask(const pb::Request& request) {
    holdings_.execute(request, {}, [](const pb::Outcome&, Bytes) {});
  }
  void perform(const pb::Request& request) {
    ask(request);
    owner_.answer();
  }
  // To an owner that asks, and to one that has forgotten the client.
  void expect_told(const Owners& expected) {
    pb::RecallDone done;
    holdings_.tell(kClient, done);
    Owners told, requested;
    for (const auto& lock : done.locks()) told.push_back(lock.owner());
    for (const auto& request : holdings_.requests(kClient))
      requested.push_back(request.setlock().lock_owner());
    EXPECT_EQ(told, expected);
    EXPECT_EQ(requested, expected);
  }

  Owner owner_;
  Holdings holdings_{owner_, [] { return true; }};
};

TEST_F(HoldingsTest, AFlockThatIsBeingConvertedIsNotTold) {
  perform(flock(1, pb::LockRange::SHARED));
  expect_told({1});
  ask(flock(1, pb::LockRange::EXCLUSIVE));
  expect_told({});
  owner_.answer();
  expect_told({1});
}

TEST_F(HoldingsTest, LocksOfOthersAndRecordLocksAreToldMeanwhile) {
  perform(record_lock(1, pb::LockRange::SHARED));
  perform(flock(2, pb::LockRange::SHARED));
  ask(record_lock(1, pb::LockRange::EXCLUSIVE));
  ask(flock(3, pb::LockRange::EXCLUSIVE));
  expect_told({1, 2});
}

TEST_F(HoldingsTest, ARecordLockThatIsBeingMadeASharedOneIsToldAsThat) {
  pb::Request held = record_lock(1, pb::LockRange::EXCLUSIVE);
  held.mutable_setlock()->mutable_range()->set_start(10);
  perform(held);
  pb::Request shared = record_lock(1, pb::LockRange::SHARED);
  shared.mutable_setlock()->mutable_range()->set_end(99);
  ask(shared);
  expect_told({1, 1});
  pb::RecallDone done;
  holdings_.tell(kClient, done);
  for (const auto& lock : done.locks()) {
    const bool is_shared = lock.range().type() == pb::LockRange::SHARED;
    EXPECT_EQ(lock.range().start(), is_shared ? 10u : 100u);
    EXPECT_EQ(lock.range().end(), is_shared ? 99u : ~std::uint64_t{0});
  }
}

// The owner answers who was waiting before it answers who has made room.
TEST_F(HoldingsTest, ALockThatIsPassedOnWithinTheMountIsTold) {
  perform(record_lock(1, pb::LockRange::EXCLUSIVE));
  perform(flock(1, pb::LockRange::EXCLUSIVE));
  ask(record_lock(2, pb::LockRange::EXCLUSIVE));
  ask(flock(2, pb::LockRange::EXCLUSIVE));
  ask(record_lock(1, pb::LockRange::UNLOCKED));
  ask(flock(1, pb::LockRange::SHARED));
  ask(flock(1, pb::LockRange::UNLOCKED));
  for (const std::size_t number : {2, 3}) owner_.answer(number);
  expect_told({2, 2});
  for (const std::size_t number : {4, 5, 6}) owner_.answer(number);
  expect_told({2, 2});
}

TEST_F(HoldingsTest, LocksThatAreBeingGivenUpAreNotToldButAllOthersAre) {
  perform(record_lock(1, pb::LockRange::EXCLUSIVE));
  perform(flock(1, pb::LockRange::SHARED));
  pb::Request part = record_lock(1, pb::LockRange::UNLOCKED);
  part.mutable_setlock()->mutable_range()->set_end(99);
  ask(part);
  expect_told({1, 1});
  pb::RecallDone done;
  holdings_.tell(kClient, done);
  for (const auto& lock : done.locks()) EXPECT_EQ(lock.range().start(), lock.flock() ? 0u : 100u);
  pb::Request close;
  close.set_client(kClient);
  close.mutable_flush()->set_id(kFile);
  close.mutable_flush()->set_lock_owner(1);
  ask(close);
  expect_told({1});
  ask(flock(1, pb::LockRange::UNLOCKED));
  expect_told({});
}

}  // namespace
}  // namespace sharefs
