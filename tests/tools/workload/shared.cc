// Modes in which one process must see what another one did on another mount: coherence and locks.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {
namespace {

constexpr unsigned kPages = 4;
constexpr std::size_t kPage = 4096;
// Slots of the board.
constexpr unsigned kHeld = 8;
constexpr unsigned kReleased = 9;

int lock(const Options& options, int fd, int how, bool wait) {
  if (!options.posix) return flock(fd, how == F_UNLCK ? LOCK_UN : LOCK_EX | (wait ? 0 : LOCK_NB));
  struct flock range {};
  range.l_type = static_cast<short>(how);
  range.l_whence = SEEK_SET;
  range.l_len = 100;
  return fcntl(fd, wait ? F_SETLKW : F_SETLK, &range);
}

}  // namespace

// Writes growing numbers to the first bytes of four pages, and tells each one on the board after its write
// returned.
void run_counter(const Options& options, Report& report) {
  Board& told = board(options);
  File file = open_file(report, options.file, O_RDWR | O_CREAT);
  report.run("ftruncate", [&] { return ftruncate(file.fd(), kPages * kPage); });
  for (std::uint64_t number = 1; !report.stopped(); ++number) {
    report.pace();
    const unsigned page = number % kPages;
    if (report.run("pwrite", [&] { return pwrite(file.fd(), &number, sizeof number, page * kPage); }) ==
        sizeof number)
      told.slots[page].store(number, std::memory_order_release);
  }
}

// Reads the numbers in a shared mapping and with pread: neither may show less than what the board told
// before.
void run_mmap_reader(const Options& options, Report& report) {
  Board& told = board(options);
  File file = open_file(report, options.file, O_RDONLY);
  void* mapped = mmap(nullptr, kPages * kPage, PROT_READ, MAP_SHARED, file.fd(), 0);
  if (mapped == MAP_FAILED) return report.fail(std::string("mmap: ") + std::strerror(errno));
  const auto* bytes = static_cast<const char*>(mapped);
  std::uint64_t seen = 0;
  while (!report.stopped() && !report.failed()) {
    report.pace();
    for (unsigned page = 0; page < kPages; ++page) {
      const std::uint64_t wanted = told.slots[page].load(std::memory_order_acquire);
      std::uint64_t in_memory = 0, in_file = 0;
      report.run("load", [&] {
        in_memory = *reinterpret_cast<const volatile std::uint64_t*>(bytes + page * kPage);
        return 0;
      });
      report.run("pread", [&] { return pread(file.fd(), &in_file, sizeof in_file, page * kPage); });
      if (in_memory < wanted)
        report.fail("a mapping shows " + std::to_string(in_memory) + " after " + std::to_string(wanted) +
                    " was written");
      if (in_file < wanted)
        report.fail("a read gave " + std::to_string(in_file) + " after " + std::to_string(wanted) +
                    " was written");
      seen = std::max(seen, in_memory);
    }
  }
  munmap(mapped, kPages * kPage);
  report.put("last_seen", seen);
}

// Holds a lock until it is stopped, writing to the file meanwhile.
void run_lock_holder(const Options& options, Report& report) {
  Board& told = board(options);
  File file = open_file(report, options.file, O_RDWR | O_CREAT);
  report.run("lock", [&] { return lock(options, file.fd(), F_WRLCK, true); });
  told.slots[kHeld] = 1;
  for (std::uint64_t number = 1; !report.stopped(); ++number) {
    report.run("pwrite", [&] { return pwrite(file.fd(), &number, sizeof number, 0); });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  told.slots[kReleased] = 1;
  report.run("unlock", [&] { return lock(options, file.fd(), F_UNLCK, true); });
}

// Tries for the lock while another one holds it, then waits until the holder gives it up, and not shorter.
void run_lock_waiter(const Options& options, Report& report) {
  Board& told = board(options);
  while (told.slots[kHeld] == 0 && !report.stopped())
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  File file = open_file(report, options.file, O_RDWR);
  File second = open_file(report, options.file, O_RDWR);
  for (int i = 0; i < 20; ++i)
    if (report.run(
            "try", [&] { return lock(options, second.fd(), F_WRLCK, false); }, EAGAIN) == 0 &&
        told.slots[kReleased] == 0)
      return report.fail("a held lock was given to a second process");
  if (report.run("wait", [&] { return lock(options, file.fd(), F_WRLCK, true); }) == 0 &&
      told.slots[kReleased] == 0)
    report.fail("the waiting process got the lock before the holder gave it up");
  report.run("unlock", [&] { return lock(options, file.fd(), F_UNLCK, true); });
}

// Adds one to a number in the file, under the lock: no increment of any process on any mount may be lost.
void run_lock_counter(const Options& options, Report& report) {
  File file = open_file(report, options.file, O_RDWR | O_CREAT);
  std::uint64_t added = 0;
  while (!report.stopped() && !report.failed()) {
    report.pace();
    report.run("lock", [&] { return lock(options, file.fd(), F_WRLCK, true); });
    std::uint64_t number = 0;
    report.run("pread", [&] { return pread(file.fd(), &number, sizeof number, 0); });
    ++number;
    if (report.run("pwrite", [&] { return pwrite(file.fd(), &number, sizeof number, 0); }) == sizeof number)
      ++added;
    report.run("unlock", [&] { return lock(options, file.fd(), F_UNLCK, true); });
  }
  report.put("added", added);
}

}  // namespace sharefs::workload
