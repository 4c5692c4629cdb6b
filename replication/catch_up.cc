#include "replication/catch_up.h"

#include <fmt/format.h>

#include <algorithm>

namespace sharefs {
namespace {

// Rounds after which writers are known to outrun the link, although they were slowed.
constexpr std::uint32_t kMaxRounds = 40;
// Of an attempt: until then the fixed costs may not have been measured well.
constexpr std::uint32_t kTrustedRounds = 3;
// A round that leaves more than this part of what it shipped does not catch up; then writers are slowed to
// this part of what the link has been seen to take.
constexpr double kCatchesUp = 0.7;
constexpr double kWritersShare = 0.5;
// Of max-pause: what the prediction must leave for its own error, and from which on less is not waited for.
constexpr double kFits = 0.8;
constexpr double kSmall = 0.25;

double ms(CatchUp::Duration duration) { return std::chrono::duration<double, std::milli>(duration).count(); }

long longer(double milliseconds) { return static_cast<long>(milliseconds * 1.5) + 1; }

}  // namespace

CatchUp::Verdict CatchUp::judge(const Round& round, const Rest& rest, const Costs& costs,
                                const std::string& target) {
  using Next = Verdict::Next;
  last_ = round;
  least_fixed_ = std::min(least_fixed_, costs.fixed());
  const double limit = ms(max_pause_);
  const double least = ms(least_fixed_);
  const double predicted = predicted_ms(rest, costs);
  const bool unreachable = least > limit && round.number >= kTrustedRounds;
  // Where nothing is left to ship it is not for the applications that the pause does not fit.
  if (unreachable || (rest.entries == 0 && round.number >= kMaxRounds && predicted > limit * kFits)) {
    const double needed = unreachable ? least : predicted;
    return {.next = Next::give_up,
            .why = fmt::format(
                "this link and these disks need a pause of about {:.0f} ms: use --max-pause {}ms or more",
                needed, longer(needed))};
  }
  // The rest shrinks from round to round until it is what arrives during one round; then waiting gains
  // nothing.
  const bool settled = rest.entries <= round.entries || predicted < limit * kSmall;
  const bool fits = predicted <= limit * kFits;
  if (fits && settled) return {.next = Next::close_gate};
  if (round.number >= kMaxRounds)
    return {.next = Next::give_up,
            .why = fmt::format("applications write faster than {} can follow: the pause would be about "
                               "{:.0f} ms; use --max-pause {}ms",
                               target, predicted, longer(predicted))};
  const bool catches_up =
      static_cast<double>(rest.entries) <= kCatchesUp * static_cast<double>(round.entries);
  return {.writers_rate = fits || catches_up ? 0 : slower()};
}

// A round that shipped nothing tells of no speed.
double CatchUp::slower() {
  if (last_.bytes == 0) return writers_rate_;
  const double shipped = static_cast<double>(last_.bytes) / std::chrono::duration<double>(last_.took).count();
  const double before = writers_rate_ > 0 ? std::min(writers_rate_, shipped) : shipped;
  writers_rate_ = std::max(before * kWritersShare, 1.0);
  return writers_rate_;
}

double CatchUp::predicted_ms(const Rest& rest, const Costs& costs) const {
  const auto ratio = [](std::uint64_t left, std::uint64_t last) {
    return static_cast<double>(left) / static_cast<double>(std::max<std::uint64_t>(1, last));
  };
  const double share = std::max(std::min(ratio(rest.entries, last_.entries), 10.0),
                                std::min(ratio(rest.bytes, last_.bytes), 1.0));
  const double shipping = std::max(0.0, ms(last_.took - costs.round_trip - costs.target_sync - costs.search));
  return ms(costs.fixed()) + ms(costs.search) + shipping * share;
}

}  // namespace sharefs
