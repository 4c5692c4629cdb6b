#include "replication/unsynced.h"

#include <gtest/gtest.h>

#include <cerrno>

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
  int perform(const pb::Request& request) { return unsynced_.answered(unsynced_.part_of(request)); }
  Unsynced unsynced_;
};

TEST_F(UnsyncedTest, a_sync_after_a_loss_fails_once_for_each_inode_that_was_not_synced) {
  perform(write_to(1));
  perform(write_to(2));
  perform(write_to(3, true));
  EXPECT_EQ(perform(sync_of(2)), 0);
  unsynced_.lost();
  EXPECT_EQ(perform(sync_of(1)), EIO);
  EXPECT_EQ(perform(sync_of(1)), 0);
  EXPECT_EQ(perform(sync_of(2)), 0);
  EXPECT_EQ(perform(sync_of(3)), 0) << "it was written synchronously";
  EXPECT_EQ(unsynced_.size(), 0U);
}

TEST_F(UnsyncedTest, what_was_written_while_a_sync_was_on_its_way_is_not_synced) {
  perform(write_to(1));
  const auto syncing = unsynced_.part_of(sync_of(1));
  perform(write_to(1));
  EXPECT_EQ(unsynced_.answered(syncing), 0);
  unsynced_.lost();
  EXPECT_EQ(perform(sync_of(1)), EIO);
}

TEST_F(UnsyncedTest, a_sync_that_was_on_its_way_fails) {
  perform(write_to(1));
  const auto syncing = unsynced_.part_of(sync_of(1));
  unsynced_.lost();
  EXPECT_EQ(unsynced_.answered(syncing), EIO);
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
  unsynced_.lost();
  EXPECT_EQ(perform(sync_of(5)), EIO);
  EXPECT_EQ(perform(sync_of(6)), 0);
  EXPECT_EQ(perform(sync_of(7)), EIO);
}

TEST_F(UnsyncedTest, of_too_many_the_oldest_are_forgotten) {
  constexpr InodeId kLast = Unsynced::kMost + 1;
  for (InodeId id = 1; id <= kLast; ++id) perform(write_to(id));
  EXPECT_LE(unsynced_.size(), Unsynced::kMost);
  unsynced_.lost();
  EXPECT_EQ(perform(sync_of(1)), 0);
  EXPECT_EQ(perform(sync_of(kLast)), EIO);
}

}  // namespace
}  // namespace sharefs
