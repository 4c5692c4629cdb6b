#include "meta/fault.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

namespace sharefs {
namespace {

enum class Action { kill, stop, sleep, error };

struct Fault {
  std::string name;
  Action action = Action::error;
  std::chrono::milliseconds delay{0};  // sleep
  std::uint64_t at = 0;                // the passage at which it fires; 0: every one
  std::atomic<std::uint64_t> passed = 0;
};

[[noreturn]] void refuse(std::string_view item) {
  throw std::runtime_error(
      "SHAREFS_FAULTS: cannot understand \"" + std::string(item) +
      "\"; wanted: NAME=kill|stop|sleep:MS|error, each with @N for the N-th passage only");
}

std::uint64_t number(std::string_view text, std::string_view item) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) refuse(item);
  return value;
}

// item := NAME '=' ACTION [ '@' N ]
void parse(std::string_view item, Fault& fault) {
  const auto equals = item.find('=');
  if (equals == 0 || equals == std::string_view::npos) refuse(item);
  fault.name = item.substr(0, equals);
  std::string_view action = item.substr(equals + 1);
  if (const auto at = action.find('@'); at != std::string_view::npos) {
    fault.at = number(action.substr(at + 1), item);
    if (fault.at == 0) refuse(item);
    action = action.substr(0, at);
  }
  constexpr std::string_view kSleep = "sleep:";
  if (action == "kill") {
    fault.action = Action::kill;
  } else if (action == "stop") {
    fault.action = Action::stop;
  } else if (action == "error") {
    fault.action = Action::error;
  } else if (action.starts_with(kSleep)) {
    fault.action = Action::sleep;
    fault.delay = std::chrono::milliseconds(number(action.substr(kSleep.size()), item));
  } else {
    refuse(item);
  }
}

// The faults of this process; fixed at the first passage of any point. A mistake in the variable throws, so
// that no test passes because its fault never fired.
std::deque<Fault>& faults() {
  static std::deque<Fault> all = [] {
    std::deque<Fault> parsed;
    const char* variable = std::getenv("SHAREFS_FAULTS");
    std::string_view rest = variable == nullptr ? "" : variable;
    while (!rest.empty()) {
      const auto comma = rest.find(',');
      parse(rest.substr(0, comma), parsed.emplace_back());
      rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    }
    return parsed;
  }();
  return all;
}

// Performs the fault; true: the caller takes its error path.
bool fire(const Fault& fault) {
  dprintf(STDERR_FILENO, "fault point %s fires\n", fault.name.c_str());
  switch (fault.action) {
    case Action::kill:
      ::kill(::getpid(), SIGKILL);
      return false;
    case Action::stop:
      ::kill(::getpid(), SIGSTOP);
      return false;
    case Action::sleep:
      std::this_thread::sleep_for(fault.delay);
      return false;
    case Action::error:
      return true;
  }
  return false;
}

}  // namespace

bool fault_point(const char* name) {
  auto& all = faults();
  if (all.empty()) [[likely]]
    return false;
  bool failed = false;
  for (Fault& fault : all) {
    if (fault.name != name) continue;
    const std::uint64_t passage = fault.passed.fetch_add(1, std::memory_order_relaxed) + 1;
    if (fault.at == 0 || fault.at == passage) failed = fire(fault) || failed;
  }
  return failed;
}

}  // namespace sharefs
