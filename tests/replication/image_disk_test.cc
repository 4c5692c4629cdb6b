// Disks that hang, fail or are full.

#include <sys/syscall.h>

#include "tests/replication/image_fixture.h"

namespace {

std::atomic<bool> disk_hangs{false}, disk_fails{false};
std::atomic<const char*> unreadable{nullptr};  // a part of the path
std::atomic<time_t> clock_set_back{0};         // seconds

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
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  const auto result = static_cast<int>(::syscall(SYS_clock_gettime, clock, time));
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) time->tv_sec -= clock_set_back;
  return result;
}
extern "C" ssize_t pread(int fd, void* to, std::size_t size, off_t offset) {
  return read_at(fd, to, size, offset);
}

namespace sharefs {
namespace {

class ImageDiskTest : public ImageTest {};

INSTANTIATE_TEST_SUITE_P(Access, ImageDiskTest, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Handles" : "ParentAndName"; });

TEST_P(ImageDiskTest, ATargetEndsThoughItsDiskHangs) {
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

TEST_P(ImageDiskTest, WhatTheTargetCannotReadIsSentAsAWhole) {
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

TEST_P(ImageDiskTest, WhatWasStampedByAClockThatWasAheadIsNotSentByEveryRound) {
  for (int i = 0; i < 50; ++i) write_file(a("f" + std::to_string(i)), "x");
  std::this_thread::sleep_for(2 * kStampTick);
  clock_set_back = 3600;
  begin();
  attempt_->image();
  attempt_->round();
  const auto before = attempt_->applied();
  attempt_->round();
  EXPECT_EQ(attempt_->applied(), before) << "nothing has changed";
  finish();
  clock_set_back = 0;
  expect_equal();
}

TEST_P(ImageDiskTest, AFullDiskIsToldInOneLine) {
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
