#include "replication/image_target.h"

#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stop_token>
#include <system_error>
#include <thread>
#include <utility>

#include "meta/caller.h"
#include "meta/fault.h"
#include "replication/cells_apply.h"
#include "replication/checksum.h"
#include "replication/target_tree.h"

namespace sharefs {

namespace {

using Clock = std::chrono::steady_clock;

// A batch is about 1 MiB; only the listing of a huge directory makes it larger.
constexpr std::size_t kMaxCells = std::size_t{1} << 30;

// What answers go through: closed when the ImageTarget goes, so that what was posted before comes to nothing.
struct Outlet {
  std::function<void(pb::Envelope)> send;
  std::function<void(std::string)> failed;
  bool open = true;
};

bool means_full(const std::system_error& error) {
  return error.code().value() == ENOSPC || error.code().value() == EDQUOT;
}

// Threads inherit the file-system identity that the reactor thread has just now for some caller's sake
// (meta/caller.h). Files get their own modes: the private area that they lie in is closed.
void take_own_identity() {
  if (unshare(CLONE_FS) == 0) umask(0);
  syscall(SYS_setfsuid, geteuid());
  syscall(SYS_setfsgid, getegid());
}

}  // namespace

struct ImageTarget::Impl {
  Impl(Options given, InodeTable& inode_table, DiskSync& disk_sync, Reactor& the_reactor,
       std::function<void(pb::Envelope)> send, std::function<void(std::string)> failed)
      : options(std::move(given)),
        inodes(inode_table),
        disk(disk_sync),
        reactor(the_reactor),
        outlet(std::make_shared<Outlet>(Outlet{std::move(send), std::move(failed)})),
        tree(inodes, options.private_area, options.doubtful, options.received),
        cells(inodes, tree, options.doubtful, options.lost) {
    thread = std::thread([this] { serve(); });
  }

  // reactor thread
  void queue(std::function<void()> task);
  void stop();

  // applying thread
  void serve();
  void apply(const Message& message);
  void apply_with_room(Bytes data);
  void settle();
  std::uint64_t sync();
  void send(pb::Envelope envelope);
  void fail(const std::string& reason);
  std::string disk_full() const;

  // constant after construction
  const Options options;
  InodeTable& inodes;
  DiskSync& disk;
  Reactor& reactor;
  const std::shared_ptr<Outlet> outlet;
  // applying thread
  TargetTree tree;
  CellsApply cells;
  std::uint64_t batches = 0;
  std::uint64_t applying_bytes = 0;  // of the batch at hand
  bool failed = false;
  pb::Cells decoded;
  // under mutex
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  bool stopping = false;

  std::stop_source interrupted;  // any thread
  std::thread thread;
};

void ImageTarget::Impl::queue(std::function<void()> task) {
  const std::lock_guard lock(mutex);
  tasks.push_back(std::move(task));
  changed.notify_one();
}

// Ends the thread after the task at hand, which waits for no disk; what is still queued is dropped.
void ImageTarget::Impl::stop() {
  outlet->open = false;
  tree.interrupt();
  interrupted.request_stop();
  {
    const std::lock_guard lock(mutex);
    stopping = true;
    changed.notify_one();
  }
  thread.join();
}

void ImageTarget::Impl::serve() {
  take_own_identity();
  for (;;) {
    std::function<void()> task;
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return stopping || !tasks.empty(); });
      if (stopping) return;
      task = std::move(tasks.front());
      tasks.pop_front();
    }
    if (failed) continue;
    try {
      task();
    } catch (const std::system_error& error) {
      fail(means_full(error) ? disk_full() : error.what());
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }
}

std::string ImageTarget::Impl::disk_full() const {
  return "target disk is full: needs " + std::to_string(applying_bytes / 1024 + 1) +
         " KiB more for what comes next";
}

void ImageTarget::Impl::fail(const std::string& reason) {
  failed = true;
  reactor.post([outlet = outlet, reason] {
    if (outlet->open) outlet->failed(reason);
  });
}

void ImageTarget::Impl::send(pb::Envelope envelope) {
  reactor.post([outlet = outlet, envelope = std::move(envelope)] {
    if (outlet->open) outlet->send(envelope);
  });
}

void ImageTarget::Impl::apply(const Message& message) {
  const pb::Batch& batch = message.head.batch();
  if (fault_point("image.target.batch")) throw std::runtime_error("fault point image.target.batch");
  if (batch.attempt() != options.attempt) return;
  if (batch.number() != batches + 1) throw Malformed("it is not the next one");
  if (batch.compressed() || message.parts.size() != 2)
    throw Malformed("it is of a form that is not known here");
  const zmq::message_t& head = message.parts[0];
  const zmq::message_t& body = message.parts[1];
  if (checksum(head, body) != batch.checksum()) throw Malformed("its checksum is wrong");
  if (head.size() > kMaxCells || !decoded.ParseFromArray(head.data(), static_cast<int>(head.size()))) {
    throw Malformed("it cannot be decoded");
  }
  applying_bytes = head.size() + body.size();
  apply_with_room(Bytes(static_cast<const std::byte*>(body.data()), body.size()));
  disk.written(applying_bytes, options.failed_syncs);
  ++batches;
  pb::Envelope envelope;
  envelope.mutable_credit()->set_attempt(options.attempt);
  envelope.mutable_credit()->set_bytes(applying_bytes);
  send(std::move(envelope));
}

// A batch may be applied twice, like what an earlier attempt has left.
void ImageTarget::Impl::apply_with_room(Bytes data) {
  try {
    cells.apply(decoded, data);
  } catch (const std::system_error& error) {
    if (!means_full(error) || !tree.make_room()) throw;
    try {
      cells.apply(decoded, data);
    } catch (const Malformed&) {  // part of a listing is not taken twice
      throw std::system_error(error.code(), error.what());
    }
  }
}

// Names that had to wait.
void ImageTarget::Impl::settle() {
  tree.settle();
  tree.lock_again();
}

// Everything applied so far is on stable storage when it returns. Tells how long that took, in nanoseconds.
std::uint64_t ImageTarget::Impl::sync() {
  const auto began = Clock::now();
  disk.sync(options.failed_syncs, interrupted.get_token());
  inodes.flush();
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - began).count());
}

ImageTarget::ImageTarget(Options options, InodeTable& inodes, DiskSync& disk, Reactor& reactor,
                         std::function<void(pb::Envelope)> send, std::function<void(std::string)> failed)
    : impl_((become_self(), std::make_unique<Impl>(std::move(options), inodes, disk, reactor, std::move(send),
                                                   std::move(failed)))) {}

ImageTarget::~ImageTarget() { impl_->stop(); }

void ImageTarget::batch(Message message) {
  auto shared = std::make_shared<const Message>(std::move(message));
  impl_->queue([impl = impl_.get(), shared] { impl->apply(*shared); });
}

void ImageTarget::manifest(pb::Manifest manifest) {
  impl_->queue([impl = impl_.get(), manifest = std::move(manifest)] {
    pb::Envelope envelope;
    *envelope.mutable_need() = impl->cells.need(manifest);
    impl->send(std::move(envelope));
  });
}

void ImageTarget::image_end() {
  impl_->queue([impl = impl_.get()] {
    impl->settle();
    impl->tree.show_hidden();
    const std::uint64_t sync_ns = impl->sync();
    if (fault_point("image.target.end")) throw std::runtime_error("fault point image.target.end");
    pb::Envelope envelope;
    envelope.mutable_image_complete()->set_attempt(impl->options.attempt);
    envelope.mutable_image_complete()->set_sync_ns(sync_ns);
    impl->send(std::move(envelope));
  });
}

void ImageTarget::round_end(std::uint32_t round) {
  impl_->queue([impl = impl_.get(), round] {
    impl->settle();
    const std::uint64_t sync_ns = impl->sync();
    if (fault_point("round.target")) throw std::runtime_error("fault point round.target");
    pb::Envelope envelope;
    pb::RoundApplied& applied = *envelope.mutable_round_applied();
    applied.set_attempt(impl->options.attempt);
    applied.set_round(round);
    applied.set_sync_ns(sync_ns);
    impl->send(std::move(envelope));
  });
}

void ImageTarget::final_end(std::uint64_t batches, std::function<void()> applied) {
  impl_->queue([impl = impl_.get(), batches, applied = std::move(applied)] {
    if (impl->batches != batches) {
      throw Malformed("there are " + std::to_string(impl->batches) + " batches instead of " +
                      std::to_string(batches));
    }
    impl->settle();
    if (const std::size_t left = impl->tree.set_aside(); left > 0) {
      throw std::runtime_error("the tree received is not whole: " + std::to_string(left) +
                               " names have no inode");
    }
    impl->sync();
    impl->inodes.sync(kRootInode);
    if (fault_point("final.target")) throw std::runtime_error("fault point final.target");
    impl->reactor.post([outlet = impl->outlet, applied] {
      if (outlet->open) applied();
    });
  });
}

bool ImageTarget::is_parked(InodeId id) const { return impl_->tree.is_parked(id); }

void ImageTarget::finish(const std::set<InodeId>& orphans, std::function<void()> discarded) {
  // Orphans may be asked for at once; what nobody can name any more may go in its own time.
  impl_->tree.keep_orphans(orphans);
  impl_->queue([impl = impl_.get(), discarded = std::move(discarded)] {
    impl->tree.discard_rest();
    impl->reactor.post([outlet = impl->outlet, discarded] {
      if (outlet->open && discarded) discarded();
    });
  });
}

}  // namespace sharefs
