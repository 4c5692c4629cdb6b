#include "fs/stamps.h"

#include <sys/stat.h>
#include <time.h>

#include <atomic>

namespace sharefs {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kTick = std::chrono::nanoseconds(kStampTick).count();
// Inodes of 128 bytes (ext4) keep whole seconds, other file systems every other one.
constexpr std::int64_t kCoarse = 2 * kSecond;

std::atomic<std::int64_t> kept{0};

bool keeps_whole_seconds(int directory) {
  struct stat found {};
  return ::fstat(directory, &found) == 0 && ::fchmod(directory, found.st_mode & 07777u) == 0 &&
         ::fstat(directory, &found) == 0 && found.st_ctim.tv_nsec == 0;
}

}  // namespace

std::int64_t ctime_floor() {
  struct timespec now {};
  ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
  return now.tv_sec * kSecond + now.tv_nsec - kTick - kept.load(std::memory_order_relaxed);
}

std::int64_t ctime_ceiling() {
  struct timespec now {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return now.tv_sec * kSecond + now.tv_nsec + kTick;
}

void learn_stamps(int directory) {
  kept = 0;
  if (!keeps_whole_seconds(directory)) return;
  const struct timespec tick { .tv_sec = 0, .tv_nsec = kTick };  // a fine stamp may be whole once
  ::nanosleep(&tick, nullptr);
  if (keeps_whole_seconds(directory)) kept = kCoarse;
}

}  // namespace sharefs
