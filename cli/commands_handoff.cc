#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <iostream>
#include <memory>
#include <optional>
#include <thread>

#include "cli/commands.h"
#include "cli/control.h"
#include "cli/failure.h"
#include "cli/progress.h"
#include "cli/units.h"
#include "replication/json_line.h"

namespace sharefs {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(100);
constexpr auto kAnswer = std::chrono::seconds(30);
constexpr auto kAlive = std::chrono::seconds(10);
// How long a daemon may be away (restarted by its operator) before migrate stops watching.
constexpr auto kDaemonAway = std::chrono::seconds(10);
constexpr auto kWaitsLong = std::chrono::seconds(5);  // for a site that does not answer
constexpr int kInterrupted = 130;

struct MigrateArguments {
  std::string name, to;
  std::string max_pause = "100ms";
  std::string rate;
  bool dry_run = false;
  bool json = false;
};

struct RemoveArguments {
  std::string name, site;
};

struct VerifyArguments {
  std::string name, with;
};

std::atomic<bool> interrupted = false;
bool is_interrupted() { return interrupted; }

ControlClient require_daemon(const DataSetPaths& paths, const std::string& name) {
  auto daemon = wait_for_daemon(paths, kDaemonAway);
  if (!daemon) {
    fail(fmt::format(
        "{} is not running on this site: start it with \"sharefs mount {} MOUNTPOINT\" or \"sharefs serve "
        "{}\"",
        name, name, name));
  }
  // What it is asked next may take as long as it takes: one that hangs must be found out before.
  try {
    daemon->ask({{"command", "handoff"}}, kAlive, is_interrupted);
  } catch (const ControlClient::ConnectionLost& lost) {
    if (interrupted) fail("interrupted before anything was begun");
    fail(fmt::format("{}: see {}", lost.what(), paths.log().string()));
  }
  return std::move(*daemon);
}

void fail_on_error(const nlohmann::json& answer) {
  if (answer.contains("error") && !text_of(answer, "error").empty()) fail(text_of(answer, "error"));
}

// Ctrl-C, or what ends it otherwise, while migrate watches: noted, so that whoever waits for it can be told
// that the handoff goes on.
class InterruptNote {
 public:
  InterruptNote() {
    struct sigaction action {};
    action.sa_handler = [](int) { interrupted = true; };
    for (std::size_t i = 0; i < kSignals.size(); ++i) {
      sigaction(kSignals[i], &action, &before_[i]);
      if (before_[i].sa_handler == SIG_IGN) sigaction(kSignals[i], &before_[i], nullptr);  // nohup
    }
  }
  ~InterruptNote() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }
  InterruptNote(const InterruptNote&) = delete;
  InterruptNote& operator=(const InterruptNote&) = delete;

 private:
  static constexpr std::array kSignals{SIGINT, SIGTERM, SIGHUP};
  std::array<struct sigaction, kSignals.size()> before_{};
};

nlohmann::json handoff_of(const nlohmann::json& status) {
  const auto found = status.find("handoff");
  return found != status.end() && found->is_object() ? *found : nlohmann::json::object();
}

// Follows a running handoff through the daemon's status until it has a result.
class HandoffWatch {
 public:
  // `started`: what the daemon answered to migrate.
  HandoffWatch(const DataSetPaths& paths, ControlClient daemon, std::string to, const nlohmann::json& started)
      : paths_(paths),
        daemon_(std::move(daemon)),
        to_(std::move(to)),
        attempt_(count_of(started, "attempt")),
        epoch_(count_of(started, "epoch")) {}

  // Without a result: as far as it was when the operator interrupted this, or, with an error, when the daemon
  // was lost.
  nlohmann::json follow() {
    ProgressDisplay display(isatty(STDERR_FILENO) != 0);
    nlohmann::json seen = {{"attempt", attempt_}, {"epoch", epoch_}, {"to", to_}};
    while (!interrupted) {
      const auto status = ask_status();
      if (!status) {
        seen["error"] =
            "the daemon of this site has ended or does not answer; the handoff goes on or is undone by the "
            "other sites: see \"sharefs status\" there";
        return seen;
      }
      auto handoff = handoff_of(*status);
      // Each further try is an attempt of its own, at a later epoch. A site that cannot reach the owner shows
      // the last handoff of its own.
      const bool ours = is_ours(handoff);
      // Only the source counts the tries, and says so while it is one.
      tries_ = ours ? std::max(tries_, count_of(handoff, "attempts")) : tries_;
      if (ours && !text_of(handoff, "result").empty()) return with_tries(handoff);
      if (ours) seen = handoff;
      if (!ours && count_of(handoff, "epoch") >= epoch_) return end_before(handoff, *status, seen);
      if (const auto owner = text_of(*status, "owner"); lacks(*status, owner))
        handoff = {{"phase", "waiting"}, {"error", owner + " is not connected"}};
      if (!handoff.empty() && text_of(handoff, "result").empty()) display.show(handoff);
      if (text_of(handoff, "phase") == "waiting" && waits_long()) {
        display.clear();
        std::cerr << fmt::format(
            "sharefs: the handoff waits, however long that takes; \"sharefs abort {}\" on the owner's site "
            "ends "
            "it\n",
            text_of(*status, "name"));
      }
      if (text_of(handoff, "phase") != "waiting") waiting_since_.reset();
      std::this_thread::sleep_for(kPoll);
    }
    return seen;
  }

 private:
  static bool lacks(const nlohmann::json& status, const std::string& owner) {
    return !owner.empty() && text_of(status, "role") != "owner" && !is_connected(status, owner);
  }

  // True once, some time after it began to wait.
  bool waits_long() {
    const auto now = std::chrono::steady_clock::now();
    if (!waiting_since_) waiting_since_ = now;
    return !told_ && now - *waiting_since_ > kWaitsLong && (told_ = true);
  }

  nlohmann::json with_tries(nlohmann::json handoff) const {
    handoff["attempts"] = std::max(tries_, count_of(handoff, "attempts"));
    return handoff;
  }

  bool is_ours(const nlohmann::json& handoff) const {
    return count_of(handoff, "attempt") == attempt_ ||
           (count_of(handoff, "epoch") >= epoch_ && text_of(handoff, "to") == to_);
  }

  // Ours has ended between two looks, since somebody has begun another one. The sites that took part know
  // how.
  nlohmann::json end_before(const nlohmann::json& other, const nlohmann::json& status,
                            nlohmann::json seen) const {
    for (const auto& handoff : status.value("history", nlohmann::json::array()))
      if (is_ours(handoff) && !text_of(handoff, "result").empty()) return with_tries(handoff);
    const bool done = text_of(other, "from") == to_;
    seen["result"] = done ? "done" : "aborted";
    if (!done)
      seen["error"] = fmt::format("it was ended: a handoff from {} to {} was begun since",
                                  text_of(other, "from"), text_of(other, "to"));
    return seen;
  }

  // Nothing: the daemon does not come back.
  std::optional<nlohmann::json> ask_status() {
    const auto end = std::chrono::steady_clock::now() + kDaemonAway;
    for (;;) {
      try {
        if (daemon_) return daemon_->ask({{"command", "status"}}, kAnswer);
      } catch (const ControlClient::ConnectionLost&) {
        daemon_.reset();
      }
      if (interrupted) return nlohmann::json::object();
      if (std::chrono::steady_clock::now() > end) return std::nullopt;
      std::this_thread::sleep_for(kPoll);
      daemon_ = ControlClient::connect(paths_.control_socket());
    }
  }

  const DataSetPaths& paths_;
  std::optional<ControlClient> daemon_;
  const std::string to_;
  const std::uint64_t attempt_, epoch_;  // of our first try
  std::uint64_t tries_ = 0;
  std::optional<std::chrono::steady_clock::time_point> waiting_since_;
  bool told_ = false;  // that it waits
};

std::string preflight_text(const nlohmann::json& preflight) {
  std::string text = fmt::format("handoff of ownership from {} to {} (nothing has been started)\n",
                                 text_of(preflight, "from"), text_of(preflight, "to"));
  text += fmt::format("  tree           {} files, {}\n", format_count(count_of(preflight, "files")),
                      format_bytes(count_of(preflight, "bytes")));
  if (preflight.contains("holds_image")) {
    text += fmt::format("  target holds   {}\n", preflight["holds_image"] == true
                                                     ? "an earlier image: only what differs is sent"
                                                     : "nothing yet: everything is sent");
  }
  if (preflight.contains("space")) {
    text += fmt::format("  space there    {}\n", format_bytes(count_of(preflight, "space")));
  }
  text += fmt::format("  round trip     {}\n", format_milliseconds(number_of(preflight, "round_trip_ms")));
  if (preflight.contains("smallest_pause_ms")) {
    text +=
        fmt::format("  smallest pause {}\n", format_milliseconds(number_of(preflight, "smallest_pause_ms")));
  }
  return text;
}

void print_json(const nlohmann::json& json) { std::cout << to_line(json) << std::endl; }

// What becomes of it is not known here; `handoff`: as far as it was.
void print_left(const MigrateArguments& arguments, nlohmann::json handoff) {
  if (!arguments.json) return;
  handoff["result"] = "running";
  handoff["to"] = arguments.to;
  print_json(handoff_result(handoff));
}

// The operator does not want to watch.
int leave_it(const MigrateArguments& arguments, const nlohmann::json& handoff, const char* goes_on) {
  print_left(arguments, handoff);
  std::cerr << fmt::format(
      "sharefs: the handoff {}; \"sharefs status {} --watch\" shows it, \"sharefs abort {}\" ends it\n",
      goes_on, arguments.name, arguments.name);
  return kInterrupted;
}

// Returns the exit code.
int tell_end(const MigrateArguments& arguments, const nlohmann::json& handoff) {
  if (arguments.json) {
    print_json(handoff_result(handoff));
  } else {
    std::cout << handoff_summary(handoff) << std::flush;
  }
  if (text_of(handoff, "result") == "done") return 0;
  const std::string error = text_of(handoff, "error");
  std::cerr << fmt::format("sharefs: the handoff did not happen: {}\n",
                           error.empty() ? text_of(handoff, "result") : printable(error));
  return 1;
}

int follow_to_end(HandoffWatch& watch, const MigrateArguments& arguments) {
  const auto handoff = watch.follow();
  if (text_of(handoff, "result").empty()) {
    if (interrupted) return leave_it(arguments, handoff, "goes on");
    print_left(arguments, handoff);
    std::cerr << fmt::format("sharefs: {}\n", text_of(handoff, "error"));
    return 1;
  }
  return tell_end(arguments, handoff);
}

int start_and_follow(const Home& home, const MigrateArguments& arguments) {
  require_valid_name(arguments.to, "site");
  nlohmann::json request = {{"command", "migrate"}, {"to", arguments.to}, {"dry_run", arguments.dry_run}};
  const auto pause = parse_duration(arguments.max_pause, "--max-pause");
  if (pause < std::chrono::milliseconds(1)) throw UsageError("--max-pause: at least 1ms");
  request["max_pause_ms"] = std::chrono::duration_cast<std::chrono::milliseconds>(pause).count();
  request["rate"] = arguments.rate.empty() ? 0 : parse_rate(arguments.rate, "--rate");

  const DataSetPaths paths = home.require(arguments.name);
  const InterruptNote note;
  ControlClient daemon = require_daemon(paths, arguments.name);
  if (interrupted) fail("interrupted before anything was begun");
  // The tree is measured first, which may take a while.
  nlohmann::json answer;
  try {
    answer = daemon.ask(request, std::nullopt, is_interrupted);
  } catch (const ControlClient::ConnectionLost&) {
    if (!interrupted || arguments.dry_run) throw;
    return leave_it(arguments, nlohmann::json::object(), "begins all the same, unless it is refused");
  }
  if (!text_of(answer, "result").empty()) return tell_end(arguments, answer);  // ended while it measured
  fail_on_error(answer);
  if (arguments.dry_run) {
    const auto preflight = answer.value("preflight", answer);
    if (arguments.json) {
      print_json(preflight);
    } else {
      std::cout << preflight_text(preflight);
    }
    return 0;
  }
  HandoffWatch watch(paths, std::move(daemon), arguments.to, answer);
  return follow_to_end(watch, arguments);
}

// With --json a script gets its object whatever went wrong.
int run_migrate(const Home& home, const MigrateArguments& arguments) {
  if (!arguments.json) return start_and_follow(home, arguments);
  try {
    return start_and_follow(home, arguments);
  } catch (const UsageError&) {
    throw;
  } catch (const std::exception& error) {
    auto result = handoff_result({{"result", "failed"}, {"to", arguments.to}, {"error", error.what()}});
    if (arguments.dry_run) result["dry_run"] = true;
    print_json(result);
    throw;
  }
}

int run_abort(const Home& home, const std::string& name) {
  const DataSetPaths paths = home.require(name);
  fail_on_error(require_daemon(paths, name).ask({{"command", "abort"}}, kAnswer));
  std::cout << fmt::format("{}: the handoff is aborted; the owner stays the owner\n", name);
  return 0;
}

int run_remove(const Home& home, const RemoveArguments& arguments) {
  const DataSetPaths paths = home.require(arguments.name);
  fail_on_error(
      require_daemon(paths, arguments.name).ask({{"command", "remove"}, {"site", arguments.site}}, kAnswer));
  std::cout << fmt::format("{}: {} is not a site any more\n", arguments.name, arguments.site);
  return 0;
}

// Whom to compare with when nobody was named: the owner, or on the owner its only other site.
std::string other_site(const nlohmann::json& status) {
  if (text_of(status, "role") != "owner") return text_of(status, "owner");
  const auto sites = status.value("sites", nlohmann::json::array());
  std::vector<std::string> names;
  for (const auto& site : sites) {
    if (text_of(site, "site") != text_of(status, "site")) names.push_back(text_of(site, "site"));
  }
  if (names.size() == 1) return names.front();
  if (names.empty()) fail("there is no other site to compare with");
  fail(fmt::format("there are several other sites: choose one with --with ({})", fmt::join(names, ", ")));
}

int run_verify(const Home& home, const VerifyArguments& arguments) {
  const DataSetPaths paths = home.require(arguments.name);
  ControlClient daemon = require_daemon(paths, arguments.name);
  const std::string with =
      arguments.with.empty() ? other_site(daemon.ask({{"command", "status"}}, kAnswer)) : arguments.with;
  const auto answer = daemon.ask({{"command", "verify"}, {"with", with}});
  fail_on_error(answer);
  const auto differences = answer.value("differences", nlohmann::json::array());
  for (const auto& difference : differences) {
    if (difference.is_string()) std::cout << difference.get<std::string>() << "\n";
  }
  const auto changed = count_of(answer, "changed_since");
  std::string text = fmt::format("{} compared with {}: {} files and directories", arguments.name, with,
                                 format_count(count_of(answer, "compared")));
  const std::string but = changed > 0
                              ? fmt::format(" but for {} that the owner has changed since the copy was made",
                                            format_count(changed))
                              : "";
  if (differences.empty()) {
    std::cout << text << ", equal" << but << "\n";
    return 0;
  }
  std::cout << text << "\n";
  fail(fmt::format("the copies differ in {} place{}: the next handoff sends again what differs",
                   differences.size(), differences.size() == 1 ? "" : "s"));
}

}  // namespace

void add_handoff_commands(CLI::App& app, CommandLine& line) {
  auto* migrate =
      app.add_subcommand("migrate", "Hand ownership over to another site, while everybody goes on working");
  const auto migrating = std::make_shared<MigrateArguments>();
  migrate->add_option("NAME", migrating->name, "The data set")->required();
  migrate->add_option("--to", migrating->to, "The site that becomes the owner")->required();
  migrate
      ->add_option(
          "--max-pause", migrating->max_pause,
          "The longest that callers are held up to the commit point, or it is tried again: 100ms, 1s")
      ->capture_default_str();
  migrate->add_option("--rate", migrating->rate, "Send at most so much: 200MiB/s (default: unlimited)")
      ->check(not_empty);
  migrate->add_flag("--dry-run", migrating->dry_run,
                    "Only ask and measure: what would be sent, the smallest pause");
  migrate->add_flag("--json", migrating->json, "Last line of standard output: a JSON object with the result");
  migrate->footer(
      "Works from any site. Exit code 0 only if ownership has moved.\n\nExamples:\n"
      "  sharefs migrate projects --to beta\n  sharefs migrate projects --to beta --max-pause 50ms --rate "
      "200MiB/s");
  migrate->callback(
      [&line, migrating] { line.run = [&line, migrating] { return run_migrate(line.home(), *migrating); }; });

  auto* abort = app.add_subcommand(
      "abort", "End a running handoff before its commit point: everything stays as it was");
  const auto aborting = std::make_shared<std::string>();
  abort->add_option("NAME", *aborting, "The data set")->required();
  abort->footer("Example:\n  sharefs abort projects");
  abort->callback(
      [&line, aborting] { line.run = [&line, aborting] { return run_abort(line.home(), *aborting); }; });

  auto* remove =
      app.add_subcommand("remove", "Take a site out of the data set, for a machine that does not come back");
  const auto removing = std::make_shared<RemoveArguments>();
  remove->add_option("NAME", removing->name, "The data set")->required();
  remove->add_option("--site", removing->site, "The site, which must not be the owner nor have a mount")
      ->required();
  remove->footer(
      "Works from any site. Its key is never accepted again; nobody waits for it any more.\n\n"
      "Example:\n  sharefs remove projects --site gamma");
  remove->callback(
      [&line, removing] { line.run = [&line, removing] { return run_remove(line.home(), *removing); }; });

  auto* verify = app.add_subcommand("verify", "Compare this site's store with another site's");
  const auto verifying = std::make_shared<VerifyArguments>();
  verify->add_option("NAME", verifying->name, "The data set")->required();
  verify->add_option("--with", verifying->with, "The other site (default: the owner, or the only other site)")
      ->check(not_empty);
  verify->footer("Exit code 0 only if they are equal.\n\nExample:\n  sharefs verify projects --with beta");
  verify->callback(
      [&line, verifying] { line.run = [&line, verifying] { return run_verify(line.home(), *verifying); }; });
}

}  // namespace sharefs
