// Two sites without a network: stores, identities and logs of their own, one reactor, and an image that goes
// from one to the other through function calls.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "fs/live_state.h"
#include "fs/store.h"
#include "meta/change_log.h"
#include "meta/reactor.h"
#include "replication/cell_shipper.h"
#include "replication/checksum.h"
#include "replication/image_source.h"
#include "replication/image_target.h"
#include "replication/inode_io.h"
#include "replication/relocate.h"
#include "replication/target_tree.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {

// A reactor on a thread of its own.
class RunningReactor {
 public:
  RunningReactor() : thread_([this] { reactor_.run(); }) {}
  ~RunningReactor() { stop(); }
  void stop() {
    reactor_.stop();
    if (thread_.joinable()) thread_.join();
  }
  Reactor& operator*() { return reactor_; }

  // Runs `task` on the reactor thread and waits for it.
  void run(const std::function<void()>& task) {
    std::promise<void> done;
    reactor_.post([&] {
      try {
        task();
        done.set_value();
      } catch (...) {
        done.set_exception(std::current_exception());
      }
    });
    done.get_future().get();
  }

 private:
  Reactor reactor_;
  std::thread thread_;
};

inline UniqueFd open_path(const std::filesystem::path& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw_errno("cannot open " + path.string());
  return fd;
}

// One copy of the data set. The owner's tree is the store, the other's lies in the private area.
struct Copy {
  Copy(Reactor& reactor, std::filesystem::path folder, bool owner, bool handles, Epoch epoch = 0)
      : home(std::move(folder)), workers(reactor, 2) {
    std::filesystem::create_directories(area() / "tree");
    std::filesystem::permissions(area(), std::filesystem::perms(0700));
    for (const char* part : {"parked", "orphans"}) std::filesystem::create_directories(area() / part);
    database = std::make_unique<Database>(home / "state.db");
    log = std::make_unique<ChangeLog>(*database, reactor);
    InodeTable::Options options;
    options.use_handles = handles;
    inodes = std::make_unique<InodeTable>(home / "state.db", home / "journal",
                                          open_path(owner ? store_path() : area() / "tree"), options);
    disk = std::make_unique<DiskSync>(open_path(store_path()).get());
    inodes->set_epoch(epoch != 0 ? epoch : owner ? 1 : 2);
    store = std::make_unique<Store>(Store::Options{.directory = store_path(), .data_set = "test"}, *inodes,
                                    opens, locks, workers);
    store->observe(log.get());
  }

  std::filesystem::path store_path() const { return home / "store"; }
  std::filesystem::path area() const { return store_path() / kPrivateArea; }
  std::filesystem::path tree() const { return area() / "tree"; }

  const std::filesystem::path home;
  Workers workers;
  OpenTable opens;
  LockTable locks;
  std::unique_ptr<Database> database;
  std::unique_ptr<ChangeLog> log;
  std::unique_ptr<InodeTable> inodes;
  std::unique_ptr<DiskSync> disk;
  std::unique_ptr<Store> store;
};

// One attempt to send an image from one copy to another.
class Attempt {
 public:
  Attempt(RunningReactor& reactor, Copy& from, Copy& to, bool holds_image, std::uint64_t number = 1,
          const Power::Interval& doubtful = {},
          std::shared_ptr<SentSet> received = std::make_shared<SentSet>())
      : reactor_(reactor), from_(from), number_(number) {
    reactor_.run([&] {
      target_ = std::make_unique<ImageTarget>(
          ImageTarget::Options{.attempt = number,
                               .source = "source",
                               .private_area = to.area(),
                               .doubtful = doubtful,
                               .received = std::move(received)},
          *to.inodes, *to.disk, *reactor_, [this](const pb::Envelope& answer) { to_source(answer); },
          [this](const std::string& reason) {
            error_ = reason;
            source_->cancel(reason);
          });
      source_ = std::make_unique<ImageSource>(
          ImageSource::Options{.attempt = number,
                               .target = "target",
                               .database = from.home / "state.db",
                               .rate = 0,
                               .credit = ImageTarget::kCredit,
                               .holds_image = holds_image},
          *from.inodes, *from.store,
          [this](const pb::Envelope& head, std::vector<zmq::message_t> parts) {
            to_target(head, std::move(parts));
          },
          *reactor_);
      cut_ = from.log->start();
    });
  }
  ~Attempt() {
    source_->cancel("the test ends");
    reactor_.run([this] {
      target_.reset();
      from_.log->stop();
    });
  }

  void image() { source_->send_image(); }
  void round(bool final_round = false) {
    std::uint64_t through = 0;
    std::int64_t cut = 0;
    reactor_.run([&] {
      through = from_.log->flush();
      cut = std::min(ctime_floor(), from_.store->oldest_change() - 1);
    });
    source_->ship_round(cut_, through, cut, open, final_round);
    cut_ = through;
  }
  // After a final round; throws what the target says when it fails.
  void end(const std::set<InodeId>& orphans = {}) {
    auto applied = std::make_shared<std::promise<void>>();
    auto future = applied->get_future();
    reactor_.run([&] { target_->final_end(source_->batches(), [applied] { applied->set_value(); }); });
    while (future.wait_for(std::chrono::milliseconds(10)) != std::future_status::ready) {
      std::string error;
      reactor_.run([&] { error = error_; });
      if (!error.empty()) throw std::runtime_error(error);
    }
    auto discarded = std::make_shared<std::promise<void>>();
    reactor_.run([&] { target_->finish(orphans, [discarded] { discarded->set_value(); }); });
    discarded->get_future().get();
  }

  ImageSource& source() { return *source_; }
  ImageTarget& target() { return *target_; }
  const std::string& error() const { return error_; }

  std::uint64_t applied() const { return applied_; }  // batches
  std::size_t largest() const { return largest_; }    // of the batches, without the data of files
  // Called for each message, to the target and to the source, on the reactor thread; false drops it and
  // everything after it, both ways.
  std::function<bool(const pb::Envelope&)> on_message;
  void end_target() { target_.reset(); }  // reactor thread
  std::vector<InodeId> open;              // inodes

 private:
  bool passes(const pb::Envelope& message) {
    if (!lost_ && on_message && !on_message(message)) lost_ = true;
    return !lost_ && target_;
  }
  void to_target(const pb::Envelope& head, std::vector<zmq::message_t> parts) {
    if (!passes(head)) return;
    if (head.has_batch()) {
      largest_ = std::max(largest_, parts[0].size());
      target_->batch(Message{head, std::move(parts)});
    } else if (head.has_manifest()) {
      target_->manifest(head.manifest());
    } else if (head.has_image_end()) {
      target_->image_end();
    } else if (head.has_round_end()) {
      target_->round_end(head.round_end().round());
    }
  }
  void to_source(const pb::Envelope& answer) {
    if (answer.has_credit()) ++applied_;
    if (!passes(answer)) return;
    if (answer.has_credit()) {
      source_->credit(answer.credit());
    }
    if (answer.has_need()) source_->need(answer.need());
    if (answer.has_image_complete()) source_->image_complete(answer.image_complete());
    if (answer.has_round_applied()) source_->round_applied(answer.round_applied());
  }

  RunningReactor& reactor_;
  Copy& from_;
  const std::uint64_t number_;
  std::uint64_t cut_ = 0;
  bool lost_ = false;
  std::size_t largest_ = 0;
  std::atomic<std::uint64_t> applied_{0};
  std::string error_;
  std::unique_ptr<ImageSource> source_;
  std::unique_ptr<ImageTarget> target_;
};

// What can be seen of a tree, one line for each name: everything that a handoff promises to keep. Without
// paths, which may be longer than there are any.
inline void describe(InodeTable& inodes, int folder, const std::string& name, const std::string& label,
                     std::map<std::string, std::string>& lines) {
  const UniqueFd fd(::openat(folder, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  if (!fd) throw_errno("cannot open " + label);
  const Backing backing = stat_inode(fd.get());
  const auto id = label == "/" ? std::optional<InodeId>(kRootInode) : inodes.find(backing);
  std::string line = "id " + std::to_string(id.value_or(0));
  const auto add = [&](const char* what, auto value) {
    line += std::string(" ") + what + " " + std::to_string(value);
  };
  add("mode", backing.stx_mode);
  add("uid", backing.stx_uid);
  add("gid", backing.stx_gid);
  add("mtime", timestamp_ns(backing.stx_mtime));
  add("ctime", id ? inodes.presented_ctime(*id, backing) : 0);
  for (const auto& [xattr, value] : read_xattrs(fd.get(), true)) line += " " + xattr + "=" + value;
  if (!is_directory(backing)) {
    add("nlink", backing.stx_nlink);
    add("size", backing.stx_size);
    add("rdev", backing.stx_rdev_major * 1000 + backing.stx_rdev_minor);
  }
  if (is_regular(backing)) {
    const UniqueFd file(::open(proc_path(fd.get()).c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) throw_errno("cannot read " + label);
    Checksum sum;
    std::string block(1 << 20, '\0');
    while (const ssize_t size = ::read(file.get(), block.data(), block.size())) {
      if (size < 0) throw_errno("cannot read " + label);
      sum.add(block.data(), static_cast<std::size_t>(size));
    }
    add("data", sum.value());
  }
  if (S_ISLNK(backing.stx_mode)) line += " -> " + read_link(fd.get());
  const UniqueFd by_id = id ? inodes.open(*id, O_PATH | O_NOFOLLOW) : UniqueFd();
  if (!by_id || !same_inode(stat_inode(by_id.get()), backing)) line += " out of reach";
  lines[label] = line;
  if (!is_directory(backing)) return;
  const UniqueFd directory(::openat(fd.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory) throw_errno("cannot list " + label);
  for (const auto& entry : list_directory(directory.get())) {
    if (label == "/" && entry.name == kPrivateArea) continue;
    describe(inodes, directory.get(), entry.name, (label == "/" ? "" : label) + "/" + entry.name, lines);
  }
}

inline std::map<std::string, std::string> describe(InodeTable& inodes, const std::filesystem::path& root) {
  std::map<std::string, std::string> lines;
  describe(inodes, open_path(root).get(), ".", "/", lines);
  return lines;
}

// The first few names that differ.
inline std::string difference(const std::map<std::string, std::string>& a,
                              const std::map<std::string, std::string>& b) {
  std::string text;
  int count = 0;
  for (const auto& [name, line] : a) {
    const auto found = b.find(name);
    if (found != b.end() && found->second == line) continue;
    if (++count > 5) break;
    text +=
        name + "\n  source: " + line + "\n  target: " + (found == b.end() ? "missing" : found->second) + "\n";
  }
  for (const auto& [name, line] : b) {
    if (a.contains(name)) continue;
    if (++count > 10) break;
    text += name + "\n  source: missing\n  target: " + line + "\n";
  }
  return text;
}

}  // namespace sharefs
