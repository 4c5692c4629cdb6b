#include "replication/ship_link.h"

#include <algorithm>
#include <utility>

namespace sharefs {

namespace {

constexpr double kMeasuredSeconds = 3;  // of busy time that the measured throughput remembers
constexpr std::chrono::milliseconds kDrains(50);
constexpr double kBurstSeconds = 0.05;  // how far the rate limit may be overdrawn

struct Outgoing {
  pb::Envelope head;
  std::vector<zmq::message_t> parts;
};

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

ShipLink::ShipLink(const ImageSource::Options& options, ImageSource::Send send, Reactor& reactor)
    : credit_limit_(options.credit),
      rate_(options.rate),
      send_(std::make_shared<const ImageSource::Send>(std::move(send))),
      reactor_(reactor),
      performed_(options.performed) {
  if (performed_) give_way_.emplace(Clock::now(), performed_());
}

void ShipLink::wait(std::unique_lock<std::mutex>& lock, const std::function<bool()>& ready) {
  changed_.wait(lock, [&] { return cancelled_ || ready(); });
  if (cancelled_) throw ImageSource::Cancelled(*cancelled_);
}

void ShipLink::acquire(std::uint64_t bytes) {
  std::unique_lock lock(mutex_);
  wait(lock, [&] { return in_flight_ == 0 || in_flight_ + bytes <= credit_limit_; });
  if (give_way_ && give_way_->rest_is_due(Clock::now())) give_way(lock);
  if (rate_ != 0) wait_for_rate(lock, bytes);
  if (in_flight_ == 0) busy_since_ = Clock::now();
  in_flight_ += bytes;
}

// A rest begins when the target has worked off what is on its way, as it may be on the same machine; over a
// slow link that takes long, and costs nobody anything.
void ShipLink::give_way(std::unique_lock<std::mutex>& lock) {
  const auto cancelled = [&] { return cancelled_.has_value(); };
  changed_.wait_for(lock, kDrains, [&] { return cancelled() || in_flight_ == 0; });
  const auto rest = give_way_->rest(Clock::now(), performed_());
  if (rest > Clock::duration::zero()) changed_.wait_for(lock, rest, cancelled);
  if (cancelled_) throw ImageSource::Cancelled(*cancelled_);
  give_way_->work(Clock::now(), performed_());
}

// A token bucket that may go into debt: a batch waits until the debt of those before it has been paid.
void ShipLink::wait_for_rate(std::unique_lock<std::mutex>& lock, std::uint64_t bytes) {
  const auto rate = static_cast<double>(rate_);
  const auto refill = [&] {
    const auto now = Clock::now();
    tokens_ = std::min(tokens_ + seconds(now - tokens_at_) * rate, rate * kBurstSeconds);
    tokens_at_ = now;
  };
  refill();
  if (tokens_ < 0) {
    const auto until = tokens_at_ + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(-tokens_ / rate));
    changed_.wait_until(lock, until, [&] { return cancelled_.has_value(); });
    if (cancelled_) throw ImageSource::Cancelled(*cancelled_);
    refill();
  }
  tokens_ -= static_cast<double>(bytes);
}

void ShipLink::send(pb::Envelope head, std::vector<zmq::message_t> parts) {
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) throw ImageSource::Cancelled(*cancelled_);
  }
  // A Task must be copyable, messages are not.
  auto outgoing = std::make_shared<Outgoing>(Outgoing{std::move(head), std::move(parts)});
  reactor_.post([send = send_, outgoing] { (*send)(outgoing->head, std::move(outgoing->parts)); });
}

void ShipLink::wait_image_complete() {
  std::unique_lock lock(mutex_);
  wait(lock, [&] { return image_complete_; });
  give_way_.reset();
}

void ShipLink::wait_round_applied(std::uint32_t round) {
  std::unique_lock lock(mutex_);
  wait(lock, [&] { return round_applied_ >= round; });
}

pb::Need ShipLink::wait_need(std::uint64_t number) {
  std::unique_lock lock(mutex_);
  wait(lock, [&] { return needs_.contains(number); });
  return std::move(needs_.extract(number).mapped());
}

void ShipLink::credit(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  bytes = std::min(bytes, in_flight_);
  measure(bytes);
  in_flight_ -= bytes;
  changed_.notify_all();
}

void ShipLink::measure(std::uint64_t bytes) {
  const auto now = Clock::now();
  busy_seconds_ += seconds(now - busy_since_);
  busy_bytes_ += static_cast<double>(bytes);
  busy_since_ = now;
  if (busy_seconds_ > kMeasuredSeconds) {
    busy_bytes_ *= kMeasuredSeconds / busy_seconds_;
    busy_seconds_ = kMeasuredSeconds;
  }
}

void ShipLink::need(const pb::Need& need) {
  const std::lock_guard lock(mutex_);
  if (needs_.size() >= kMostNeeds) return;  // nobody has asked for so many
  needs_[need.number()] = need;
  changed_.notify_all();
}

void ShipLink::image_complete(std::uint64_t sync_ns) {
  const std::lock_guard lock(mutex_);
  image_complete_ = true;
  target_sync_ = std::chrono::nanoseconds(sync_ns);
  changed_.notify_all();
}

void ShipLink::round_applied(std::uint32_t round, std::uint64_t sync_ns) {
  const std::lock_guard lock(mutex_);
  round_applied_ = std::max(round_applied_, round);
  target_sync_ = std::chrono::nanoseconds(sync_ns);
  changed_.notify_all();
}

void ShipLink::check() {
  const std::lock_guard lock(mutex_);
  if (cancelled_) throw ImageSource::Cancelled(*cancelled_);
}

void ShipLink::cancel(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (!cancelled_) cancelled_ = reason;
  changed_.notify_all();
}

std::chrono::nanoseconds ShipLink::target_sync() const {
  const std::lock_guard lock(mutex_);
  return target_sync_;
}

double ShipLink::bytes_per_second() const {
  const std::lock_guard lock(mutex_);
  const double rate = busy_seconds_ > 0 ? busy_bytes_ / busy_seconds_ : 0;
  return rate_ != 0 ? std::min(rate, static_cast<double>(rate_)) : rate;
}

}  // namespace sharefs
