#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <spdlog/fmt/ranges.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <thread>

#include "cli/bypass.h"
#include "cli/commands.h"
#include "cli/control.h"
#include "cli/daemon.h"
#include "cli/failure.h"
#include "cli/progress.h"
#include "cli/setup.h"
#include "cli/units.h"
#include "fs/mounts.h"
#include "replication/power.h"
#include "replication/site.h"
#include "replication/tree_place.h"

namespace sharefs {
namespace fs = std::filesystem;
namespace {

constexpr auto kMountAnswers = std::chrono::seconds(10);
// An owner syncs its store in the end.
constexpr auto kDaemonEnds = std::chrono::minutes(5);

struct ServeArguments {
  std::string name;
  fs::path mountpoint;  // empty: serve
  bool foreground = false;
  std::string options;
  std::string timeout;
  bool write_through = false;
};

struct UmountArguments {
  std::string target;
  bool lazy = false;
};

// Without the words of an fstab that are not for file systems (see mount(8)).
std::vector<std::string> split_options(const std::string& text) {
  constexpr std::array<std::string_view, 7> kOfFstab{"defaults", "_netdev", "nofail", "auto",
                                                     "noauto",   "user",    "users"};
  std::vector<std::string> options;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const bool for_others = word.starts_with("x-") || word.starts_with("user=") ||
                            std::find(kOfFstab.begin(), kOfFstab.end(), word) != kOfFstab.end();
    if (!word.empty() && !for_others) options.push_back(word);
  }
  return options;
}

// A mount whose daemon was killed stays in the way; nothing can come of it any more. False: there is none.
bool remove_dead_mount(const fs::path& mountpoint) {
  if (mountpoint.empty() || !is_dead_mount(mountpoint)) return false;
  if (const std::string why = unmount(mountpoint, Unmount::lazy); !why.empty()) {
    fail(fmt::format("{} has a mount whose daemon is gone, and it cannot be unmounted: {}",
                     mountpoint.string(), why));
  }
  std::cerr << fmt::format("sharefs: note: removed the mount of an ended daemon from {}\n",
                           printable(mountpoint.string()));
  return true;
}

// The disk of the store may not be mounted, or the directory may have become something else.
void check_store(const std::string& name, const fs::path& store, const std::string& id) {
  refuse_foreign_area(store);
  const auto marker = read_store_marker(store);
  if (marker == id) return;
  if (access((store / kPrivateArea).c_str(), R_OK | X_OK) != 0 && errno != ENOENT)
    fail(fmt::format("{} cannot be used as a store: {}", store.string(), strerror(errno)));
  if (marker) fail(fmt::format("{} is the store of another data set now, not of {}", store.string(), name));
  fail(
      fmt::format("{} is not the store of {} ({} is missing): is its disk mounted? One that was moved needs "
                  "a link in its place (ln -s)",
                  store.string(), name, (store / kPrivateArea / "data_set").string()));
}

// Whose place a new mount can take: a directory's, or a dead mount's, which leaves when that one is there
// (FuseMount).
void check_usable(const fs::path& mountpoint) {
  if (is_dead_mount(mountpoint)) return;
  std::error_code error;
  if (!fs::exists(mountpoint, error) && !error) {
    fs::path missing = mountpoint;  // of a link what it leads to
    while (fs::is_symlink(missing))
      missing = (missing.parent_path() / fs::read_symlink(missing)).lexically_normal();
    fail(fmt::format("{} does not exist: mkdir -p {}", mountpoint.string(), missing.string()));
  }
  if (!fs::is_directory(mountpoint, error)) {
    fail(fmt::format("{}: {}", mountpoint.string(), error ? error.message() : "not a directory"));
  }
  if (const auto mount = fuse_mount_at(mountpoint)) {
    fail(fmt::format("{} is mounted already ({})", mountpoint.string(), mount->source));
  }
}

void check_mountpoint(const Home& home, const fs::path& mountpoint, const fs::path& store) {
  std::error_code error;
  check_usable(mountpoint);
  if (mountpoint != store && is_within(mountpoint, store)) {
    fail(fmt::format("{} lies inside the store {}: mount over the store itself or elsewhere",
                     mountpoint.string(), store.string()));
  }
  if (mountpoint != store && is_within(store, mountpoint)) {
    fail(fmt::format("the store {} would be hidden below {}: mount elsewhere", store.string(),
                     mountpoint.string()));
  }
  const fs::path state = fs::weakly_canonical(home.folder(), error);
  // The daemon would wait for itself, or nobody would reach it any more.
  for (const fs::path& own : {state, fs::path("/proc")})
    if (is_within(own, mountpoint) || is_within(mountpoint, own))
      fail(
          fmt::format("{}, which is needed to serve, would be hidden in whole or in part below {}: mount "
                      "elsewhere",
                      own.string(), mountpoint.string()));
}

// Each device of its own is left out of the mount, and of a handoff.
void tell_what_is_hidden(const fs::path& store, const std::optional<fs::path>& mountpoint) {
  for (const auto& mount : read_mounts())
    if (mount.mountpoint != store && is_within(mount.mountpoint, store))
      std::cerr << fmt::format(
          "sharefs: warning: {} is a file system of its own: it is not part of the data set, and \"migrate\" "
          "refuses as long as it is mounted\n",
          printable(mount.mountpoint.string()));
  std::error_code error;
  if (mountpoint && *mountpoint != store && !fs::is_empty(*mountpoint, error) && !error)
    std::cerr << fmt::format(
        "sharefs: note: {} is not empty: what is in it is hidden until it is unmounted\n",
        printable(mountpoint->string()));
}

// Once per data set, not at every mount.
void tell_what_privileges_add(State& state) {
  constexpr const char* kTold = "told_unprivileged";
  if (geteuid() == 0 || !state.setting(kTold).empty()) return;
  std::cerr << "sharefs: note: without root, files are served as your own: no other owners (chown), no "
               "device nodes, "
               "no trusted or security attributes, the mount is yours alone (unless -o allow_other), and a "
               "file that "
               "others move in the store while it is not mounted is found again by name only\n";
  state.set_setting(kTold, "1");
}

// Asks the mount for its root from a process that can be left behind. False: no answer in time.
bool mount_answers(const fs::path& mountpoint) {
  const pid_t child = fork();
  if (child < 0) return true;
  if (child == 0) {
    struct stat status {};
    _exit(stat(mountpoint.c_str(), &status) == 0 ? 0 : 1);
  }
  const auto end = std::chrono::steady_clock::now() + kMountAnswers;
  while (std::chrono::steady_clock::now() < end) {
    if (waitpid(child, nullptr, WNOHANG) == child) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

// An ordinary user cannot open the store below the mount that a killed daemon has left over it. From now on
// applications find the bare directory there, so whatever can refuse the new mount before does.
bool uncover(const fs::path& store, const std::optional<fs::path>& earlier,
             const std::optional<fs::path>& mountpoint) {
  return geteuid() != 0 && (earlier == store || mountpoint == store) && remove_dead_mount(store);
}

// Where a killed daemon had it mounted, if that is elsewhere: not before this one serves.
void clear_earlier(const std::string& name, const std::optional<fs::path>& earlier,
                   const std::optional<fs::path>& mountpoint) {
  try {
    if (earlier && earlier != mountpoint && is_mounted(*earlier, name)) remove_dead_mount(*earlier);
  } catch (const std::exception& error) {
    std::cerr << fmt::format("sharefs: warning: {}\n", printable(error.what()));
  }
}

void start_daemon(const Home& home, const ServeArguments& arguments, DaemonOptions& options,
                  bool& uncovered) {
  std::optional<fs::path> earlier;
  {
    OpenState open(options.paths);  // closed again before the daemon is forked
    // A store that was moved is reached by a link: mounts are known by where it leads.
    const fs::path store = resolve_mountpoint(open.state.setting("store"));
    if (const std::string where = open.state.setting("mountpoint"); !where.empty()) earlier = where;
    if (!arguments.mountpoint.empty()) {
      options.mountpoint = resolve_mountpoint(arguments.mountpoint);
      check_mountpoint(home, *options.mountpoint, store);
    }
    uncovered = uncover(store, earlier, options.mountpoint);
    {
      const SetAside dead(store);
      check_store(arguments.name, store, open.state.setting("data_set_id"));
    }
    tell_what_is_hidden(store, options.mountpoint);
    tell_what_privileges_add(open.state);
    if (!is_dead_mount(store)) warn_of_bypassing(store);  // it was said when that was mounted
  }
  if (arguments.foreground) {
    options.patient = true;  // nobody waits for this command to end
    // Not the daemon's own, which the kernel asks on the way to what is below the mount.
    std::jthread clearing;
    serve_in_foreground(options, [&] {
      tell_service_manager();
      clearing = std::jthread([&] { clear_earlier(arguments.name, earlier, options.mountpoint); });
    });
  } else {
    serve_in_background(options);
    clear_earlier(arguments.name, earlier, options.mountpoint);
  }
}

// Of umount(8), which does not wait for the daemon. False: it is not ending.
bool wait_if_ending(const DataSetPaths& paths) {
  std::chrono::milliseconds patience = std::chrono::seconds(1);  // it ended just now, or it hangs
  try {
    if (auto daemon = wait_for_daemon(paths, kMountAnswers)) {
      if (!daemon->ask({{"command", "status"}}, kMountAnswers).value("stopping", false)) return false;
      patience = kDaemonEnds;
    }
  } catch (const ControlClient::ConnectionLost&) {
  }
  return DaemonLock::wait_released(paths, patience);
}

int run_serve(const Home& home, const ServeArguments& arguments) {
  DaemonOptions options{home.require(arguments.name), std::nullopt, split_options(arguments.options),
                        std::nullopt};
  if (!arguments.timeout.empty()) {
    options.timeout =
        std::chrono::duration_cast<std::chrono::milliseconds>(parse_duration(arguments.timeout, "--timeout"));
    if (options.timeout->count() < 1) throw UsageError("--timeout: at least 1ms");
  }
  options.write_through = arguments.write_through;
  if (const pid_t pid = DaemonLock::holder(options.paths); pid != 0 && !wait_if_ending(options.paths)) {
    fail(fmt::format(
        "already mounted or served by process {}: \"sharefs status {}\" tells where, \"sharefs umount {}\" "
        "ends it",
        pid, arguments.name, arguments.name));
  }
  bool uncovered = false;
  try {
    start_daemon(home, arguments, options, uncovered);
  } catch (const std::exception& error) {
    if (!uncovered) throw;
    fail(
        fmt::format("{} (nothing is mounted over the store now: what applications write there goes past "
                    "sharefs)",
                    error.what()));
  }
  if (!arguments.foreground && options.mountpoint && !mount_answers(*options.mountpoint)) {
    std::cerr << fmt::format(
        "sharefs: note: mounted, but the owner does not answer yet; requests wait for it\n");
  }
  return 0;
}

// The data set whose daemon has its mount there, or had.
std::string data_set_mounted_at(const Home& home, const std::string& target) {
  const fs::path mountpoint = resolve_mountpoint(target);
  std::string had;
  for (const auto& name : home.data_sets()) {
    if (home.setting_of(name, "mountpoint") != mountpoint.string()) continue;
    if (is_mounted(mountpoint, name)) return name;
    had = name;
  }
  if (!had.empty()) return had;
  fail(fmt::format("{} is neither a data set nor the mount point of one in {}", target,
                   home.folder().string()));
}

// A source that ends before the commit point rolls back, a target makes its source wait: neither is meant by
// umount.
void refuse_during_handoff(const nlohmann::json& status, const std::string& name) {
  const auto handoff = status.find("handoff");
  if (handoff == status.end() || !handoff->is_object() || !text_of(*handoff, "result").empty()) return;
  const std::string site = text_of(status, "site"), from = text_of(*handoff, "from");
  if (from != site && text_of(*handoff, "to") != site) return;
  // It is the source that aborts.
  if (from != site && !is_connected(status, from))
    fail(fmt::format("a handoff from {} is running, which cannot be reached: wait for it, or give --lazy",
                     from));
  fail(fmt::format("a handoff to {} is running: wait for its end, or end it with \"sharefs abort {}\"",
                   text_of(*handoff, "to"), name));
}

// The mounts of other sites that wait when the owner's daemon ends; or where the files are.
void tell_who_waits(const nlohmann::json& status, const std::string& name) {
  if (text_of(status, "role") != "owner") {
    if (text_of(status, "mountpoint") == resolve_mountpoint(text_of(status, "store")))
      std::cerr << fmt::format("sharefs: note: the files are on {}, not in {}\n", text_of(status, "owner"),
                               printable(text_of(status, "store")));
    return;
  }
  if (!text_of(status, "contested").empty()) return;  // it has sent them on
  const std::uint64_t own = text_of(status, "mountpoint").empty() ? 0 : 1;
  const std::uint64_t clients = count_of(status, "clients");
  if (clients <= own) return;
  std::cerr << fmt::format(
      "sharefs: note: {} mount(s) of {} on other sites wait until this site serves it again; to take this "
      "machine "
      "away, "
      "migrate first\n",
      clients - own, name);
}

// The owner's daemon moves the files into place when it has taken over, and before it ends.
void tell_if_not_in_place(const DataSetPaths& paths, const std::string& name) {
  OpenState open(paths);
  const std::string store = open.state.setting("store");
  if (open.state.ownership().owner == open.state.setting("site") && !TreePlace::in_place(open.state))
    std::cerr << fmt::format(
        "sharefs: warning: some files of {} are in {} yet: \"sharefs serve {}\" and umount once more puts "
        "them in place\n",
        printable(store), printable((fs::path(store) / kPrivateArea / "tree").string()), name);
}

// Who takes the store away now must know. A daemon that was killed meanwhile has noted nothing either, nor
// has one that runs already again.
void fail_if_not_synced(const DataSetPaths& paths, const std::string& name) {
  OpenState open(paths);
  if (Power::ended_synced(open.state) || DaemonLock::holder(paths) != 0) return;
  fail(fmt::format("the daemon of {} has ended, but it has not noted that all of {} is on the disk: see {}",
                   name, open.state.setting("store"), paths.log().string()));
}

// What applications were told is written must not go with the state folder.
void tell_if_unsent(const DataSetPaths& paths, const std::string& name) {
  const std::string unsent = OpenState(paths).state.setting(kUnsentSetting);
  if (unsent.empty() || DaemonLock::holder(paths) != 0) return;
  std::cerr << fmt::format(
      "sharefs: warning: {} writes that were acknowledged here have not reached the owner, which is away: "
      "keep "
      "{}, the next \"sharefs mount {}\" sends them\n",
      unsent, printable(paths.folder.string()), name);
}

// By this process and not by the daemon, which could not answer the kernel's last requests while it unmounts.
void unmount_or_explain(const fs::path& mountpoint, bool lazy) {
  const std::string why = unmount(mountpoint, lazy ? Unmount::lazy : Unmount::busy_fails);
  if (why.empty()) return;
  if (!means_busy(why)) fail(fmt::format("cannot unmount {}: {}", mountpoint.string(), why));
  std::vector<std::string> users, mounts;
  for (const auto& process : find_bypassing(mountpoint))
    users.push_back(fmt::format("{} ({})", process.pid, process.command));
  const auto ours = mount_at(mountpoint);
  for (const auto& mount : read_mounts())
    if (ours && mount.parent == ours->id) mounts.push_back(mount.mountpoint.string());
  std::string what;
  if (!users.empty()) what += fmt::format(": used by {}", fmt::join(users, ", "));
  if (!mounts.empty()) what += fmt::format(": mounted in it: {}", fmt::join(mounts, ", "));
  fail(fmt::format("{} is busy{}; end or unmount what uses it, or give --lazy", mountpoint.string(), what));
}

int run_umount(const Home& home, const UmountArguments& arguments) {
  const std::string name =
      home.has(arguments.target) ? arguments.target : data_set_mounted_at(home, arguments.target);
  const DataSetPaths paths = home.require(name);
  const bool ran = DaemonLock::holder(paths) != 0;
  auto daemon = wait_for_daemon(paths, kDaemonEnds);
  if (const pid_t pid = DaemonLock::holder(paths); !daemon && pid != 0)
    fail(fmt::format("the daemon (process {}) neither listens nor ends: see {}", pid, paths.log().string()));
  const fs::path mountpoint = OpenState(paths).state.setting("mountpoint");
  const bool mounted = is_mounted(mountpoint, name);
  if (!daemon) {
    if (!ran && !mounted) fail(fmt::format("{} is not mounted and not served here", name));
    remove_dead_mount(mountpoint);
    OpenState(paths).state.set_setting("mountpoint", "");
    tell_if_not_in_place(paths, name);
    tell_if_unsent(paths, name);
    if (ran) fail_if_not_synced(paths, name);
    return 0;
  }
  nlohmann::json status;
  try {
    status = daemon->ask({{"command", "status"}}, std::chrono::seconds(10));
  } catch (const ControlClient::ConnectionLost& error) {
    const pid_t pid = DaemonLock::holder(paths);
    if (pid <= 0) throw;
    fail(fmt::format("{}: see {}, or kill process {} and umount again", error.what(), paths.log().string(),
                     pid));
  }
  if (!arguments.lazy) refuse_during_handoff(status, name);
  if (mounted) unmount_or_explain(mountpoint, arguments.lazy);
  try {
    daemon->ask({{"command", "stop"}}, std::chrono::seconds(10));
  } catch (const ControlClient::ConnectionLost&) {
    // It ended by itself when the mount was gone.
  }
  if (!DaemonLock::wait_released(paths, kDaemonEnds)) {
    fail(fmt::format("the daemon (process {}) does not end: see {}", DaemonLock::holder(paths),
                     paths.log().string()));
  }
  tell_if_not_in_place(paths, name);
  tell_if_unsent(paths, name);
  tell_who_waits(status, name);
  fail_if_not_synced(paths, name);
  return 0;
}

void add_common(CLI::App& command, ServeArguments& arguments) {
  command.add_flag(
      "-f,--foreground", arguments.foreground,
      "Stay in the foreground, log to standard error, and wait for an owner that cannot be reached");
  command
      .add_option("--timeout", arguments.timeout,
                  "Let requests fail (ETIMEDOUT) when the owner does not answer for so long; default: wait")
      ->check(not_empty);
}

}  // namespace

void add_mount_commands(CLI::App& app, CommandLine& line) {
  auto* mount = app.add_subcommand("mount", "Mount a data set");
  const auto mounting = std::make_shared<ServeArguments>();
  mount->add_option("NAME", mounting->name, "The data set")->required();
  mount
      ->add_option("MOUNTPOINT", mounting->mountpoint,
                   "A directory; the store itself is fine: applications keep their paths")
      ->required();
  mount->add_option("-o", mounting->options,
                    "Mount options, separated by commas (allow_other, ro, nosuid, ...)");
  mount->add_flag("--write-through", mounting->write_through,
                  "Each write waits until the owner has performed it, also where no other site can tell");
  add_common(*mount, *mounting);
  mount->footer(
      "Examples:\n  sharefs mount projects /srv/projects\n  sharefs mount projects /mnt/projects -o ro "
      "--timeout 30s");
  mount->callback(
      [&line, mounting] { line.run = [&line, mounting] { return run_serve(line.home(), *mounting); }; });

  auto* serve = app.add_subcommand("serve", "Serve a data set to other sites without a mount here");
  const auto serving = std::make_shared<ServeArguments>();
  serve->add_option("NAME", serving->name, "The data set")->required();
  add_common(*serve, *serving);
  serve->footer("Example:\n  sharefs serve projects");
  serve->callback(
      [&line, serving] { line.run = [&line, serving] { return run_serve(line.home(), *serving); }; });

  auto* umount = app.add_subcommand("umount", "Unmount a data set and end its daemon");
  const auto unmounting = std::make_shared<UmountArguments>();
  umount->add_option("NAME|MOUNTPOINT", unmounting->target, "The data set, or where it is mounted")
      ->required();
  umount->add_flag("--lazy", unmounting->lazy,
                   "Also while files are in use (their users get errors from then on) or a handoff runs");
  umount->footer("Examples:\n  sharefs umount projects\n  sharefs umount /srv/projects");
  umount->callback([&line, unmounting] {
    line.run = [&line, unmounting] { return run_umount(line.home(), *unmounting); };
  });
}

}  // namespace sharefs
