#include "cli/home.h"

#include <fcntl.h>
#include <pwd.h>
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <thread>

#include "cli/units.h"

namespace sharefs {
namespace fs = std::filesystem;
namespace {

// Of the open file description, not of the process: it can be looked at without being taken, and no other
// descriptor of the file that this process closes releases it.
struct flock exclusive_lock() {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

}  // namespace

bool valid_name(std::string_view name) {
  constexpr std::size_t kLongest = 64;
  if (name.empty() || name.size() > kLongest || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

void require_valid_name(std::string_view name, std::string_view what) {
  if (valid_name(name)) return;
  throw UsageError(
      fmt::format("\"{}\" cannot be the name of a {}: use 1 to 64 of A-Z a-z 0-9 . _ -", name, what));
}

fs::path Home::default_folder() {
  if (geteuid() == 0) return "/var/lib/sharefs";
  // An XDG path that is not absolute is to be ignored, says the specification.
  if (const char* state = std::getenv("XDG_STATE_HOME"); state != nullptr && state[0] == '/') {
    return fs::path(state) / "sharefs";
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && home[0] == '/') {
    return fs::path(home) / ".local/state/sharefs";
  }
  if (const passwd* user = getpwuid(geteuid()); user != nullptr) {
    return fs::path(user->pw_dir) / ".local/state/sharefs";
  }
  throw std::runtime_error("cannot tell where to keep state: set SHAREFS_HOME or give --home");
}

bool Home::has(std::string_view name) const {
  if (!valid_name(name)) return false;
  std::error_code error;
  if (!fs::exists(paths(name).database(), error)) {
    if (error == std::errc::permission_denied) {
      throw std::runtime_error(fmt::format("no permission to read {}", folder_.string()));
    }
    return false;
  }
  // Set last by init and join: without it, one of them was interrupted and can be repeated.
  return !OpenState(paths(name)).state.setting("data_set").empty();
}

std::vector<std::string> Home::data_sets() const {
  std::vector<std::string> names;
  std::error_code error;
  fs::directory_iterator entries(folder_, error);
  if (error && error != std::errc::no_such_file_or_directory) {
    throw std::runtime_error(fmt::format("cannot read {}: {}", folder_.string(), error.message()));
  }
  if (error) return names;
  for (const auto& entry : entries) {
    std::string name = entry.path().filename().string();
    bool here = true;
    try {
      here = has(name);
    } catch (const DatabaseError&) {
      // Whoever opens it hears what is wrong with it.
    }
    if (here) names.push_back(std::move(name));
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string Home::setting_of(std::string_view name, std::string_view key) const {
  try {
    return OpenState(paths(name)).state.setting(key);
  } catch (const DatabaseError& error) {
    std::cerr << fmt::format("sharefs: warning: leaving out {}, whose state cannot be read: {}\n", name,
                             error.what());
    return {};
  }
}

DataSetPaths Home::require(std::string_view name) const {
  if (has(name)) return paths(name);
  throw std::runtime_error(
      fmt::format("no data set \"{}\" in {}; \"sharefs status\" lists those that are here, \"sharefs init\" "
                  "and \"sharefs "
                  "join\" make one",
                  name, folder_.string()));
}

std::optional<DaemonLock> DaemonLock::try_take(const DataSetPaths& paths) {
  const int fd = open(paths.pid_file().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0)
    throw std::runtime_error(fmt::format("cannot open {}: {}", paths.pid_file().string(), strerror(errno)));
  DaemonLock lock(fd);
  struct flock whole = exclusive_lock();
  if (fcntl(fd, F_OFD_SETLK, &whole) != 0) return std::nullopt;
  const std::string pid = std::to_string(getpid()) + "\n";
  if (ftruncate(fd, 0) != 0 || pwrite(fd, pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    throw std::runtime_error(fmt::format("cannot write {}: {}", paths.pid_file().string(), strerror(errno)));
  }
  return lock;
}

DaemonLock::~DaemonLock() {
  if (fd_ >= 0) close(fd_);
}

pid_t DaemonLock::holder(const DataSetPaths& paths) {
  const int fd = open(paths.pid_file().c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  pid_t pid = 0;
  struct flock found = exclusive_lock();
  if (fcntl(fd, F_OFD_GETLK, &found) == 0 && found.l_type != F_UNLCK) {
    char text[32] = {};
    if (pread(fd, text, sizeof text - 1, 0) > 0) pid = static_cast<pid_t>(std::strtol(text, nullptr, 10));
    if (pid <= 0) pid = -1;  // held, and not yet written
  }
  close(fd);
  return pid;
}

bool DaemonLock::wait_released(const DataSetPaths& paths, std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  while (holder(paths) != 0) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

}  // namespace sharefs
