#include "fs/pace.h"

#include <algorithm>
#include <cerrno>
#include <utility>

namespace sharefs {
namespace {

// Less is not worth a timer.
constexpr auto kShortestDelay = std::chrono::milliseconds(1);

// Recalls wait for writebacks, and a sync changes nothing.
bool is_slowed(const pb::Request& request) {
  return changes_files(request.op_case()) && !request.write().writeback();
}

}  // namespace

void Pace::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (request.has_cancel() && cancel(request)) return reply_errno(reply, 0);
  if (rate_ == 0 || !is_slowed(request)) return gate_.execute(request, data, std::move(reply));
  const auto when = due(data.size());
  if (waiting_.empty() && when <= Clock::now() + kShortestDelay)
    return gate_.execute(request, data, std::move(reply));
  waiting_.push_back({when, request, std::string(as_text(data)), std::move(reply)});
  arm();
}

// The caller was killed: nothing is to be performed for it, least of all later.
bool Pace::cancel(const pb::Request& cancel) {
  const auto found = std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiting& one) {
    return one.request.client() == cancel.client() && one.request.seq() == cancel.cancel().seq();
  });
  if (found == waiting_.end()) return false;
  const Reply reply = std::move(found->reply);
  waiting_.erase(found);
  reply_errno(reply, EINTR);
  return true;
}

Pace::Clock::time_point Pace::due(std::size_t bytes) {
  const auto now = Clock::now();
  const std::chrono::duration<double> cost(static_cast<double>(bytes + kCost) / rate_);
  const auto when = std::clamp(free_, now, now + longest_);
  free_ = when + std::chrono::duration_cast<Clock::duration>(cost);
  return waiting_.empty() ? when : std::max(when, waiting_.back().due);
}

void Pace::arm() {
  if (timer_ != 0 || waiting_.empty()) return;
  const auto delay = std::max(waiting_.front().due - Clock::now(), Clock::duration::zero());
  timer_ = reactor_.after(delay, [this] {
    timer_ = 0;
    let_pass(Clock::now());
    arm();
  });
}

void Pace::let_pass(Clock::time_point until) {
  while (!waiting_.empty() && waiting_.front().due <= until) {
    Waiting one = std::move(waiting_.front());
    waiting_.pop_front();
    gate_.execute(one.request, as_bytes(one.data), std::move(one.reply));
  }
}

void Pace::limit(double bytes_per_second, Clock::duration longest) {
  rate_ = bytes_per_second;
  longest_ = longest;
}

void Pace::unlimited() {
  rate_ = 0;
  let_pass(Clock::time_point::max());
}

}  // namespace sharefs
