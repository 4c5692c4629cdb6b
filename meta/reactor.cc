#include "meta/reactor.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meta/brief_wait.h"

namespace sharefs {
namespace {

// Events taken from the kernel at once. Few, so that what a callback unwatches is seldom in the batch
// already.
constexpr int kEventsPerRound = 32;
using Events = std::array<epoll_event, kEventsPerRound>;

[[noreturn]] void fail(const char* call) { throw std::system_error(errno, std::generic_category(), call); }

}  // namespace

struct Reactor::Impl {
  struct Watch {
    Task ready;
    bool dead = false;  // unwatched; kept until the events of this round have been looked at
  };
  using TimerKey = std::pair<Clock::time_point, TimerId>;

  // constant after construction
  int epoll = -1;
  int wake = -1;  // eventfd: written by stop(), and by post() when the queue was empty

  // any thread
  std::atomic<bool> stopping = false;
  std::atomic<std::thread::id> thread = std::this_thread::get_id();
  std::mutex mutex;
  std::vector<Task> posted;              // under mutex
  std::atomic<bool> any_posted = false;  // written under mutex; read without it to skip the lock

  // reactor thread
  std::unordered_map<int, std::unique_ptr<Watch>> watches;
  std::vector<std::unique_ptr<Watch>> dead;
  std::map<TimerKey, Task> timers;
  std::unordered_map<TimerId, Clock::time_point> due;
  TimerId last_timer = 0;
  std::deque<std::function<bool()>> checks;  // a deque: a check may add another one
  std::vector<Task> batch;                   // posted tasks being run; the rest of it waits if one throws
  std::size_t batch_next = 0;
  BriefWait brief_wait;

  Impl();
  ~Impl();
  void signal_wake() const;
  int take(Events& events, int timeout_ms) const;
  int look_briefly(Events& events);
  int sleep(Events& events, int timeout_ms);
  void poll(int timeout_ms);
  void run_timers();
  void run_posted();
  bool run_checks();
  int sleep_time() const;
};

Reactor::Impl::Impl() {
  epoll = ::epoll_create1(EPOLL_CLOEXEC);
  wake = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;  // stands for `wake`
  if (epoll < 0 || wake < 0 || ::epoll_ctl(epoll, EPOLL_CTL_ADD, wake, &event) != 0) {
    const int error = errno;
    if (epoll >= 0) ::close(epoll);
    if (wake >= 0) ::close(wake);
    throw std::system_error(error, std::generic_category(), "reactor: epoll");
  }
}

Reactor::Impl::~Impl() {
  ::close(wake);
  ::close(epoll);
}

// Async-signal-safe. A full counter (EAGAIN) is as good as a written one.
void Reactor::Impl::signal_wake() const {
  const int saved = errno;
  const std::uint64_t one = 1;
  while (::write(wake, &one, sizeof one) < 0 && errno == EINTR) {
  }
  errno = saved;
}

int Reactor::Impl::take(Events& events, int timeout_ms) const {
  const int count = ::epoll_wait(epoll, events.data(), kEventsPerRound, timeout_ms);
  if (count < 0 && errno != EINTR) fail("reactor: epoll_wait");
  return std::max(count, 0);
}

// Instead of sleeping at once, if that has been worth it lately. The core is offered to others all the time.
int Reactor::Impl::look_briefly(Events& events) {
  if (!brief_wait.worth_it()) return 0;
  const auto start = Clock::now();
  auto now = start;
  int count = take(events, 0);
  while (count == 0 && now - start < BriefWait::kLongest) {
    ::sched_yield();
    const auto back = Clock::now();
    if (back - now > BriefWait::kContended) {
      brief_wait.contended(back, back - now);
      break;
    }
    now = back;
    count = take(events, 0);
  }
  brief_wait.looked(count != 0);
  return count;
}

int Reactor::Impl::sleep(Events& events, int timeout_ms) {
  const auto start = Clock::now();
  const int count = take(events, timeout_ms);
  brief_wait.slept(Clock::now() - start, count != 0);
  return count;
}

// Waits for events and runs their callbacks.
void Reactor::Impl::poll(int timeout_ms) {
  Events events;
  int count = 0;
  if (timeout_ms != 0) {
    count = look_briefly(events);
    if (count == 0) count = sleep(events, timeout_ms);
  } else {
    count = take(events, 0);
  }
  for (int i = 0; i < count; ++i) {
    auto* watch = static_cast<Watch*>(events[static_cast<std::size_t>(i)].data.ptr);
    if (watch == nullptr) {
      std::uint64_t times = 0;
      [[maybe_unused]] const auto drained = ::read(wake, &times, sizeof times);
    } else if (!watch->dead) {
      watch->ready();
    }
  }
}

void Reactor::Impl::run_timers() {
  if (timers.empty()) return;
  const auto now = Clock::now();
  // One by one from the map: a callback may cancel a timer that is due as well.
  while (!timers.empty() && timers.begin()->first.first <= now) {
    auto node = timers.extract(timers.begin());
    due.erase(node.key().second);
    node.mapped()();
  }
}

// Runs what was posted until now. What those tasks post themselves waits for the next round, so that a chain
// of posts does not starve the descriptors.
void Reactor::Impl::run_posted() {
  if (batch_next == batch.size()) {
    if (!any_posted.load(std::memory_order_acquire)) return;
    batch.clear();
    batch_next = 0;
    const std::lock_guard lock(mutex);
    batch.swap(posted);
    any_posted.store(false, std::memory_order_relaxed);
  }
  while (batch_next < batch.size()) {
    const Task task = std::move(batch[batch_next++]);
    task();
  }
}

bool Reactor::Impl::run_checks() {
  bool worked = false;
  for (std::size_t i = 0; i < checks.size(); ++i) worked = checks[i]() || worked;
  return worked;
}

// For epoll_wait; rounded up, so that a timer is never looked at before it is due.
int Reactor::Impl::sleep_time() const {
  if (stopping.load(std::memory_order_acquire) || any_posted.load(std::memory_order_acquire)) return 0;
  if (batch_next != batch.size()) return 0;  // run() was left by a task that threw
  if (timers.empty()) return -1;
  const auto left = timers.begin()->first.first - Clock::now();
  if (left <= Clock::duration::zero()) return 0;
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
  return static_cast<int>(std::min<std::int64_t>(ms, std::numeric_limits<int>::max()));
}

Reactor::Reactor() : impl_(std::make_unique<Impl>()) {}
Reactor::~Reactor() = default;

void Reactor::watch(int fd, Task ready) {
  auto watch = std::make_unique<Impl::Watch>();
  watch->ready = std::move(ready);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = watch.get();
  if (::epoll_ctl(impl_->epoll, EPOLL_CTL_ADD, fd, &event) != 0) fail("reactor: watch");
  impl_->watches[fd] = std::move(watch);
}

void Reactor::unwatch(int fd) {
  auto node = impl_->watches.extract(fd);
  if (node.empty()) return;
  ::epoll_ctl(impl_->epoll, EPOLL_CTL_DEL, fd,
              nullptr);  // fails if the descriptor is closed already: gone all the same
  node.mapped()->dead = true;
  impl_->dead.push_back(std::move(node.mapped()));
}

void Reactor::before_sleep(std::function<bool()> check) { impl_->checks.push_back(std::move(check)); }

Reactor::TimerId Reactor::after(Clock::duration delay, Task task) {
  const TimerId id = ++impl_->last_timer;
  const auto when = Clock::now() + delay;
  impl_->timers.emplace(Impl::TimerKey(when, id), std::move(task));
  impl_->due.emplace(id, when);
  return id;
}

void Reactor::cancel(TimerId timer) {
  const auto found = impl_->due.find(timer);
  if (found == impl_->due.end()) return;
  impl_->timers.erase({found->second, timer});
  impl_->due.erase(found);
}

void Reactor::post(Task task) {
  bool first = false;
  {
    const std::lock_guard lock(impl_->mutex);
    first = impl_->posted.empty();
    impl_->posted.push_back(std::move(task));
    impl_->any_posted.store(true, std::memory_order_release);
  }
  // The reactor looks at any_posted before it sleeps, so it needs no waking by itself.
  if (first && !on_reactor_thread()) impl_->signal_wake();
}

void Reactor::run() {
  impl_->thread.store(std::this_thread::get_id(), std::memory_order_relaxed);
  int timeout = 0;  // the checks may have had something to do before now
  while (!impl_->stopping.exchange(false, std::memory_order_acq_rel)) {
    impl_->poll(timeout);
    impl_->run_timers();
    impl_->run_posted();
    const bool again = impl_->run_checks();
    // Swapped out first: what a callback captured may unwatch something when it goes.
    if (!impl_->dead.empty()) std::exchange(impl_->dead, {}).clear();
    timeout = again ? 0 : impl_->sleep_time();
  }
}

void Reactor::stop() {
  impl_->stopping.store(true, std::memory_order_release);
  impl_->signal_wake();
}

bool Reactor::on_reactor_thread() const {
  return impl_->thread.load(std::memory_order_relaxed) == std::this_thread::get_id();
}

}  // namespace sharefs
