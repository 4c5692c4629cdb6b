// One site of one data set: everything that the daemon runs, put together.
//
// Threads: all calls on the reactor thread.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "meta/reactor.h"

namespace sharefs {

// Setting: how many writes the last mount had acknowledged that have not reached the owner; the next one
// sends them. Empty: none.
constexpr const char* kUnsentSetting = "unsent_writes";

class Site {
 public:
  struct Options {
    std::filesystem::path folder;                     // of the data set below SHAREFS_HOME; has state.db
    std::optional<std::filesystem::path> mountpoint;  // unset: serve without a mount
    std::vector<std::string> mount_options;
    std::optional<std::chrono::milliseconds> timeout;  // --timeout
    bool patient = false;        // waits for an owner that cannot be reached, instead of giving the mount up
    bool write_through = false;  // acknowledges no write before the owner has performed it
  };
  // Opens the store and binds the endpoint. Throws std::runtime_error with one clear line.
  // `ended` is called when the site shall end (unmounted from outside).
  Site(Options options, Reactor& reactor, std::function<void()> ended);
  ~Site();

  // Announces the mount to the owner, then mounts; `ready` gets an empty string, or why not in one line.
  void start(const std::function<void(std::string)>& ready);
  // Unmounts and tells the owner, as far as it can be reached within two seconds.
  void stop(const std::function<void()>& stopped);

  // Performs a control command (see cli/README.md for each) and replies with a JSON object; {"error": "..."}
  // when it could not be done. Commands: status, handoff, migrate, abort, verify, reload_invitations.
  void command(const nlohmann::json& request, std::function<void(nlohmann::json)> reply);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
