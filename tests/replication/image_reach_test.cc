// What goes out of reach in the middle of a round, where there are no file handles.

#include "replication/batch_sender.h"
#include "tests/replication/image_fixture.h"

namespace sharefs {
namespace {

// Files go out of reach in the middle of a round: so much is written to a file that is read before them that
// the round has to wait for credit.
class OutOfReachTest : public ImageTest {
 protected:
  static constexpr int kBurst = InodeTable::kKeptInodes;
  static constexpr int kBigBatches = 20;
  static_assert(kBigBatches * BatchSender::kBatchBytes > ImageTarget::kCredit);

  void SetUp() override {
    for (const char* name : {"x", "y"}) std::filesystem::create_directories(a(name));
    for (int i = 0; i < 2 * kBurst; ++i) {
      write_file(a("x/many" + std::to_string(i)), "");
      std::filesystem::create_hard_link(a("x/many" + std::to_string(i)), a("y/many" + std::to_string(i)));
    }
    for (int i = 0; i < 2 * kBurst; ++i) id_of("x/many" + std::to_string(i));
    x_ = id_of("x");
  }
  void image() {
    begin();
    attempt_->on_message = [this](const pb::Envelope& message) {
      if (message.has_batch()) ++batches_;
      if (message.has_batch() && at_batch_.contains(batches_)) at_batch_[batches_]();
      return true;
    };
    attempt_->image();
  }
  void round(std::map<int, std::function<void()>> at_batch) {
    batches_ = 0;
    at_batch_ = std::move(at_batch);
    attempt_->round();
    at_batch_.clear();
  }

  // Reactor thread, these two. Whatever was kept in reach is not any more.
  void lose_others() {
    for (int i = 0; i < kBurst; ++i) unlink_here(x_, "many" + std::to_string(lost_++));
  }
  void unlink_here(InodeId parent, const std::string& name) {
    pb::Request unlink;
    unlink.mutable_unlink()->set_parent(parent);
    unlink.mutable_unlink()->set_name(name);
    a_->store->execute(unlink, {}, [](const pb::Outcome& outcome, Bytes) { EXPECT_EQ(outcome.error(), 0u); });
  }
  void unlink(InodeId parent, const std::string& name) {
    reactor_.run([&] { unlink_here(parent, name); });
  }
  void write(const std::string& path, std::size_t size) {
    pb::Request write;
    write.mutable_write()->set_id(id_of(path));
    write.mutable_write()->set_size(static_cast<std::uint32_t>(size));
    EXPECT_EQ(ask(*a_, write, std::string(size, next_++)).error(), 0u);
  }
  void write_big(const std::string& path) { write(path, kBigBatches * BatchSender::kBatchBytes); }
  void create(const std::string& name) {
    pb::Request create;
    create.mutable_create()->set_parent(kRootInode);
    create.mutable_create()->set_name(name);
    create.mutable_create()->set_mode(S_IFREG | 0644);
    EXPECT_EQ(ask(*a_, create).error(), 0u);
  }

  InodeId x_ = 0;
  int lost_ = 0, batches_ = 0;
  char next_ = 'A';
  std::map<int, std::function<void()>> at_batch_;
};

INSTANTIATE_TEST_SUITE_P(Access, OutOfReachTest, testing::Values(false),
                         [](const auto&) { return "ParentAndName"; });

// Its bytes were read, its state was not; in the next round only its state could be.
TEST_P(OutOfReachTest, WhatIsBackInReachAfterItWasMissedIsSentByTheNextRound) {
  write_file(a("x/f"), "old");
  for (const char* name : {"f1", "f2", "f3"}) std::filesystem::create_hard_link(a("x/f"), a("y") / name);
  write_file(a("z-big"), "");
  const InodeId y = id_of("y"), first = id_of("x/f");
  ASSERT_LT(first, id_of("z-big"));
  image();
  write("x/f", 3);
  unlink(x_, "f");
  write_big("z-big");
  round({{1, [this] { lose_others(); }}});

  id_of("y/f1");
  unlink(y, "f1");
  create("new");
  write_big("new");
  write_big("z-big");
  round({{1, [this] { lose_others(); }}, {kBigBatches + 2, [this, y] {
                                            pb::Request look;
                                            look.mutable_lookup()->set_parent(y);
                                            look.mutable_lookup()->set_name("f2");
                                            a_->store->execute(look, {}, [](const pb::Outcome&, Bytes) {});
                                          }}});
  EXPECT_GT(batches_, kBigBatches + 2);
  finish();
  expect_equal();
}

TEST_P(OutOfReachTest, WhatWasMissedHasItsHolesAtTheTarget) {
  write_file(a("a-big"), "");
  write_file(a("x/f"), std::string(64 << 10, 'o'));
  std::filesystem::create_hard_link(a("x/f"), a("y/f"));
  const InodeId first = id_of("a-big");
  ASSERT_LT(first, id_of("x/f"));
  image();
  pb::Request punch;
  punch.mutable_fallocate()->set_id(id_of("x/f"));
  punch.mutable_fallocate()->set_length(32 << 10);
  punch.mutable_fallocate()->set_mode(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
  ASSERT_EQ(ask(*a_, punch).error(), 0u);
  unlink(x_, "f");
  write_big("a-big");
  round({{1, [this] { lose_others(); }}});
  finish();
  expect_equal();
}

TEST_P(OutOfReachTest, ANameOfWhatWasMissedIsSent) {
  image();
  create("a-big");
  write_big("a-big");
  create("f");
  pb::Request link;
  link.mutable_link()->set_id(id_of("f"));
  link.mutable_link()->set_parent(kRootInode);
  link.mutable_link()->set_name("g");
  ASSERT_EQ(ask(*a_, link).error(), 0u);
  round({{1, [this] {
            unlink_here(kRootInode, "g");
            lose_others();
          }}});
  finish();
  expect_equal();
}

}  // namespace
}  // namespace sharefs
