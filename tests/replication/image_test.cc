// Image and log between two stores: whatever changes meanwhile, both trees are equal after the last round.

#include <linux/fs.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

#include "replication/batch_sender.h"
#include "replication/verify.h"
#include "tests/replication/image_sites.h"
#include "tests/replication/mutator.h"

namespace {

std::atomic<bool> disk_hangs{false}, disk_fails{false};
std::atomic<const char*> unreadable{nullptr};  // a part of the path

ssize_t read_at(int fd, void* to, std::size_t size, off_t offset) {
  std::error_code none;
  if (unreadable != nullptr &&
      std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd), none).string().find(unreadable) !=
          std::string::npos) {
    errno = EIO;
    return -1;
  }
  return ::syscall(SYS_pread64, fd, to, size, offset);
}

}  // namespace

// In place of those of the C library.
extern "C" int syncfs(int fd) noexcept {
  while (disk_hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (disk_fails) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_syncfs, fd));
}
extern "C" ssize_t pread(int fd, void* to, std::size_t size, off_t offset) {
  return read_at(fd, to, size, offset);
}

namespace sharefs {
namespace {

unsigned environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : otherwise;
}

void write_file(const std::filesystem::path& path, const std::string& data) {
  std::ofstream(path, std::ios::binary) << data;
}

std::string read_file(const std::filesystem::path& path) {
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
    attempt_ = std::make_unique<Attempt>(reactor_, *a_, *b_, holds_image, ++attempts_);
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
  bool b_on_disk_of_its_own_ = false;
};

INSTANTIATE_TEST_SUITE_P(Access, ImageTest, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Handles" : "ParentAndName"; });

TEST_P(ImageTest, SendsEveryKindOfInodeWithAllThatStatSays) {
  std::filesystem::create_directories(a("d/e"));
  write_file(a("d/file"), "hello");
  write_file(a("d/empty"), "");
  write_file(a("big"), std::string(5 << 20, 'x') + "tail");
  std::filesystem::create_hard_link(a("d/file"), a("d/e/link"));
  std::filesystem::create_symlink("no/where", a("symlink"));
  ASSERT_EQ(::mkfifo(a("fifo").c_str(), 0640), 0);
  ASSERT_EQ(::setxattr(a("d/file").c_str(), "user.colour", "blue", 4, 0), 0);
  ASSERT_EQ(::setxattr(a("d/e").c_str(), "user.colour", "red", 3, 0), 0);
  ASSERT_EQ(::chmod(a("d/empty").c_str(), 06711), 0);
  if (::geteuid() == 0) {
    ASSERT_EQ(::mknod(a("null").c_str(), S_IFCHR | 0666, makedev(1, 3)), 0);
    ASSERT_EQ(::lchown(a("symlink").c_str(), 12, 34), 0);
  }
  ASSERT_EQ(::chmod(a_->store_path().c_str(), 0751), 0);
  const timespec times[2] = {{.tv_sec = 5, .tv_nsec = 6}, {.tv_sec = -7, .tv_nsec = 8}};
  ASSERT_EQ(::utimensat(AT_FDCWD, a("d").c_str(), times, 0), 0);
  send_all();
  expect_equal();
  EXPECT_EQ(attempt_->source().counters().image_bytes, (5u << 20) + 4 + 5);
}

TEST_P(ImageTest, SendsMoreAttributeNamesThanFitAShortList) {
  write_file(a("file"), "");
  for (int number = 0; number < 50; ++number) {
    const std::string name = "user." + std::string(20, 'n') + std::to_string(number);
    ASSERT_EQ(::setxattr(a("file").c_str(), name.c_str(), "value", 5, 0), 0);
  }
  send_all();
  expect_equal();
}

TEST_P(ImageTest, KeepsHolesAsHoles) {
  const UniqueFd fd(::open(a("sparse").c_str(), O_RDWR | O_CREAT, 0600));
  ASSERT_EQ(::pwrite(fd.get(), "data", 4, 10 << 20), 4);
  ASSERT_EQ(::ftruncate(fd.get(), 64 << 20), 0);
  send_all();
  expect_equal();
  EXPECT_LT(std::filesystem::file_size(b("sparse")), 65u << 20);
  struct stat status {};
  ASSERT_EQ(::stat(b("sparse").c_str(), &status), 0);
  EXPECT_LE(status.st_blocks, 64);
  EXPECT_LT(attempt_->source().counters().image_bytes_sent, 10'000u);
}

TEST_P(ImageTest, BlocksBehindTheEndHideNoHole) {
  std::ofstream(a("sparse")).close();
  const UniqueFd fd(::open(a("sparse").c_str(), O_WRONLY | O_CLOEXEC));
  if (::fallocate(fd.get(), FALLOC_FL_KEEP_SIZE, 4 << 20, 4 << 20) != 0)
    GTEST_SKIP() << "no room can be reserved";
  ASSERT_EQ(::pwrite(fd.get(), "end", 3, (2 << 20) - 3), 3);
  send_all();
  expect_equal();
  EXPECT_LE(attempt_->source().counters().image_bytes_sent, 1U << 20);
}

TEST_P(ImageTest, ShrinkingAndGrowingAgainLeavesZeros) {
  write_file(a("f"), std::string(8192, 'x'));
  begin();
  attempt_->image();
  const InodeId id = id_of("f");
  for (const std::uint64_t size : {4096u, 8192u}) {
    pb::Request request;
    request.mutable_setattr()->set_id(id);
    request.mutable_setattr()->set_size(size);
    ASSERT_EQ(ask(*a_, request).error(), 0u);
  }
  finish();
  expect_equal();
  EXPECT_EQ(read_file(b("f")), std::string(4096, 'x') + std::string(4096, '\0'));
}

TEST_P(ImageTest, AppliesSwapsAndTurnedNests) {
  for (const char* path : {"a/b/in", "c/x", "d/y", "p/q/r/s", "k/l", "m"})
    std::filesystem::create_directories(a(path));
  write_file(a("a/b/f"), "f");
  write_file(a("one"), "1");
  write_file(a("two"), "2");
  begin();
  attempt_->image();
  ASSERT_EQ(rename("one", "two", RENAME_EXCHANGE), 0);
  ASSERT_EQ(rename("c", "d", RENAME_EXCHANGE), 0);
  ASSERT_EQ(rename("a/b", "b"), 0);  // a/b -> b/a
  ASSERT_EQ(rename("a", "b/a"), 0);
  ASSERT_EQ(rename("p/q/r", "r"), 0);  // p/q/r/s -> r/s/p/q
  ASSERT_EQ(rename("p", "r/s/p"), 0);
  // Every name stays taken, and yet parent and child change places.
  ASSERT_EQ(rename("k/l", "m", RENAME_EXCHANGE), 0);
  ASSERT_EQ(rename("k", "m/k"), 0);
  ASSERT_EQ(rename("m", "k"), 0);
  finish();
  expect_equal();
}

TEST_P(ImageTest, AppliesNamesUsedAgain) {
  write_file(a("f"), "old");
  write_file(a("g"), "other");
  std::filesystem::create_directories(a("dir/sub"));
  begin();
  attempt_->image();
  ASSERT_EQ(rename("g", "f"), 0);  // replaces
  pb::Request request;
  request.mutable_rmdir()->set_parent(id_of("dir"));
  request.mutable_rmdir()->set_name("sub");
  ASSERT_EQ(ask(*a_, request).error(), 0u);
  request.mutable_create()->set_parent(id_of("dir"));
  request.mutable_create()->set_name("sub");
  request.mutable_create()->set_mode(S_IFREG | 0600);
  ASSERT_EQ(ask(*a_, request).error(), 0u);
  request.mutable_link()->set_id(id_of("dir/sub"));
  request.mutable_link()->set_parent(kRootInode);
  request.mutable_link()->set_name("g");
  ASSERT_EQ(ask(*a_, request).error(), 0u);
  finish();
  expect_equal();
}

TEST_P(ImageTest, HandsOverOrphansAndDropsOthers) {
  write_file(a("open"), "still read by somebody");
  write_file(a("gone"), "by nobody");
  write_file(a("later"), "unlinked before the image");
  const InodeId open = id_of("open"), gone = id_of("gone"), later = id_of("later");
  const auto unlink = [&](const std::string& name) {
    pb::Request request;
    request.mutable_unlink()->set_parent(kRootInode);
    request.mutable_unlink()->set_name(name);
    ASSERT_EQ(ask(*a_, request).error(), 0u);
  };
  unlink("later");
  begin();
  attempt_->image();
  unlink("open");
  unlink("gone");
  pb::Request request;
  request.mutable_forget()->add_ids(gone);
  ASSERT_EQ(ask(*a_, request).error(), 0u);
  finish({open, later});
  expect_equal();
  EXPECT_EQ(read_file(b_->area() / "orphans" / hex_name(open)), "still read by somebody");
  EXPECT_EQ(read_file(b_->area() / "orphans" / hex_name(later)), "unlinked before the image");
  EXPECT_TRUE(b_->inodes->is_orphan(open));
  EXPECT_TRUE(b_->inodes->open(later, O_RDONLY));
  EXPECT_FALSE(b_->inodes->open(gone, O_PATH));
}

TEST_P(ImageTest, ATargetEndsThoughItsDiskHangs) {
  write_file(a("f"), "data");
  begin();
  disk_hangs = true;
  std::thread image([&] { EXPECT_THROW(attempt_->image(), ImageSource::Cancelled); });
  while (attempt_->applied() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  attempt_->source().cancel("aborted");
  image.join();
  std::promise<void> ended;
  std::thread end([&] {
    reactor_.run([this] { attempt_->end_target(); });
    ended.set_value();
  });
  EXPECT_EQ(ended.get_future().wait_for(std::chrono::seconds(2)), std::future_status::ready);
  disk_hangs = false;
  end.join();
  send_all(true);
  expect_equal();
}

TEST(DiskSyncTest, AFailureEndsWhatHasBegunBeforeItWasNoted) {
  const TemporaryDirectory directory;
  DiskSync disk(open_path(directory.path()).get());
  disk.sync(0);
  disk_fails = true;
  EXPECT_THROW(disk.sync(0), std::runtime_error);
  disk_fails = false;
  EXPECT_THROW(disk.sync(0), std::runtime_error)
      << "this sync has not failed, and does not tell what the other one has lost";
  EXPECT_THROW(disk.written(1, 0), std::runtime_error);
  EXPECT_THROW(disk.note_failure([] { throw std::runtime_error("a full disk"); }), std::runtime_error);
  int noted = 0;
  EXPECT_EQ(disk.note_failure([&] { ++noted; }), 1u);
  EXPECT_EQ(disk.note_failure([&] { ++noted; }), 1u);
  EXPECT_EQ(noted, 1);
  EXPECT_THROW(disk.sync(0), std::runtime_error) << "it was noted when this attempt had begun already";
  EXPECT_NO_THROW(disk.sync(1));
  EXPECT_NO_THROW(disk.written(1, 1));
}

TEST_P(ImageTest, WhatTheTargetCannotReadIsSentAsAWhole) {
  write_file(a("f"), std::string(100'000, 'o'));
  send_all();
  change_owner();
  std::swap(a_, b_);
  write_file(a("f"), std::string(100'000, 'n'));
  unreadable = "/a/store/";  // the old image, moved back
  send_all(true);
  unreadable = nullptr;
  expect_equal();
}

// ---- concurrent change

class ConvergenceTest : public ImageTest {
 protected:
  void converge(unsigned seed, bool holds_image) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    begin(holds_image);
    reactor_.run([&] { mutator_->start(environment("SHAREFS_TEST_OPERATIONS", 3000)); });
    attempt_->image();
    for (int i = 0; i < 3; ++i) attempt_->round();
    for (bool idle = false; !idle;)
      reactor_.run([&] {
        mutator_->stop();
        idle = mutator_->idle();
      });
    finish(mutator_->orphans());
    expect_equal();
    for (const InodeId id : mutator_->orphans()) {
      EXPECT_TRUE(b_->inodes->open(id, O_PATH)) << "orphan " << id;
    }
  }
  void populate(unsigned seed, int operations) {
    mutator_ = std::make_unique<Mutator>(*reactor_, *a_->store, seed);
    for (int i = 0; i < operations; ++i) reactor_.run([&] { mutator_->perform(); });
  }
  std::unique_ptr<Mutator> mutator_;
};

INSTANTIATE_TEST_SUITE_P(Access, ConvergenceTest, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Handles" : "ParentAndName"; });

TEST_P(ConvergenceTest, BothTreesAreEqualAfterTheLastRound) {
  const unsigned first = environment("SHAREFS_TEST_SEED", 1), seeds = environment("SHAREFS_TEST_SEEDS", 3);
  for (unsigned seed = first; seed < first + seeds && !HasFailure(); ++seed) {
    attempt_.reset();
    reactor_.run([&] {
      a_.reset();
      b_.reset();
    });
    std::filesystem::remove_all(directory_.path() / "a");
    std::filesystem::remove_all(directory_.path() / "b");
    restart();
    for (int i = 0; i < 300; ++i) {  // seen by nobody yet
      const std::string folder = a("old" + std::to_string(i % 17)).string();
      std::filesystem::create_directories(folder);
      write_file(folder + "/file" + std::to_string(i), std::string(static_cast<std::size_t>(i) * 97, 'o'));
    }
    populate(seed, 1500);
    converge(seed, false);
    if (!HasFailure() && seed % 2 == 1) converge(seed, true);  // again, over what is there
    if (HasFailure()) std::cerr << "seed " << seed << "\n";
  }
}

// ---- what the target holds

TEST_P(ImageTest, ABrokenImageIsResumedWithoutSendingItAgain) {
  std::string noise(3 << 20, '\0');
  for (std::size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<char>(i * 2654435761u >> 13);
  std::filesystem::create_directories(a("d"));
  for (int i = 0; i < 40; ++i) write_file(a("d/file" + std::to_string(i)), noise.substr(0, 300'000));
  for (int i = 0; i < 8; ++i) write_file(a("big" + std::to_string(i)), noise);
  begin();
  attempt_->on_message = [](const pb::Envelope& message) {
    return !message.has_batch() || message.batch().number() < 20;
  };
  std::thread lost([&] { EXPECT_THROW(attempt_->image(), ImageSource::Cancelled); });
  while (attempt_->applied() < 19) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  attempt_->source().cancel("connection lost");
  lost.join();
  attempt_.reset();
  const std::uint64_t all = 40 * 300'000 + 8 * noise.size();

  send_all(true);
  expect_equal();
  const auto& counters = attempt_->source().counters();
  EXPECT_EQ(counters.image_bytes, all);
  EXPECT_LT(counters.image_bytes_sent, all - (18u << 20));

  send_all(true);  // nothing has changed
  EXPECT_EQ(attempt_->source().counters().image_bytes_sent, 0u);
  expect_equal();
}

// Of its old image the target has more than the file that is being read, which then grows beyond its end.
TEST_P(ImageTest, NothingOldIsLeftWhereAFileGrowsByAGap) {
  constexpr std::size_t kPiece = BatchSender::kBatchBytes;
  constexpr std::size_t kPieces = 2 * ImageTarget::kCredit / kPiece;
  write_file(a("f"), std::string((kPieces + 8) * kPiece, 'o'));
  send_all();
  write_file(a("f"), std::string(kPieces * kPiece, 'n'));
  const InodeId id = id_of("f");
  begin(true);
  bool written = false;
  attempt_->on_message = [&](const pb::Envelope& message) {
    if (message.has_batch() && message.batch().number() == 3 && !written) {
      written = true;
      pb::Request write;
      write.mutable_write()->set_id(id);
      write.mutable_write()->set_offset((kPieces + 4) * kPiece);
      write.mutable_write()->set_size(1);
      a_->store->execute(write, as_bytes("x"),
                         [](const pb::Outcome& outcome, Bytes) { EXPECT_EQ(outcome.error(), 0u); });
    }
    return true;
  };
  attempt_->image();
  finish();
  EXPECT_TRUE(written);
  expect_equal();
}

// Without file handles only some of them are kept in reach, and the log says nothing of their other names.
TEST_P(ImageTest, ManyFilesMayLoseTheNameByWhichTheyAreReachedBetweenTwoRounds) {
  constexpr int kFiles = 3 * InodeTable::kKeptInodes;
  const auto name = [](int i) { return "x/f" + std::to_string(i); };
  std::filesystem::create_directories(a("x"));
  std::filesystem::create_directories(a("y/deep"));
  for (int i = 0; i < kFiles; ++i) {
    write_file(a(name(i)), "old");
    std::filesystem::create_hard_link(a(name(i)), a("y/deep/" + std::to_string(i)));
  }
  begin();
  attempt_->image();
  for (int i = 0; i < kFiles; ++i) {
    pb::Request write;
    write.mutable_write()->set_id(id_of(name(i)));
    write.mutable_write()->set_size(3);
    EXPECT_EQ(ask(*a_, write, "new").error(), 0u);
    pb::Request unlink;
    unlink.mutable_unlink()->set_parent(id_of("x"));
    unlink.mutable_unlink()->set_name("f" + std::to_string(i));
    EXPECT_EQ(ask(*a_, unlink).error(), 0u);
  }
  finish();
  expect_equal();
}

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

TEST_P(ImageTest, ANameThatHadToWaitLeavesTheTimesOfItsDirectory) {
  constexpr InodeId kLate = 1u << 20;
  std::filesystem::create_directories(a("d"));
  send_all();
  const InodeId directory = id_of("d");
  TargetTree tree(*b_->inodes, b_->area());
  tree.attach(directory, "late", kLate);
  EXPECT_EQ(tree.set_aside(), 1u);
  pb::InodeState late;
  late.mutable_attr()->set_id(kLate);
  late.mutable_attr()->set_mode(S_IFREG | 0644);
  tree.create(late, nullptr);
  const std::string before = describe(*b_->inodes, b_->tree())["/d"];
  tree.settle();
  EXPECT_EQ(tree.set_aside(), 0u);
  auto after = describe(*b_->inodes, b_->tree());
  EXPECT_TRUE(after.contains("/d/late"));
  EXPECT_EQ(after["/d"], before);
}

// It would be made anew, and its data sent again.
TEST_P(ImageTest, WhatIsThereIsNotTakenForUnknownWhereNoDescriptorIsLeft) {
  write_file(a("f"), "here");
  send_all();
  const InodeId id = id_of("f");
  TargetTree tree(*b_->inodes, b_->area());
  const UniqueFd next(::fcntl(b_->inodes->root(), F_DUPFD_CLOEXEC, 0));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{static_cast<rlim_t>(next.get()), before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  EXPECT_THROW(tree.known(id), std::system_error);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(tree.known(id));
}

TEST_P(ImageTest, OnlyChangedBlocksAreSentAndOldBytesGo) {
  std::string data(4 << 20, 'a');
  write_file(a("f"), data);
  std::filesystem::create_directories(a("d/vanishing/deep"));
  write_file(a("d/vanishing/deep/f"), "x");
  write_file(a("d/moving"), data);
  send_all();
  const UniqueFd fd(::open(a("f").c_str(), O_RDWR));
  ASSERT_EQ(::pwrite(fd.get(), "b", 1, (2 << 20) + 5), 1);
  ASSERT_EQ(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20), 0);
  std::filesystem::remove_all(a("d/vanishing"));
  std::filesystem::rename(a("d/moving"), a("moved"));
  write_file(a("d/vanishing"), "a file now");
  send_all(true);
  expect_equal();
  EXPECT_LE(attempt_->source().counters().image_bytes_sent, (1u << 20) + 10);
  EXPECT_EQ(read_file(b("f"))[1 << 20], '\0');
}

TEST_P(ImageTest, MovingBackSendsOnlyWhatHasChanged) {
  for (int i = 0; i < 50; ++i) {
    std::filesystem::create_directories(a("d" + std::to_string(i % 5)));
    write_file(a("d" + std::to_string(i % 5) + "/f" + std::to_string(i)), std::string(100'000, 'x'));
  }
  write_file(a("top"), "top");
  send_all();
  change_owner();
  expect_equal(*a_, a_->tree(), *b_, b_->store_path());
  std::swap(a_, b_);
  Mutator mutator(*reactor_, *a_->store, 7);
  begin(true);
  reactor_.run([&] { mutator.start(300); });
  attempt_->image();
  attempt_->round();
  for (bool idle = false; !idle;)
    reactor_.run([&] {
      mutator.stop();
      idle = mutator.idle();
    });
  finish(mutator.orphans());
  expect_equal();
  EXPECT_LT(attempt_->source().counters().image_bytes_sent, 50 * 100'000u);
}

TEST_P(ImageTest, ALongListingComesInPartsOfWhichNoneIsLarge) {
  constexpr int kNames = 6000;
  const auto name = [](int i) { return "d/" + std::string(200, 'n') + std::to_string(i); };
  std::filesystem::create_directories(a("d/below"));
  for (int i = 0; i < kNames; ++i) write_file(a(name(i)), "");
  send_all();
  const InodeId directory = id_of("d");
  for (int i = 0; i < kNames; i += 97) {
    pb::Request request;
    request.mutable_unlink()->set_parent(directory);
    request.mutable_unlink()->set_name(std::filesystem::path(name(i)).filename().string());
    EXPECT_EQ(ask(*a_, request).error(), 0u);
  }
  for (int i = 1; i < 1000; i += 97) {
    EXPECT_EQ(rename(name(i), name(kNames - 2 * i), RENAME_EXCHANGE), 0);
    EXPECT_EQ(rename(name(i + 1), name(i) + "-moved"), 0);
  }
  EXPECT_EQ(rename("d/below", name(0)), 0);
  EXPECT_EQ(rename(name(5), "d/below"), 0);
  send_all(true);
  expect_equal();
  EXPECT_LT(attempt_->largest(), std::size_t{1} << 20);
}

TEST_P(ImageTest, WhatWasMovedOutOfADeletedDirectoryHasNoHiddenName) {
  std::filesystem::create_directories(a("gone/deep"));
  std::filesystem::create_directories(a("kept"));
  write_file(a("gone/one"), "one");
  write_file(a("gone/deep/two"), "two");
  write_file(a("gone/deep/lost"), "lost");
  send_all();
  change_owner();
  std::swap(a_, b_);
  // No log knows of this.
  ASSERT_EQ(rename("gone/one", "kept/one"), 0);
  ASSERT_EQ(rename("gone/deep/two", "kept/two"), 0);
  std::filesystem::remove_all(a_->store_path() / "gone");
  begin(true);
  attempt_->image();
  for (const char* name : {"one", "two"}) {
    struct stat status {};
    ASSERT_EQ(::stat((b_->tree() / "kept" / name).c_str(), &status), 0) << name;
    EXPECT_EQ(status.st_nlink, 1U) << name;
  }
  finish();
  expect_equal();
}

// A disk that is full before the round gives it its new name, and that has something that may go.
TEST_P(ImageTest, ADirectoryThatMovesKeepsWhatIsInItWhereRoomIsMade) {
  if (::geteuid() != 0) GTEST_SKIP() << "mounts";
  limit_target("12m");
  std::filesystem::create_directories(a("d/deep/er"));
  for (const char* name : {"d/one", "d/deep/two", "d/deep/er/three"}) write_file(a(name), name);
  std::filesystem::create_hard_link(a("d/one"), a("linked"));
  write_file(a("deleted"), std::string(8 << 20, 'x'));
  send_all();
  std::filesystem::remove(a("deleted"));
  begin(true);
  attempt_->image();
  ASSERT_EQ(rename("d", "e"), 0);
  write_file(a("unnoticed"), std::string(8 << 20, 'y'));
  ASSERT_EQ(rename("unnoticed", "large"), 0);
  attempt_->round();
  finish();
  expect_equal();
}

// It is where the image has not been yet, and moves to where that has been.
TEST_P(ImageTest, WhatMovesPastTheImageHasNoHiddenName) {
  std::filesystem::create_directories(a("gone"));
  std::filesystem::create_directories(a("kept"));
  write_file(a("gone/file"), "precious");
  send_all();
  change_owner();
  std::swap(a_, b_);
  ASSERT_EQ(rename("gone/file", "kept/file"), 0);
  std::filesystem::remove_all(a("gone"));
  const auto unseen = a_->home / "unseen";
  std::filesystem::rename(a("kept/file"), unseen);
  begin(true);
  attempt_->image();
  std::filesystem::rename(unseen, a("kept/file"));
  ASSERT_EQ(rename("kept/file", "kept/moved"), 0);
  attempt_->round();
  struct stat status {};
  ASSERT_EQ(::stat(b("kept/moved").c_str(), &status), 0);
  EXPECT_EQ(status.st_nlink, 1U);
  finish();
  expect_equal();
}

// Which of them a table without file handles knows is a matter of chance.
TEST_P(ImageTest, WhatHasSeveralNamesIsReachedWhicheverOfThemGoes) {
  for (const char* which : {"1", "2"}) {
    for (const char* folder : {"a", "z"}) std::filesystem::create_directories(a(folder + std::string(which)));
    for (const std::string name : {"with its directory", "alone"}) {
      write_file(a("a" + std::string(which)) / name, "data");
      std::filesystem::create_hard_link(a("a" + std::string(which)) / name,
                                        a("z" + std::string(which)) / name);
    }
  }
  send_all();
  change_owner();
  std::swap(a_, b_);
  std::filesystem::remove(a("a1/alone"));
  std::filesystem::remove(a("z2/alone"));
  send_all(true);
  expect_equal();
  change_owner();
  std::swap(a_, b_);
  std::filesystem::remove_all(a("a1"));
  std::filesystem::remove_all(a("z2"));
  send_all(true);
  expect_equal();
  for (const char* path : {"z1/with its directory", "z1/alone", "a2/with its directory", "a2/alone"}) {
    const auto backing = stat_name(AT_FDCWD, b(path).string());
    ASSERT_TRUE(backing) << path;
    EXPECT_EQ(backing->stx_nlink, 1U) << path;
    EXPECT_TRUE(b_->inodes->open(b_->inodes->find(*backing).value(), O_PATH | O_CLOEXEC)) << path;
  }
}

TEST_P(ImageTest, WhatWasWrittenIsSentWhicheverNameGoes) {
  std::filesystem::create_directories(a("d"));
  write_file(a("f"), "old");
  std::filesystem::create_hard_link(a("f"), a("d/f"));
  begin();
  attempt_->image();
  for (const char* name : {"f", "g"}) {
    if (std::string(name) == "g") std::filesystem::create_hard_link(a("d/f"), a("g"));
    pb::Request write, unlink;
    write.mutable_write()->set_id(id_of(name));
    write.mutable_write()->set_size(3);
    ASSERT_EQ(ask(*a_, write, name + std::string("ew")).error(), 0u);
    unlink.mutable_unlink()->set_parent(kRootInode);
    unlink.mutable_unlink()->set_name(name);
    ASSERT_EQ(ask(*a_, unlink).error(), 0u);
    attempt_->round();
    EXPECT_EQ(read_file(b("d/f")), name + std::string("ew"));
  }
  finish();
  expect_equal();
}

// Extended attributes of a file that may not be written are for root.
TEST(WriteXattrs, AListThatLetsTheOwnerNotWriteComesLast) {
  const TemporaryDirectory directory;
  const UniqueFd fd(::open((directory.path() / "f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  std::string list("\2\0\0\0", 4);
  for (const char tag : {'\1', '\4', '\40'}) {
    const char entry[8] = {tag, 0, 4, 0, -1, -1, -1, -1};
    list.append(entry, sizeof entry);
  }
  list[10] = 5;
  const Xattrs wanted{{"system.posix_acl_access", list}, {"user.x", "value"}};
  std::string error;
  std::thread user([&] {
    if (::geteuid() == 0) {
      ASSERT_EQ(::fchown(fd.get(), 1000, 1000), 0);
      ASSERT_EQ(::syscall(SYS_setresuid, 1000, 1000, 1000), 0);  // this thread
    }
    try {
      write_xattrs(fd.get(), false, wanted);
    } catch (const std::exception& failed) {
      error = failed.what();
    }
  });
  user.join();
  EXPECT_EQ(error, "");
  EXPECT_EQ(read_xattrs(fd.get(), false).at("user.x"), "value");
}

// Between the look at a file that says how much there is to read and the reading.
TEST_P(ImageTest, WhatIsAppendedMeanwhileIsReadOrItsStampIsNotTold) {
  write_file(a("f"), "old");
  const InodeId id = id_of("f");
  const auto opened = open_inode(*a_->inodes, id);
  ASSERT_TRUE(opened);
  write_file(a("f"), "old and new");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // so the stamp is believed
  pb::Cells sent;
  ImageSource::Options options;
  options.credit = 1 << 20;
  ShipLink link(
      options,
      [&](const pb::Envelope&, const std::vector<zmq::message_t>& parts) {
        ASSERT_TRUE(sent.ParseFromArray(parts.at(0).data(), static_cast<int>(parts.at(0).size())));
      },
      *reactor_);
  BatchSender sender(1, link);
  ShipCounters counters;
  CellShipper shipper(*a_->inodes, *a_->store, sender, counters);
  shipper.whole(id, *opened, nullptr, Holes::skip);
  sender.flush();
  reactor_.run([] {});
  ASSERT_EQ(sent.inodes_size(), 1);
  ASSERT_EQ(sent.extents_size(), 1);
  EXPECT_EQ(sent.extents(0).length(), sent.inodes(0).attr().size());
}

TEST_P(ImageTest, WhatAClockThatIsAheadHasStampedIsToldOnce) {
  write_file(a("f"), "data");
  const InodeId id = id_of("f");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const Backing backing = *stat_name(AT_FDCWD, a("f"));
  a_->inodes->import_ctime(id, timestamp_ns(backing.stx_ctime) + 3'600'000'000'000, backing);
  begin();
  attempt_->image();
  const auto applied = attempt_->applied();
  attempt_->round();
  attempt_->round();
  EXPECT_EQ(attempt_->applied(), applied);
  finish();
  expect_equal();
}

// A power cut takes identities and leaves files; a process may be killed between erasing the one and
// removing the other.
TEST_P(ImageTest, WhatIsParkedAndHasLostItsIdentityIsNotTakenForWhoHasIt) {
  write_file(a("f"), "precious");
  std::filesystem::create_hard_link(a("f"), a("g"));
  const InodeId id = id_of("f");
  write_file(b_->area() / "parked" / hex_name(id), "left");
  begin(true);
  attempt_->image();
  EXPECT_FALSE(attempt_->target().is_parked(id));
  finish();
  expect_equal();
}

// The first attempt gives the inode its place beside what is left.
TEST_P(ImageTest, WhatIsParkedAndHasLostItsIdentityIsNotTakenForWhoHasItByALaterAttemptEither) {
  write_file(a("f"), "precious");
  const InodeId id = id_of("f");
  for (const char* folder : {"parked", "orphans"}) {
    write_file(b_->area() / folder / hex_name(id), "left");
    begin(true);
    attempt_->image();
    std::filesystem::create_hard_link(a("f"), a(std::string("also with what was ") + folder));
    send_all(true);
    expect_equal();
    EXPECT_TRUE(std::filesystem::is_empty(b_->area() / "orphans")) << folder;
  }
}

TEST_P(ImageTest, AnOrphanThatHasLostItsIdentityIsNotTakenForWhoHasIt) {
  write_file(a("f"), "precious");
  const InodeId id = id_of("f");
  pb::Request request;
  request.mutable_unlink()->set_parent(kRootInode);
  request.mutable_unlink()->set_name("f");
  ASSERT_EQ(ask(*a_, request).orphaned_size(), 1);
  write_file(b_->area() / "orphans" / hex_name(id), "left");
  for (int attempts = 0; attempts < 2; ++attempts) {  // the first one ends early
    begin(true);
    attempt_->image();
  }
  finish({id});
  EXPECT_EQ(read_file(b_->area() / "orphans" / hex_name(id)), "precious");
  EXPECT_TRUE(b_->inodes->open(id, O_PATH));
}

// ---- what a target does not believe

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

TEST_P(HostileTest, AFullDiskIsToldInOneLine) {
  if (::geteuid() != 0) GTEST_SKIP() << "mounts";
  limit_target("4m");
  write_file(a("large"), std::string(8 << 20, 'x'));
  begin();
  try {
    attempt_->image();
    ADD_FAILURE() << "it fits";
  } catch (const ImageSource::Cancelled& full) {
    EXPECT_TRUE(std::string(full.what()).starts_with("target disk is full: needs ")) << full.what();
  }
}

}  // namespace
}  // namespace sharefs
