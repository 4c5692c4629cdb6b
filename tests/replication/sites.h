// Sites for tests: Transports on 127.0.0.1 that know each other, on one reactor that runs in the test's
// thread.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "meta/reactor.h"
#include "replication/transport.h"

namespace sharefs::testing {

using namespace std::chrono_literals;

// Runs the reactor until `done` says so; false: it did not within `patience`.
inline bool run_until(Reactor& reactor, const std::function<bool()>& done,
                      std::chrono::milliseconds patience = 10s) {
  const auto deadline = Reactor::Clock::now() + patience;
  bool held = false;
  std::function<void()> look = [&] {
    held = done();
    if (held || Reactor::Clock::now() > deadline) return reactor.stop();
    reactor.after(1ms, look);
  };
  look();
  reactor.run();
  return held;
}

inline void run_for(Reactor& reactor, std::chrono::milliseconds time) {
  run_until(
      reactor, [] { return false; }, time);
}

// A Transport and what it told.
struct TestSite {
  TestSite(Reactor& reactor, SiteName site, CurveKeys the_keys,
           const std::string& listen = "tcp://127.0.0.1:0")
      : name(site),
        keys(std::move(the_keys)),
        transport({.site = site, .listen = listen, .keys = keys}, reactor) {
    transport.on_connection(
        [this](const SiteName& other, const pb::Hello&, Gap gap) {
          ++connected[other];
          if (gap == Gap::broken) ++broken[other];
          if (on_connected) on_connected(other, gap);
        },
        [this](const SiteName& other) { ++lost[other]; });
  }
  TestSite(Reactor& reactor, SiteName site) : TestSite(reactor, std::move(site), make_curve_keys()) {}

  void knows(const TestSite& other) {
    transport.add_site(other.name, other.transport.endpoint(), other.keys.public_key);
  }

  SiteName name;
  CurveKeys keys;
  Transport transport;
  std::map<SiteName, int> connected, broken, lost;
  std::function<void(const SiteName&, Gap)> on_connected;
};

inline void introduce(TestSite& one, TestSite& two) {
  one.knows(two);
  two.knows(one);
}

inline bool run_until_connected(Reactor& reactor, TestSite& one, TestSite& two) {
  return run_until(reactor,
                   [&] { return one.transport.connected(two.name) && two.transport.connected(one.name); });
}

}  // namespace sharefs::testing
