// Promises of names and attributes, and the caches that rely on them: after a change has been acknowledged,
// nobody is shown what was before it.
#include "fs/promises.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fs/name_cache.h"
#include "tests/fs/fake_executor.h"

namespace sharefs {
namespace {

using test::Answer;
using test::request_of;

constexpr ClientId kOwn = 9;
constexpr std::size_t kOwnSite = 3;
constexpr Epoch kEpoch = 3;

class NoLog final : public ChangeObserver {
 public:
  void changing(const Change& /*change*/) override {}
};

// One directory of files, whose sizes are how often they were written; or what was written into them, if that
// was anything.
class TinyStore final : public Executor {
 public:
  void execute(const pb::Request& request, Bytes data, Reply reply) override {
    pb::Outcome outcome;
    switch (request.op_case()) {
      case pb::Request::kLookup: {
        const auto found = names.find(request.lookup().name());
        if (found == names.end())
          outcome.set_error(ENOENT);
        else
          fill(*outcome.mutable_attr(), found->second);
        break;
      }
      case pb::Request::kGetattr:
        fill(*outcome.mutable_attr(), request.getattr().id());
        break;
      case pb::Request::kReaddir:
        for (const auto& [name, id] : names) {
          auto& entry = *outcome.add_entries();
          entry.set_name(name);
          if (request.readdir().plus()) fill(*entry.mutable_attr(), id);
          entry.mutable_attr()->set_bare(request.readdir().bare());
        }
        break;
      case pb::Request::kCreate:
        change(kRootInode);
        names[request.create().name()] = ++last_id;
        fill(*outcome.mutable_attr(), last_id);
        break;
      case pb::Request::kUnlink: {
        const auto found = names.find(request.unlink().name());
        change(kRootInode);
        if (found == names.end()) {
          outcome.set_error(ENOENT);
        } else {
          change(found->second);
          outcome.add_orphaned(found->second);
          names.erase(found);
        }
        break;
      }
      case pb::Request::kWrite:
        if (no_space) return later(request.write().id(), reply);
        change(request.write().id());
        if (data.empty()) break;
        versions[request.write().id()].emplace_back(as_text(data));
        sizes[request.write().id()] = data.size();
        outcome.set_count(data.size());
        break;
      case pb::Request::kRead: {
        const auto& all = versions[request.read().id()];
        return reply(outcome, all.empty() ? Bytes() : as_bytes(all.back()));
      }
      case pb::Request::kSetxattr:
        change(request.setxattr().id());
        break;
      case pb::Request::kFallocate:
        return later(request.fallocate().id(), reply);
      default:
        break;
    }
    reply(outcome, {});
  }

  void later(InodeId id, const Reply& reply) {
    observer->changing({.kind = Change::Kind::attributes, .id = id});
    end_work = [this, id, reply] {
      ++sizes[id];
      reply({}, {});
    };
  }
  void change(InodeId id) {
    observer->changing({.kind = Change::Kind::attributes, .id = id});
    ++sizes[id];
  }
  void fill(pb::Attr& attr, InodeId id) {
    attr.set_id(id);
    attr.set_mode(id == kRootInode ? S_IFDIR : S_IFREG);
    attr.set_nlink(1);
    attr.set_size(sizes[id]);
  }

  ChangeObserver* observer = nullptr;
  bool no_space = false;
  std::function<void()> end_work;
  std::map<std::string, InodeId> names;
  std::map<InodeId, std::uint64_t> sizes;
  std::map<InodeId, std::vector<std::string>> versions;
  InodeId last_id = 100;
};

class PromisesTest : public ::testing::Test {
 protected:
  struct Site;
  // What crosses the network, in the order of each direction.
  using Wire = std::deque<std::function<void()>>;
  class Asking final : public Executor {
   public:
    Asking(PromisesTest& test, std::size_t index) : test_(test), index_(index) {}
    void execute(const pb::Request& request, Bytes data, Reply reply) override {
      test_.up[index_].push_back(
          [this, request, data = std::string(as_text(data)), reply = std::move(reply)] {
            test_.promises.execute(
                request, as_bytes(data),
                [this, reply, slow = request.has_read()](const pb::Outcome& outcome, Bytes result) {
                  // A worker reads: its answer may come after others.
                  auto& wire = slow ? test_.workers[index_] : test_.down[index_];
                  wire.push_back([reply, outcome, result = std::string(as_text(result))] {
                    reply(outcome, as_bytes(result));
                  });
                });
          });
    }

   private:
    PromisesTest& test_;
    std::size_t index_;
  };
  // The last one is the owner's own: it asks without a network.
  struct Site {
    Site(PromisesTest& test, std::size_t index)
        : asking(test, index),
          cache(index == kOwnSite ? static_cast<Executor&>(test.promises) : asking,
                [this] { return trusted ? std::chrono::hours(1) : std::chrono::hours(0); }) {
      cache.believe(kEpoch, index != kOwnSite);
    }
    Asking asking;
    bool trusted = true;
    NameCache cache;
    // What the kernel believes by itself: sizes. It takes no reply to a look during which a change of its own
    // ended.
    std::map<InodeId, std::uint64_t> kernel;
    unsigned own_changes = 0;
  };

  PromisesTest() {
    store.observer = &promises;
    store.names["old"] = ++store.last_id;
    opens.attach(kOwn, "own");
    for (std::size_t i = 0; i < 3; ++i) opens.attach(i + 1, "site");
    for (std::size_t i = 0; i <= kOwnSite; ++i) sites.push_back(std::make_unique<Site>(*this, i));
    promises.begin(kEpoch, {});
    deliver_all();
    recalls = 0;
  }

  void recall(const RecallOrder& order, std::function<void(bool)> done) {
    ++recalls;
    if (order.client == kOwn) {
      NameCache& cache = sites[kOwnSite]->cache;
      if (order.all_names) cache.forget_all();
      cache.forget(order.names, order.stamp);
      const auto lent = cache.take_lent(order.all_names ? nullptr : &order.names);
      if (lent.empty()) return done(false);
      notifier.push_back([this, lent, done = std::move(done)] {
        for (const InodeId id : lent) sites[kOwnSite]->kernel.erase(id);
        done(false);
      });
      return;
    }
    const auto index = static_cast<std::size_t>(order.client - 1);
    down[index].push_back([this, index, order, done = std::move(done)] {
      if (order.all_names) sites[index]->cache.forget_all();
      sites[index]->cache.forget(order.names, order.stamp);
      for (const InodeId id : sites[index]->cache.take_lent(order.all_names ? nullptr : &order.names))
        sites[index]->kernel.erase(id);
      if (!silent.contains(index)) up[index].push_back([done] { done(false); });
    });
  }
  void deliver(Wire& wire) {
    const auto task = std::move(wire.front());
    wire.pop_front();
    task();
    if (delivered) delivered();
  }
  void deliver_all() {
    for (bool again = true; again;) {
      again = false;
      for (auto* wires : {&up, &workers, &down})
        for (auto& wire : *wires)
          while (!wire.empty()) {
            deliver(wire);
            again = true;
          }
      for (; !notifier.empty(); again = true) deliver(notifier);
    }
  }
  void pass_time(Reactor::Clock::duration time) {
    reactor.after(time, [this] { reactor.stop(); });
    reactor.run();
  }

  Answer& ask(std::size_t site, const pb::Request& request) {
    Answer& answer = answers.emplace_back();
    if (site == kOwn)
      promises.execute(request, {}, answer.reply());
    else
      sites[site]->cache.execute(request, {}, answer.reply());
    return answer;
  }
  // Somebody is told of the inode while the change waits, and may not believe it when that is acknowledged.
  void expect_called_back(InodeId id, const Answer& change) {
    ask(0, getattr(1, id));
    deliver_all();
    ASSERT_TRUE(ask(0, getattr(1, id)).given());
    store.end_work();
    EXPECT_FALSE(change.given());
    deliver_all();
    EXPECT_TRUE(change.given());
    EXPECT_FALSE(ask(0, getattr(1, id)).given());
  }
  static pb::Request lookup(ClientId client, const std::string& name) {
    auto request = request_of(client, 1);
    request.mutable_lookup()->set_parent(kRootInode);
    request.mutable_lookup()->set_name(name);
    return request;
  }
  static pb::Request getattr(ClientId client, InodeId id) {
    auto request = request_of(client, 1);
    request.mutable_getattr()->set_id(id);
    return request;
  }
  static pb::Request list(ClientId client) {
    auto request = request_of(client, 1);
    request.mutable_readdir()->set_id(kRootInode);
    request.mutable_readdir()->set_max_bytes(1 << 15);
    return request;
  }
  static pb::Request create(ClientId client, const std::string& name) {
    auto request = request_of(client, 1);
    request.mutable_create()->set_parent(kRootInode);
    request.mutable_create()->set_name(name);
    return request;
  }
  static pb::Request unlink(ClientId client, const std::string& name) {
    auto request = request_of(client, 1);
    request.mutable_unlink()->set_parent(kRootInode);
    request.mutable_unlink()->set_name(name);
    return request;
  }
  static pb::Request write(ClientId client, InodeId id) { return test::write_of(client, 1, id, 0, 1); }

  Reactor reactor;
  NoLog log;
  OpenTable opens;
  TinyStore store;
  Promises promises{
      store,
      log,
      opens,
      kOwn,
      reactor,
      [this](const RecallOrder& order, std::function<void(bool)> done) { recall(order, std::move(done)); },
      std::chrono::milliseconds(100)};
  std::vector<std::unique_ptr<Site>> sites;
  std::array<Wire, 3> up, down, workers;
  std::function<void()> delivered;  // called after each message
  Wire notifier;                    // what the owner's kernel has been told to drop
  std::set<std::size_t> silent;     // sites that do not answer recalls
  std::deque<Answer> answers;
  int recalls = 0;
};

TEST_F(PromisesTest, WhatWasLookedAtOnceIsAnsweredWithoutAsking) {
  ask(0, lookup(1, "old"));
  ask(0, lookup(1, "none"));
  deliver_all();
  const auto& again = ask(0, lookup(1, "old"));
  const auto& none = ask(0, lookup(1, "none"));
  const auto& attr = ask(0, getattr(1, store.names["old"]));
  EXPECT_TRUE(again.given() && none.given() && attr.given());
  EXPECT_EQ(again.outcome.attr().id(), store.names["old"]);
  EXPECT_EQ(none.error(), ENOENT);
}

TEST_F(PromisesTest, WhatWasListedIsKnown) {
  const InodeId id = store.names["old"];
  ask(0, list(1));
  deliver_all();
  const auto& look = ask(0, lookup(1, "old"));
  EXPECT_TRUE(look.given());
  EXPECT_EQ(look.outcome.attr().id(), id);
  EXPECT_FALSE(ask(0, lookup(1, "none")).given()) << "a listing does not tell what is not there";
  const auto& written = ask(kOwn, write(kOwn, id));
  EXPECT_FALSE(written.given());
  deliver_all();
  EXPECT_TRUE(written.given());
  EXPECT_FALSE(ask(0, getattr(1, id)).given());
}

TEST_F(PromisesTest, WhatWasListedWithoutXattrsHasNoneUntilTheyAreSet) {
  const InodeId id = store.names["old"];
  const auto get = [&](const std::string& name) {
    auto request = request_of(1, 1);
    request.mutable_getxattr()->set_id(id);
    request.mutable_getxattr()->set_name(name);
    return request;
  };
  auto names = request_of(1, 1);
  names.mutable_listxattr()->set_id(id);
  ask(0, list(1));
  deliver_all();
  EXPECT_EQ(ask(0, get("system.posix_acl_access")).error(), ENODATA);
  EXPECT_TRUE(ask(0, names).given());
  EXPECT_FALSE(ask(0, get("user.a")).given()) << "the store may have no such attributes at all";
  ask(0, write(1, id));
  deliver_all();
  EXPECT_TRUE(ask(0, get("security.capability")).given()) << "writing gives no attributes";
  auto set = request_of(1, 1);
  set.mutable_setxattr()->set_id(id);
  set.mutable_setxattr()->set_name("user.a");
  ask(0, set);
  deliver_all();
  EXPECT_FALSE(ask(0, get("security.capability")).given());
  EXPECT_FALSE(ask(0, names).given());
}

TEST_F(PromisesTest, AChangeWaitsUntilOthersHaveForgotten) {
  const InodeId id = store.names["old"];
  ask(0, lookup(1, "old"));
  deliver_all();
  const auto& written = ask(kOwn, write(kOwn, id));
  EXPECT_FALSE(written.given());
  deliver_all();
  EXPECT_TRUE(written.given());
  const auto& look = ask(0, getattr(1, id));
  EXPECT_FALSE(look.given()) << "it is not known any more";
  deliver_all();
  EXPECT_EQ(look.outcome.attr().size(), 1U);
  const auto& unread = ask(kOwn, write(kOwn, 101 + 50));
  EXPECT_TRUE(unread.given()) << "nobody was told of it";
}

TEST_F(PromisesTest, ASilentHolderIsWaitedForOnlyForItsLease) {
  ask(0, lookup(1, "old"));
  deliver_all();
  silent.insert(0);
  const auto& written = ask(kOwn, write(kOwn, store.names["old"]));
  deliver_all();
  EXPECT_FALSE(written.given());
  pass_time(std::chrono::milliseconds(150));
  EXPECT_TRUE(written.given());
}

TEST_F(PromisesTest, AnUntrustedOwnerIsAskedAgain) {
  ask(0, lookup(1, "old"));
  deliver_all();
  sites[0]->trusted = false;
  EXPECT_FALSE(ask(0, lookup(1, "old")).given());
  EXPECT_FALSE(sites[0]->cache.is_there(store.names["old"], S_IFREG));
  sites[0]->trusted = true;
  EXPECT_TRUE(sites[0]->cache.is_there(store.names["old"], S_IFREG));
}

TEST_F(PromisesTest, ANewOwnerAcknowledgesNoChangeBeforeAllHaveForgotten) {
  ask(0, lookup(1, "old"));
  deliver_all();
  promises.end();
  promises.begin(kEpoch + 1, {1, 2});
  silent.insert(1);
  const auto& written = ask(kOwn, write(kOwn, store.names["old"]));
  deliver_all();
  EXPECT_FALSE(written.given()) << "the second site has not answered";
  EXPECT_FALSE(ask(0, lookup(1, "old")).given()) << "what the earlier owner promised is void";
  pass_time(std::chrono::milliseconds(150));
  EXPECT_TRUE(written.given());
}

// Its stamps begin anew, since its epoch is the same.
TEST_F(PromisesTest, NothingIsPromisedWhoseHolderTheNextOwnerWouldNotKnow) {
  promises.pause(true);
  ask(0, getattr(1, 101));
  deliver_all();
  EXPECT_FALSE(ask(0, getattr(1, 101)).given());
  deliver_all();
  promises.pause(false);  // it stays the owner
  ask(0, getattr(1, 101));
  deliver_all();
  EXPECT_TRUE(ask(0, getattr(1, 101)).given());
}

TEST_F(PromisesTest, AnotherProcessOfTheOwnerWaitsLongerForSitesThatAreHeard) {
  using std::chrono::milliseconds;
  bool heard = true, recovered = false;
  Promises another(
      store, log, opens, kOwn, reactor, [](const RecallOrder&, auto) {}, milliseconds(50));
  another.on_recovered([&] { recovered = true; });
  another.on_lease([&] { return milliseconds(heard ? 20 : 0); });
  another.begin(kEpoch, {0});
  pass_time(milliseconds(200));
  EXPECT_FALSE(recovered);
  heard = false;
  pass_time(milliseconds(100));
  EXPECT_TRUE(recovered);
}

TEST_F(PromisesTest, AnotherProcessOfTheOwnerIsBelieved) {
  for (int i = 0; i < 10; ++i) {
    ask(0, lookup(1, "old"));
    deliver_all();
    ask(kOwn, write(kOwn, store.names["old"]));
    deliver_all();
  }
  promises.end();
  promises.begin(kEpoch, {1, 2, 3});
  deliver_all();
  ask(0, lookup(1, "old"));
  deliver_all();
  EXPECT_TRUE(ask(0, lookup(1, "old")).given());
}

// Its kernel goes on changing the same names, which it would not before an answer.
TEST_F(PromisesTest, AChangeWhoseCallerWasKilledIsNotTakenForTheNewestWord) {
  const InodeId id = store.names["old"];
  ask(1, getattr(2, id));
  ask(0, lookup(1, "old"));
  deliver_all();
  silent.insert(1);
  auto killed = unlink(1, "old");
  killed.set_seq(7);
  ask(0, killed);
  deliver_all();
  auto cancel = request_of(1, 8);
  cancel.mutable_cancel()->set_seq(7);
  ask(0, cancel);
  ask(0, create(1, "old"));
  deliver_all();
  ask(0, lookup(1, "old"));
  deliver_all();
  pass_time(std::chrono::milliseconds(110));
  deliver_all();
  const auto& seen = ask(0, lookup(1, "old"));
  deliver_all();
  ASSERT_TRUE(seen.given());
  EXPECT_EQ(seen.error(), 0);
  EXPECT_NE(seen.outcome.attr().id(), id);
}

TEST_F(PromisesTest, WhoseChangeFailedForgetsToo) {
  ask(0, lookup(1, "none"));
  deliver_all();
  ASSERT_TRUE(ask(0, lookup(1, "none")).given());
  const auto& failed = ask(0, unlink(1, "none"));  // changes the directory all the same
  deliver_all();
  EXPECT_EQ(failed.error(), ENOENT);
  EXPECT_FALSE(ask(0, lookup(1, "none")).given());
}

TEST_F(PromisesTest, WhoIsToldWhileAWorkerChangesItIsCalledBack) {
  const InodeId id = store.names["old"];
  auto fallocate = request_of(kOwn, 1);
  fallocate.mutable_fallocate()->set_id(id);
  const auto& done = ask(kOwn, fallocate);
  EXPECT_FALSE(done.given());
  expect_called_back(id, done);
}

TEST_F(PromisesTest, WhoComesWhileAWriteWaitsIsCalledBack) {
  const InodeId id = store.names["old"];
  for (ClientId client = 1; client <= 3; ++client) opens.detach(client);
  store.no_space = true;
  const auto& done = ask(kOwn, write(kOwn, id));
  for (ClientId client = 1; client <= 3; ++client) opens.attach(client, "site");
  expect_called_back(id, done);
}

TEST_F(PromisesTest, AnOutcomeThatARecallHasOvertakenIsNotKept) {
  const InodeId id = store.names["old"];
  const auto& look = ask(0, getattr(1, id));
  deliver(up[0]);
  ask(kOwn, write(kOwn, id));
  ASSERT_EQ(down[0].size(), 2U);
  std::swap(down[0][0], down[0][1]);
  deliver_all();
  EXPECT_EQ(look.outcome.attr().size(), 0U);
  const auto& again = ask(0, getattr(1, id));
  deliver_all();
  EXPECT_EQ(again.outcome.attr().size(), 1U);
}

// Everything in every order that the network allows. Whatever is answered was true at some time after the
// last change that had been acknowledged when it was asked.
TEST_F(PromisesTest, NobodyIsShownWhatWasBeforeAnAcknowledgedChange) {
  const auto seed = std::random_device()();
  std::mt19937 random(seed);
  SCOPED_TRACE("seed " + std::to_string(seed));
  const auto pick = [&](std::size_t below) {
    return std::uniform_int_distribution<std::size_t>(0, below - 1)(random);
  };
  const std::vector<std::string> names{"old", "a", "b", "c"};
  // Per name: every inode that it has had (0: none), and up to where that was acknowledged.
  std::map<std::string, std::vector<InodeId>> history;
  std::map<std::string, std::size_t> acknowledged;
  for (const auto& name : names) history[name] = {store.names.contains(name) ? store.names[name] : 0};
  std::map<InodeId, std::uint64_t> written;  // acknowledged sizes
  std::array<bool, 4> changing{};            // a kernel changes a directory, and looks into it, one at a time
  std::array<int, 4> looking{};
  int answered = 0, asked = 0, lent = 0;
  const auto update = [&] {
    for (const auto& name : names) {
      const InodeId now = store.names.contains(name) ? store.names[name] : 0;
      if (history[name].back() != now) history[name].push_back(now);
    }
  };
  delivered = update;
  for (int step = 0; step < 70'000; ++step) {
    const auto wire = pick(13);
    if (wire == 12) {
      if (!notifier.empty()) deliver(notifier);
      continue;
    }
    if (wire < 3) {
      if (!up[wire].empty()) deliver(up[wire]);
      continue;
    }
    if (wire < 6) {
      if (!down[wire - 3].empty()) deliver(down[wire - 3]);
      continue;
    }
    const auto who = pick(4);
    const ClientId client = who == kOwnSite ? kOwn : who + 1;
    const auto send = [&](const pb::Request& request, std::function<void(const pb::Outcome&)> check) {
      ++asked;
      Reply reply = [check = std::move(check), &answered](const pb::Outcome& outcome, Bytes) {
        ++answered;
        check(outcome);
      };
      sites[who]->cache.execute(request, {}, std::move(reply));
      update();
    };
    const auto& name = names[pick(names.size())];
    const auto op = pick(7);
    if (op == 6 && !changing[who]) {
      ++looking[who];
      send(list(client), [&, who, from = acknowledged](const pb::Outcome& outcome) {
        --looking[who];
        for (const auto& entry : outcome.entries()) {
          if (entry.attr().id() == 0) continue;  // without attributes: at the owner
          const auto& all = history[entry.name()];
          const auto least = from.contains(entry.name()) ? from.at(entry.name()) : 0;
          EXPECT_NE(std::find(all.begin() + static_cast<long>(least), all.end(), entry.attr().id()),
                    all.end())
              << who << " is listed " << entry.name() << " as it was before an acknowledged change";
        }
      });
    } else if (op < 2 && !changing[who]) {
      ++looking[who];
      send(lookup(client, name), [&, who, name, from = acknowledged[name]](const pb::Outcome& outcome) {
        --looking[who];
        const InodeId seen = outcome.error() == ENOENT ? 0 : outcome.attr().id();
        const auto& all = history[name];
        EXPECT_NE(std::find(all.begin() + static_cast<long>(from), all.end(), seen), all.end())
            << who << " is shown " << name << " as " << seen << ", from before an acknowledged change; now "
            << all.back();
      });
    } else if (op == 2) {
      const InodeId id = pick(3) == 0 ? kRootInode : 101 + pick(store.last_id - 100);
      const unsigned before = sites[who]->own_changes;
      send(getattr(client, id), [&, who, id, before, least = written[id]](const pb::Outcome& outcome) {
        EXPECT_GE(outcome.attr().size(), least) << "of " << id;
        if (sites[who]->cache.lend(outcome.attr(), true).count() == 0) return;
        ++lent;
        if (sites[who]->own_changes == before) sites[who]->kernel[id] = outcome.attr().size();
      });
    } else if (op == 3 && !changing[who] && looking[who] == 0) {
      changing[who] = true;
      const InodeId id = 101 + pick(store.last_id - 100);
      send(write(client, id), [&, who, id](const pb::Outcome&) {
        changing[who] = false;
        ++sites[who]->own_changes;
        sites[who]->kernel.erase(id);
        ++written[id];
      });
    } else if (!changing[who] && looking[who] == 0) {
      changing[who] = true;
      const bool makes = op == 4;
      const auto request = makes ? create(client, name) : unlink(client, name);
      send(request, [&, who, name, makes](const pb::Outcome& outcome) {
        changing[who] = false;
        if (outcome.error() != 0) return;
        update();
        const auto& all = history[name];
        const auto found =
            std::find(all.begin(), all.end(), makes ? outcome.attr().id() : outcome.orphaned(0));
        const auto index = static_cast<std::size_t>(found - all.begin()) + (makes ? 0 : 1);
        ASSERT_LT(index, all.size());
        acknowledged[name] = std::max(acknowledged[name], index);
      });
    }
    for (const auto& site : sites)
      for (const auto& [id, size] : site->kernel)
        EXPECT_GE(size, written[id]) << "a kernel believes what " << id
                                     << " was before an acknowledged change";
    if (HasFailure()) break;
  }
  deliver_all();
  EXPECT_EQ(answered, asked);
  EXPECT_GT(recalls, 100);
  EXPECT_GT(lent, 100);
}

TEST_F(PromisesTest, ASmallFileIsReadWithoutAskingUntilItChanges) {
  const InodeId id = store.names["old"];
  const auto read = [&](std::uint64_t offset = 0, std::uint32_t size = 4096) -> std::optional<std::string> {
    std::optional<std::string> result;
    auto request = request_of(1, 1);
    request.mutable_read()->set_id(id);
    request.mutable_read()->set_offset(offset);
    request.mutable_read()->set_size(size);
    sites[0]->cache.execute(request, {}, [&](const pb::Outcome&, Bytes bytes) { result = as_text(bytes); });
    auto answer = result;
    deliver_all();
    return answer;
  };
  const auto put = [&](ClientId client, const std::string& data, std::uint64_t offset = 0) {
    Answer& answer = answers.emplace_back();
    const auto request = test::write_of(client, 1, id, offset, static_cast<std::uint32_t>(data.size()));
    if (client == kOwn)
      promises.execute(request, as_bytes(data), answer.reply());
    else
      sites[0]->cache.execute(request, as_bytes(data), answer.reply());
    deliver_all();
  };
  put(kOwn, "first");
  EXPECT_EQ(read(), std::nullopt);
  EXPECT_EQ(read(), std::nullopt) << "its attributes were not promised when it was read";
  ask(0, lookup(1, "old"));
  deliver_all();
  EXPECT_EQ(read(2), std::nullopt) << "not read from the start";
  EXPECT_EQ(read(), std::nullopt);
  EXPECT_EQ(read(), "first");
  EXPECT_EQ(read(2, 2), "rs");
  EXPECT_EQ(read(9), "");
  put(kOwn, "second");
  EXPECT_EQ(read(), std::nullopt);
  ask(0, lookup(1, "old"));
  deliver_all();
  put(1, "third!");
  EXPECT_EQ(read(), "third!") << "what this mount wrote itself";
  put(1, "4th");
  EXPECT_EQ(read(), std::nullopt) << "some of the bytes before may be left";
  put(1, "fifth", 1);
  EXPECT_EQ(read(), std::nullopt);
  ask(0, getattr(1, id));
  deliver_all();
  read();
  EXPECT_NE(read(), std::nullopt);
  sites[0]->trusted = false;
  EXPECT_EQ(read(), std::nullopt);
  sites[0]->trusted = true;
  put(1, std::string(ContentCache::kLongest + 1, 'x'));
  read(0, 1 << 20);
  EXPECT_EQ(read(), std::nullopt) << "it is not small any more";
}

// All contents have one length, so that nothing but the promise tells one from another.
TEST_F(PromisesTest, NobodyReadsWhatWasBeforeAnAcknowledgedWrite) {
  const auto seed = std::random_device()();
  std::mt19937 random(seed);
  SCOPED_TRACE("seed " + std::to_string(seed));
  const auto pick = [&](std::size_t below) {
    return std::uniform_int_distribution<std::size_t>(0, below - 1)(random);
  };
  store.names["other"] = ++store.last_id;
  const std::array<std::string, 2> names{"old", "other"};
  std::map<InodeId, std::size_t> acknowledged;  // index of the newest version
  const auto index_of = [&](InodeId id, const std::string& content) {
    const auto& all = store.versions[id];
    return static_cast<std::size_t>(all.rend() - std::find(all.rbegin(), all.rend(), content)) - 1;
  };
  for (const auto& name : names) {
    store.versions[store.names[name]] = {"00000000"};
    store.sizes[store.names[name]] = 8;
  }
  unsigned last = 0, reads = 0, sent = 0, asked = 0, answered = 0;
  for (int step = 0; step < 100'000 && !HasFailure(); ++step) {
    const auto what = pick(240);
    if (what < 180) {
      const auto wire = what % 9;
      auto& some = wire < 3 ? up[wire] : wire < 6 ? down[wire - 3] : workers[wire - 6];
      if (!some.empty()) deliver(some);
      continue;
    }
    const auto who = pick(4);
    const ClientId client = who == kOwnSite ? kOwn : who + 1;
    const auto& name = names[pick(names.size())];
    const InodeId id = store.names[name];
    if (!notifier.empty()) deliver(notifier);
    if (what < 208) {
      sites[who]->cache.execute(lookup(client, name), {}, [](const pb::Outcome&, Bytes) {});
    } else if (what < 236) {
      auto request = request_of(client, 1);
      request.mutable_read()->set_id(id);
      request.mutable_read()->set_size(4096);
      ++reads;
      ++asked;
      const std::size_t before = who == kOwnSite ? 0 : up[who].size();
      sites[who]->cache.execute(
          request, {}, [&, who, id, least = acknowledged[id]](const pb::Outcome&, Bytes bytes) {
            ++answered;
            EXPECT_GE(index_of(id, std::string(as_text(bytes))), least)
                << who << " reads " << as_text(bytes) << " from before an acknowledged write";
          });
      if (who == kOwnSite || up[who].size() != before) ++sent;
    } else {
      std::string content = std::to_string(++last);
      content.insert(0, 8 - content.size(), '0');
      ++asked;
      sites[who]->cache.execute(test::write_of(client, 1, id, 0, 8), as_bytes(content),
                                [&, id, content](const pb::Outcome&, Bytes) {
                                  ++answered;
                                  acknowledged[id] = std::max(acknowledged[id], index_of(id, content));
                                });
    }
  }
  deliver_all();
  EXPECT_EQ(answered, asked);
  EXPECT_LT(sent, reads * 9 / 10) << "some are answered without asking";
}

TEST_F(PromisesTest, AttributesAreLentToAKernelThatHoldsTheInode) {
  NameCache& cache = sites[0]->cache;
  const InodeId id = store.names["old"];
  const auto lent = [&](const pb::Request& request, bool held) {
    bool result = false;
    cache.execute(request, {}, [&](const pb::Outcome& outcome, Bytes) {
      result = cache.lend(outcome.attr(), held).count() > 0;
    });
    deliver_all();
    return result;
  };
  EXPECT_FALSE(lent(lookup(1, "old"), false)) << "the kernel may not have the inode yet";
  EXPECT_TRUE(lent(getattr(1, id), true));
  EXPECT_TRUE(lent(lookup(1, "old"), false));
  cache.let_go(id);
  EXPECT_FALSE(lent(lookup(1, "old"), false));
  EXPECT_TRUE(lent(getattr(1, id), true));
  cache.forget_all();
  EXPECT_EQ(cache.take_lent(nullptr), std::vector{id}) << "the owner will recall it all the same";
  EXPECT_TRUE(cache.take_lent(nullptr).empty());
  sites[0]->trusted = false;
  EXPECT_FALSE(lent(getattr(1, id), true));
  pb::Attr copy;
  copy.set_id(id);
  EXPECT_EQ(cache.lend(copy, true).count(), 0) << "not what the cache has handed out";
}

TEST_F(PromisesTest, PagesAreKeptWhileThePromiseLasts) {
  NameCache& cache = sites[0]->cache;
  const InodeId id = store.names["old"];
  EXPECT_FALSE(cache.keeps_pages(id)) << "nothing is promised";
  ask(0, lookup(1, "old"));
  deliver_all();
  EXPECT_FALSE(cache.keeps_pages(id)) << "opened for the first time";
  EXPECT_TRUE(cache.keeps_pages(id));
  ask(1, write(2, id));
  deliver_all();
  EXPECT_FALSE(cache.keeps_pages(id));
  ask(0, getattr(1, id));
  deliver_all();
  EXPECT_FALSE(cache.keeps_pages(id));
  EXPECT_TRUE(cache.keeps_pages(id));
  sites[0]->trusted = false;
  EXPECT_FALSE(cache.keeps_pages(id));
}

// The kernel looks at a name of a directory in which it renames: its answers may overtake the rename's.
class RenameUnderWay : public ::testing::Test {
 protected:
  RenameUnderWay() {
    owner.late = true;
    owner.result = [this](const pb::Request& request) {
      pb::Outcome outcome;
      outcome.set_promise(++stamp_);
      if (request.has_lookup()) {
        outcome.mutable_attr()->set_id(found.at(request.lookup().name()));
        outcome.mutable_attr()->set_mode(S_IFREG);
        outcome.mutable_attr()->set_nlink(1);
      }
      return outcome;
    };
    cache_.believe(kEpoch);
  }
  void look(const char* name) {
    auto request = request_of(1, 1);
    request.mutable_lookup()->set_parent(kRootInode);
    request.mutable_lookup()->set_name(name);
    cache_.execute(request, {}, answers_.emplace_back().reply());
  }
  void rename(std::uint32_t flags) {
    auto request = request_of(1, 2);
    request.mutable_rename()->set_parent(kRootInode);
    request.mutable_rename()->set_name("a");
    request.mutable_rename()->set_new_parent(kRootInode);
    request.mutable_rename()->set_new_name("b");
    request.mutable_rename()->set_flags(flags);
    cache_.execute(request, {}, answers_.emplace_back().reply());
  }
  bool knows(const char* name) {
    const std::size_t asked = owner.calls.size();
    look(name);
    return owner.calls.size() == asked;
  }

  test::FakeExecutor owner;
  std::map<std::string, InodeId> found;  // by the owner

 private:
  std::uint64_t stamp_ = kEpoch << kStampBits;
  NameCache cache_{owner, [] { return std::chrono::hours(1); }};
  std::deque<Answer> answers_;
};

TEST_F(RenameUnderWay, TheOldNameIsNotKeptWhereSomebodySawTheNewOneFirst) {
  found = {{"a", 7}, {"b", 7}};
  look("a");
  owner.answer(0);
  rename(0);
  look("b");
  owner.answer(2);  // it has been performed, and waits for another site
  owner.answer(1);
  EXPECT_FALSE(knows("a")) << "the owner is to say that there is no such name";
}

TEST_F(RenameUnderWay, AnExchangeThatSomebodySawFirstIsNotMadeTwice) {
  found = {{"a", 8}, {"b", 7}};  // as it is behind the exchange
  rename(RENAME_EXCHANGE);
  look("a");
  look("b");
  owner.answer(1);  // it has been performed, and waits for another site
  owner.answer(2);
  owner.answer(0);
  EXPECT_FALSE(knows("a")) << "the owner is to say which is which";
}

TEST_F(PromisesTest, ADirectoryMadeHereIsKnownCompletely) {
  NameCache& cache = sites[0]->cache;
  auto mkdir = request_of(1, 1);
  mkdir.mutable_mkdir()->set_parent(kRootInode);
  mkdir.mutable_mkdir()->set_name("dir");
  test::FakeExecutor owner;
  NameCache alone(owner, [] { return std::chrono::seconds(1); });
  alone.believe(kEpoch);
  std::uint64_t stamp = kEpoch << 40;
  owner.result = [&stamp](const pb::Request& request) {
    pb::Outcome outcome;
    outcome.set_promise(++stamp);
    if (request.has_mkdir() || request.has_create()) {
      outcome.mutable_attr()->set_id(request.has_mkdir() ? 500 : 501);
      outcome.mutable_attr()->set_mode(request.has_mkdir() ? S_IFDIR : S_IFREG);
    }
    return outcome;
  };
  const auto at = [&](const pb::Request& request) {
    Answer& answer = answers.emplace_back();
    alone.execute(request, {}, answer.reply());
    return answer.outcome;
  };
  const auto look = [&](const std::string& name) {
    auto request = request_of(1, 1);
    request.mutable_lookup()->set_parent(500);
    request.mutable_lookup()->set_name(name);
    return at(request);
  };
  at(mkdir);
  EXPECT_EQ(static_cast<int>(look("x").error()), ENOENT);
  auto make = request_of(1, 2);
  make.mutable_create()->set_parent(500);
  make.mutable_create()->set_name("x");
  at(make);
  EXPECT_EQ(look("x").attr().id(), 501U);
  auto move = request_of(1, 3);
  move.mutable_rename()->set_parent(500);
  move.mutable_rename()->set_name("x");
  move.mutable_rename()->set_new_parent(500);
  move.mutable_rename()->set_new_name("y");
  at(move);
  EXPECT_EQ(static_cast<int>(look("x").error()), ENOENT);
  EXPECT_EQ(look("y").attr().id(), 501U);
  EXPECT_EQ(owner.calls.size(), 3U) << "nothing was looked up at the owner";
  alone.forget({500}, stamp + 1);
  look("x");
  EXPECT_EQ(owner.calls.size(), 4U);
  EXPECT_EQ(cache.size(), 0U);
}

}  // namespace
}  // namespace sharefs
