#include "meta/reactor.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace sharefs {
namespace {

using std::chrono::milliseconds;

class Pipe {
 public:
  Pipe() { EXPECT_EQ(::pipe2(ends_, O_NONBLOCK | O_CLOEXEC), 0); }
  ~Pipe() {
    close_reader();
    ::close(ends_[1]);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  int reader() const { return ends_[0]; }
  void fill() { EXPECT_EQ(::write(ends_[1], "x", 1), 1); }
  void drain() {
    char byte = 0;
    EXPECT_EQ(::read(ends_[0], &byte, 1), 1);
  }
  void close_reader() {
    if (ends_[0] >= 0) ::close(ends_[0]);
    ends_[0] = -1;
  }

 private:
  int ends_[2] = {-1, -1};
};

TEST(Reactor, posted_tasks_run_in_the_order_of_the_calls) {
  Reactor reactor;
  std::vector<int> order;
  for (int i = 0; i < 5; ++i) reactor.post([&, i] { order.push_back(i); });
  reactor.post([&] {
    reactor.post([&] { order.push_back(7); });
    reactor.post([&] { reactor.stop(); });
    order.push_back(6);
  });
  reactor.run();
  EXPECT_EQ(order, (std::vector{0, 1, 2, 3, 4, 6, 7}));
}

TEST(Reactor, posts_of_several_threads_all_arrive_each_thread_in_order) {
  constexpr int kThreads = 4;
  constexpr int kPosts = 2000;
  Reactor reactor;
  std::vector<std::vector<int>> got(kThreads);
  int total = 0;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kPosts; ++i)
        reactor.post([&, t, i] {
          got[static_cast<std::size_t>(t)].push_back(i);
          if (++total == kThreads * kPosts) reactor.stop();
        });
    });
  reactor.run();
  for (auto& thread : threads) thread.join();
  for (const auto& numbers : got) EXPECT_TRUE(std::is_sorted(numbers.begin(), numbers.end()));
}

TEST(Reactor, a_task_that_posts_itself_does_not_starve_descriptors_or_timers) {
  Reactor reactor;
  Pipe pipe;
  bool timer = false;
  std::function<void()> again = [&] { reactor.post(again); };
  reactor.watch(pipe.reader(), [&] {
    pipe.drain();
    if (timer) reactor.stop();
  });
  reactor.after(milliseconds(2), [&] {
    timer = true;
    pipe.fill();
  });
  pipe.fill();
  reactor.post(again);
  reactor.run();
  EXPECT_TRUE(timer);
}

TEST(Reactor, timers_run_when_due_in_order_of_their_times) {
  Reactor reactor;
  std::vector<int> order;
  const auto start = Reactor::Clock::now();
  reactor.after(milliseconds(20), [&] {
    order.push_back(20);
    EXPECT_GE(Reactor::Clock::now() - start, milliseconds(20));
    reactor.stop();
  });
  reactor.after(milliseconds(5), [&] { order.push_back(5); });
  reactor.after(milliseconds(0), [&] {
    order.push_back(0);
    reactor.after(milliseconds(10), [&] { order.push_back(10); });
  });
  reactor.run();
  EXPECT_EQ(order, (std::vector{0, 5, 10, 20}));
}

TEST(Reactor, a_timer_can_be_cancelled_also_by_one_that_is_due_with_it) {
  Reactor reactor;
  std::vector<char> ran;
  Reactor::TimerId second = 0;
  Reactor::TimerId first = 0;
  const auto early = reactor.after(milliseconds(0), [&] { ran.push_back('e'); });
  first = reactor.after(milliseconds(1), [&] {
    ran.push_back('1');
    reactor.cancel(first);  // itself: past, ignored
    reactor.cancel(second);
  });
  second = reactor.after(milliseconds(1), [&] { ran.push_back('2'); });
  reactor.after(milliseconds(5), [&] { reactor.stop(); });
  reactor.cancel(early);
  reactor.cancel(early);
  reactor.cancel(0);
  reactor.cancel(12345);
  std::this_thread::sleep_for(milliseconds(3));
  reactor.run();
  EXPECT_EQ(ran, std::vector{'1'});
}

TEST(Reactor, a_descriptor_is_called_until_drained_and_never_after_unwatch) {
  Reactor reactor;
  Pipe pipe;
  int calls = 0;
  pipe.fill();
  pipe.fill();
  reactor.watch(pipe.reader(), [&] {
    pipe.drain();
    if (++calls < 2) return;
    pipe.fill();
    reactor.unwatch(pipe.reader());
    reactor.unwatch(pipe.reader());
    reactor.after(milliseconds(5), [&] { reactor.stop(); });
  });
  reactor.run();
  EXPECT_EQ(calls, 2);
}

TEST(Reactor, a_callback_may_unwatch_another_descriptor_that_is_ready_in_the_same_round) {
  Reactor reactor;
  Pipe a;
  Pipe b;
  int calls = 0;
  a.fill();
  b.fill();
  reactor.watch(a.reader(), [&, keep = std::string(100, 'k')] {
    ++calls;
    reactor.unwatch(b.reader());
    reactor.unwatch(a.reader());
    EXPECT_EQ(keep.size(), 100U);  // what the callback captured lives as long as it runs
    reactor.post([&] { reactor.stop(); });
  });
  reactor.watch(b.reader(), [&, keep = std::string(100, 'k')] {
    ++calls;
    reactor.unwatch(a.reader());
    reactor.unwatch(b.reader());
    EXPECT_EQ(keep.size(), 100U);
    reactor.post([&] { reactor.stop(); });
  });
  reactor.run();
  EXPECT_EQ(calls, 1);
}

TEST(Reactor, a_descriptor_number_used_again_within_a_round_gets_no_event_of_its_predecessor) {
  Reactor reactor;
  Pipe first;
  Pipe other;
  int wrong = 0;
  const auto replace = [&](Pipe& victim) {
    const int number = victim.reader();
    reactor.unwatch(number);
    victim.close_reader();
    auto* fresh = new Pipe;
    EXPECT_EQ(fresh->reader(), number);
    reactor.watch(fresh->reader(), [&] { ++wrong; });
    reactor.after(milliseconds(5), [&reactor, fresh] {
      reactor.unwatch(fresh->reader());
      delete fresh;
      reactor.stop();
    });
  };
  first.fill();
  other.fill();
  bool done = false;
  const auto watch = [&](Pipe& mine, Pipe& victim) {
    reactor.watch(mine.reader(), [&] {
      mine.drain();
      if (!std::exchange(done, true)) replace(victim);
    });
  };
  watch(first, other);
  watch(other, first);
  reactor.run();
  EXPECT_EQ(wrong, 0);
}

TEST(Reactor, the_end_of_a_pipe_counts_as_readable) {
  Reactor reactor;
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_NONBLOCK | O_CLOEXEC), 0);
  reactor.watch(ends[0], [&] { reactor.stop(); });
  ::close(ends[1]);
  reactor.run();
  reactor.unwatch(ends[0]);
  ::close(ends[0]);
}

TEST(Reactor, a_descriptor_that_cannot_be_watched_is_refused) {
  Reactor reactor;
  EXPECT_THROW(reactor.watch(-1, [] {}), std::system_error);
  Pipe pipe;
  reactor.watch(pipe.reader(), [] {});
  EXPECT_THROW(reactor.watch(pipe.reader(), [] {}), std::system_error);
}

TEST(Reactor, sleeps_only_after_every_check_had_nothing_to_do) {
  Reactor reactor;
  int rounds_a = 0;
  int rounds_b = 0;
  reactor.before_sleep([&] { return ++rounds_a < 5; });
  reactor.before_sleep([&] {
    // The other one has work; this one sees that it is asked again as well.
    ++rounds_b;
    return false;
  });
  reactor.after(milliseconds(10), [&] {
    EXPECT_GE(rounds_a, 5);
    EXPECT_EQ(rounds_a, rounds_b);
    EXPECT_LT(rounds_a, 10) << "asked without a reason";
    reactor.stop();
  });
  reactor.run();
}

TEST(Reactor, what_a_check_posts_runs_at_once) {
  Reactor reactor;
  bool posted = false;
  reactor.before_sleep([&] {
    if (!std::exchange(posted, true)) reactor.post([&] { reactor.stop(); });
    return false;
  });
  reactor.post([] {});
  reactor.run();
  EXPECT_TRUE(posted);
}

TEST(Reactor, stop_before_run_and_from_another_thread) {
  Reactor reactor;
  reactor.stop();
  reactor.run();
  std::thread other([&] {
    std::this_thread::sleep_for(milliseconds(5));
    reactor.stop();
  });
  reactor.run();
  other.join();
  reactor.post([&] { reactor.stop(); });
  reactor.run();  // and it can be run again
}

Reactor* interrupted = nullptr;

TEST(Reactor, stop_from_a_signal_handler) {
  Reactor reactor;
  interrupted = &reactor;
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) { interrupted->stop(); };
  ASSERT_EQ(::sigaction(SIGALRM, &action, &before), 0);
  const itimerval soon{{0, 0}, {0, 5000}};
  ASSERT_EQ(::setitimer(ITIMER_REAL, &soon, nullptr), 0);
  reactor.run();
  ::sigaction(SIGALRM, &before, nullptr);
}

TEST(Reactor, run_throws_what_a_task_throws_and_goes_on_with_the_rest_when_run_again) {
  Reactor reactor;
  bool rest = false;
  reactor.post([] { throw std::runtime_error("a task"); });
  reactor.post([&] {
    rest = true;
    reactor.stop();
  });
  EXPECT_THROW(reactor.run(), std::runtime_error);
  EXPECT_FALSE(rest);
  reactor.run();
  EXPECT_TRUE(rest);
}

TEST(Reactor, knows_its_thread) {
  Reactor reactor;
  EXPECT_TRUE(reactor.on_reactor_thread()) << "before run(), the thread that made it";
  std::thread runner([&] { reactor.run(); });
  std::atomic<bool> inside = false;
  reactor.post([&] {
    inside = reactor.on_reactor_thread();
    reactor.stop();
  });
  runner.join();
  EXPECT_TRUE(inside);
  EXPECT_FALSE(reactor.on_reactor_thread());
}

}  // namespace
}  // namespace sharefs
