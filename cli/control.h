// The control socket: how the command line talks to the daemon of a data set.
//
// A Unix stream socket (mode 0600, in a folder of mode 0700). Each request and each reply is one line of
// JSON. A connection has one request at a time: further lines wait until the reply to the one before has been
// sent. The commands are described in cli/README.md.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "cli/home.h"
#include "meta/reactor.h"

namespace sharefs {

// Reactor thread only.
class ControlServer {
 public:
  using Reply = std::function<void(nlohmann::json)>;
  using Handler = std::function<void(const nlohmann::json& request, Reply reply)>;

  // Replaces whatever is at `socket`: the caller holds the data set's DaemonLock.
  ControlServer(const std::filesystem::path& socket, Reactor& reactor, Handler handler);
  ~ControlServer();  // removes the socket; replies that come later are dropped

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// Blocking.
class ControlClient {
 public:
  // nullopt: no daemon listens there. One that does not take up the connection in time is one that does not
  // answer (ask).
  static std::optional<ControlClient> connect(const std::filesystem::path& socket);
  ControlClient(ControlClient&& other) noexcept;
  ControlClient& operator=(ControlClient&& other) noexcept;
  ~ControlClient();

  // Throws ConnectionLost if the daemon ends or does not answer in time (unset: waits as long as it takes, or
  // until `given_up`).
  struct ConnectionLost : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  nlohmann::json ask(const nlohmann::json& request,
                     std::optional<std::chrono::milliseconds> timeout = std::nullopt,
                     const std::function<bool()>& given_up = {});

 private:
  explicit ControlClient(int fd) : fd_(fd) {}
  int fd_;
  std::string received_;
};

// Blocking. Waits while a daemon is just starting or ending. nullopt: none runs, or it does not listen in
// time.
std::optional<ControlClient> wait_for_daemon(const DataSetPaths& paths, std::chrono::milliseconds timeout);

}  // namespace sharefs
