// Two stores, an image that goes from one to the other, and what tells whether both trees are equal.
#pragma once

#include <sys/mount.h>

#include <fstream>
#include <iterator>

#include "replication/verify.h"
#include "tests/replication/image_sites.h"

namespace sharefs {

inline void write_file(const std::filesystem::path& path, const std::string& data) {
  std::ofstream(path, std::ios::binary) << data;
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The parameter: whether file handles are used.
class ImageTest : public testing::TestWithParam<bool> {
 protected:
  ImageTest() { restart(); }
  void SetUp() override {
    if (GetParam() && !a_->inodes->uses_handles()) GTEST_SKIP() << "file handles need privilege";
  }

  void restart() {
    reactor_.run([&] {
      a_.reset();
      b_.reset();
      a_ = std::make_unique<Copy>(*reactor_, directory_.path() / "a", true, GetParam());
      b_ = std::make_unique<Copy>(*reactor_, directory_.path() / "b", false, GetParam());
    });
  }
  ~ImageTest() override {
    attempt_.reset();
    reactor_.stop();  // nothing runs any more when the stores go
    if (b_on_disk_of_its_own_) ::umount2((directory_.path() / "b" / "store").c_str(), MNT_DETACH);
  }
  // The target begins anew, with a disk of its own that holds no more than this.
  void limit_target(const char* size) {
    reactor_.run([&] { b_.reset(); });
    const auto store = directory_.path() / "b" / "store";
    std::filesystem::remove_all(directory_.path() / "b");
    std::filesystem::create_directories(store);
    ASSERT_EQ(::mount("none", store.c_str(), "tmpfs", 0, (std::string("size=") + size).c_str()), 0);
    b_on_disk_of_its_own_ = true;
    reactor_.run([&] { b_ = std::make_unique<Copy>(*reactor_, directory_.path() / "b", false, GetParam()); });
  }

  std::filesystem::path a(const std::string& name) const { return a_->store_path() / name; }
  std::filesystem::path b(const std::string& name) const { return b_->tree() / name; }

  pb::Outcome ask(Copy& copy, const pb::Request& request, const std::string& data = {}) {
    std::promise<pb::Outcome> promise;
    reactor_.run([&] {
      copy.store->execute(request, as_bytes(data),
                          [&](const pb::Outcome& outcome, Bytes) { promise.set_value(outcome); });
    });
    return promise.get_future().get();
  }
  InodeId id_of(const std::string& path) {
    InodeId id = kRootInode;
    for (const auto& part : std::filesystem::path(path)) {
      pb::Request request;
      request.mutable_lookup()->set_parent(id);
      request.mutable_lookup()->set_name(part.string());
      id = ask(*a_, request).attr().id();
    }
    return id;
  }
  int rename(const std::string& from, const std::string& to, unsigned flags = 0) {
    const std::filesystem::path one(from), two(to);
    pb::Request request;
    auto& op = *request.mutable_rename();
    op.set_parent(id_of(one.parent_path().string()));
    op.set_name(one.filename().string());
    op.set_new_parent(id_of(two.parent_path().string()));
    op.set_new_name(two.filename().string());
    op.set_flags(flags);
    return static_cast<int>(ask(*a_, request).error());
  }

  void expect_equal() { expect_equal(*a_, a_->store_path(), *b_, b_->tree()); }
  static void expect_equal(Copy& from, const std::filesystem::path& source, Copy& to,
                           const std::filesystem::path& target) {
    // Without file handles what has lost the name by which it was reached is in reach again when it is seen.
    static const std::atomic<bool> ending{false};
    identify_all(*from.inodes, ending);
    const auto one = describe(*from.inodes, source);
    const auto two = describe(*to.inodes, target);
    EXPECT_TRUE(one == two) << difference(one, two);
    EXPECT_TRUE(std::filesystem::is_empty(to.area() / "parked"));
  }

  void begin(bool holds_image = false) {
    attempt_.reset();
    attempt_ = std::make_unique<Attempt>(reactor_, *a_, *b_, holds_image, ++attempts_, doubtful_, received_);
  }
  void finish(const std::set<InodeId>& orphans = {}) {
    attempt_->round(true);
    attempt_->end(orphans);
  }
  // The trees change their places; who they are is for the caller to swap.
  void change_owner() {
    attempt_.reset();
    reactor_.run([&] {
      Relocation up(*b_->inodes, b_->store_path(), Relocation::Direction::up);
      up.all();
      Relocation down(*a_->inodes, a_->store_path(), Relocation::Direction::down);
      down.all();
      b_->store->drop_descriptors();
      a_->store->drop_descriptors();
    });
  }
  void send_all(bool holds_image = false) {
    begin(holds_image);
    attempt_->image();
    finish();
  }

  TemporaryDirectory directory_;
  RunningReactor reactor_;
  std::unique_ptr<Copy> a_, b_;
  std::unique_ptr<Attempt> attempt_;
  std::uint64_t attempts_ = 0;
  // at the target
  Power::Interval doubtful_;
  std::shared_ptr<SentSet> received_ = std::make_shared<SentSet>();
  bool b_on_disk_of_its_own_ = false;
};

}  // namespace sharefs
