// A store mounted for real in the test's own process: FrontEnd -> Spy -> Coherence -> Store, on a reactor of
// its own.
#pragma once

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fs/coherence.h"
#include "fs/front_end.h"
#include "fs/inode_table.h"
#include "fs/live_state.h"
#include "fs/store.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {

// Notes every request that passes, and holds those that the test wants held.
class Spy final : public Executor {
 public:
  explicit Spy(Executor& target) : target_(target) {}

  void execute(const pb::Request& request, Bytes data, Reply reply) override {
    const std::lock_guard lock(mutex_);
    if (noting_) seen_.push_back(request);
    if (tell_) {
      reply = [this, request, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
        pb::Outcome told = outcome;
        tell_(request, told);
        reply(told, bytes);
      };
    }
    if (changed_meanwhile_) {
      reply = [this, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
        pb::Outcome told = outcome;
        if (outcome.count() > 0 && changed_meanwhile_) {
          changed_meanwhile_();
          told.set_invalidate(true);
        }
        reply(told, bytes);
      };
    }
    if (request.op_case() == held_kind_) {
      held_.push_back({request, std::string(as_text(data)), std::move(reply)});
    } else {
      target_.execute(request, data, std::move(reply));
    }
  }

  // --- any thread
  void set_noting(bool noting) { noting_ = noting; }
  void hold(pb::Request::OpCase kind) {
    const std::lock_guard lock(mutex_);
    held_kind_ = kind;
  }
  std::vector<pb::Request> seen(pb::Request::OpCase kind) {
    const std::lock_guard lock(mutex_);
    std::vector<pb::Request> matching;
    for (const auto& request : seen_) {
      if (request.op_case() == kind) matching.push_back(request);
    }
    return matching;
  }
  std::vector<pb::Request> all() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    seen_.clear();
  }
  std::size_t held() {
    const std::lock_guard lock(mutex_);
    return held_.size();
  }

  // --- reactor thread
  // Somebody else changes an inode just before a write to it is answered; empty: nobody does.
  void change_meanwhile(std::function<void()> change) { changed_meanwhile_ = std::move(change); }
  // What is answered says more than the store does.
  void tell(std::function<void(const pb::Request&, pb::Outcome&)> tell) { tell_ = std::move(tell); }
  void let_go() {
    std::vector<Held> held;
    {
      const std::lock_guard lock(mutex_);
      held_kind_ = pb::Request::OP_NOT_SET;
      held = std::exchange(held_, {});
    }
    for (auto& one : held) target_.execute(one.request, as_bytes(one.data), std::move(one.reply));
  }

 private:
  struct Held {
    pb::Request request;
    std::string data;
    Reply reply;
  };
  Executor& target_;
  std::recursive_mutex mutex_;  // a reply may ask for something itself
  std::atomic<bool> noting_ = true;
  std::vector<pb::Request> seen_;
  std::vector<Held> held_;
  std::function<void()> changed_meanwhile_;
  std::function<void(const pb::Request&, pb::Outcome&)> tell_;
  pb::Request::OpCase held_kind_ = pb::Request::OP_NOT_SET;
};

class MountedStore {
 public:
  static constexpr std::uint64_t kClient = 77;

  // `over_store`: the mountpoint is the store itself.
  explicit MountedStore(bool over_store = false) : over_store_(over_store) {
    std::filesystem::create_directory(store_path());
    std::filesystem::create_directory(directory_.path() / "mnt");
    std::filesystem::permissions(directory_.path(), std::filesystem::perms(0755));
    inodes_ = std::make_unique<InodeTable>(
        directory_.path() / "state.db", directory_.path() / "journal",
        UniqueFd(::open(store_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
    inodes_->set_epoch(1);
    store_ = std::make_unique<Store>(Store::Options{store_path(), "test", 512}, *inodes_, opens_, locks_,
                                     workers_);
    coherence_ = std::make_unique<Coherence>(
        *store_, opens_, locks_, reactor_,
        [this](const RecallOrder& order, std::function<void(bool)> done) { recall(order, std::move(done)); });
    spy_ = std::make_unique<Spy>(*coherence_);
    pb::Request attach;
    attach.set_client(kClient);
    attach.set_seq(1ULL << 62);
    attach.mutable_attach()->set_site("here");
    coherence_->execute(attach, {}, [](const pb::Outcome&, Bytes) {});
  }

  ~MountedStore() { stop(); }
  MountedStore(const MountedStore&) = delete;
  MountedStore& operator=(const MountedStore&) = delete;

  void mount(FrontEnd::Options options = {}) {
    options.mountpoint = mountpoint();
    options.data_set = "test";
    front_end_ = std::make_unique<FrontEnd>(options, reactor_, *spy_, kClient, [this] { unmounted_ = true; });
    front_end_->set_policy(kSharedMount);
    thread_ = std::jthread([this] { reactor_.run(); });
  }

  // Unmounts and ends the reactor, on its own thread as in production.
  void stop() {
    if (!thread_.joinable()) return;
    on_reactor([this] { front_end_.reset(); });
    reactor_.stop();
    thread_.join();
  }

  // Runs it on the reactor thread and waits.
  void on_reactor(const std::function<void()>& task) {
    std::promise<void> done;
    reactor_.post([&] {
      task();
      done.set_value();
    });
    done.get_future().wait();
  }

  std::filesystem::path store_path() const { return directory_.path() / "store"; }
  std::filesystem::path mountpoint() const { return over_store_ ? store_path() : directory_.path() / "mnt"; }
  std::string path(const std::string& name) const { return mountpoint() / name; }
  std::string below(const std::string& name) const { return store_path() / name; }
  FrontEnd& front_end() { return *front_end_; }
  Spy& spy() { return *spy_; }
  bool unmounted() const { return unmounted_; }

 private:
  void recall(const RecallOrder& order, std::function<void(bool)> done) {
    if (front_end_ == nullptr || order.sole) {  // the tests choose the policy themselves
      done(false);
    } else if (order.orphan) {
      done(front_end_->watch_orphan(order.id));
    } else {
      front_end_->invalidate(order.id, order.offset, order.length, [done = std::move(done)] { done(true); });
    }
  }

  const bool over_store_;
  TemporaryDirectory directory_;
  Reactor reactor_;
  Workers workers_{reactor_, 1};
  OpenTable opens_;
  LockTable locks_;
  std::unique_ptr<InodeTable> inodes_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Coherence> coherence_;
  std::unique_ptr<Spy> spy_;
  std::unique_ptr<FrontEnd> front_end_;
  std::atomic<bool> unmounted_ = false;
  std::jthread thread_;
};

}  // namespace sharefs
