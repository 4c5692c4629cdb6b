// What the modes of the workload tool share: options, the report, the blackboard, patterned blocks.
//
// A mode performs operations on a directory until it is told to stop (SIGTERM or --seconds), checks itself
// every result that it can, and reports JSON: ops, errors, first_error, longest_stall_ms and what its
// verifier needs to know.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sharefs::workload {

struct Options {
  std::string mode;
  std::vector<std::string> dirs;    // --dir, repeatable: the first is where the mode works
  std::string file;                 // --file: one file, shared by several processes
  std::string id = "0";             // --id: distinguishes processes of one mode
  std::string board;                // --board: a file outside of every mount, see Board
  std::string expect;               // --expect: what a verifier must find, written at the end of a run
  double seconds = 0;               // --seconds: 0 runs until SIGTERM
  unsigned rate = 0;                // --rate: operations per second; 0: as fast as possible
  unsigned files = 8;               // --files
  unsigned block = 4096;            // --block: bytes
  unsigned blocks = 64;             // --blocks: per file
  unsigned sync_every = 0;          // --sync-every: fsync after so many writes
  std::uint64_t seed = 1;           // --seed
  bool posix = false;               // --posix: fcntl locks instead of flock
  bool until_gone = false;          // --until-gone: a daemon that is killed ends the run and is no error
  bool rewrite = false;             // --rewrite: an fsync that fails with EIO is no error, see fsync-writer
  std::vector<std::string> counts;  // --count ID=N, repeatable: what each appender wrote
};

// The mount lost its daemon (ENOTCONN and the like) and --until-gone was given: ends the run.
struct Gone : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Collects results. Not thread-safe, except stopped().
class Report {
 public:
  explicit Report(const Options& options);

  // Performs one system call, timed and counted. `result` < 0 is a failure of `what` unless errno is
  // `allowed`.
  template <class Call>
  auto run(const char* what, Call call, int allowed = 0) {
    auto start = begin();
    auto result = call();
    end(start, what, result < 0, allowed);
    return result;
  }
  void fail(const std::string& text);  // a wrong result
  void put(const std::string& key, std::uint64_t value) { extra_[key] = value; }
  void pace();           // waits for the next slot of --rate
  bool stopped() const;  // SIGTERM, or --seconds are over
  bool failed() const { return errors_ != 0; }
  std::string json() const;

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin() const { return Clock::now(); }
  void end(Clock::time_point start, const char* what, bool failed, int allowed);

  const Options& options_;
  Clock::time_point started_;
  std::int64_t started_wall_ms_;
  Clock::time_point next_slot_;
  std::uint64_t ops_ = 0;
  std::uint64_t errors_ = 0;
  std::string first_error_;
  std::chrono::nanoseconds longest_{0};
  std::int64_t longest_at_ms_ = 0;                                   // since the start
  std::map<std::string_view, std::chrono::nanoseconds> longest_of_;  // each kind of call
  std::vector<std::uint32_t> timeline_;                              // operations ended in each 100 ms
  std::vector<float> latencies_us_;                                  // of --rate runs only
  std::map<std::string, std::uint64_t> extra_;
};

// A page of counters outside of the file system under test, through which processes on different mounts tell
// each other what has already happened.
struct Board {
  std::atomic<std::uint64_t> slots[64];
};
Board& board(const Options& options);

// Fills `block` with bytes that follow from who wrote it, where, and which of its writes this is; seq 0 is
// zeros.
void fill_block(std::vector<char>& block, std::uint64_t writer, std::uint64_t file, std::uint64_t index,
                std::uint64_t seq);
// The seq for which `block` is what fill_block makes, or -1 if it is for none.
std::int64_t block_seq(const std::vector<char>& block, std::uint64_t writer, std::uint64_t file,
                       std::uint64_t index);
std::uint64_t hash_of(const std::string& text);

// An open file descriptor, closed at the end of its scope.
class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  File(File&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();
  int fd() const { return fd_; }

 private:
  int fd_;
};
// Opens or throws.
File open_file(Report& report, const std::string& path, int flags, mode_t mode = 0644);

// The modes.
void run_writer(const Options&, Report&);
void verify_writer(const Options&, Report&);
void run_paced(const Options&, Report&);
void run_fsync_writer(const Options&, Report&);
void verify_fsync_writer(const Options&, Report&);
void run_appender(const Options&, Report&);
void verify_appender(const Options&, Report&);
void prepare_renamer(const Options&, Report&);
void run_renamer(const Options&, Report&);
void verify_renamer(const Options&, Report&);
void run_creator(const Options&, Report&);
void run_directory_stream(const Options&, Report&);
void run_removed_directory(const Options&, Report&);
void run_open_unlinked(const Options&, Report&);
void run_stat_holder(const Options&, Report&);
void run_counter(const Options&, Report&);
void run_mmap_reader(const Options&, Report&);
void run_lock_holder(const Options&, Report&);
void run_lock_waiter(const Options&, Report&);
void run_lock_counter(const Options&, Report&);

}  // namespace sharefs::workload
