// Slows writers down while a handoff cannot catch up with them.
//
// The catch-up rounds of a handoff end only if the change log is shipped faster than it grows. Where
// applications write faster than the link takes, mutations pass here at a limited rate, in the order of their
// arrival, each one delayed by no more than a bound; everything else passes at once. Without a limit nothing
// is delayed.
//
// Position: in front of the Gate, on the owner. Threads: reactor thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>

#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

class Pace final : public Executor {
 public:
  Pace(Executor& gate, Reactor& reactor) : gate_(gate), reactor_(reactor) {}
  ~Pace() override { reactor_.cancel(timer_); }

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // Lets mutations pass at this many bytes per second (of the data written, and kCost for each) from now on,
  // none of them later than `longest` after it came.
  void limit(double bytes_per_second, Reactor::Clock::duration longest);
  // Lets everything pass that waits, in order, and what comes later at once.
  void unlimited();

  static constexpr std::size_t kCost = 256;

 private:
  using Clock = Reactor::Clock;
  struct Waiting {
    Clock::time_point due;
    pb::Request request;
    std::string data;
    Reply reply;
  };
  bool cancel(const pb::Request& cancel);
  Clock::time_point due(std::size_t bytes);
  void arm();
  void let_pass(Clock::time_point until);

  // constant after construction
  Executor& gate_;
  Reactor& reactor_;
  // reactor thread
  double rate_ = 0;  // bytes per second; 0: no limit
  Clock::duration longest_{};
  Clock::time_point free_{};     // when what has passed is paid for
  std::deque<Waiting> waiting_;  // in the order of `due`
  Reactor::TimerId timer_ = 0;
};

}  // namespace sharefs
