// Where the tree lies, through changes of ownership, restarts and disks that let nothing be moved.

#include "replication/tree_place.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>

#include "tests/replication/image_sites.h"

namespace sharefs {
namespace {

using Direction = TreePlace::Direction;

// A site that has received the tree. What cannot be moved is a directory in the way of the marker's new name:
// nothing that a site makes.
class TreePlaceTest : public testing::Test {
 protected:
  TreePlaceTest() {
    start();
    for (const char* name : {"one", "two"}) std::ofstream(copy_->tree() / name) << name;
    ::chmod(copy_->tree().c_str(), 0751);
    for (const char* name : {"one", "two"})
      copy_->inodes->identify(kRootInode, name, copy_->inodes->root(),
                              *stat_name(copy_->inodes->root(), name));
    before_ = describe(*copy_->inodes, copy_->tree());
  }
  ~TreePlaceTest() override { stop(); }

  // Another process: as a site does, it takes the store for the root first.
  void start(bool store_is_root = false) {
    stop();
    reactor_.run([&] {
      copy_ = std::make_unique<Copy>(*reactor_, directory_.path() / "s", store_is_root, true);
      state_ = std::make_unique<State>(*copy_->database);
      power_ = std::make_unique<Power>(*state_);
      power_->trust();
      place_ = std::make_unique<TreePlace>(*copy_->store, *copy_->inodes, *state_, *power_,
                                           copy_->store_path(), *reactor_, [this] { return walked_; });
    });
  }
  void stop() {
    reactor_.run([&] {
      place_.reset();
      power_.reset();
      state_.reset();
      copy_.reset();
    });
  }
  void on_reactor(const std::function<void()>& task) { reactor_.run(task); }
  std::filesystem::path hindrance() const { return copy_->area() / "relocation.new"; }
  std::map<std::string, std::string> shown() {
    return describe(*copy_->inodes, "/proc/self/fd/" + std::to_string(copy_->inodes->root()));
  }

  TemporaryDirectory directory_;
  RunningReactor reactor_;
  std::unique_ptr<Copy> copy_;
  std::unique_ptr<State> state_;
  std::unique_ptr<Power> power_;
  std::unique_ptr<TreePlace> place_;
  bool walked_ = false;
  std::map<std::string, std::string> before_;
};

TEST_F(TreePlaceTest, ItGoesToWhoeverOwnsAndBack) {
  on_reactor([&] {
    place_->move(Direction::up);
    place_->finish();
    EXPECT_TRUE(place_->settled());
    EXPECT_EQ(place_->root(), copy_->store_path());
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
  on_reactor([&] {
    place_->move(Direction::down);
    place_->finish();
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
}

TEST_F(TreePlaceTest, WhatCannotBeBegunIsServedFromWhereItLiesAndTriedAgain) {
  std::filesystem::create_directory(hindrance());
  on_reactor([&] {
    place_->move(Direction::up);
    EXPECT_FALSE(place_->settled());
    EXPECT_FALSE(place_->moving());
    EXPECT_EQ(place_->root(), copy_->tree());
    place_->finish();  // in one place
    EXPECT_EQ(place_->root(), copy_->tree());
  });
  EXPECT_EQ(shown(), before_);
  start(true);
  on_reactor([&] {
    place_->resume(Direction::up);
    EXPECT_EQ(place_->root(), copy_->tree());
    walked_ = true;
  });
  EXPECT_EQ(shown(), before_);
  std::filesystem::remove(hindrance());
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  on_reactor([&] {
    EXPECT_FALSE(place_->settled());
    walked_ = false;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  on_reactor([&] { EXPECT_TRUE(place_->settled()); });
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
}

TEST_F(TreePlaceTest, AStoreThatCannotBePutAwayIsNoTarget) {
  on_reactor([&] {
    place_->move(Direction::up);
    place_->finish();
    std::filesystem::create_directory(hindrance());
    place_->move(Direction::down);
    EXPECT_THROW(place_->finish(), std::runtime_error);
    EXPECT_FALSE(place_->settled());
    std::filesystem::remove(hindrance());
    place_->finish();
    EXPECT_TRUE(place_->settled());
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
}

TEST_F(TreePlaceTest, WhoGivesAwayWhatHasNeverLeftThePrivateAreaClosesTheStore) {
  std::filesystem::create_directory(hindrance());
  on_reactor([&] {
    place_->move(Direction::up);
    place_->move(Direction::down);
    EXPECT_TRUE(place_->settled());
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
  EXPECT_EQ(stat_inode(open_path(copy_->store_path()).get()).stx_mode & 07777, 0700);
}

// An empty tree: only the root tells whether it was moved.
class EmptyTreePlaceTest : public TreePlaceTest {
 protected:
  EmptyTreePlaceTest() {
    for (const char* name : {"one", "two"}) std::filesystem::remove(copy_->tree() / name);
    before_ = describe(*copy_->inodes, copy_->tree());
    on_reactor([&] { place_->resume(Direction::down); });
  }
};

TEST_F(EmptyTreePlaceTest, ItIsMovedByTheProcessThatComesAfterTheOneThatTookOver) {
  start(true);
  on_reactor([&] { place_->resume(Direction::up); });
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
  start(true);  // and is put away in the same way
  on_reactor([&] { place_->resume(Direction::down); });
  EXPECT_EQ(describe(*copy_->inodes, copy_->tree()), before_);
}

TEST_F(EmptyTreePlaceTest, ItStaysWhereItIsUntilItCanBeMoved) {
  std::filesystem::create_directory(hindrance());
  on_reactor([&] { place_->move(Direction::up); });
  EXPECT_EQ(shown(), before_);
  start(true);
  on_reactor([&] { place_->resume(Direction::up); });
  EXPECT_EQ(shown(), before_);
  std::filesystem::remove(hindrance());
  on_reactor([&] {
    place_->finish();
    EXPECT_TRUE(place_->settled());
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
}

TEST_F(TreePlaceTest, WhatIsAboveADirectoryThatIsBehindIsTheRoot) {
  for (int i = 0; i < 100; ++i) std::filesystem::create_directory(copy_->tree() / std::to_string(i));
  on_reactor([&] {
    place_->move(Direction::up);
    const UniqueFd tree = open_path(copy_->tree());
    const auto behind = list_directory(tree.get());
    const auto directory = std::find_if(behind.begin(), behind.end(), [this](const auto& entry) {
      return std::filesystem::is_directory(copy_->tree() / entry.name);
    });
    ASSERT_NE(directory, behind.end());
    const auto& name = directory->name;
    pb::Request request;
    request.mutable_lookup()->set_parent(
        copy_->inodes->identify(kRootInode, name, tree.get(), *stat_name(tree.get(), name)));
    request.mutable_lookup()->set_name("..");
    place_->execute(request, {}, [](const pb::Outcome& outcome, Bytes) {
      EXPECT_EQ(outcome.error(), 0U);
      EXPECT_EQ(outcome.attr().id(), kRootInode);
    });
  });
}

// Something is in the place of the tree, as a disk might fail just there.
TEST_F(TreePlaceTest, WhatWasBegunAndCannotBeGoneOnWithIsServedAsFarAsItCanBeSeen) {
  std::string moved;
  on_reactor([&] {
    Relocation begun(*copy_->inodes, copy_->store_path(), Direction::up);
    EXPECT_TRUE(begun.step(1));
    moved = std::filesystem::exists(copy_->store_path() / "one") ? "one" : "two";
  });
  const std::string behind = moved == "one" ? "two" : "one";
  start(true);
  const auto away = copy_->area() / "away";
  std::filesystem::rename(copy_->tree(), away);
  std::ofstream(copy_->tree()) << "x";
  const auto look_up = [&](const std::string& name) {
    std::uint32_t found = 0;
    pb::Request request;
    request.mutable_lookup()->set_parent(kRootInode);
    request.mutable_lookup()->set_name(name);
    place_->execute(request, {}, [&](const pb::Outcome& outcome, Bytes) { found = outcome.error(); });
    return found;
  };
  on_reactor([&] {
    place_->resume(Direction::up);
    EXPECT_FALSE(place_->settled());
    EXPECT_EQ(place_->root(), copy_->store_path());
    EXPECT_EQ(look_up(moved), 0U);
    EXPECT_EQ(look_up(behind), static_cast<std::uint32_t>(ENOTDIR));
    EXPECT_THROW(place_->finish(), std::runtime_error) << "it would be handed over in part";
  });
  std::filesystem::remove(copy_->tree());
  std::filesystem::rename(away, copy_->tree());
  on_reactor([&] {
    EXPECT_EQ(look_up(behind), 0U);
    place_->finish();
    EXPECT_TRUE(place_->settled());
  });
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
}

TEST_F(TreePlaceTest, WhatHasBeenMovedWithoutAWordOnItIsEnded) {
  on_reactor([&] {
    place_->move(Direction::up);
    place_->finish();
  });
  std::filesystem::create_symlink("up", copy_->area() / "relocation");
  start(true);
  on_reactor([&] {
    place_->resume(Direction::up);
    EXPECT_TRUE(place_->settled());
  });
  EXPECT_FALSE(Relocation::under_way(copy_->store_path()));
  EXPECT_EQ(describe(*copy_->inodes, copy_->store_path()), before_);
}

}  // namespace
}  // namespace sharefs
