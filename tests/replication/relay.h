// A TCP relay that can hold bytes back, lose packets without closing anything, or be slow.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
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
  // The connections that exist now stay open, and whatever is sent on them is lost: nobody acknowledges it.
  void swallow_existing() {
    swallow_ = true;
    while (swallow_) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  // Ends the connections that exist now.
  void break_existing() {
    break_ = true;
    while (break_) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  // Passes on so much of what is sent to the target; what is sent back is not held up. 0: without a limit.
  void limit(std::size_t bytes_per_second) { limit_ = bytes_per_second; }
  const std::string& endpoint() const { return endpoint_; }

 private:
  struct Pair {
    int near, far;
  };
  static void close_pair(const Pair& pair) {
    ::close(pair.near);
    ::close(pair.far);
  }

  // No packet reaches the socket any more.
  static void lose_packets(int fd) {
    sock_filter drop{.code = BPF_RET | BPF_K, .jt = 0, .jf = 0, .k = 0};
    const sock_fprog program{.len = 1, .filter = &drop};
    EXPECT_EQ(::setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program), 0);
  }

  void serve() {
    constexpr std::size_t kMost = 1 << 16;
    std::vector<char> buffer(kMost);
    auto last = std::chrono::steady_clock::now();
    double allowed = 0;
    while (!stop_) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      if (hold_) continue;
      for (const auto& pair : pairs_) {
        if (!swallow_) break;
        lose_packets(pair.near);
        lose_packets(pair.far);
      }
      swallow_ = false;
      if (break_) {
        for (const auto& pair : pairs_) close_pair(pair);
        pairs_.clear();
        break_ = false;
      }
      if (const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC); fd >= 0)
        pairs_.push_back({fd, connect_to(target_)});
      const auto now = std::chrono::steady_clock::now();
      const double more = static_cast<double>(limit_) * std::chrono::duration<double>(now - last).count();
      allowed = limit_ == 0 ? kMost : std::min<double>(kMost, allowed + more);
      last = now;
      std::erase_if(pairs_, [&](const Pair& pair) {
        const auto there = pass(pair.near, pair.far, static_cast<std::size_t>(allowed), buffer);
        allowed -= static_cast<double>(std::max<ssize_t>(there, 0));
        if (there >= 0 && pass(pair.far, pair.near, kMost, buffer) >= 0) return false;
        close_pair(pair);
        return true;
      });
    }
  }

  // How many bytes; -1: one end has closed.
  static ssize_t pass(int from, int to, std::size_t most, std::vector<char>& buffer) {
    if (most == 0) return 0;
    const auto got = ::recv(from, buffer.data(), most, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) return -1;
    return ::send(to, buffer.data(), static_cast<std::size_t>(got), MSG_NOSIGNAL) == got ? got : -1;
  }

  // constant after construction
  sockaddr_in target_;
  int listener_ = -1;
  std::string endpoint_;
  // any thread
  std::atomic<bool> stop_ = false, hold_ = false, swallow_ = false, break_ = false;
  std::atomic<std::size_t> limit_ = 0;
  // relay thread; the destructor after it has ended
  std::vector<Pair> pairs_;
  std::thread thread_;
};

}  // namespace sharefs::testing
