#include "cli/bypass.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <optional>

#include "cli/failure.h"
#include "fs/mounts.h"

namespace sharefs {
namespace fs = std::filesystem;
namespace {

// The device of a file, from what the kernel has cached: a mount that does not answer cannot hold us up.
std::optional<std::pair<unsigned, unsigned>> device_of(const fs::path& path) {
  struct statx status {};
  if (statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, 0, &status) != 0) return std::nullopt;
  return std::pair(status.stx_dev_major, status.stx_dev_minor);
}

std::string read_line(const fs::path& file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

class Scan {
 public:
  explicit Scan(fs::path store) : store_(std::move(store)), device_(device_of(store_)) {}

  std::optional<BypassingProcess> process(pid_t pid) const {
    const fs::path proc = fs::path("/proc") / std::to_string(pid);
    BypassingProcess found{pid, read_line(proc / "comm"), "", ""};
    if (link(proc / "cwd", "working directory", found) || link(proc / "root", "root", found) ||
        link(proc / "exe", "program", found) || descriptors(proc, found) || mappings(proc, found)) {
      return found;
    }
    return std::nullopt;
  }

 private:
  bool inside(const std::string& path) const { return path.starts_with('/') && is_within(path, store_); }

  bool link(const fs::path& link, const char* how, BypassingProcess& found) const {
    std::error_code error;
    const fs::path target = fs::read_symlink(link, error);
    // A path alone may mean another mount at the same place, so the device must be the store's.
    if (error || !inside(target) || device_of(link) != device_) return false;
    found.how = how;
    found.example = target;
    return true;
  }

  bool descriptors(const fs::path& proc, BypassingProcess& found) const {
    std::error_code error;
    for (fs::directory_iterator fd(proc / "fd", error), end; !error && fd != end; fd.increment(error)) {
      if (link(fd->path(), "open file", found)) return true;
    }
    return false;
  }

  bool mappings(const fs::path& proc, BypassingProcess& found) const {
    std::ifstream maps(proc / "maps");
    for (std::string line; std::getline(maps, line);) {
      const auto start = line.find('/');
      if (start == std::string::npos || !inside(line.substr(start))) continue;
      found.how = "mapping";
      found.example = line.substr(start);
      return true;
    }
    return false;
  }

  fs::path store_;
  std::optional<std::pair<unsigned, unsigned>> device_;
};

}  // namespace

std::vector<BypassingProcess> find_bypassing(const fs::path& store) {
  std::vector<BypassingProcess> found;
  const Scan scan(store);
  std::error_code error;
  for (fs::directory_iterator entry("/proc", error), end; !error && entry != end; entry.increment(error)) {
    const auto pid = static_cast<pid_t>(std::atol(entry->path().filename().c_str()));
    if (pid <= 0 || pid == getpid()) continue;
    if (auto process = scan.process(pid)) found.push_back(std::move(*process));
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.pid < b.pid; });
  return found;
}

void warn_of_bypassing(const fs::path& store) {
  constexpr std::size_t kShown = 10;
  const auto processes = find_bypassing(store);
  if (processes.empty()) return;
  std::cerr << fmt::format(
      "sharefs: warning: {} process{} in the store itself and so bypass{} the mount; what {} there is not "
      "replicated safely until {} ended or reopened {} files:\n",
      processes.size(), processes.size() == 1 ? " works" : "es work", processes.size() == 1 ? "es" : "",
      processes.size() == 1 ? "it changes" : "they change", processes.size() == 1 ? "it has" : "they have",
      processes.size() == 1 ? "its" : "their");
  for (std::size_t i = 0; i < std::min(kShown, processes.size()); ++i) {
    std::cerr << fmt::format("  pid {} ({}): {} {}\n", processes[i].pid, printable(processes[i].command),
                             processes[i].how, printable(processes[i].example.string()));
  }
  if (processes.size() > kShown) std::cerr << fmt::format("  and {} more\n", processes.size() - kShown);
}

}  // namespace sharefs
