// What the shipping thread of an ImageSource waits for, and how its messages get to the reactor.
//
// Threads: send(), the waits and take_need() on the shipping thread; feed methods on the reactor thread; one
// mutex inside.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "replication/give_way.h"
#include "replication/image_source.h"

namespace sharefs {

class ShipLink {
 public:
  ShipLink(const ImageSource::Options& options, ImageSource::Send send, Reactor& reactor);

  // --- shipping thread; all throw ImageSource::Cancelled after cancel()
  // Waits until `bytes` more fit into the credit, the rate and, until the image is complete, what
  // applications leave; counts them as in flight. A batch larger than the whole credit goes alone.
  void acquire(std::uint64_t bytes);
  void check();  // where nothing is sent for long
  void send(pb::Envelope head, std::vector<zmq::message_t> parts);
  void wait_image_complete();
  void wait_round_applied(std::uint32_t round);
  pb::Need wait_need(std::uint64_t number);

  // --- reactor thread
  void credit(std::uint64_t bytes);
  void need(const pb::Need& need);
  void image_complete(std::uint64_t sync_ns);
  void round_applied(std::uint32_t round, std::uint64_t sync_ns);
  void cancel(const std::string& reason);

  // --- any thread
  std::chrono::nanoseconds target_sync() const;
  double bytes_per_second() const;

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kMostNeeds = 16;
  void wait(std::unique_lock<std::mutex>& lock, const std::function<bool()>& ready);
  void wait_for_rate(std::unique_lock<std::mutex>& lock, std::uint64_t bytes);
  void give_way(std::unique_lock<std::mutex>& lock);
  void measure(std::uint64_t bytes);

  // constant after construction
  const std::uint64_t credit_limit_;
  const std::uint64_t rate_;
  const std::shared_ptr<const ImageSource::Send> send_;  // outlives this object in posted tasks
  Reactor& reactor_;
  const std::function<std::uint64_t()> performed_;
  // shipping thread
  std::optional<GiveWay> give_way_;  // while an image is sent
  // under mutex_
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<std::string> cancelled_;
  std::uint64_t in_flight_ = 0;
  bool image_complete_ = false;
  std::uint32_t round_applied_ = 0;
  std::map<std::uint64_t, pb::Need> needs_;
  std::chrono::nanoseconds target_sync_{0};
  Clock::time_point busy_since_{};  // of the time not yet measured; meaningful while something is in flight
  double busy_seconds_ = 0;         // both decay, so that the last seconds count
  double busy_bytes_ = 0;
  double tokens_ = 0;
  Clock::time_point tokens_at_ = Clock::now();
};

}  // namespace sharefs
