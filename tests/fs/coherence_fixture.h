// A Coherence over a fake store, whose clients follow an order when the test says so.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <deque>
#include <functional>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fs/coherence.h"
#include "tests/fs/fake_executor.h"

namespace sharefs::test {

constexpr ClientId kA = 1, kB = 2, kC = 3;
constexpr InodeId kFile = 50, kOther = 51;
using Clients = std::vector<ClientId>;
using std::chrono::milliseconds;

class CoherenceTest : public ::testing::Test {
 protected:
  struct Order {
    RecallOrder what;
    std::function<void(bool)> done;
  };

  CoherenceTest()
      : coherence_(
            store_, opens_, locks_, reactor_,
            [this](const RecallOrder& order, std::function<void(bool)> done) {
              if (follow_at_once_) {
                done(false);
              } else {
                orders_.push_back({order, std::move(done)});
              }
            },
            CoherenceTiming{.lease = milliseconds(200),
                            .sole_timeout = milliseconds(100),
                            .extension = [this](ClientId client, auto) {
                              return behind_.contains(client) ? milliseconds(50) : milliseconds(0);
                            }}) {}

  // Lets the reactor serve its timers for a while.
  void pass_time(milliseconds time) {
    reactor_.after(time, [this] { reactor_.stop(); });
    reactor_.run();
  }
  void attach_all(std::initializer_list<ClientId> clients) {
    for (const ClientId client : clients) opens_.attach(client, "site" + std::to_string(client));
  }
  void opened(ClientId client, InodeId id = kFile, std::uint32_t flags = O_RDWR) {
    opens_.open({client, id * 10, id, flags, false});
  }
  Answer& ask(const pb::Request& request, std::string_view data = {}) {
    Answer& answer = answers_.emplace_back();
    coherence_.execute(request, as_bytes(data), answer.reply());
    return answer;
  }
  Answer& write(ClientId client, InodeId id = kFile) {
    return ask(write_of(client, ++seq_, id, 100, 4), "data");
  }
  Answer& attach(ClientId client) {
    pb::Request request = request_of(client, ++seq_);
    request.mutable_attach()->set_site("site" + std::to_string(client));
    return ask(request);
  }
  Answer& detach(ClientId client) {
    pb::Request request = request_of(client, ++seq_);
    request.mutable_detach();
    return ask(request);
  }
  Answer& forget(ClientId client, InodeId id) {
    pb::Request request = request_of(client, ++seq_);
    request.mutable_forget()->add_ids(id);
    return ask(request);
  }
  Answer& release(ClientId client, InodeId id = kFile) {
    pb::Request request = request_of(client, ++seq_);
    request.mutable_release()->set_id(id);
    request.mutable_release()->set_handle(id * 10);
    request.mutable_release()->set_lock_owner(7);
    request.mutable_release()->set_unlock_flock(true);
    return ask(request);
  }
  // The store says that this unlink leaves `id` without a name.
  Answer& unlink_last(ClientId client, InodeId id) {
    store_.result = [id](const pb::Request& request) {
      pb::Outcome outcome;
      if (request.op_case() == pb::Request::kUnlink) outcome.add_orphaned(id);
      return outcome;
    };
    pb::Request request = request_of(client, ++seq_);
    request.mutable_unlink()->set_parent(kRootInode);
    return ask(request);
  }
  Answer& lock(ClientId client, std::uint64_t owner, pb::LockRange::Type type, bool wait,
               bool flock = false) {
    pb::Request request = request_of(client, ++seq_);
    pb::SetLock& set = *request.mutable_setlock();
    set.set_id(kFile);
    set.set_lock_owner(owner);
    set.mutable_range()->set_type(type);
    set.mutable_range()->set_end(9);
    set.set_wait(wait);
    set.set_flock(flock);
    return ask(request);
  }
  // The oldest order to this client is followed.
  void follow(ClientId client, bool referenced = false) {
    for (auto it = orders_.begin(); it != orders_.end(); ++it) {
      if (it->what.client != client) continue;
      const auto done = std::move(it->done);
      orders_.erase(it);
      done(referenced);
      return;
    }
    ADD_FAILURE() << "no order to client " << client;
  }
  std::vector<ClientId> ordered() const {
    std::vector<ClientId> clients;
    for (const Order& order : orders_) clients.push_back(order.what.client);
    return clients;
  }
  std::size_t writes_performed() const {
    std::size_t count = 0;
    for (const auto& call : store_.calls) count += call.request.op_case() == pb::Request::kWrite ? 1 : 0;
    return count;
  }
  std::vector<InodeId> freed() const {
    std::vector<InodeId> ids;
    for (const auto& call : store_.calls) {
      if (call.request.op_case() != pb::Request::kForget) continue;
      EXPECT_EQ(call.request.client(), 0U);
      EXPECT_EQ(call.request.client(), 0U);
      ids.insert(ids.end(), call.request.forget().ids().begin(), call.request.forget().ids().end());
    }
    return ids;
  }

  std::uint64_t seq_ = 0;
  std::set<ClientId> behind_;  // whom an order may not have reached yet, though they are heard
  bool follow_at_once_ = false;
  std::deque<Answer> answers_;
  std::deque<Order> orders_;
  Reactor reactor_;
  FakeExecutor store_;
  OpenTable opens_;
  LockTable locks_;
  Coherence coherence_;
};

}  // namespace sharefs::test
