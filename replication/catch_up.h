// When the gate may be closed: judges the rounds of the change log that have been shipped, and predicts from
// them what the pause would take (promise P2). Pure: told what was measured, it says what is to be done.
//
// The rest is compared with the last round in two ways. Entries tell what names and attributes cost; but what
// is overwritten many times is shipped once, so a round of few entries may ship as many bytes as one of many.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "meta/reactor.h"

namespace sharefs {

class CatchUp {
 public:
  using Duration = Reactor::Clock::duration;

  // What is in the log and has not been shipped.
  struct Rest {
    std::uint64_t entries = 0, bytes = 0;
  };
  struct Round {
    std::uint32_t number = 0;  // from 1, per attempt
    std::uint64_t entries = 0, bytes = 0;
    Duration took{};
  };
  // What a pause takes although nothing is left to ship: three round trips (the rest and «log applied»; the
  // confirmation; records and their outcomes), and what makes both sides durable.
  struct Costs {
    Duration round_trip{}, target_sync{}, own_sync{};
    // Of the last round: to look for inodes in the whole tree. As long as rounds do that, the rest may have
    // to, and however little is left, it takes as long.
    Duration search{};
    Duration fixed() const { return 3 * round_trip + target_sync + own_sync; }
  };
  struct Verdict {
    enum class Next { close_gate, another_round, give_up };
    Next next = Next::another_round;
    std::string why{};        // give_up: one line, with the --max-pause that it takes
    double writers_rate = 0;  // not 0: applications are to write no faster than this, in bytes per second
  };

  explicit CatchUp(std::chrono::milliseconds max_pause) : max_pause_(max_pause) {}

  // A round has ended. `target` is named in what is said.
  Verdict judge(const Round& round, const Rest& rest, const Costs& costs, const std::string& target);
  double predicted_ms(const Rest& rest, const Costs& costs) const;
  double writers_rate() const { return writers_rate_; }

 private:
  double slower();

  std::chrono::milliseconds max_pause_;
  Round last_{};
  Duration least_fixed_ = Duration::max();  // the shortest seen: the disks may just be busy
  double writers_rate_ = 0;
};

}  // namespace sharefs
