// Serves one mount: reads the kernel's requests, passes them on as values, answers with what came of them.
//
// The life of a request: serve() reads it, libfuse decodes it and calls an operation (fuse_operations.cc),
// which takes a PendingRequest from the pool, fills the pb::Request kept for its kind and submits it; the
// executor's reply comes back to one of the answer_ functions (fuse_answers.cc), which answers the kernel.
//
// Invariants
//  - A request allocates nothing of its own: values and pending requests are used again.
//  - `answered_below` of a request never exceeds its own seq or that of any unanswered one.
//  - The kernel's lookup counts change only with a reply that the kernel has taken.
//  - A killed caller is answered at once, so that it ends whatever its request waits for; what comes of the
//  request after that is undone where the kernel would have had to (open handles), and not shown from caches.
//
// Threads: the reactor's, except where it says otherwise.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fs/front_end.h"
#include "fs/fuse_mount.h"
#include "fs/fuse_notifier.h"
#include "fs/fuse_pruner.h"
#include "fs/fuse_session.h"
#include "fs/known_inodes.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

class FuseServer;
struct PendingRequest;

// Whether writes on a handle that is opened with these flags pass by the page cache.
bool writes_directly(int flags);

// Answers the kernel with what came of a request.
using Answer = void (FuseServer::*)(PendingRequest&, const pb::Outcome&, Bytes);

// A request of the kernel that the executor has not answered yet. Linked in the order of seq.
struct PendingRequest {
  FuseServer* server = nullptr;  // nullptr: the mount is gone, nobody waits
  PendingRequest* previous = nullptr;
  PendingRequest* next = nullptr;
  Answer answer = nullptr;
  fuse_req_t caller = nullptr;  // nullptr: the kernel was answered already
  std::uint64_t seq = 0;        // 0: not in use
  Reactor::Clock::time_point arrived;
  InodeId id = 0;            // the inode that it is about
  std::uint64_t handle = 0;  // open, create
  std::uint64_t owner = 0;   // setlk
  std::size_t room = 0;      // what the caller takes: readdir, getxattr
  std::uint64_t offset = 0;  // read and write, of `size` bytes
  std::size_t size = 0;
  int flags = 0;      // open, create
  bool plus = false;  // readdirplus
  bool waits_for_lock = false;
  bool posix_lock = false;   // setlk: of `owner`
  bool gives_up = false;     // a lock: performed also for a caller that was killed
  bool interrupted = false;  // a signal for the caller
  bool cancelled = false;    // Cancel was sent
  bool given_up = false;     // the caller was killed, and answered
  bool changes = false;      // a mutation, and no sync
  bool leaves_attributes =
      false;                  // one of names or xattrs: the kernel does not tell attributes from before it
  bool locks_pages = false;   // the kernel keeps pages of the range locked until the answer, perhaps all
  bool writes_back = false;   // what was stored in a mapping
  bool opened_early = false;  // the caller has its file, and the owner may not know yet
  bool late = false;          // performed, and answered when the kernel has dropped pages
};

class FuseServer {
 public:
  FuseServer(const FrontEnd::Options& options, Reactor& reactor, Executor& executor, std::uint64_t client,
             std::function<void()> unmounted);
  ~FuseServer();
  FuseServer(const FuseServer&) = delete;
  FuseServer& operator=(const FuseServer&) = delete;

  // --- see FrontEnd
  std::uint64_t client() const { return client_; }
  void set_policy(CachePolicy policy);
  void invalidate(InodeId id, std::uint64_t offset, std::uint64_t length, std::function<void()> done);
  void invalidate_all(std::vector<InodeId> ids);
  void promise_broken(const std::vector<InodeId>* ids, const std::vector<InodeId>& lent,
                      std::function<void()> done);
  bool watch_orphan(InodeId id);
  std::chrono::nanoseconds take_longest_wait();

  // --- for the operations
  bool is_pruner(pid_t thread) const { return pruner_->is_looking(thread); }
  void closed(InodeId id);  // a file or directory: it may be unused now
  static FuseServer& of(fuse_req_t caller) { return *static_cast<FuseServer*>(fuse_req_userdata(caller)); }
  const FuseSession::Extras& extras() const { return session_.extras(); }
  // `flags`: of the open; 0 for a directory.
  std::uint64_t new_handle(int flags) {
    return ++last_handle_ | (writes_directly(flags) ? kDirectHandle : 0);
  }
  // Whether it was opened so that writes pass by the page cache. The flags of a write need not say what those
  // of the open said (F_SETFL), but the kernel goes by the open.
  static bool is_direct(std::uint64_t handle) { return (handle & kDirectHandle) != 0; }

  struct Begun {
    PendingRequest& pending;
    pb::Request& request;  // header filled in; the body still holds what the last request of this kind said
  };
  // `id`: the inode whose pages go when the outcome says so.
  Begun begin(fuse_req_t caller, pb::Request::OpCase op, InodeId id);

  // An interrupt of the caller sends Cancel if the request waits for a lock, or the caller was killed.
  void submit(const pb::Request& request, Bytes data, PendingRequest& pending, Answer answer);
  // A read of pages that this mount is writing is submitted when the write has been answered.
  void submit_read(const pb::Request& request, PendingRequest& pending);

  // What was stored in mappings is written back first, if there can be any: the kernel does not do that by
  // itself before everything that tells, or sets, what it changes.
  void submit_written_back(const pb::Request& request, Bytes data, PendingRequest& pending, Answer answer);
  // The same for what passes by the pages of the kernel, if it leaves that to us.
  void submit_direct(const pb::Request& request, Bytes data, PendingRequest& pending, Answer answer);

  // The caller, which nothing can interrupt, is told after `patience` that it succeeded, also if it has not
  // yet.
  void answer_within(PendingRequest& pending, Reactor::Clock::duration patience);

  void answer_lookup(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_entry(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_handle(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_create(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_attr(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_link_target(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_open(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_opendir(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_data(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_xattr(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_directory(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_statfs(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_count(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  static std::uint64_t appended_from(const PendingRequest& pending, const pb::Outcome& outcome);
  void answer_direct_write(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_misplaced_write(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_offset(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_getlk(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_lock(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_error(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void answer_nobody(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);

  // The kernel forgot the inode `times`.
  void forget(InodeId id, std::uint64_t times);

  // How an opened file is told to the kernel.
  fuse_file_info opened_file(const PendingRequest& pending, InodeId id);
  void note_cached(InodeId id, int flags);  // of the handle with which it is opened
  // The file was opened with this handle, and whoever opened it goes on: what pages the kernel was to drop
  // then are gone.
  void used(std::uint64_t handle) {
    if (!dropping_opens_.empty()) dropping_opens_.erase(handle);
  }
  // The kernel did not take a handle that the executor knows.
  void ask_release(InodeId id, std::uint64_t handle);
  void ask_releasedir(InodeId id, std::uint64_t handle);
  // The POSIX locks of this owner end.
  void ask_flush(InodeId id, std::uint64_t handle, std::uint64_t owner);
  // See FrontEnd::Options.
  bool opens_at_once(InodeId id, std::uint32_t type) const {
    return opens_at_once_ && opens_at_once_(id, type);
  }
  bool must_flush(InodeId id, std::uint64_t handle) const { return must_flush_ && must_flush_(id, handle); }
  // Did this mount take POSIX locks on the inode for this owner since? Forgets about them.
  bool take_posix_locks(InodeId id, std::uint64_t owner);
  void note_posix_lock(InodeId id, std::uint64_t owner, std::uint64_t handle) {
    posix_locks_[{id, owner}] = handle;
  }
  // The owner whose locks, taken through this handle, no close has dropped: those of open file descriptions
  // (F_OFD_SETLK), of which the kernel says nothing when they end. 0: none. Forgets about them.
  std::uint64_t take_description_locks(InodeId id, std::uint64_t handle);

 private:
  // What the kernel is being told to drop because a promise was broken; see FrontEnd::promise_broken.
  struct Drop {
    std::vector<InodeId> pages;  // inodes that are waited for
    std::size_t attributes = 0;  // notifications that are waited for
    std::function<void()> done;
  };
  // Pages that go when the request `seq` has been answered.
  struct LockedPages {
    std::uint64_t seq;
    InodeId id;
    std::uint64_t offset;
    std::uint64_t length;
    std::function<void()> done;
  };
  struct WaitingRead {
    PendingRequest* pending;
    pb::Request request;
  };
  // What a pending request is kept in, also when the mount is gone and the executor has not answered yet.
  struct Pool {
    std::deque<PendingRequest> all;
    std::vector<PendingRequest*> free;
  };

  static constexpr std::uint64_t kDirectHandle = std::uint64_t{1} << 62;

  // --- reading (fuse_server.cc)
  void serve();
  std::size_t receive();
  void process(std::size_t size);
  void ended();
  void finish(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  bool may_drop_first(const PendingRequest& pending) const;
  std::vector<InodeId> lent_under_way(const PendingRequest& pending, const pb::Outcome& outcome);
  // Pages of its inode, and attributes of these.
  void drop_first(PendingRequest& pending, const pb::Outcome& outcome, Bytes data, bool pages,
                  const std::vector<InodeId>& lent);
  void conclude(PendingRequest& pending, const pb::Outcome& outcome, Bytes data);
  void done_with(PendingRequest& pending);
  void link(PendingRequest& pending);
  void unlink(PendingRequest& pending);
  std::uint64_t answered_below() const;
  static void interrupted(fuse_req_t caller, void* pending);
  void look_at_interrupted();
  void give_up(PendingRequest& pending);
  void undo(const PendingRequest& pending, const pb::Outcome& outcome);
  // Asks something on the mount's own account; nobody waits for what comes of it.
  void ask(pb::Request& request);
  void ask_cancel(std::uint64_t seq);
  bool changes(InodeId id) const;
  static bool is_being_written(const PendingRequest& read);
  void submit_waiting_reads();
  // `done` waits for all of them, but for those that the kernel keeps locked for `except`.
  void drop_pages(InodeId id, std::uint64_t offset, std::uint64_t length, std::function<void()> done,
                  const PendingRequest* except = nullptr);
  // `answer` once `wait` has called back, unless the caller was killed meanwhile.
  void answer_late(PendingRequest& pending, std::function<void(fuse_req_t)> answer,
                   const std::function<void(std::function<void()> done)>& wait);
  // The owner has answered it, and this mount has not yet.
  bool concludes_a_change() const;
  void drop_changing();  // pages of what this mount is changing
  // `done` once all pages are dropped that were ordered to be, and, if so asked, what this mount is changing
  // is answered; after kDropPatience in any case.
  void when_pages_are_dropped(bool changes_too, const std::function<void()>& done);
  void answered(std::uint64_t seq);
  void pages_unlocked(std::uint64_t seq);
  void pages_dropped(InodeId id);
  void settle_drops();
  void take_waiting();
  // `done` may be called at once.
  void when_written_back(InodeId id, const std::function<void()>& done);
  void prune_soon(InodeId id);
  void forget_soon(InodeId orphan);
  void send_forgets();

  // --- ending
  void serve_while_unmounting();
  void refuse_waiting_callers();
  void refuse_one();
  bool wait_for_request() const;

  // --- answering (fuse_answers.cc)
  fuse_entry_param entry_of(const pb::Attr& attr) const;
  double attributes_timeout(const PendingRequest& pending, const pb::Attr& attr, bool held);  // seconds
  // Fills directory_; returns the bytes and how many entries they hold.
  std::pair<std::size_t, int> fill_directory(const PendingRequest& pending, const pb::Outcome& outcome);

  // constant after construction
  Reactor& reactor_;
  Executor& executor_;
  const std::uint64_t client_;
  const std::function<void()> unmounted_;
  const std::function<bool(InodeId, std::uint32_t)> opens_at_once_;
  const std::function<bool(InodeId)> keeps_pages_;
  const std::function<bool(InodeId, std::uint64_t)> must_flush_;
  const std::function<Reactor::Clock::duration(const pb::Attr&, bool)> lend_attributes_;
  const std::function<void(InodeId)> let_go_;
  FuseMount mount_;
  FuseSession session_;
  std::unique_ptr<FuseNotifier> notifier_;
  std::unique_ptr<FusePruner> pruner_;
  std::span<std::byte> buffer_;  // pre-faulted: a page fault in the middle of a read would fail the request
  const std::shared_ptr<bool> alive_;  // false once this object is gone

  std::vector<pb::Request> requests_;  // one for each kind, by its number
  std::unique_ptr<Pool> pool_;
  PendingRequest* oldest_ = nullptr;  // by seq
  PendingRequest* newest_ = nullptr;
  std::uint64_t highest_seq_ = 0;
  std::uint64_t own_requests_ = 0;
  std::uint64_t last_handle_ = 0;
  std::exception_ptr failure_;  // of the executor: goes on after libfuse's frames
  bool ended_ = false;          // the kernel ended the mount
  Reactor::TimerId interrupt_timer_ = 0;

  double entry_timeout_ = 0;  // seconds
  double attr_timeout_ = 0;
  bool sole_ = false;
  std::uint16_t sole_period_ = 0;  // counts the times that the mount became the only one

  KnownInodes known_;
  // Attributes that the kernel was lent with its last answer to a thread, which has asked nothing since.
  // After a while it has them.
  struct Lent {
    InodeId id;
    Reactor::Clock::time_point until;
  };
  static constexpr std::size_t kMostLent = 1024;
  std::unordered_map<pid_t, Lent> lent_to_;
  std::vector<std::shared_ptr<Drop>> drops_;  // that somebody waits for
  std::vector<LockedPages> locked_pages_;
  std::multimap<std::uint64_t, std::function<void()>> until_answered_;  // by the seq of a request
  std::vector<WaitingRead> waiting_reads_;                              // oldest first
  // By handle: answered so that the opener's thread drops the pages that the kernel has, and not used since.
  std::unordered_map<std::uint64_t, InodeId> dropping_opens_;
  std::unordered_set<InodeId> watched_orphans_;
  std::vector<InodeId> unused_orphans_;  // perhaps, and for prune_timer_
  Reactor::TimerId prune_timer_ = 0;
  std::vector<InodeId> forgotten_orphans_;  // the owner is not told yet: for forget_timer_
  Reactor::TimerId forget_timer_ = 0;
  std::map<std::pair<InodeId, std::uint64_t>, std::uint64_t> posix_locks_;
  Reactor::Clock::duration longest_wait_{};
  std::vector<char> directory_;  // a reply to readdir
};

// What libfuse calls for each request; the userdata is the FuseServer.
const fuse_lowlevel_ops& fuse_operations();
void add_file_operations(fuse_lowlevel_ops& operations);

}  // namespace sharefs
