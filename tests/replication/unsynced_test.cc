#include "replication/unsynced.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <utility>
#include <vector>

namespace sharefs {
namespace {

pb::Request write_to(InodeId id, bool sync = false) {
  pb::Request request;
  request.mutable_write()->set_id(id);
  request.mutable_write()->set_sync(sync);
  return request;
}

pb::Request sync_of(InodeId id) {
  pb::Request request;
  request.mutable_sync()->set_id(id);
  return request;
}

class UnsyncedTest : public testing::Test {
 protected:
  // An owner that answers when it is told to.
  class Owner final : public Executor {
   public:
    void execute(const pb::Request&, Bytes, Reply reply) override { waiting_.push_back(std::move(reply)); }
    void answer(int error) {
      pb::Outcome outcome;
      outcome.set_error(static_cast<std::uint32_t>(error));
      const Reply reply = std::move(waiting_.front());
      waiting_.erase(waiting_.begin());
      reply(outcome, {});
    }

   private:
    std::vector<Reply> waiting_;
  };

  void ask(const pb::Request& request) {
    unsynced_.execute(request, {}, [this](const pb::Outcome& outcome, Bytes) { told_ = outcome.error(); });
  }
  std::uint32_t answer(int error = 0) {
    owner_.answer(error);
    return told_;
  }
  std::uint32_t perform(const pb::Request& request, int error = 0) {
    ask(request);
    return answer(error);
  }

  Owner owner_;
  SiteName owner_name_ = "alpha";
  Unsynced unsynced_{owner_, [this]() -> const SiteName& { return owner_name_; }};
  std::uint32_t told_ = 0;
};

TEST_F(UnsyncedTest, a_sync_after_a_loss_fails_once_for_each_inode_that_was_not_synced) {
  perform(write_to(1));
  perform(write_to(2));
  perform(write_to(3, true));
  EXPECT_EQ(perform(sync_of(2)), 0U);
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(1)), std::uint32_t{EIO});
  EXPECT_EQ(perform(sync_of(1)), 0U);
  EXPECT_EQ(perform(sync_of(2)), 0U);
  EXPECT_EQ(perform(sync_of(3)), 0U) << "it was written synchronously";
  EXPECT_EQ(unsynced_.size(), 0U);
}

TEST_F(UnsyncedTest, what_was_written_while_a_sync_was_on_its_way_is_not_synced) {
  perform(write_to(1));
  ask(sync_of(1));
  ask(write_to(1));
  EXPECT_EQ(answer(), 0U);
  EXPECT_EQ(answer(), 0U);
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(1)), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, a_sync_that_was_on_its_way_fails) {
  perform(write_to(1));
  ask(sync_of(1));
  unsynced_.lost(owner_name_);
  EXPECT_EQ(answer(), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, what_failed_has_changed_nothing_and_a_sync_that_failed_tells_nothing_of_a_loss) {
  perform(write_to(1), ENOSPC);
  perform(write_to(2));
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(1)), 0U);
  EXPECT_EQ(perform(sync_of(2), ENOSPC), std::uint32_t{ENOSPC});
  EXPECT_EQ(perform(sync_of(2)), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, what_a_handoff_made_durable_is_not_lost_but_a_loss_before_it_is_still_told) {
  perform(write_to(1));
  unsynced_.lost(owner_name_);
  perform(write_to(2));
  unsynced_.durable(owner_name_);
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(1)), std::uint32_t{EIO});
  EXPECT_EQ(perform(sync_of(2)), 0U);
}

TEST_F(UnsyncedTest, what_a_former_owner_lost_before_it_handed_over_is_told_whoever_syncs_meanwhile) {
  perform(write_to(1));
  perform(write_to(2));
  owner_name_ = "beta";
  perform(write_to(2));
  EXPECT_EQ(perform(sync_of(1)), 0U) << "nobody knows yet";
  EXPECT_EQ(perform(sync_of(2)), 0U);
  unsynced_.lost("beta");
  EXPECT_EQ(perform(sync_of(2)), 0U) << "beta has synced it";
  unsynced_.lost("alpha");
  EXPECT_EQ(perform(sync_of(1)), std::uint32_t{EIO});
  EXPECT_EQ(perform(sync_of(2)), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, what_a_former_owner_handed_over_is_not_lost_when_it_loses_its_power_later) {
  perform(write_to(1));
  owner_name_ = "beta";
  perform(write_to(2));
  unsynced_.durable("alpha");
  unsynced_.lost("alpha");
  EXPECT_EQ(perform(sync_of(1)), 0U);
  unsynced_.lost("beta");
  EXPECT_EQ(perform(sync_of(2)), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, names_are_synced_with_their_directories) {
  pb::Request rename;
  rename.mutable_rename()->set_parent(5);
  rename.mutable_rename()->set_new_parent(6);
  pb::Request create;
  create.mutable_create()->set_parent(7);
  perform(rename);
  perform(create);
  perform(sync_of(6));
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(5)), std::uint32_t{EIO});
  EXPECT_EQ(perform(sync_of(6)), 0U);
  EXPECT_EQ(perform(sync_of(7)), std::uint32_t{EIO});
}

TEST_F(UnsyncedTest, of_too_many_the_oldest_are_forgotten) {
  constexpr InodeId kLast = Unsynced::kMost + 1;
  for (InodeId id = 1; id <= kLast; ++id) perform(write_to(id));
  EXPECT_LE(unsynced_.size(), Unsynced::kMost);
  unsynced_.lost(owner_name_);
  EXPECT_EQ(perform(sync_of(1)), 0U);
  EXPECT_EQ(perform(sync_of(kLast)), std::uint32_t{EIO});
}

}  // namespace
}  // namespace sharefs
