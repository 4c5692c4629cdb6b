// What an image and its rounds carry, to a target that holds nothing or an older one.

#include <grp.h>
#include <linux/fs.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "tests/replication/image_fixture.h"
#include "tests/replication/mutator.h"

namespace sharefs {
namespace {

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

// Without file handles so many names of one inode take long.
using ImageWithHandlesTest = ImageTest;
INSTANTIATE_TEST_SUITE_P(Access, ImageWithHandlesTest, testing::Values(true));

// ext4 gives an inode no more than 65,000.
TEST_P(ImageWithHandlesTest, AnInodeWithAsManyNamesAsItCanHaveIsMovedBack) {
  for (const char* directory : {"a", "b", "c"}) std::filesystem::create_directories(a(directory));
  write_file(a("b/moves"), "x");
  const long most = ::pathconf(a("b/moves").c_str(), _PC_LINK_MAX);
  for (int i = 1; i < std::min(most, 65'000L); ++i)
    ASSERT_EQ(::link(a("b/moves").c_str(), a("b/" + std::to_string(i)).c_str()), 0) << i;
  send_all();
  change_owner();
  std::swap(a_, b_);
  ASSERT_EQ(rename("b/1", "a/1"), 0);  // one of them is listed before b
  ASSERT_EQ(rename("b/2", "c/2"), 0);
  send_all(true);
  EXPECT_EQ(attempt_->error(), "");
  for (const char* name : {"a/1", "c/2"}) EXPECT_TRUE(std::filesystem::exists(b(name))) << name;
  for (const char* name : {"b/1", "b/2"}) EXPECT_FALSE(std::filesystem::exists(b(name))) << name;
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

// An empty one of the root, which nobody refers to.
void remove_directory(Store& store, const std::string& name, InodeId id) {
  pb::Request rmdir, forget, statfs;
  rmdir.mutable_rmdir()->set_parent(kRootInode);
  rmdir.mutable_rmdir()->set_name(name);
  forget.mutable_forget()->add_ids(id);
  statfs.mutable_statfs();  // deletes what is doomed
  for (const auto& request : {rmdir, forget, statfs})
    store.execute(request, {}, [](const pb::Outcome& outcome, Bytes) { EXPECT_EQ(outcome.error(), 0U); });
}

// Once the target is asked for the first time what it has.
void remove_when_asked(Attempt& attempt, Store& store, const std::string& name, InodeId id) {
  attempt.on_message = [&store, name, id, done = false](const pb::Envelope& message) mutable {
    if (message.has_manifest() && !std::exchange(done, true)) remove_directory(store, name, id);
    return true;
  };
}

// It is where the image has not been yet, and moves to where that has been.
// It was announced, so the target takes it for whole; and what is in it there has another name by now.
TEST_P(ImageTest, ADirectoryThatGoesBeforeItIsListedHidesNoName) {
  for (const char* name : {"gone", "kept"}) std::filesystem::create_directories(a(name));
  write_file(a("gone/f"), "precious");
  send_all();
  std::filesystem::rename(a("gone/f"), a("kept/f"));
  const InodeId gone = id_of("gone");
  begin(true);
  remove_when_asked(*attempt_, *a_->store, "gone", gone);
  attempt_->image();
  attempt_->round(true);
  EXPECT_EQ(stat_name(AT_FDCWD, b("kept/f").string())->stx_nlink, 1U) << "from t2 on applications see it";
  attempt_->end();
  expect_equal();
}

// One that goes does not come between the parts of another one's listing.
TEST_P(ImageTest, ADirectoryThatGoesCutsIntoNoListing) {
  for (const char* name : {"gone", "big"}) std::filesystem::create_directories(a(name));
  for (int i = 0; i < 5000; ++i) write_file(a("big/" + std::to_string(i)), "");
  send_all();
  const InodeId gone = id_of("gone");
  begin(true);
  remove_when_asked(*attempt_, *a_->store, "gone", gone);
  attempt_->image();
  attempt_->round(true);
  attempt_->end();
  expect_equal();
}

// A power cut of the target has taken its bytes, and nothing else.
TEST_P(ImageTest, WhatIsDoubtfulStaysSoWhenTheTargetMovesIt) {
  std::filesystem::create_directories(a("d"));
  write_file(a("d/f"), std::string(5000, 'p'));
  write_file(a("other"), "x");
  send_all();
  const Backing before = *stat_name(AT_FDCWD, b("d/f").string());
  CtimeKeeper ctime(*b_->inodes, id_of("d/f"), before);
  write_file(b("d/f"), std::string(5000, '\0'));
  const std::array<struct timespec, 2> times{timespec{.tv_sec = 0, .tv_nsec = UTIME_OMIT},
                                             to_timespec(timestamp_ns(before.stx_mtime))};
  ASSERT_EQ(::utimensat(AT_FDCWD, b("d/f").c_str(), times.data(), 0), 0);
  const Backing after = *stat_name(AT_FDCWD, b("d/f").string());
  ctime.restore(after);
  doubtful_ = {.from = timestamp_ns(before.stx_ctime) + 1, .to = timestamp_ns(after.stx_ctime) + 1};
  received_ = std::make_shared<SentSet>();
  std::this_thread::sleep_for(2 * kStampTick);
  // It moves past the walk, so the target parks it; then the attempt ends.
  std::filesystem::rename(a("d"), a_->home / "unseen");
  begin(true);
  attempt_->image();
  std::filesystem::rename(a_->home / "unseen", a("d"));
  send_all(true);
  expect_equal();
}

// A clock that was corrected, or set back, since.
TEST_P(ImageTest, WhatIsReceivedIsNotInDoubtWhateverItsStampIs) {
  for (const char* name : {"a", "b"}) std::filesystem::create_directories(a(name));
  write_file(a("a/f"), "moves");
  write_file(a("a/two"), "has two names");
  std::filesystem::create_hard_link(a("a/two"), a("b/names"));
  doubtful_ = {.from = 0, .to = std::numeric_limits<std::int64_t>::max()};
  begin();
  attempt_->image();
  EXPECT_EQ(rename("a/f", "b/f"), 0);
  EXPECT_EQ(rename("b", "a/b"), 0);
  finish();
  expect_equal();
}

// Otherwise an image over a link that lasts for less than comparing takes would not get ahead.
TEST_P(ImageTest, WhatIsReceivedIsNotComparedByTheNextAttempt) {
  for (int i = 0; i < 10; ++i) write_file(a("f" + std::to_string(i)), std::string(5000, 'x'));
  send_all();
  doubtful_ = {.from = 0, .to = std::numeric_limits<std::int64_t>::max()};
  const auto compared = [this] {
    int files = 0;
    begin(true);
    attempt_->on_message = [&files](const pb::Envelope& message) {
      for (const auto& inode : message.need().inodes()) files += inode.what() != pb::Need::HAVE ? 1 : 0;
      return true;
    };
    attempt_->image();
    finish();
    return files;
  };
  EXPECT_EQ(compared(), 0) << "received before by this process";
  received_ = std::make_shared<SentSet>();  // a new one
  EXPECT_EQ(compared(), 10);
  EXPECT_EQ(compared(), 0);
  expect_equal();
}

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

// ext4 keeps them in one block, which holds the new ones, but not beside the old ones.
TEST(WriteXattrs, OldValuesMakeRoomForNewOnes) {
  const TemporaryDirectory directory;
  const UniqueFd fd(::open((directory.path() / "f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const std::string small(10, 's'), large(3000, 'l');
  EXPECT_TRUE(write_xattrs(fd.get(), false, {{"user.a", small}, {"user.b", large}, {"user.c", small}}));
  const Xattrs swapped{{"user.a", large}, {"user.b", small}, {"user.c", small}};
  EXPECT_TRUE(write_xattrs(fd.get(), false, swapped));
  EXPECT_EQ(read_xattrs(fd.get(), false), swapped);
}

// Whoever is not root strips setuid with a new size.
TEST(OrdinaryUsersImageTest, SetuidStaysWhereTheSizeIsSet) {
  const auto as_user = [] {
    if (::geteuid() == 0 && (::setgroups(0, nullptr) != 0 || ::setresgid(1000, 1000, 1000) != 0 ||
                             ::setresuid(1000, 1000, 1000) != 0))
      std::exit(2);
    const TemporaryDirectory directory;
    RunningReactor reactor;
    std::unique_ptr<Copy> a, b;
    reactor.run([&] {
      a = std::make_unique<Copy>(*reactor, directory.path() / "a", true, false);
      b = std::make_unique<Copy>(*reactor, directory.path() / "b", false, false);
    });
    write_file(a->store_path() / "f", std::string(4096, 'x'));
    ::chmod((a->store_path() / "f").c_str(), 04755);
    Attempt attempt(reactor, *a, *b, false);
    attempt.image();
    reactor.run([&] {
      pb::Request look, size, mode;
      look.mutable_lookup()->set_parent(kRootInode);
      look.mutable_lookup()->set_name("f");
      a->store->execute(look, {}, [&](const pb::Outcome& outcome, Bytes) {
        size.mutable_setattr()->set_id(outcome.attr().id());
        mode.mutable_setattr()->set_id(outcome.attr().id());
      });
      size.mutable_setattr()->set_size(1 << 20);
      mode.mutable_setattr()->set_mode(04755);
      for (const auto& request : {size, mode})
        a->store->execute(request, {}, [](const pb::Outcome&, Bytes) {});
    });
    attempt.round(true);
    attempt.end({});
    struct stat status {};
    ::stat((b->tree() / "f").c_str(), &status);
    std::cerr << std::oct << status.st_mode << " of " << std::dec << status.st_size << " bytes";
    std::_Exit(0);
  };
  EXPECT_EXIT(as_user(), testing::ExitedWithCode(0), "104755 of 1048576 bytes");
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

}  // namespace
}  // namespace sharefs
