#include "fs/fuse_server.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <future>
#include <limits>
#include <mutex>
#include <string>
#include <system_error>

namespace sharefs {
namespace {

// Requests of the mount itself; those of the kernel have numbers below. They leave the lower half for
// requests that others make in the mount's name (attach, detach).
constexpr std::uint64_t kOwnSeq = 1ULL << 62 | 1ULL << 32;

// How long dirty pages may take to come back at the end, before everything that still waits is refused.
constexpr auto kUnmountGrace = std::chrono::seconds(2);
constexpr int kUnmountPollMs = 5;

constexpr std::uint64_t kPage = 4096;

// More requests with a caller that waits than the kernel has in its queue at once: new ones keep coming.
constexpr std::size_t kMostWaiting = 1000;

// An answer waits for pages to be dropped for no longer than this: whatever a kernel keeps locked meanwhile.
constexpr auto kDropPatience = std::chrono::milliseconds(100);

// How soon the kernel is made to let go of what has no name any more: many at once, and most of what this
// mount has deleted itself it has forgotten by then.
constexpr auto kPruneDelay = std::chrono::milliseconds(50);
constexpr auto kForgetDelay =
    std::chrono::milliseconds(10);  // one request for many: each costs as much as an unlink

// How often a caller that was interrupted is looked at: its next signal may kill it.
constexpr auto kDyingInterval = std::chrono::milliseconds(100);

// The default of these signals kills nobody.
constexpr std::array kHarmless{SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH};

// Whether a signal waits for the thread that will end it. False if that cannot be seen from here.
bool is_dying(pid_t thread) {
  std::ifstream status("/proc/" + std::to_string(thread) + "/status");
  std::uint64_t pending = 0, survived = 0;
  for (std::string line; std::getline(status, line);) {
    if (!line.starts_with("Sig") && !line.starts_with("ShdPnd:")) continue;
    const std::uint64_t signals = std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 16);
    if (line.starts_with("SigPnd:") || line.starts_with("ShdPnd:")) pending |= signals;
    if (line.starts_with("SigBlk:") || line.starts_with("SigIgn:") || line.starts_with("SigCgt:"))
      survived |= signals;
  }
  for (const int signal : kHarmless) survived |= std::uint64_t{1} << (signal - 1);
  return (pending & ~survived) != 0;
}

// Where they begin, and where they end.
std::pair<std::uint64_t, std::uint64_t> pages_of(const PendingRequest& pending) {
  return {pending.offset / kPage * kPage, (pending.offset + pending.size + kPage - 1) / kPage * kPage};
}

std::span<std::byte> map_buffer() {
  void* memory = ::mmap(nullptr, kRequestBuffer, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "FUSE: request buffer");
  return {static_cast<std::byte*>(memory), kRequestBuffer};
}

}  // namespace

FuseServer::FuseServer(const FrontEnd::Options& options, Reactor& reactor, Executor& executor,
                       std::uint64_t client, std::function<void()> unmounted)
    : reactor_(reactor),
      executor_(executor),
      client_(client),
      unmounted_(std::move(unmounted)),
      opens_at_once_(options.opens_at_once),
      keeps_pages_(options.keeps_pages),
      must_flush_(options.must_flush),
      lend_attributes_(options.lend_attributes),
      let_go_(options.let_go),
      mount_(options.mountpoint, options.data_set, options.mount_options),
      session_(fuse_operations(), this, mount_.device()),
      notifier_(std::make_unique<FuseNotifier>(session_, reactor)),
      pruner_(std::make_unique<FusePruner>(session_, mount_.mountpoint())),
      buffer_(map_buffer()),
      alive_(std::make_shared<bool>(true)),
      requests_(pb::Request::kSync + 1),
      pool_(std::make_unique<Pool>()) {
  ::fcntl(mount_.device(), F_SETFL, O_NONBLOCK);
  reactor_.watch(mount_.device(), [this] { serve(); });
}

FuseServer::~FuseServer() {
  *alive_ = false;
  pruner_->end();
  if (!ended_) {
    reactor_.unwatch(mount_.device());
    serve_while_unmounting();
  }
  refuse_waiting_callers();
  reactor_.cancel(interrupt_timer_);
  reactor_.cancel(prune_timer_);
  reactor_.cancel(forget_timer_);
  notifier_.reset();
  pruner_.reset();
  ::munmap(buffer_.data(), buffer_.size());
  if (pool_->free.size() != pool_->all.size()) {
    // The executor still has requests: what it answers must find its PendingRequest, whenever that is.
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Pool>> abandoned;
    const std::lock_guard lock(mutex);
    abandoned.push_back(std::move(pool_));
  }
}

// ---- requests

// One for each time that the reactor finds the device readable: looking for another one in vain costs a call,
// too.
void FuseServer::serve() {
  if (const std::size_t size = receive(); size != 0) process(size);
}

// Reads a request into the buffer. 0 if there is none.
std::size_t FuseServer::receive() {
  while (true) {
    const ssize_t got = ::read(mount_.device(), buffer_.data(), buffer_.size());
    if (got >= 0) return static_cast<std::size_t>(got);
    if (errno == EAGAIN) return 0;
    if (errno == ENODEV) {
      ended();
      return 0;
    }
    // ENOENT: the request was taken back while it was read.
    if (errno != EINTR && errno != ENOENT) {
      throw std::system_error(errno, std::generic_category(), "FUSE: reading a request");
    }
  }
}

void FuseServer::process(std::size_t size) {
  session_.process(buffer_.first(size));
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void FuseServer::ended() {
  ended_ = true;
  reactor_.unwatch(mount_.device());
  reactor_.post([this, alive = alive_] {
    if (*alive && unmounted_) unmounted_();
  });
}

FuseServer::Begun FuseServer::begin(fuse_req_t caller, pb::Request::OpCase op, InodeId id) {
  if (pool_->free.empty()) {
    pool_->all.emplace_back();
    pool_->free.push_back(&pool_->all.back());
  }
  PendingRequest& pending = *pool_->free.back();
  pool_->free.pop_back();
  pending = PendingRequest{};
  pending.server = this;
  pending.caller = caller;
  pending.seq = session_.extras().unique;
  pending.arrived = Reactor::Clock::now();
  pending.id = id;
  pending.changes = changes_files(op);
  pending.leaves_attributes = changes_names(op) || op == pb::Request::kSetxattr ||
                              op == pb::Request::kRemovexattr || op == pb::Request::kFallocate;
  link(pending);

  const fuse_ctx* context = fuse_req_ctx(caller);
  if (!lent_to_.empty()) lent_to_.erase(context->pid);
  pb::Request& request = requests_[static_cast<std::size_t>(op)];
  request.set_client(client_);
  request.set_seq(pending.seq);
  request.set_uid(context->uid);
  request.set_gid(context->gid);
  request.set_pid(static_cast<std::uint32_t>(context->pid));
  request.set_answered_below(answered_below());
  request.set_lazy(false);
  return {pending, request};
}

void FuseServer::submit(const pb::Request& request, Bytes data, PendingRequest& pending, Answer answer) {
  if (pending.given_up) {  // its caller was killed while it waited here
    pb::Outcome outcome;
    outcome.set_error(EINTR);
    return finish(pending, outcome, {});
  }
  const std::uint64_t seq = pending.seq;
  pending.answer = answer;
  if (pending.changes && !drops_.empty()) pages_dropped(pending.id);
  try {
    executor_.execute(request, data, [p = &pending](const pb::Outcome& outcome, Bytes bytes) {
      if (p->server != nullptr) p->server->finish(*p, outcome, bytes);
    });
  } catch (...) {
    failure_ = std::current_exception();  // libfuse, which called us, is not made for exceptions
    return;
  }
  // Calls back at once if the interrupt came before.
  if (pending.seq == seq && pending.caller != nullptr)
    fuse_req_interrupt_func(pending.caller, &FuseServer::interrupted, &pending);
}

// The kernel unlocks a page that was up to date as soon as the new bytes are in it. Somebody may drop it
// before they have arrived (opening the file is enough); what is read then without them would stay when the
// write is done, since nothing drops it again.
void FuseServer::submit_read(const pb::Request& request, PendingRequest& pending) {
  pending.answer = &FuseServer::answer_data;
  if (!is_being_written(pending)) return submit(request, {}, pending, pending.answer);
  waiting_reads_.push_back({&pending, request});
  fuse_req_interrupt_func(pending.caller, &FuseServer::interrupted, &pending);
}

bool FuseServer::is_being_written(const PendingRequest& read) {
  const auto [begin, end] = pages_of(read);
  for (const PendingRequest* before = read.previous; before != nullptr; before = before->previous) {
    if (before->id != read.id || !before->changes || !before->locks_pages || before->late) continue;
    const auto [written, beyond] = pages_of(*before);
    if (written < end && beyond > begin) return true;
  }
  return false;
}

void FuseServer::submit_waiting_reads() {
  const auto ready = std::stable_partition(waiting_reads_.begin(), waiting_reads_.end(),
                                           [](const auto& read) { return is_being_written(*read.pending); });
  const std::vector<WaitingRead> reads(std::make_move_iterator(ready),
                                       std::make_move_iterator(waiting_reads_.end()));
  waiting_reads_.erase(ready, waiting_reads_.end());
  for (const WaitingRead& read : reads) submit(read.request, {}, *read.pending, read.pending->answer);
}

void FuseServer::submit_written_back(const pb::Request& request, Bytes data, PendingRequest& pending,
                                     Answer answer) {
  if (!known_.may_be_dirty(pending.id)) return submit(request, data, pending, answer);
  pending.answer = answer;
  fuse_req_interrupt_func(pending.caller, &FuseServer::interrupted, &pending);
  const auto copy = std::make_shared<const std::string>(as_text(data));
  drop_pages(pending.id, 0, 0, [this, p = &pending, seq = pending.seq, request, copy] {
    if (p->server != nullptr && p->seq == seq) submit(request, as_bytes(*copy), *p, p->answer);
  });
}

void FuseServer::submit_direct(const pb::Request& request, Bytes data, PendingRequest& pending,
                               Answer answer) {
  if (session_.writes_back_before_direct()) return submit(request, data, pending, answer);
  submit_written_back(request, data, pending, answer);
}

void FuseServer::answer_within(PendingRequest& pending, Reactor::Clock::duration patience) {
  if (pending.seq == 0) return;  // answered already
  reactor_.after(patience, [p = &pending, seq = pending.seq, alive = alive_] {
    if (!*alive || p->seq != seq || p->caller == nullptr) return;
    p->answer = &FuseServer::answer_nobody;
    fuse_reply_err(std::exchange(p->caller, nullptr), 0);
  });
}

// ---- interrupted callers

// libfuse holds a lock of the request here: it must not be answered yet.
void FuseServer::interrupted(fuse_req_t /*caller*/, void* data) {
  auto& pending = *static_cast<PendingRequest*>(data);
  pending.interrupted = true;
  FuseServer& server = *pending.server;
  if (server.interrupt_timer_ == 0)
    server.interrupt_timer_ = server.reactor_.after({}, [&server] { server.look_at_interrupted(); });
}

// A lock that waits ends with any signal; everything else, as on a local disk, only with one that kills. The
// kernel tells of the first signal only, which need not be that one, so callers are looked at again.
void FuseServer::look_at_interrupted() {
  interrupt_timer_ = 0;
  std::vector<PendingRequest*> all;  // what is done with one may end others
  for (PendingRequest* one = oldest_; one != nullptr; one = one->next)
    if (one->interrupted && one->caller != nullptr) all.push_back(one);
  for (PendingRequest* one : all) {
    if (one->seq == 0 || one->caller == nullptr) continue;
    if (is_dying(fuse_req_ctx(one->caller)->pid))
      give_up(*one);
    else if (one->waits_for_lock && !std::exchange(one->cancelled, true))
      ask_cancel(one->seq);
  }
  const auto waits = [](const PendingRequest* one) { return one->interrupted && one->caller != nullptr; };
  if (interrupt_timer_ == 0 && std::any_of(all.begin(), all.end(), waits))
    interrupt_timer_ = reactor_.after(kDyingInterval, [this] { look_at_interrupted(); });
}

// Its caller ends now, whatever the request waits for. The Flush of a killed process is interrupted by the
// same signal, and nothing else gives up the locks that it had.
void FuseServer::give_up(PendingRequest& pending) {
  // The kernel would go on believing that there is no such name.
  const bool makes_name =
      pending.answer == &FuseServer::answer_entry || pending.answer == &FuseServer::answer_create;
  if (entry_timeout_ > 0 && makes_name) return;
  fuse_reply_err(std::exchange(pending.caller, nullptr), EINTR);
  pages_unlocked(pending.seq);
  pending.given_up = true;
  if (!pending.gives_up && !std::exchange(pending.cancelled, true)) ask_cancel(pending.seq);
}

// The request of a killed caller was performed all the same.
void FuseServer::undo(const PendingRequest& pending, const pb::Outcome& outcome) {
  if (outcome.error() != 0) return;
  if (pending.answer == &FuseServer::answer_open) ask_release(pending.id, pending.handle);
  if (pending.answer == &FuseServer::answer_create) ask_release(outcome.attr().id(), pending.handle);
  if (pending.answer == &FuseServer::answer_opendir) ask_releasedir(pending.id, pending.handle);
  drop_pages(pending.id, 0, 0, {});
  for (const pb::Attr& attr : outcome.changed())
    notifier_->invalidate(attr.id(), FuseNotifier::kAttributes, 0, {});
}

void FuseServer::finish(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  const bool pages = outcome.invalidate() && may_drop_first(pending);
  const auto lent = lent_to_.empty() ? std::vector<InodeId>() : lent_under_way(pending, outcome);
  if ((pages || !lent.empty()) && *alive_)  // later no reactor runs that would tell when it is dropped
    drop_first(pending, outcome, data, pages, lent);
  else
    conclude(pending, outcome, data);
}

// What the kernel is lent it counts from when the thread that asked goes on, on a busy machine some time
// after the answer; and what a change of names or of xattrs leaves, it does not compare with that.
std::vector<InodeId> FuseServer::lent_under_way(const PendingRequest& pending, const pb::Outcome& outcome) {
  std::vector<InodeId> lent;
  if (!pending.leaves_attributes || pending.caller == nullptr || pending.given_up) return lent;
  const auto now = Reactor::Clock::now();
  std::erase_if(lent_to_, [&](const auto& one) {
    const auto& [id, until] = one.second;
    const bool changed = std::any_of(outcome.changed().begin(), outcome.changed().end(),
                                     [id = id](const pb::Attr& attr) { return attr.id() == id; });
    if (changed && until >= now) lent.push_back(id);
    return changed || until < now;
  });
  return lent;
}

// While the kernel truncates it writes nothing back. What is written back is waited for by whoever drops
// other pages of the same mapping.
bool FuseServer::may_drop_first(const PendingRequest& pending) const {
  if (pending.caller == nullptr || pending.given_up || pending.writes_back) return false;
  const bool may_truncate =
      pending.answer == &FuseServer::answer_attr || pending.answer == &FuseServer::answer_open;
  return pending.answer != &FuseServer::answer_create && !(may_truncate && known_.may_be_dirty(pending.id));
}

// Somebody else has changed the inode meanwhile, and may say so to the caller: what this one looks at next is
// not to come from pages from before. Those that the kernel keeps locked for the request itself follow.
void FuseServer::drop_first(PendingRequest& pending, const pb::Outcome& outcome, Bytes data, bool pages,
                            const std::vector<InodeId>& lent) {
  pending.late = true;
  const auto conclude_once = [this, p = &pending, seq = pending.seq, over = std::make_shared<bool>(false),
                              outcome, copy = std::make_shared<const std::string>(as_text(data)),
                              alive = alive_] {
    if (!*alive || p->server == nullptr || p->seq != seq || std::exchange(*over, true)) return;
    p->late = false;
    conclude(*p, outcome, as_bytes(*copy));
  };
  const auto dropped = [conclude_once, left = std::make_shared<std::size_t>(lent.size() + (pages ? 1 : 0))] {
    if (--*left == 0) conclude_once();
  };
  const PendingRequest* const own = &pending;
  const InodeId id = pending.id;
  for (const InodeId one : lent) notifier_->invalidate(one, FuseNotifier::kAttributes, 0, dropped);
  if (pages) drop_pages(id, 0, 0, dropped, own);
  reactor_.after(kDropPatience, conclude_once);
  submit_waiting_reads();  // of what has been written
}

void FuseServer::conclude(PendingRequest& pending, const pb::Outcome& outcome, Bytes data) {
  unlink(pending);
  if (pending.caller != nullptr && !pending.waits_for_lock) {
    longest_wait_ = std::max(longest_wait_, Reactor::Clock::now() - pending.arrived);
  }
  // What this mount's own request left without a name: its kernel still refers to it, and says when it does
  // not.
  for (const InodeId id : outcome.orphaned()) {
    if (!watch_orphan(id)) forget_soon(id);
  }
  if (pending.given_up)
    undo(pending, outcome);
  else
    (this->*pending.answer)(pending, outcome, data);
  // After the answer: the kernel holds the caller's locks until then.
  if (outcome.invalidate()) drop_pages(pending.id, 0, 0, {});
  if (!pending.late) answered(pending.seq);
  if (!waiting_reads_.empty()) submit_waiting_reads();
  if (!pending.late) done_with(pending);
}

void FuseServer::done_with(PendingRequest& pending) {
  pending.seq = 0;
  pool_->free.push_back(&pending);
}

// The kernel counts upwards, so the place is nearly always at the end.
void FuseServer::link(PendingRequest& pending) {
  PendingRequest* before = newest_;
  while (before != nullptr && before->seq > pending.seq) before = before->previous;
  PendingRequest* after = before != nullptr ? before->next : oldest_;
  pending.previous = before;
  pending.next = after;
  (before != nullptr ? before->next : oldest_) = &pending;
  (after != nullptr ? after->previous : newest_) = &pending;
  highest_seq_ = std::max(highest_seq_, pending.seq);
}

void FuseServer::unlink(PendingRequest& pending) {
  (pending.previous != nullptr ? pending.previous->next : oldest_) = pending.next;
  (pending.next != nullptr ? pending.next->previous : newest_) = pending.previous;
}

std::uint64_t FuseServer::answered_below() const {
  return oldest_ != nullptr ? oldest_->seq : highest_seq_ + 1;
}

void FuseServer::ask(pb::Request& request) {
  request.set_client(client_);
  request.set_seq(kOwnSeq + ++own_requests_);
  request.set_answered_below(answered_below());
  try {
    executor_.execute(request, {}, [](const pb::Outcome&, Bytes) {});
  } catch (...) {
    failure_ = std::current_exception();
  }
}

void FuseServer::ask_cancel(std::uint64_t seq) {
  pb::Request request;
  request.mutable_cancel()->set_seq(seq);
  ask(request);
}

// One that is asked for may be granted behind the release: whoever closes the file next gives it up, and be
// it the kernel for a process that was killed.
bool FuseServer::take_posix_locks(InodeId id, std::uint64_t owner) {
  const auto noted = posix_locks_.find({id, owner});
  if (noted == posix_locks_.end()) return false;
  posix_locks_.erase(noted);
  for (const PendingRequest* one = oldest_; one != nullptr; one = one->next)
    if (one->posix_lock && one->id == id && one->owner == owner) note_posix_lock(id, owner, one->handle);
  return true;
}

std::uint64_t FuseServer::take_description_locks(InodeId id, std::uint64_t handle) {
  auto one = posix_locks_.lower_bound({id, 0});
  while (one != posix_locks_.end() && one->first.first == id && one->second != handle) ++one;
  if (one == posix_locks_.end() || one->first.first != id) return 0;
  const std::uint64_t owner = one->first.second;
  posix_locks_.erase(one);
  return owner;
}

// ---- what the front end is asked

void FuseServer::set_policy(CachePolicy policy) {
  const bool sole = policy.entry_timeout.count() > 0 || policy.attr_timeout.count() > 0;
  if (sole && !sole_) sole_period_ = static_cast<std::uint16_t>(std::max(1, (sole_period_ + 1) & 0xffff));
  sole_ = sole;
  entry_timeout_ = std::chrono::duration<double>(policy.entry_timeout).count();
  attr_timeout_ = std::chrono::duration<double>(policy.attr_timeout).count();
}

void FuseServer::invalidate(InodeId id, std::uint64_t offset, std::uint64_t length,
                            std::function<void()> done) {
  drop_pages(id, offset, length, std::move(done));
}

void FuseServer::invalidate_all(std::vector<InodeId> ids) {
  std::partition(ids.begin(), ids.end(), [this](InodeId id) { return !known_.may_be_dirty(id); });
  for (const InodeId id : ids) drop_pages(id, 0, 0, {});
}

// The kernel keeps pages locked that this mount itself is reading or writing, for as long as the owner takes.
// A notifier that waited for them would hold up the others, and keep the device of a killed process open: its
// callers would never end.
void FuseServer::drop_pages(InodeId id, std::uint64_t offset, std::uint64_t length,
                            std::function<void()> done, const PendingRequest* except) {
  if (done && !keeps_written_pages(session_.protocol_minor()) && known_.may_be_dirty(id))
    done = [this, id, done = std::move(done)] { when_written_back(id, done); };
  const std::uint64_t end =
      length == 0 ? std::numeric_limits<std::int64_t>::max() : offset + length;  // as the kernel's loff_t
  std::vector<LockedPages> locked;
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next) {
    if (pending->id != id || !pending->locks_pages || pending->caller == nullptr) continue;
    const auto [begin, beyond] = pages_of(*pending);
    if (begin < end && beyond > offset) locked.push_back({pending->seq, id, begin, beyond - begin, {}});
  }
  if (locked.empty()) return notifier_->invalidate(id, offset, length, std::move(done));

  std::sort(locked.begin(), locked.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  const auto left = std::make_shared<std::size_t>(1);
  const auto part = [left, done = std::move(done)] {
    if (--*left == 0 && done) done();
  };
  std::uint64_t at = offset;
  const auto drop_until = [&](std::uint64_t until) {
    if (at >= until) return;
    ++*left;
    notifier_->invalidate(id, at, length == 0 && until == end ? 0 : until - at, part);
  };
  for (LockedPages& pages : locked) {
    drop_until(pages.offset);
    at = std::max(at, pages.offset + pages.length);
    if (except != nullptr && pages.seq == except->seq) continue;
    ++*left;
    pages.done = part;
    locked_pages_.push_back(std::move(pages));
  }
  drop_until(end);
  part();
}

void FuseServer::take_waiting() {
  for (std::size_t taken = 0; taken < kMostWaiting && !ended_;) {
    const std::size_t size = receive();
    if (size == 0) return;
    process(size);
    if (!session_.extras().writes_back) ++taken;
  }
}

// A kernel that does not keep the pages that it writes back copies them, and drops them while their bytes are
// on their way. They are in its queue by then, or follow when others of the inode are answered (while
// somebody synchronizes it or closes it the kernel may ask nothing more until then).
void FuseServer::when_written_back(InodeId id, const std::function<void()>& done) {
  take_waiting();
  std::vector<LockedPages> written;
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next) {
    if (pending->id != id || !pending->writes_back) continue;
    const auto [begin, beyond] = pages_of(*pending);
    written.push_back({pending->seq, id, begin, beyond - begin, {}});
  }
  if (written.empty()) return done();
  const auto left = std::make_shared<std::size_t>(written.size());
  for (LockedPages& pages : written) {
    pages.done = [this, left, done] {
      if (--*left != 0) return;
      take_waiting();
      done();
    };
    locked_pages_.push_back(std::move(pages));
  }
}

void FuseServer::pages_unlocked(std::uint64_t seq) {
  const auto unlocked = std::partition(locked_pages_.begin(), locked_pages_.end(),
                                       [seq](const LockedPages& pages) { return pages.seq != seq; });
  for (auto pages = unlocked; pages != locked_pages_.end(); ++pages)
    notifier_->invalidate(pages->id, pages->offset, pages->length, std::move(pages->done));
  locked_pages_.erase(unlocked, locked_pages_.end());
}

void FuseServer::promise_broken(const std::vector<InodeId>* ids, const std::vector<InodeId>& lent,
                                std::function<void()> done) {
  const auto drop = std::make_shared<Drop>();
  drop->done = std::move(done);
  drops_.push_back(drop);
  drop->attributes = lent.size();
  for (const InodeId id : lent) {
    notifier_->invalidate(id, FuseNotifier::kAttributes, 0, [this, drop] {
      --drop->attributes;
      settle_drops();
    });
  }
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next) {
    const InodeId id = pending->id;
    if (!pending->opened_early) continue;
    if (ids != nullptr && std::find(ids->begin(), ids->end(), id) == ids->end()) continue;
    if (!changes(id)) drop->pages.push_back(id);
    drop_pages(id, 0, 0, [this, id] { pages_dropped(id); });
  }
  settle_drops();
}

bool FuseServer::changes(InodeId id) const {
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next)
    if (pending->changes && pending->id == id) return true;
  return false;
}

bool FuseServer::concludes_a_change() const {
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next)
    if (pending->changes && pending->late) return true;
  return false;
}

// While the kernel truncates it writes nothing back: see may_drop_first.
void FuseServer::drop_changing() {
  std::set<InodeId> changing;
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next) {
    const bool may_truncate = pending->answer == &FuseServer::answer_attr;
    if (pending->changes && known_.may_be_cached(pending->id) &&
        !(may_truncate && known_.may_be_dirty(pending->id)))
      changing.insert(pending->id);
  }
  for (const InodeId id : changing) drop_pages(id, 0, 0, {});
}

void FuseServer::when_pages_are_dropped(bool changes_too, const std::function<void()>& done) {
  std::set<std::uint64_t> awaited;
  for (const PendingRequest* pending = oldest_; pending != nullptr; pending = pending->next)
    if (changes_too && pending->changes && known_.may_be_cached(pending->id)) awaited.insert(pending->seq);
  for (const LockedPages& pages : locked_pages_) awaited.insert(pages.seq);
  const auto once = [done, over = std::make_shared<bool>(false)] {
    if (!std::exchange(*over, true)) done();
  };
  const auto left = std::make_shared<std::size_t>(awaited.size() + 1);
  const auto one_less = [this, left, once] {
    if (--*left == 0) notifier_->when_followed(once);
  };
  for (const std::uint64_t seq : awaited) until_answered_.emplace(seq, one_less);
  reactor_.after(kDropPatience, [once, alive = alive_] {
    if (*alive) once();
  });
  one_less();
}

void FuseServer::answered(std::uint64_t seq) {
  if (!locked_pages_.empty()) pages_unlocked(seq);
  if (until_answered_.empty()) return;
  const auto [first, last] = until_answered_.equal_range(seq);
  std::vector<std::function<void()>> waiting;
  for (auto one = first; one != last; ++one) waiting.push_back(std::move(one->second));
  until_answered_.erase(first, last);
  for (const auto& tell : waiting) tell();
}

// Nobody need wait for pages of this inode any more.
void FuseServer::pages_dropped(InodeId id) {
  for (const auto& drop : drops_) std::erase(drop->pages, id);
  settle_drops();
}

void FuseServer::settle_drops() {
  const auto waited = std::partition(drops_.begin(), drops_.end(), [](const auto& drop) {
    return !drop->pages.empty() || drop->attributes > 0;
  });
  const std::vector<std::shared_ptr<Drop>> over(waited, drops_.end());
  drops_.erase(waited, drops_.end());
  for (const auto& drop : over) drop->done();
}

bool FuseServer::watch_orphan(InodeId id) {
  if (!known_.contains(id)) return false;
  watched_orphans_.insert(id);
  prune_soon(id);
  return true;
}

void FuseServer::closed(InodeId id) {
  if (!watched_orphans_.empty() && watched_orphans_.contains(id)) prune_soon(id);
}

void FuseServer::prune_soon(InodeId id) {
  unused_orphans_.push_back(id);
  if (prune_timer_ != 0) return;
  prune_timer_ = reactor_.after(kPruneDelay, [this] {
    prune_timer_ = 0;
    // The others the kernel has forgotten by itself.
    std::erase_if(unused_orphans_, [this](InodeId orphan) { return !watched_orphans_.contains(orphan); });
    if (!unused_orphans_.empty()) pruner_->prune(std::exchange(unused_orphans_, {}));
  });
}

std::chrono::nanoseconds FuseServer::take_longest_wait() { return std::exchange(longest_wait_, {}); }

void FuseServer::forget(InodeId id, std::uint64_t times) {
  if (!known_.remove(id, times)) return;
  if (let_go_) let_go_(id);
  if (!watched_orphans_.empty() && watched_orphans_.erase(id) != 0) forget_soon(id);
}

void FuseServer::forget_soon(InodeId orphan) {
  forgotten_orphans_.push_back(orphan);
  if (forget_timer_ == 0) forget_timer_ = reactor_.after(kForgetDelay, [this] { send_forgets(); });
}

void FuseServer::send_forgets() {
  forget_timer_ = 0;
  pb::Request request;
  for (const InodeId id : std::exchange(forgotten_orphans_, {})) {
    if (!watch_orphan(id))
      request.mutable_forget()->add_ids(id);  // it may be known again, by its file handle
  }
  if (!request.has_forget()) return;
  request.set_lazy(true);
  ask(request);
}

// ---- the end

// Unmounting writes back dirty pages, which only works while somebody serves them; what the executor does not
// answer at once is refused after the grace.
void FuseServer::serve_while_unmounting() {
  const auto detached = std::async(std::launch::async, [this] { mount_.detach(); });
  const auto still_detaching = [&detached] {
    return detached.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
  };
  const auto deadline = Reactor::Clock::now() + kUnmountGrace;
  const auto busy = [&] { return still_detaching() || !notifier_->idle() || !pruner_->idle(); };
  while (!ended_ && busy() && Reactor::Clock::now() < deadline) {
    if (wait_for_request()) serve();
  }
  refuse_waiting_callers();
  while (!ended_ && busy()) {
    if (wait_for_request()) refuse_one();
  }
}

bool FuseServer::wait_for_request() const {
  pollfd ready{.fd = mount_.device(), .events = POLLIN, .revents = 0};
  return ::poll(&ready, 1, kUnmountPollMs) == 1;
}

void FuseServer::refuse_waiting_callers() {
  fuse_session_exit(session_.get());  // libfuse shall not complain about a device that is gone
  while (oldest_ != nullptr) {
    PendingRequest& pending = *oldest_;
    unlink(pending);
    pending.server = nullptr;
    if (pending.caller != nullptr) fuse_reply_err(pending.caller, ENOTCONN);
  }
}

void FuseServer::refuse_one() {
  const ssize_t got = ::read(mount_.device(), buffer_.data(), buffer_.size());
  if (got < 0) {
    ended_ = errno == ENODEV;
    return;
  }
  fuse_in_header request{};
  std::memcpy(&request, buffer_.data(), sizeof request);
  if (request.opcode == FUSE_FORGET || request.opcode == FUSE_BATCH_FORGET ||
      request.opcode == FUSE_INTERRUPT)
    return;
  const fuse_out_header reply{.len = sizeof(fuse_out_header), .error = -ENOTCONN, .unique = request.unique};
  [[maybe_unused]] const ssize_t written = ::write(mount_.device(), &reply, sizeof reply);
}

}  // namespace sharefs
