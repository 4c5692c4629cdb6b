// What a target does not believe.

#include "tests/replication/image_fixture.h"

namespace sharefs {
namespace {

class HostileTest : public ImageTest {
 protected:
  void SetUp() override {
    ImageTest::SetUp();
    std::filesystem::create_directories(a("d"));
    write_file(a("d/f"), "data");
    write_file(a("f"), "data");
    std::filesystem::create_symlink(directory_.path() / "outside", a("s"));
    std::filesystem::create_directories(directory_.path() / "outside");
    write_file(directory_.path() / "outside" / "precious", "precious");
    send_all();
    attempt_.reset();
    before_ = describe(*b_->inodes, b_->tree());
  }
  // Applies the batch to a new target and returns what it says.
  std::string refuse(const pb::Cells& cells, const std::string& data = {}) {
    std::string reason;
    std::promise<void> failed;
    std::unique_ptr<ImageTarget> target;
    reactor_.run([&] {
      target = std::make_unique<ImageTarget>(
          ImageTarget::Options{.attempt = 9, .source = "source", .private_area = b_->area()}, *b_->inodes,
          *b_->disk, *reactor_, [&](const pb::Envelope&) { failed.set_value(); },
          [&](const std::string& why) {
            reason = why;
            failed.set_value();
          });
      Message message;
      message.parts.emplace_back(cells.SerializeAsString());
      message.parts.emplace_back(data);
      pb::Batch& batch = *message.head.mutable_batch();
      batch.set_attempt(9);
      batch.set_number(1);
      batch.set_checksum(checksum(message.parts[0], message.parts[1]));
      target->batch(std::move(message));
    });
    failed.get_future().get();
    reactor_.run([&] { target.reset(); });
    EXPECT_EQ(read_file(directory_.path() / "outside" / "precious"), "precious");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_.path() / "outside"), {}), 1);
    return reason;
  }
  InodeId id(const std::string& name) { return *b_->inodes->find(*stat_name(AT_FDCWD, b(name).string())); }

  std::map<std::string, std::string> before_;
};

INSTANTIATE_TEST_SUITE_P(Access, HostileTest, testing::Values(true), [](const auto&) { return "Handles"; });

TEST_P(HostileTest, RefusesNamesThatLeadElsewhere) {
  for (const std::string& name :
       {std::string("../x"), std::string("x/y"), std::string(".."), std::string("."), std::string(),
        std::string("a\0b", 3), std::string(256, 'n'), std::string(".sharefs")}) {
    pb::Cells cells;
    auto& entry = *cells.add_entries();
    entry.set_parent(kRootInode);
    entry.set_name(name);
    entry.set_id(id("f"));
    EXPECT_TRUE(refuse(cells).starts_with("malformed batch")) << name;
    entry.set_id(0);
    EXPECT_TRUE(refuse(cells).starts_with("malformed batch")) << name;
    cells.clear_entries();
    cells.add_directories()->set_id(kRootInode);
    *cells.mutable_directories(0)->add_entries() = entry;
    cells.mutable_directories(0)->mutable_entries(0)->set_id(id("f"));
    EXPECT_TRUE(refuse(cells).starts_with("malformed batch")) << name;
  }
  EXPECT_EQ(describe(*b_->inodes, b_->tree()), before_);
}

TEST_P(HostileTest, RefusesAPartOfAListingWithoutItsStart) {
  pb::Cells cells;
  cells.add_directories()->set_id(kRootInode);
  cells.mutable_directories(0)->set_more(true);
  cells.add_directories()->set_id(id("d"));
  cells.mutable_directories(1)->set_part(1);
  EXPECT_TRUE(refuse(cells).starts_with("malformed batch"));
  EXPECT_EQ(describe(*b_->inodes, b_->tree()), before_);
}

TEST_P(HostileTest, RefusesDataWhereNoneCanBe) {
  for (const InodeId where : {kRootInode, id("d"), id("s"), InodeId{0}, InodeId{123456}}) {
    pb::Cells cells;
    auto& extent = *cells.add_extents();
    extent.set_id(where);
    extent.set_length(4);
    EXPECT_NE(refuse(cells, "evil"), "") << where;
  }
  struct {
    std::uint64_t offset, length;
    bool hole;
  } const extents[] = {{0, 5, false},
                       {0, 3, false},
                       {~0ull, 4, false},
                       {~0ull - 2, ~0ull, true},
                       {1ull << 63, 4, false},
                       {0, ~0ull, false},
                       {0x7fffffffffffffff, 4, false}};
  for (const auto& [offset, length, hole] : extents) {
    pb::Cells cells;
    auto& extent = *cells.add_extents();
    extent.set_id(id("f"));
    extent.set_offset(offset);
    extent.set_length(length);
    extent.set_hole(hole);
    EXPECT_TRUE(refuse(cells, hole ? "" : "evil").starts_with("malformed batch")) << offset << " " << length;
  }
  EXPECT_EQ(describe(*b_->inodes, b_->tree()), before_);
}

TEST_P(HostileTest, RefusesToChangeWhatAnInodeIs) {
  const auto state = [](pb::Cells& cells, InodeId id, std::uint32_t mode) -> pb::InodeState& {
    auto& state = *cells.add_inodes();
    state.mutable_attr()->set_id(id);
    state.mutable_attr()->set_mode(mode);
    state.set_complete(true);
    return state;
  };
  pb::Cells link;
  state(link, id("d"), S_IFLNK | 0777).set_link_target((directory_.path() / "outside").string());
  EXPECT_NE(refuse(link), "");
  pb::Cells device;
  state(device, id("f"), S_IFBLK | 0666);
  EXPECT_NE(refuse(device), "");
  pb::Cells root;
  state(root, kRootInode, S_IFREG | 0600);
  EXPECT_NE(refuse(root), "");
  pb::Cells strange;
  state(strange, 500, 0xf000 | 0600);
  EXPECT_NE(refuse(strange), "");
  pb::Cells inside;  // a name below a file
  auto& entry = *inside.add_entries();
  entry.set_parent(id("s"));
  entry.set_name("precious");
  entry.set_id(id("f"));
  EXPECT_NE(refuse(inside), "");
  pb::Cells freed;
  freed.add_freed(kRootInode);
  EXPECT_NE(refuse(freed), "");
  EXPECT_EQ(describe(*b_->inodes, b_->tree()), before_);
}

TEST_P(HostileTest, ADirectoryInItselfIsNeverWhole) {
  attempt_ = std::make_unique<Attempt>(reactor_, *a_, *b_, true, 10);
  pb::Cells cells;
  auto& entry = *cells.add_entries();
  entry.set_parent(id("d"));
  entry.set_name("d");
  entry.set_id(id("d"));
  EXPECT_EQ(refuse(cells), "");  // set aside: names may come in any order
}

TEST_P(HostileTest, RefusesAWrongChecksumAndAMissingBatch) {
  for (const bool number : {false, true}) {
    std::promise<std::string> failed;
    std::unique_ptr<ImageTarget> target;
    reactor_.run([&] {
      target = std::make_unique<ImageTarget>(
          ImageTarget::Options{.attempt = 9, .source = "source", .private_area = b_->area()}, *b_->inodes,
          *b_->disk, *reactor_, [](const pb::Envelope&) {},
          [&](const std::string& why) { failed.set_value(why); });
      Message message;
      message.parts.emplace_back();
      message.parts.emplace_back();
      message.head.mutable_batch()->set_attempt(9);
      message.head.mutable_batch()->set_number(number ? 2 : 1);
      target->batch(std::move(message));
    });
    EXPECT_TRUE(failed.get_future().get().starts_with("malformed batch"));
    reactor_.run([&] { target.reset(); });
  }
}

}  // namespace
}  // namespace sharefs
