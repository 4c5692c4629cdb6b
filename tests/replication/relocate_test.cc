// The tree moves between the store and its private area while it is served.

#include "replication/relocate.h"

#include <sys/stat.h>

#include <fstream>

#include "tests/replication/image_sites.h"

namespace sharefs {
namespace {

class RelocateTest : public testing::Test {
 protected:
  RelocateTest() {
    start();
    for (const char* name : {"one", "two", "three"}) {
      std::ofstream(copy_->tree() / name) << name;
    }
    std::filesystem::create_directories(copy_->tree() / "dir" / "sub");
    ::chmod(copy_->tree().c_str(), 0751);
    const timespec times[2] = {{.tv_sec = 5, .tv_nsec = 6}, {.tv_sec = 7, .tv_nsec = 8}};
    ::utimensat(AT_FDCWD, copy_->tree().c_str(), times, 0);
    copy_->inodes->import_ctime(kRootInode, 12345, stat_inode(copy_->inodes->root()));
    for (const char* name : {"one", "dir"}) {
      const auto backing = *stat_name(copy_->inodes->root(), name);
      const InodeId id = copy_->inodes->identify(kRootInode, name, copy_->inodes->root(), backing);
      copy_->inodes->import_ctime(id, 777, backing);
    }
    for (const char* name : {"two", "three"}) {
      copy_->inodes->identify(kRootInode, name, copy_->inodes->root(),
                              *stat_name(copy_->inodes->root(), name));
    }
    before_ = describe(*copy_->inodes, copy_->tree());
  }
  ~RelocateTest() override { reactor_.stop(); }

  void start() {
    reactor_.run([&] {
      copy_.reset();
      copy_ = std::make_unique<Copy>(*reactor_, directory_.path() / "s", false, true);
    });
  }
  auto relocate(Relocation::Direction direction) {
    return std::make_unique<Relocation>(*copy_->inodes, copy_->store_path(), direction);
  }

  TemporaryDirectory directory_;
  RunningReactor reactor_;
  std::unique_ptr<Copy> copy_;
  std::map<std::string, std::string> before_;
};

TEST_F(RelocateTest, UpAndDownChangeNothingThatCanBeSeen) {
  relocate(Relocation::Direction::up)->all();
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
  EXPECT_TRUE(std::filesystem::is_empty(copy_->tree()));
  EXPECT_FALSE(Relocation::under_way(copy_->store_path()));
  relocate(Relocation::Direction::down)->all();
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(copy_->store_path()), {}), 1);
}

// Its bytes may have been lost with the power: shown as before it would be taken for whole
// (CellsApply::need).
TEST_F(RelocateTest, WhatIsDoubtfulDoesNotGetItsCtimeBack) {
  const auto shown = [&](const char* name) {
    const auto backing = *stat_name(copy_->inodes->root(), name);
    return copy_->inodes->presented_ctime(*copy_->inodes->find(backing), backing);
  };
  const std::int64_t one = shown("one"), two = shown("two");
  const auto own = timestamp_ns(stat_name(copy_->inodes->root(), "one")->stx_ctime);
  ::usleep(20'000);  // more than a tick of the clock
  std::ofstream(copy_->tree() / "two") << "two";
  const std::int64_t later = shown("two");
  ASSERT_GT(later, two);
  Power::Interval doubtful;
  Relocation relocation(*copy_->inodes, copy_->store_path(), Relocation::Direction::up, {},
                        [&] { return doubtful; });
  doubtful = {.from = own, .to = own + 1};  // by a sync that fails meanwhile
  relocation.all();
  EXPECT_NE(shown("one"), one);
  EXPECT_EQ(shown("two"), later) << "was not in doubt";
}

TEST_F(RelocateTest, ARequestFindsTheNameThatItMentions) {
  const auto up = relocate(Relocation::Direction::up);
  pb::Request request;
  request.mutable_lookup()->set_parent(kRootInode);
  request.mutable_lookup()->set_name("two");
  up->before(request);
  EXPECT_TRUE(std::filesystem::exists(copy_->store_path() / "two"));
  EXPECT_TRUE(std::filesystem::exists(copy_->tree() / "one"));
  request.mutable_rename()->set_parent(kRootInode);
  request.mutable_rename()->set_name("one");
  request.mutable_rename()->set_new_parent(kRootInode);
  request.mutable_rename()->set_new_name("three");
  up->before(request);
  EXPECT_TRUE(std::filesystem::exists(copy_->store_path() / "one"));
  EXPECT_TRUE(std::filesystem::exists(copy_->store_path() / "three"));
  request.mutable_lookup()->set_parent(kRootInode);
  request.mutable_lookup()->set_name("../s");
  up->before(request);
  EXPECT_FALSE(up->done());
  request.mutable_readdir()->set_id(kRootInode);
  up->before(request);
  EXPECT_TRUE(up->done());
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
}

TEST_F(RelocateTest, ItGoesOnAfterARestartAndCanTurnRound) {
  relocate(Relocation::Direction::up)->step(2);
  EXPECT_TRUE(Relocation::under_way(copy_->store_path()));
  start();
  relocate(Relocation::Direction::up)->step(1);
  start();
  relocate(Relocation::Direction::down)->step(1);
  start();
  relocate(Relocation::Direction::down)->all();
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
  EXPECT_FALSE(Relocation::under_way(copy_->store_path()));
}

TEST_F(RelocateTest, ANameInBothPlacesIsReportedAndKeepsNoOtherBack) {
  for (const char* name : {"one", "dir"}) std::ofstream(copy_->store_path() / name) << "mine";
  const auto up = relocate(Relocation::Direction::up);
  EXPECT_THROW(up->all(), std::runtime_error);
  for (const char* name : {"two", "three"})
    EXPECT_TRUE(std::filesystem::exists(copy_->store_path() / name)) << name;
  for (const char* name : {"one", "dir"}) std::filesystem::remove(copy_->store_path() / name);
  up->all();
  auto after = describe(*copy_->inodes, copy_->store_path());
  for (auto* lines : {&before_, &after}) lines->erase("/");  // its times tell that something was removed
  EXPECT_EQ(after, before_);
}

}  // namespace
}  // namespace sharefs
