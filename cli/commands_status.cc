#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <thread>

#include "cli/commands.h"
#include "cli/control.h"
#include "cli/failure.h"
#include "cli/progress.h"
#include "cli/setup.h"
#include "cli/units.h"
#include "fs/mounts.h"
#include "replication/json_line.h"
#include "replication/tree_place.h"

namespace sharefs {
namespace {

constexpr auto kAnswer = std::chrono::seconds(10);
constexpr auto kWatchInterval = std::chrono::seconds(1);
constexpr unsigned kShownHandoffs = 5;

struct StatusArguments {
  std::string name;  // empty: all
  bool json = false;
  bool watch = false;
};

nlohmann::json to_status(const HandoffRecord& record) {
  return {{"attempt", record.attempt},
          {"result", record.result},
          {"phase", record.phase},
          {"role", record.role},
          {"from", record.source},
          {"to", record.target},
          {"epoch", record.epoch},
          {"started", record.started},
          {"t0", record.t0},
          {"t1", record.t1},
          {"t2", record.t2},
          {"t3", record.t3},
          {"ended", record.ended},
          {"image_files", record.image_files},
          {"image_bytes", record.image_bytes},
          {"image_bytes_sent", record.image_bytes_sent},
          {"log_entries", record.log_entries},
          {"log_bytes", record.log_bytes},
          {"rounds", record.rounds},
          {"records", record.records},
          {"pause_ms", record.pause_ms},
          {"error", record.error}};
}

// What the database knows, in the words of a daemon's status.
nlohmann::json status_from_database(State& state, const std::string& name) {
  const Ownership ownership = state.ownership();
  const std::string site = state.setting("site");
  const std::string mountpoint = state.setting("mountpoint");
  nlohmann::json status = {{"name", name},
                           {"site", site},
                           {"role", ownership.owner == site ? "owner" : "remote"},
                           {"owner", ownership.owner},
                           {"epoch", ownership.epoch},
                           {"phase", "not running"},
                           {"mountpoint", ""},
                           {"store", state.setting("store")},
                           {"in_place", TreePlace::in_place(state)},
                           {"sites", nlohmann::json::array()},
                           {"handoff", nullptr},
                           {"running", false}};
  if (is_mounted(mountpoint, name)) status["dead_mountpoint"] = mountpoint;
  for (const auto& other : state.sites()) {
    status["sites"].push_back({{"site", other.name}, {"endpoint", other.endpoint}, {"connected", false}});
  }
  if (const auto handoffs = state.handoffs(1); !handoffs.empty())
    status["handoff"] = to_status(handoffs.front());
  return status;
}

std::string connection_text(const nlohmann::json& status, const nlohmann::json& site) {
  if (site.value("connected", false)) return "connected";
  if (site.value("refused", false)) return "refuses this site's key (was it removed there?)";
  if (site.value("one_way", false))
    return fmt::format("is reached, but does not reach this site at {}", text_of(status, "endpoint"));
  return "not connected";
}

std::string site_rows(const nlohmann::json& status) {
  std::string text;
  for (const auto& site : status.value("sites", nlohmann::json::array())) {
    const std::string endpoint = text_of(site, "endpoint");
    const bool self = text_of(site, "site") == text_of(status, "site");
    text += fmt::format("  site       {:<16} {:<32} {}\n", text_of(site, "site"),
                        endpoint.empty() ? "does not listen" : endpoint,
                        self ? "this site" : connection_text(status, site));
  }
  return text;
}

std::string history_rows(const nlohmann::json& status) {
  const auto history = status.value("history", nlohmann::json::array());
  if (history.empty()) return "";
  std::string text = "  handoffs   started              from -> to               result    pause      sent\n";
  for (const auto& handoff : history) {
    const std::string result = text_of(handoff, "result");
    text += fmt::format("             {}  {:<23}  {:<8}  {:<9}  {}\n",
                        format_time(static_cast<std::int64_t>(count_of(handoff, "started"))).substr(0, 19),
                        text_of(handoff, "from") + " -> " + text_of(handoff, "to"),
                        result.empty() ? text_of(handoff, "phase") : result,
                        result == "done" ? format_milliseconds(number_of(handoff, "pause_ms")) : "-",
                        // The target learns it in the end.
                        text_of(handoff, "role") == "target" && result != "done"
                            ? "-"
                            : format_bytes(count_of(handoff, "image_bytes_sent")));
    if (const std::string error = printable(text_of(handoff, "error")); !error.empty())
      text += "               " + error + "\n";
  }
  return text;
}

std::string status_text(const nlohmann::json& status) {
  if (status.contains("error"))
    return fmt::format("{}\n  error      {}\n", text_of(status, "name"), printable(text_of(status, "error")));
  const bool running = status.value("running", false);
  const std::string mountpoint = printable(text_of(status, "mountpoint"));
  std::string text = fmt::format("{}\n", text_of(status, "name"));
  text += fmt::format("  this site  {} ({})\n", text_of(status, "site"), text_of(status, "role"));
  text += fmt::format("  owner      {}, epoch {}\n", text_of(status, "owner"), count_of(status, "epoch"));
  if (const std::string contested = printable(text_of(status, "contested")); !contested.empty())
    text += fmt::format("  CONTESTED  {}\n", contested);
  text += fmt::format("  store      {}\n", printable(text_of(status, "store")));
  if (running) {
    const std::string wanted = printable(text_of(status, "wanted_mountpoint"));
    text += fmt::format("  mounted    {} (process {})\n",
                        status.value("stopping", false) ? "no, is about to end"
                        : !mountpoint.empty()           ? mountpoint
                        : wanted.empty()                ? "no, serves other sites"
                                         : fmt::format("not yet, {} waits for {} to answer", wanted,
                                                       text_of(status, "owner")),
                        count_of(status, "pid"));
  } else if (const auto daemon = count_of(status, "pid"); daemon != 0) {
    text += fmt::format("  mounted    process {} starts, ends, or does not answer\n", daemon);
  } else {
    text += "  mounted    no, not running\n";
  }
  if (text_of(status, "role") == "owner" && !status.value("in_place", true))
    text +=
        running
            ? "             its files are being moved into place\n"
            : fmt::format(
                  "             not all of its files are in place: \"sharefs serve {}\" puts them there\n",
                  text_of(status, "name"));
  if (const std::string dead = printable(text_of(status, "dead_mountpoint")); !dead.empty()) {
    text += fmt::format(
        "             {} has the mount of a daemon that was killed: mount again, or \"sharefs umount {}\"\n",
        dead, text_of(status, "name"));
  }
  text += site_rows(status);
  const auto handoff = status.value("handoff", nlohmann::json());
  if (handoff.is_object() && text_of(handoff, "result").empty()) {
    text += fmt::format("  handoff    {} -> {}  {}\n", text_of(handoff, "from"), text_of(handoff, "to"),
                        running ? plain_line(handoff) : "not ended: this site sees to that when it runs");
  }
  return text + history_rows(status);
}

nlohmann::json collect(const Home& home, const StatusArguments& arguments) {
  if (!arguments.name.empty()) {
    home.require(arguments.name);
    return read_status(home, arguments.name);
  }
  auto all = nlohmann::json::array();
  for (const auto& name : home.data_sets()) {
    try {
      all.push_back(read_status(home, name));
    } catch (const std::exception& error) {
      all.push_back({{"name", name}, {"error", error.what()}});
    }
  }
  return all;
}

// Returns the exit code.
int show(const Home& home, const StatusArguments& arguments) {
  const auto status = collect(home, arguments);
  if (arguments.watch && !arguments.json && isatty(STDOUT_FILENO) != 0) std::cout << "\033[H\033[2J";
  if (arguments.json) {
    std::cout << to_line(status) << std::endl;
  } else if (status.is_object()) {
    std::cout << status_text(status) << std::flush;
  } else if (status.empty()) {
    std::cout << fmt::format("no data sets in {}\n", home.folder().string()) << std::flush;
  } else {
    for (const auto& one : status) std::cout << status_text(one) << std::flush;
  }
  return status.is_array() && std::any_of(status.begin(), status.end(),
                                          [](const nlohmann::json& one) { return one.contains("error"); })
             ? 1
             : 0;
}

int run_status(const Home& home, const StatusArguments& arguments) {
  int code = show(home, arguments);
  while (arguments.watch && std::cout) {
    std::this_thread::sleep_for(kWatchInterval);
    code = show(home, arguments);
  }
  return code;
}

}  // namespace

nlohmann::json read_status(const Home& home, const std::string& name) {
  const DataSetPaths paths = home.paths(name);
  OpenState open(paths);
  nlohmann::json status;
  if (auto daemon = ControlClient::connect(paths.control_socket())) {
    try {
      status = daemon->ask({{"command", "status"}}, kAnswer);
    } catch (const ControlClient::ConnectionLost&) {
      // It ended just now.
    }
  }
  if (!status.is_object() || status.contains("error")) {
    status = status_from_database(open.state, name);
    if (const pid_t daemon = DaemonLock::holder(paths); daemon != 0) {
      status["phase"] = "starting or ending";
      if (daemon > 0) status["pid"] = daemon;
      status.erase("dead_mountpoint");
    }
  }
  status["history"] = nlohmann::json::array();
  const nlohmann::json latest = status["handoff"];
  for (const auto& handoff : open.state.handoffs(kShownHandoffs)) {
    auto& row = status["history"].emplace_back(to_status(handoff));
    // The database knows of one that runs what was so when its phase began. (A target tells of it what the
    // source says.)
    if (!latest.is_object() || row["attempt"] != latest.value("attempt", nlohmann::json()) ||
        row["role"] != latest.value("role", ""))
      continue;
    for (auto& [key, value] : row.items()) value = latest.value(key, value);
  }
  return status;
}

void add_status_command(CLI::App& app, CommandLine& line) {
  auto* status =
      app.add_subcommand("status", "Show data sets: who owns them, where they are mounted, handoffs");
  const auto arguments = std::make_shared<StatusArguments>();
  status->add_option("NAME", arguments->name, "One data set (default: all)");
  status->add_flag("--json", arguments->json, "One JSON object, or an array of all");
  status->add_flag("--watch", arguments->watch, "Show it again every second, until Ctrl-C");
  status->footer("Examples:\n  sharefs status\n  sharefs status projects --watch");
  status->callback(
      [&line, arguments] { line.run = [&line, arguments] { return run_status(line.home(), *arguments); }; });
}

}  // namespace sharefs
