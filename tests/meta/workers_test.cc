#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "meta/reactor.h"

namespace sharefs {
namespace {

using std::chrono::milliseconds;

TEST(Workers, work_runs_elsewhere_and_done_on_the_reactor_thread) {
  Reactor reactor;
  Workers workers(reactor, 2);
  bool elsewhere = false;
  bool home = false;
  workers.submit([&] { elsewhere = !reactor.on_reactor_thread(); },
                 [&] {
                   home = reactor.on_reactor_thread();
                   reactor.stop();
                 });
  reactor.run();
  EXPECT_TRUE(elsewhere);
  EXPECT_TRUE(home);
}

TEST(Workers, one_worker_keeps_the_order_and_many_run_side_by_side) {
  Reactor reactor;
  Workers one(reactor, 1);
  std::vector<int> order;
  for (int i = 0; i < 100; ++i)
    one.submit([] {},
               [&order, i, &reactor] {
                 order.push_back(i);
                 if (i == 99) reactor.stop();
               });
  reactor.run();
  ASSERT_EQ(order.size(), 100U);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));

  Workers two(reactor, 2);
  std::atomic<int> inside = 0;
  int met = 0;
  for (int i = 0; i < 2; ++i)
    two.submit(
        [&] {
          ++inside;
          while (inside < 2) std::this_thread::yield();
        },
        [&] {
          if (++met == 2) reactor.stop();
        });
  reactor.run();
  EXPECT_EQ(met, 2);
}

TEST(Workers, the_destructor_finishes_what_was_submitted) {
  Reactor reactor;
  std::atomic<int> finished = 0;
  {
    Workers workers(reactor, 1);
    for (int i = 0; i < 10; ++i)
      workers.submit(
          [&] {
            std::this_thread::sleep_for(milliseconds(1));
            ++finished;
          },
          [] {});
  }
  EXPECT_EQ(finished, 10);
}

TEST(Workers, what_work_throws_comes_out_of_run) {
  Reactor reactor;
  Workers workers(reactor, 1);
  bool done = false;
  workers.submit([] { throw std::runtime_error("on a worker"); }, [&] { done = true; });
  EXPECT_THROW(reactor.run(), std::runtime_error);
  EXPECT_FALSE(done);
}

}  // namespace
}  // namespace sharefs
