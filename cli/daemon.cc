#include "cli/daemon.h"

#include <fcntl.h>
#include <malloc.h>
#include <spdlog/fmt/fmt.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "cli/control.h"
#include "cli/failure.h"
#include "fs/inode_table.h"
#include "meta/log.h"
#include "meta/reactor.h"
#include "replication/site.h"

namespace sharefs {
namespace {

constexpr std::uintmax_t kLargestLog = 8u << 20;
constexpr int kArenas = 4;
constexpr std::string_view kReady = "ready";

// SIGTERM, SIGINT and SIGHUP as a descriptor. Blocked before any thread starts, so that every thread inherits
// it.
class StopSignals {
 public:
  StopSignals() {
    sigset_t signals;
    sigemptyset(&signals);
    for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, signal);
    pthread_sigmask(SIG_BLOCK, &signals, &before_);
    fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd_ < 0) fail(fmt::format("signalfd: {}", strerror(errno)));
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
  }
  ~StopSignals() {
    close(fd_);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  int fd() const { return fd_; }
  int take() const {
    signalfd_siginfo info{};
    return read(fd_, &info, sizeof info) == sizeof info ? static_cast<int>(info.ssi_signo) : 0;
  }

 private:
  int fd_ = -1;
  sigset_t before_{};
};

// The Site with what surrounds it, from its start to its end.
class Daemon {
 public:
  explicit Daemon(const DaemonOptions& options)
      : options_(options),
        // Posted: the mount tells from within its own code that it ended. Known before: who mounts again at
        // once may ask in between.
        site_({options.paths.folder, options.mountpoint, options.mount_options, options.timeout,
               options.patient, options.write_through},
              reactor_,
              [this] {
                unmounted_ = true;
                reactor_.post([this] { stop("unmounted"); });
              }),
        control_(options.paths.control_socket(), reactor_,
                 [this](const nlohmann::json& request, ControlServer::Reply reply) {
                   perform(request, std::move(reply));
                 }) {
    reactor_.watch(signals_.fd(), [this] { stop(strsignal(signals_.take())); });
  }

  // Throws what the start failed with.
  void run(const std::function<void()>& ready) {
    reactor_.post([this, &ready] {
      site_.start([this, &ready](const std::string& error) {
        if (!error.empty()) return fail_start(error);
        log::info("sharefs {} serves {}{}", SHAREFS_VERSION, options_.paths.folder.filename().string(),
                  options_.mountpoint ? " at " + options_.mountpoint->string() : " without a mount");
        ready();
      });
    });
    reactor_.run();
    if (!start_error_.empty()) fail(start_error_);
  }

 private:
  void fail_start(const std::string& error) {
    start_error_ = error;
    reactor_.stop();
  }

  // The second time, without waiting for the other sites.
  void stop(const char* why) {
    log::info("stopping: {}", why);
    if (std::exchange(stopping_, true)) return reactor_.stop();
    site_.stop([this] { reactor_.stop(); });
  }

  // Answers what concerns the process; everything else is the Site's.
  void perform(const nlohmann::json& request, ControlServer::Reply reply) {
    const auto command = request["command"].get<std::string>();
    if (command == "stop") {
      reply({{"stopping", true}});
      if (!stopping_) stop("asked by an operator");
    } else if (command == "status") {
      site_.command(request, [this, reply = std::move(reply)](nlohmann::json status) {
        status["running"] = true;
        status["stopping"] = stopping_ || unmounted_;
        status["pid"] = getpid();
        status["version"] = SHAREFS_VERSION;
        reply(std::move(status));
      });
    } else {
      site_.command(request, std::move(reply));
    }
  }

  const DaemonOptions& options_;
  const StopSignals signals_;  // before anything that starts a thread
  Reactor reactor_;
  Site site_;
  ControlServer control_;
  bool stopping_ = false;
  bool unmounted_ = false;
  std::string start_error_;
};

void open_log(const DataSetPaths& paths) {
  std::error_code error;
  if (const auto size = std::filesystem::file_size(paths.log(), error); !error && size > kLargestLog) {
    std::filesystem::rename(paths.log(), paths.log().string() + ".1", error);
  }
  const int log = open(paths.log().c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (log < 0 || null < 0) fail(fmt::format("cannot write {}: {}", paths.log().string(), strerror(errno)));
  dup2(null, STDIN_FILENO);
  dup2(log, STDOUT_FILENO);
  dup2(log, STDERR_FILENO);
  close(log);
  close(null);
}

void tell_starter(int pipe, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(pipe, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) break;  // the starter was interrupted just now: the daemon goes on
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

// The life of the background process. Descriptors of the starter (pipes of a script, locks) are not kept
// open. It ends with a starter that is interrupted before it is ready.
int run_background(const DaemonOptions& options, int pipe) {
  setsid();
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  dup2(pipe, STDERR_FILENO + 1);
  pipe = STDERR_FILENO + 1;
  fcntl(pipe, F_SETFD, FD_CLOEXEC);
  close_range(static_cast<unsigned>(pipe) + 1, ~0U, 0);
  bool told = false;
  const auto tell = [&](std::string_view text) {
    if (std::exchange(told, true)) return;
    prctl(PR_SET_PDEATHSIG, 0);
    tell_starter(pipe, text);
    close(pipe);
  };
  bool logs = false;  // before, standard output and error are the starter's, which says what it is told
  try {
    open_log(options.paths);
    logs = true;
    if (chdir("/") != 0) fail("cannot change to /");
    serve_in_foreground(options, [&] { tell(kReady); });
    return 0;
  } catch (const std::exception& error) {
    if (logs) log::error("{}", error.what());
    tell(error.what());
    return 1;
  }
}

std::string read_all(int fd) {
  std::string text;
  char buffer[512];
  for (;;) {
    const ssize_t got = read(fd, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
  }
}

}  // namespace

void tell_service_manager() {
  constexpr std::string_view kServing = "READY=1";
  const char* const where = std::getenv("NOTIFY_SOCKET");
  sockaddr_un address{};
  const std::size_t length = where != nullptr ? std::strlen(where) : 0;
  if (length == 0 || length > sizeof address.sun_path) return;
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, where, length);
  if (address.sun_path[0] == '@') address.sun_path[0] = '\0';
  const UniqueFd told(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (::sendto(told.get(), kServing.data(), kServing.size(), 0, reinterpret_cast<const sockaddr*>(&address),
               static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length)) < 0)
    log::warn("{} is not told that this serves: {}", where, std::strerror(errno));
}

void serve_in_foreground(const DaemonOptions& options, const std::function<void()>& ready) {
  init_logging(options.paths.folder.filename().string());
  const auto lock = DaemonLock::try_take(options.paths);
  if (!lock) {
    fail(fmt::format("already served by process {}: \"sharefs umount {}\" ends it",
                     DaemonLock::holder(options.paths), options.paths.folder.filename().string()));
  }
  // A shell's limit is for its own files. Where it cannot be lifted, too long ones are refused (EFBIG).
  const rlimit unlimited{.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
  setrlimit(RLIMIT_FSIZE, &unlimited);
  // The usual soft limit is for programs that use select(2). Whoever reaches the port, without a key, is
  // given a descriptor for each connection until it is turned away.
  rlimit descriptors{};
  if (getrlimit(RLIMIT_NOFILE, &descriptors) == 0) {
    descriptors.rlim_cur = descriptors.rlim_max;
    setrlimit(RLIMIT_NOFILE, &descriptors);
  }
  umask(0);  // modes are decided by the callers of the mount
  // Each of glibc's arenas keeps what a burst of 1 MiB messages took, up to 20 MiB; by default every thread
  // gets one of its own.
  mallopt(M_ARENA_MAX, kArenas);
  Daemon(options).run(ready);
}

void serve_in_background(const DaemonOptions& options) {
  int pipes[2];
  if (pipe2(pipes, O_CLOEXEC) != 0) fail(fmt::format("pipe: {}", strerror(errno)));
  const pid_t child = fork();
  if (child < 0) fail(fmt::format("fork: {}", strerror(errno)));
  if (child == 0) {
    close(pipes[0]);
    _exit(run_background(options, pipes[1]));
  }
  close(pipes[1]);
  const std::string answer = read_all(pipes[0]);
  close(pipes[0]);
  if (answer == kReady) return;
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  fail(answer.empty() ? fmt::format("the daemon ended while it started: see {}", options.paths.log().string())
                      : answer);
}

}  // namespace sharefs
