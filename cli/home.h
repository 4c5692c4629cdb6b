// The folder of a site's state: SHAREFS_HOME/NAME/ (mode 0700) for each data set, and what lies in it.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "meta/database.h"
#include "meta/state.h"

namespace sharefs {

// Data sets and sites are called [A-Za-z0-9._-]{1,64}, and not "." or "..".
bool valid_name(std::string_view name);
void require_valid_name(std::string_view name, std::string_view what);  // UsageError

// The files of one data set's folder.
struct DataSetPaths {
  std::filesystem::path folder;
  std::filesystem::path database() const { return folder / "state.db"; }
  std::filesystem::path control_socket() const { return folder / "control.sock"; }
  std::filesystem::path pid_file() const { return folder / "sharefs.pid"; }
  std::filesystem::path log() const { return folder / "sharefs.log"; }
};

class Home {
 public:
  explicit Home(std::filesystem::path folder) : folder_(std::move(folder)) {}

  // /var/lib/sharefs for root, $XDG_STATE_HOME/sharefs or ~/.local/state/sharefs for everybody else.
  static std::filesystem::path default_folder();

  const std::filesystem::path& folder() const { return folder_; }
  DataSetPaths paths(std::string_view name) const { return {folder_ / name}; }
  bool has(std::string_view name) const;  // initialised or joined here
  // Sorted by name; also those whose state cannot be read.
  std::vector<std::string> data_sets() const;
  // A setting of one of many. Of one whose state cannot be read it is empty, and there is a warning: that one
  // does not stand in the way of the others.
  std::string setting_of(std::string_view name, std::string_view key) const;
  // The paths of a data set that is here; throws with one line that says what to do otherwise.
  DataSetPaths require(std::string_view name) const;

 private:
  std::filesystem::path folder_;
};

// A short-lived look at a data set's state; the daemon may have the same database open.
struct OpenState {
  explicit OpenState(const DataSetPaths& paths) : database(paths.database()), state(database) {}
  Database database;
  State state;
};

// What makes a process the only one that serves a data set: an exclusive lock on its pid file, released by
// the kernel however the process ends.
class DaemonLock {
 public:
  static std::optional<DaemonLock> try_take(const DataSetPaths& paths);  // nullopt: another process has it
  static pid_t holder(const DataSetPaths& paths);                        // 0: nobody
  static bool wait_released(const DataSetPaths& paths, std::chrono::milliseconds timeout);

  DaemonLock(DaemonLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  DaemonLock& operator=(DaemonLock&&) = delete;
  ~DaemonLock();

 private:
  explicit DaemonLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace sharefs
