// The process that serves a data set on this site: a Site on a reactor, the control socket beside it.
//
// Threads: everything here runs on the thread of main(). In the background process nothing is started (no
// thread, no ZeroMQ context, no database) before the fork.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/home.h"

namespace sharefs {

struct DaemonOptions {
  DataSetPaths paths;
  std::optional<std::filesystem::path> mountpoint;
  std::vector<std::string> mount_options;
  std::optional<std::chrono::milliseconds> timeout;
  bool patient = false;        // see Site::Options
  bool write_through = false;  // the same
};

// Tells systemd (Type=notify), if it has started this process.
void tell_service_manager();

// Serves until SIGTERM, SIGINT, the command «stop», or the end of the mount. Throws std::runtime_error with
// one line. `ready` is called once, when requests are being served.
void serve_in_foreground(const DaemonOptions& options, const std::function<void()>& ready);

// Starts serve_in_foreground() in a process of its own, which logs to the data set's log file. Returns when
// it serves; throws what it failed with.
void serve_in_background(const DaemonOptions& options);

}  // namespace sharefs
