// A TCP relay that can hold bytes back, or swallow them, without closing anything: a network that fails
// silently.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace sharefs::testing {

// tcp://127.0.0.1:PORT as a socket address.
inline sockaddr_in loopback(const std::string& endpoint) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1))));
  return address;
}

// A connected blocking socket.
inline int connect_to(const sockaddr_in& address) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  EXPECT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  return fd;
}

class Relay {
 public:
  explicit Relay(const std::string& target) : target_(loopback(target)) {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    sockaddr_in here = loopback("tcp://127.0.0.1:0");
    EXPECT_EQ(::bind(listener_, reinterpret_cast<sockaddr*>(&here), sizeof here), 0);
    EXPECT_EQ(::listen(listener_, 16), 0);
    socklen_t length = sizeof here;
    ::getsockname(listener_, reinterpret_cast<sockaddr*>(&here), &length);
    endpoint_ = "tcp://127.0.0.1:" + std::to_string(ntohs(here.sin_port));
    thread_ = std::thread([this] { serve(); });
  }
  ~Relay() {
    stop_ = true;
    thread_.join();
    for (const auto& pair : pairs_) close_pair(pair);
    ::close(listener_);
  }
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  // Passes nothing on while held; what was sent meanwhile comes later.
  void hold(bool on) { hold_ = on; }
  // The connections that exist now stay open, and whatever is sent on them is gone.
  void swallow_existing() { swallow_ = true; }
  const std::string& endpoint() const { return endpoint_; }

 private:
  struct Pair {
    int near, far;
    bool swallowed;
  };
  static void close_pair(const Pair& pair) {
    ::close(pair.near);
    ::close(pair.far);
  }

  void serve() {
    std::vector<char> buffer(1 << 16);
    while (!stop_) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      if (hold_) continue;
      if (swallow_.exchange(false))
        for (auto& pair : pairs_) pair.swallowed = true;
      if (const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC); fd >= 0)
        pairs_.push_back({fd, connect_to(target_), false});
      std::erase_if(pairs_, [&](const Pair& pair) {
        if (pass(pair.near, pair.far, pair.swallowed, buffer) &&
            pass(pair.far, pair.near, pair.swallowed, buffer))
          return false;
        close_pair(pair);
        return true;
      });
    }
  }

  // False: one end has closed.
  static bool pass(int from, int to, bool swallowed, std::vector<char>& buffer) {
    const auto got = ::recv(from, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (got < 0) return errno == EAGAIN;
    if (got == 0) return false;
    return swallowed || ::send(to, buffer.data(), static_cast<std::size_t>(got), MSG_NOSIGNAL) == got;
  }

  // constant after construction
  sockaddr_in target_;
  int listener_ = -1;
  std::string endpoint_;
  // any thread
  std::atomic<bool> stop_ = false, hold_ = false, swallow_ = false;
  // relay thread; the destructor after it has ended
  std::vector<Pair> pairs_;
  std::thread thread_;
};

}  // namespace sharefs::testing
