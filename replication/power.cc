#include "replication/power.h"

#include <sys/random.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>

#include "replication/inode_io.h"

namespace sharefs {
namespace {

// Settings
constexpr const char* kNumber = "power";
constexpr const char* kBoot = "boot";                 // of the machine, when `power` was last looked at
constexpr const char* kEnded = "synced";              // the last process ended with everything synced
constexpr const char* kSynced = "synced_before";      // ns since 1970
constexpr const char* kDoubtful = "doubtful_ctimes";  // "FROM TO"
constexpr const char* kLost = "lost_ctimes";          // "FROM TO"

// The clock of a machine that has just started may be behind: many have none that goes on without power, and
// begin with the time that was noted last.
constexpr std::chrono::nanoseconds kClockError = std::chrono::hours(24);
constexpr std::chrono::nanoseconds kNone{0};

std::int64_t now() {
  const std::chrono::nanoseconds since = std::chrono::system_clock::now().time_since_epoch();
  return since.count();
}

std::string boot_id() {
  std::string id;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), id);
  return id;
}

std::uint64_t another_number() {
  std::uint64_t number = 0;
  while (number == 0)
    if (::getrandom(&number, sizeof number, 0) != sizeof number) number = 0;
  return number;
}

std::int64_t number_in(const std::string& text) { return text.empty() ? 0 : std::stoll(text); }

}  // namespace

Power::Power(State& state) : state_(state) {
  const std::string last = state.setting(kNumber), boot = boot_id();
  const bool lost = last.empty() || (state.setting(kBoot) != boot && !ended_synced(state));
  number_ = lost ? another_number() : std::stoull(last);
  if (lost) {
    const std::int64_t from = number_in(state.setting(kSynced));
    extend(kDoubtful, from, last.empty() ? kNone : kClockError);
    if (!last.empty()) extend(kLost, from, kClockError);
  }
  state.set_setting(kNumber, std::to_string(number_));
  state.set_setting(kBoot, boot);
  state.set_setting(kEnded, "");
}

void Power::synced(std::int64_t when) {
  // Also if it is earlier than the last time: then the clock was set back, and so are the stamps that follow.
  state_.set_setting(kSynced, std::to_string(when));
}

void Power::sync_failed() { extend(kDoubtful, number_in(state_.setting(kSynced)), kNone); }

void Power::ends_synced() { state_.set_setting(kEnded, "1"); }

bool Power::ended_synced(State& state) { return !state.setting(kEnded).empty(); }

Power::Interval Power::doubtful() { return interval(kDoubtful); }

Power::Interval Power::lost() { return interval(kLost); }

Power::Interval Power::interval(const char* setting) {
  Interval interval;
  const std::string text = state_.setting(setting);
  long long from = 0, to = 0;
  if (std::sscanf(text.c_str(), "%lld %lld", &from, &to) == 2) interval = {from, to};
  return interval;
}

// Up to the last stamp that a file may have now (ctime_floor() is the first one that it may get), or by
// `clock_error` more. A clock that was set back since does not tell what was stamped since.
void Power::extend(const char* setting, std::int64_t from, std::chrono::nanoseconds clock_error) {
  const Interval before = interval(setting);
  if (now() < from)
    return set(setting, {.from = 0, .to = std::max(before.to, from + clock_error.count() + 1)});
  const std::int64_t to = std::max(before.to, std::max(now(), from) + clock_error.count() + 1);
  set(setting, {.from = before.to > 0 ? std::min(before.from, from) : from, .to = to});
}

void Power::inherit(const Interval& inherited) {
  if (inherited.to <= inherited.from) return;
  const Interval mine = lost();
  const bool none = mine.to <= mine.from;
  set(kLost, {.from = none ? inherited.from : std::min(mine.from, inherited.from),
              .to = none ? inherited.to : std::max(mine.to, inherited.to)});
}

void Power::set(const char* setting, const Interval& interval) {
  state_.set_setting(setting, std::to_string(interval.from) + " " + std::to_string(interval.to));
}

void Power::trust() { state_.set_setting(kDoubtful, ""); }

}  // namespace sharefs
