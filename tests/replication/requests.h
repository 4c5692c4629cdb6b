// Requests for tests, and an executor that counts what it performs.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "meta/executor.h"

namespace sharefs::testing {

inline pb::Request request_of(std::uint64_t client, std::uint64_t seq) {
  pb::Request request;
  request.set_client(client);
  request.set_seq(seq);
  return request;
}

inline pb::Request attach_request(std::uint64_t client, const std::string& site) {
  auto request = request_of(client, (std::uint64_t{1} << 61) | 1);
  request.mutable_attach()->set_site(site);
  return request;
}

inline pb::Request detach_request(std::uint64_t client, std::uint64_t seq) {
  auto request = request_of(client, seq);
  request.mutable_detach();
  return request;
}

inline pb::Request write_request(std::uint64_t client, std::uint64_t seq, std::uint32_t size,
                                 std::uint64_t answered_below = 0) {
  auto request = request_of(client, seq);
  request.set_answered_below(answered_below);
  request.mutable_write()->set_size(size);
  return request;
}

inline pb::Request read_request(std::uint64_t client, std::uint64_t seq) {
  auto request = request_of(client, seq);
  request.mutable_read()->set_size(1 << 20);
  return request;
}

inline pb::Request lookup_request(std::uint64_t client, std::uint64_t seq, const std::string& name) {
  auto request = request_of(client, seq);
  request.mutable_lookup()->set_name(name);
  return request;
}

// Answers at once, or when released.
class FakeStore final : public Executor {
 public:
  void execute(const pb::Request& request, Bytes bytes, Reply reply) override {
    last_data = as_text(bytes);
    if (hold)
      held_.emplace_back(request, std::move(reply));
    else
      perform(request, reply);
  }
  void release() {
    hold = false;
    while (!held_.empty()) {
      const auto [request, reply] = std::move(held_.front());
      held_.pop_front();
      perform(request, reply);
    }
  }
  std::size_t held() const { return held_.size(); }
  std::size_t performed() const { return order.size(); }
  int most_times() const {
    int most = 0;
    for (const auto& [key, times] : times) most = std::max(most, times);
    return most;
  }

  bool hold = false;
  std::string data;                                              // what a READ returns
  std::string last_data;                                         // what came with the last request
  std::vector<std::uint64_t> order;                              // seqs, as performed
  std::map<std::pair<std::uint64_t, std::uint64_t>, int> times;  // (client, seq): how often performed

 private:
  void perform(const pb::Request& request, const Reply& reply) {
    order.push_back(request.seq());
    ++times[{request.client(), request.seq()}];
    pb::Outcome outcome;
    if (request.has_write()) outcome.set_count(request.write().size());
    reply(outcome, request.has_read() ? as_bytes(data) : Bytes());
  }
  std::deque<std::pair<pb::Request, Reply>> held_;
};

}  // namespace sharefs::testing
