#include "cli/control.h"

#include <fcntl.h>
#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>

#include "replication/json_line.h"

namespace sharefs {
namespace {

constexpr std::size_t kLongestRequest = 1u << 20;
constexpr std::size_t kMostUnsent = 16u << 20;
constexpr int kLookAgainMs = 100;
constexpr auto kAccepts = std::chrono::seconds(5);
constexpr auto kSendAgain = std::chrono::milliseconds(5);

// A socket address holds 107 characters, a path more: it is named through a descriptor of its folder.
class SocketAddress {
 public:
  explicit SocketAddress(const std::filesystem::path& socket)
      : folder_(open(socket.parent_path().c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC)) {
    address_.sun_family = AF_UNIX;
    const std::string path = fmt::format("/proc/self/fd/{}/{}", folder_, socket.filename().string());
    path.copy(address_.sun_path, sizeof address_.sun_path - 1);
  }
  ~SocketAddress() {
    if (folder_ >= 0) close(folder_);
  }
  SocketAddress(const SocketAddress&) = delete;
  SocketAddress& operator=(const SocketAddress&) = delete;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address_); }
  static constexpr socklen_t size() { return sizeof(sockaddr_un); }

 private:
  int folder_;
  sockaddr_un address_{};
};

}  // namespace

struct ControlServer::Impl : std::enable_shared_from_this<ControlServer::Impl> {
  struct Client {
    int fd = -1;
    std::string received, unsent;
    bool busy = false;  // a request is being performed
  };

  Impl(std::filesystem::path path, Reactor& r, Handler h)
      : socket(std::move(path)), reactor(r), handler(std::move(h)) {
    const SocketAddress address(socket);
    unlink(socket.c_str());
    listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    // The mode given before bind is the mode that the socket file gets.
    if (listener < 0 || fchmod(listener, 0600) != 0 ||
        bind(listener, address.get(), SocketAddress::size()) != 0 || listen(listener, 16) != 0) {
      const int error = errno;
      if (listener >= 0) close(listener);
      throw std::runtime_error(fmt::format("cannot listen on {}: {}", socket.string(), strerror(error)));
    }
    reactor.watch(listener, [this] { accept_clients(); });
  }

  ~Impl() {
    while (!clients.empty()) drop(clients.begin()->first);
    reactor.unwatch(listener);
    close(listener);
    unlink(socket.c_str());
  }

  void accept_clients() {
    for (;;) {
      const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (fd < 0) return;
      const std::uint64_t id = ++last_client;
      clients[id].fd = fd;
      reactor.watch(fd, [this, id] { readable(id); });
    }
  }

  void drop(std::uint64_t id) {
    const auto found = clients.find(id);
    if (found == clients.end()) return;
    reactor.unwatch(found->second.fd);
    close(found->second.fd);
    clients.erase(found);
  }

  void readable(std::uint64_t id) {
    const auto found = clients.find(id);
    if (found == clients.end()) return;
    char buffer[4096];
    for (;;) {
      const ssize_t got = recv(found->second.fd, buffer, sizeof buffer, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
      if (got <= 0 || found->second.received.size() > kLongestRequest) return drop(id);
      found->second.received.append(buffer, static_cast<std::size_t>(got));
    }
    perform_next(id);
  }

  // Takes the next complete line of a client that waits for nothing.
  void perform_next(std::uint64_t id) {
    const auto found = clients.find(id);
    if (found == clients.end() || found->second.busy) return;
    std::string& received = found->second.received;
    const auto end = received.find('\n');
    if (end == std::string::npos) return;
    const auto request = parse_line(received.substr(0, end));
    received.erase(0, end + 1);
    found->second.busy = true;
    const Reply reply = [weak = weak_from_this(), id](const nlohmann::json& answer) {
      if (const auto self = weak.lock()) self->reply(id, answer);
    };
    if (!request.is_object() || !request.contains("command") || !request["command"].is_string()) {
      return reply({{"error", "a request is one line with a JSON object that has \"command\""}});
    }
    try {
      handler(request, reply);
    } catch (const std::exception& error) {
      spdlog::warn("command {}: {}", request["command"].get<std::string>(), error.what());
      reply({{"error", error.what()}});
    }
  }

  void reply(std::uint64_t id, const nlohmann::json& answer) {
    const auto found = clients.find(id);
    if (found == clients.end() || !found->second.busy) return;
    found->second.busy = false;
    found->second.unsent += to_line(answer) + "\n";
    send_unsent(id);
    // By way of the reactor: a handler that replies at once must not recurse for every line that waits.
    reactor.post([weak = weak_from_this(), id] {
      if (const auto self = weak.lock()) self->perform_next(id);
    });
  }

  void send_unsent(std::uint64_t id) {
    const auto found = clients.find(id);
    if (found == clients.end()) return;
    std::string& unsent = found->second.unsent;
    while (!unsent.empty()) {
      const ssize_t sent = send(found->second.fd, unsent.data(), unsent.size(), MSG_NOSIGNAL);
      if (sent >= 0) {
        unsent.erase(0, static_cast<std::size_t>(sent));
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (unsent.size() > kMostUnsent) return drop(id);
        reactor.after(kSendAgain, [weak = weak_from_this(), id] {
          if (const auto self = weak.lock()) self->send_unsent(id);
        });
        return;
      } else if (errno != EINTR) {
        return drop(id);
      }
    }
  }

  std::filesystem::path socket;
  Reactor& reactor;
  Handler handler;
  int listener = -1;
  std::uint64_t last_client = 0;
  std::map<std::uint64_t, Client> clients;
};

ControlServer::ControlServer(const std::filesystem::path& socket, Reactor& reactor, Handler handler)
    : impl_(std::make_shared<Impl>(socket, reactor, std::move(handler))) {}

ControlServer::~ControlServer() = default;

std::optional<ControlClient> ControlClient::connect(const std::filesystem::path& socket) {
  const SocketAddress address(socket);
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw std::runtime_error(fmt::format("cannot make a socket: {}", strerror(errno)));
  const timeval patience{.tv_sec = kAccepts.count(), .tv_usec = 0};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  if (::connect(fd, address.get(), SocketAddress::size()) == 0) return ControlClient(fd);
  const int error = errno;
  // One that hangs has not taken up those before this one: ask() tells.
  if (error == EAGAIN || error == EINTR) return ControlClient(fd);
  close(fd);
  if (error == ENOENT || error == ECONNREFUSED || error == ENOTDIR) return std::nullopt;
  throw std::runtime_error(
      fmt::format("cannot reach the daemon at {}: {}", socket.string(), strerror(error)));
}

ControlClient::ControlClient(ControlClient&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), received_(std::move(other.received_)) {}

ControlClient& ControlClient::operator=(ControlClient&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(received_, other.received_);
  return *this;
}

ControlClient::~ControlClient() {
  if (fd_ >= 0) close(fd_);
}

nlohmann::json ControlClient::ask(const nlohmann::json& request,
                                  std::optional<std::chrono::milliseconds> timeout,
                                  const std::function<bool()>& given_up) {
  const std::string line = to_line(request) + "\n";
  for (std::size_t done = 0; done < line.size();) {
    const ssize_t sent = send(fd_, line.data() + done, line.size() - done, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == ENOTCONN))
      throw ConnectionLost("the daemon does not answer");
    if (sent < 0) throw ConnectionLost("the daemon has ended");
    done += static_cast<std::size_t>(sent);
  }
  const auto end = std::chrono::steady_clock::now() + timeout.value_or(std::chrono::milliseconds(0));
  for (;;) {
    if (const auto newline = received_.find('\n'); newline != std::string::npos) {
      auto answer = parse_line(received_.substr(0, newline));
      received_.erase(0, newline + 1);
      if (!answer.is_object()) throw ConnectionLost("the daemon gave a malformed answer");
      return answer;
    }
    int wait = -1;
    if (timeout) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      if (left.count() <= 0) throw ConnectionLost("the daemon does not answer");
      wait = static_cast<int>(left.count());
    }
    if (given_up) {
      if (given_up()) throw ConnectionLost("interrupted before the daemon answered");
      wait = kLookAgainMs;
    }
    pollfd readable{fd_, POLLIN, 0};
    if (poll(&readable, 1, wait) <= 0) continue;
    char buffer[16384];
    const ssize_t got = recv(fd_, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw ConnectionLost("the daemon has ended");
    received_.append(buffer, static_cast<std::size_t>(got));
  }
}

std::optional<ControlClient> wait_for_daemon(const DataSetPaths& paths, std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    if (auto daemon = ControlClient::connect(paths.control_socket())) return daemon;
    if (DaemonLock::holder(paths) == 0 || std::chrono::steady_clock::now() > end) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace sharefs
