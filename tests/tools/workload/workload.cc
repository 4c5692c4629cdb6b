#include "tests/tools/workload/workload.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

namespace sharefs::workload {
namespace {

std::atomic<bool> stop_requested{false};

void on_signal(int) { stop_requested = true; }

// Calls that wait for a lock must not be interrupted by the request to stop.
void catch_signals() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
}

bool means_gone(int error) { return error == ENOTCONN || error == ECONNABORTED || error == ENODEV; }

std::int64_t milliseconds(std::chrono::nanoseconds duration) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(duration).count();
}

struct Header {
  std::uint64_t magic, writer, file, index, seq;
};
constexpr std::uint64_t kMagic = 0x73686172656673ull;

}  // namespace

Report::Report(const Options& options)
    : options_(options),
      started_(Clock::now()),
      started_wall_ms_(milliseconds(std::chrono::system_clock::now().time_since_epoch())),
      next_slot_(started_) {
  catch_signals();
}

void Report::end(Clock::time_point start, const char* what, bool failed, int allowed) {
  const int error = errno;
  const auto now = Clock::now();
  ++ops_;
  const auto slot = static_cast<std::size_t>(milliseconds(now - started_) / 100);
  if (slot >= timeline_.size()) timeline_.resize(slot + 1);
  ++timeline_[slot];
  auto& longest_of = longest_of_[what];
  longest_of = std::max(longest_of, std::chrono::nanoseconds(now - start));
  if (now - start > longest_) {
    longest_ = now - start;
    longest_at_ms_ = milliseconds(start - started_);
  }
  if (options_.rate != 0)
    latencies_us_.push_back(std::chrono::duration<float, std::micro>(now - start).count());
  if (failed && options_.until_gone && means_gone(error)) throw Gone(what);
  if (failed && error != allowed) fail(std::string(what) + ": " + std::strerror(error));
  errno = error;
}

void Report::fail(const std::string& text) {
  if (errors_++ == 0) first_error_ = text;
}

void Report::pace() {
  if (options_.rate == 0) return;
  std::this_thread::sleep_until(next_slot_);
  next_slot_ += std::chrono::nanoseconds(1'000'000'000u / options_.rate);
  // Slots missed while an operation stalled are not made up for: the load stays what was asked for.
  next_slot_ = std::max(next_slot_, Clock::now() - std::chrono::milliseconds(1));
}

bool Report::stopped() const {
  if (stop_requested) return true;
  return options_.seconds > 0 && Clock::now() - started_ > std::chrono::duration<double>(options_.seconds);
}

std::string Report::json() const {
  nlohmann::json out = {
      {"mode", options_.mode},
      {"id", options_.id},
      {"ops", ops_},
      {"errors", errors_},
      {"first_error", first_error_},
      {"longest_stall_ms", std::chrono::duration<double, std::milli>(longest_).count()},
      {"longest_stall_at_ms", longest_at_ms_},
      {"started_ms", started_wall_ms_},
      {"timeline", timeline_},
  };
  for (const auto& [what, longest] : longest_of_)
    out["longest_ms"][std::string(what)] = std::chrono::duration<double, std::milli>(longest).count();
  if (!latencies_us_.empty()) {
    auto sorted = latencies_us_;
    std::sort(sorted.begin(), sorted.end());
    out["p50_us"] = sorted[sorted.size() / 2];
    out["p99_us"] = sorted[sorted.size() * 99 / 100];
  }
  for (const auto& [key, value] : extra_) out[key] = value;
  return out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

Board& board(const Options& options) {
  if (options.board.empty()) throw std::invalid_argument("this mode needs --board FILE");
  File file(::open(options.board.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
  if (file.fd() < 0 || ftruncate(file.fd(), sizeof(Board)) != 0)
    throw std::runtime_error("cannot make the board " + options.board);
  void* page = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
  if (page == MAP_FAILED) throw std::runtime_error("cannot map the board " + options.board);
  return *static_cast<Board*>(page);
}

std::uint64_t hash_of(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3ull;
  return hash;
}

void fill_block(std::vector<char>& block, std::uint64_t writer, std::uint64_t file, std::uint64_t index,
                std::uint64_t seq) {
  if (seq == 0) {
    std::fill(block.begin(), block.end(), '\0');
    return;
  }
  const Header header{kMagic, writer, file, index, seq};
  std::uint64_t state = (writer ^ (file << 40) ^ (index << 20) ^ seq) * 0x9e3779b97f4a7c15ull | 1;
  for (std::size_t at = 0; at < block.size(); at += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::memcpy(&block[at], &state, std::min<std::size_t>(8, block.size() - at));
  }
  std::memcpy(block.data(), &header, std::min(sizeof header, block.size()));
}

std::int64_t block_seq(const std::vector<char>& block, std::uint64_t writer, std::uint64_t file,
                       std::uint64_t index) {
  Header header{};
  std::memcpy(&header, block.data(), std::min(sizeof header, block.size()));
  const bool zeros = header.magic == 0;
  if (!zeros && header.magic != kMagic) return -1;
  std::vector<char> wanted(block.size());
  fill_block(wanted, writer, file, index, zeros ? 0 : header.seq);
  return wanted == block ? static_cast<std::int64_t>(zeros ? 0 : header.seq) : -1;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

File open_file(Report& report, const std::string& path, int flags, mode_t mode) {
  int fd = report.run("open", [&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); });
  if (fd < 0) throw std::runtime_error("cannot open " + path + ": " + std::strerror(errno));
  return File(fd);
}

}  // namespace sharefs::workload
