// Random mutations of a store, one after the other, as applications would make them: few names in few
// directories, so that they meet each other.
#pragma once

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/stat.h>

#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fs/store.h"
#include "meta/reactor.h"

namespace sharefs {

class Mutator {
 public:
  Mutator(Reactor& reactor, Store& store, unsigned seed) : reactor_(reactor), store_(store), random_(seed) {}

  // Reactor thread, all of them. start() goes on with up to `operations` until stop(), in between other work.
  void start(unsigned operations) {
    left_ = operations;
    tick();
  }
  void stop() { left_ = 0; }
  bool idle() const { return in_flight_ == 0 && !scheduled_; }
  void perform() { operation(); }

  // Without file handles an inode is known by one name only, and lost with it.
  bool hard_links = true;

  const std::set<InodeId>& orphans() const { return orphans_; }
  unsigned performed() const { return performed_; }

 private:
  struct Found {
    InodeId id = 0;
    std::uint32_t mode = 0;
    std::uint64_t size = 0;
  };

  void tick() {
    scheduled_ = false;
    if (left_ == 0) return;
    --left_;
    operation();
    scheduled_ = true;
    reactor_.after(std::chrono::microseconds(20), [this] { tick(); });
  }

  unsigned below(unsigned limit) { return static_cast<unsigned>(random_() % limit); }
  InodeId directory() { return directories_[below(static_cast<unsigned>(directories_.size()))]; }
  std::string name() { return std::string(1, static_cast<char>('a' + below(10))); }

  void ask(const pb::Request& request, std::string_view data = {},
           std::function<void(const pb::Outcome&)> then = {}) {
    ++in_flight_;
    store_.execute(request, as_bytes(data),
                   [this, then = std::move(then)](const pb::Outcome& outcome, Bytes) {
                     --in_flight_;
                     if (outcome.error() == 0) ++performed_;
                     for (const InodeId id : outcome.orphaned()) orphans_.insert(id);
                     if (then) then(outcome);
                   });
  }
  static pb::Request request() {
    pb::Request request;
    request.set_client(1);
    return request;
  }

  std::optional<Found> look(InodeId parent, const std::string& name) {
    std::optional<Found> found;
    pb::Request r = request();
    r.mutable_lookup()->set_parent(parent);
    r.mutable_lookup()->set_name(name);
    ask(r, {}, [&found](const pb::Outcome& outcome) {
      if (outcome.error() == 0)
        found = Found{outcome.attr().id(), outcome.attr().mode(), outcome.attr().size()};
    });
    return found;
  }

  void made_directory(const pb::Outcome& outcome) {
    if (outcome.error() != 0) return;
    directories_.push_back(outcome.attr().id());
    if (directories_.size() > 24) directories_.erase(directories_.begin() + 1);
  }

  void operation() {
    pb::Request r = request();
    const InodeId parent = directory();
    const std::string first = name();
    switch (below(20)) {
      case 0:
      case 1:
      case 2:
        return create(parent, first);
      case 3:
      case 4: {
        r.mutable_mkdir()->set_parent(parent);
        r.mutable_mkdir()->set_name(first);
        r.mutable_mkdir()->set_mode(0755);
        return ask(r, {}, [this](const pb::Outcome& outcome) { made_directory(outcome); });
      }
      case 5: {
        r.mutable_unlink()->set_parent(parent);
        r.mutable_unlink()->set_name(first);
        return ask(r);
      }
      case 6: {
        r.mutable_rmdir()->set_parent(parent);
        r.mutable_rmdir()->set_name(first);
        return ask(r);
      }
      case 7:
      case 8:
      case 9:
      case 10: {
        auto& op = *r.mutable_rename();
        op.set_parent(parent);
        op.set_name(first);
        op.set_new_parent(directory());
        op.set_new_name(name());
        op.set_flags(below(3) == 0 ? RENAME_EXCHANGE : 0);
        return ask(r);
      }
      case 11: {
        r.mutable_symlink()->set_parent(parent);
        r.mutable_symlink()->set_name(first);
        r.mutable_symlink()->set_target("somewhere/" + std::to_string(below(1000)));
        return ask(r);
      }
      case 12:
        return forget();
      default: {
        const auto found = look(parent, first);
        if (!found) return create(parent, first);
        if (S_ISDIR(found->mode) && below(2) == 0) directories_.push_back(found->id);
        return change(*found, parent);
      }
    }
  }

  void create(InodeId parent, const std::string& name) {
    pb::Request r = request();
    auto& op = *r.mutable_create();
    op.set_parent(parent);
    op.set_name(name);
    op.set_mode(below(10) == 0 ? S_IFIFO | 0600u : S_IFREG | 0644u);
    ask(r, {}, [this](const pb::Outcome& outcome) {
      if (outcome.error() == 0 && S_ISREG(outcome.attr().mode())) write(outcome.attr().id(), 0);
    });
  }

  void write(InodeId id, std::uint64_t offset) {
    pb::Request r = request();
    const std::string data(1 + below(30000), static_cast<char>('A' + below(26)));
    r.mutable_write()->set_id(id);
    r.mutable_write()->set_offset(offset);
    r.mutable_write()->set_size(static_cast<std::uint32_t>(data.size()));
    ask(r, data);
  }

  void change(const Found& found, InodeId parent) {
    pb::Request r = request();
    const bool file = S_ISREG(found.mode);
    switch (below(file ? 9 : 4)) {
      case 0:
        r.mutable_setattr()->set_id(found.id);
        r.mutable_setattr()->set_mode(0500 + below(0300));
        return ask(r);
      case 1:
        r.mutable_setattr()->set_id(found.id);
        r.mutable_setattr()->set_uid(below(3));
        r.mutable_setattr()->set_mtime(1'000'000'000 + below(1000));
        return ask(r);
      case 2:
        if (!file && !S_ISDIR(found.mode)) return;
        if (below(3) == 0) {
          r.mutable_removexattr()->set_id(found.id);
          r.mutable_removexattr()->set_name("user.x");
          return ask(r);
        }
        r.mutable_setxattr()->set_id(found.id);
        r.mutable_setxattr()->set_name("user.x");
        return ask(r, std::to_string(below(1000)));
      case 3:
        if (S_ISDIR(found.mode) || !hard_links) return;
        r.mutable_link()->set_id(found.id);
        r.mutable_link()->set_parent(below(2) == 0 ? parent : directory());
        r.mutable_link()->set_name(name());
        return ask(r);
      case 4:
        r.mutable_setattr()->set_id(found.id);
        r.mutable_setattr()->set_size(below(60000));
        return ask(r);
      case 5: {
        static constexpr int kModes[] = {0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE,
                                         FALLOC_FL_COLLAPSE_RANGE};
        r.mutable_fallocate()->set_id(found.id);
        r.mutable_fallocate()->set_offset(4096ull * below(6));
        r.mutable_fallocate()->set_length(4096ull * (1 + below(4)));
        r.mutable_fallocate()->set_mode(static_cast<std::uint32_t>(kModes[below(4)]));
        return ask(r);
      }
      default:
        return write(found.id, below(3) == 0 ? below(200000) : below(20000));
    }
  }

  void forget() {
    if (orphans_.empty() || below(2) == 0) return;
    pb::Request r = request();
    auto it = orphans_.begin();
    std::advance(it, below(static_cast<unsigned>(orphans_.size())));
    r.mutable_forget()->add_ids(*it);
    orphans_.erase(it);
    ask(r);
  }

  Reactor& reactor_;
  Store& store_;
  std::mt19937 random_;
  unsigned left_ = 0, performed_ = 0;
  int in_flight_ = 0;
  bool scheduled_ = false;
  std::vector<InodeId> directories_{kRootInode};
  std::set<InodeId> orphans_;
};

}  // namespace sharefs
