// Random mutations of a store, one after the other, as applications would make them: few names in few
// directories, so that they meet each other.
#pragma once

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fs/live_state.h"
#include "fs/store.h"
#include "meta/reactor.h"

namespace sharefs {

class Mutator {
 public:
  Mutator(Reactor& reactor, Store& store, unsigned seed) : reactor_(reactor), store_(&store), random_(seed) {}

  // Reactor thread, all of them. start() goes on with up to `operations` until stop(), in between other work.
  void start(unsigned operations) {
    left_ = operations;
    tick();
  }
  void stop() { left_ = 0; }
  bool idle() const { return in_flight_ == 0 && !scheduled_; }
  void perform() { operation(); }
  void use(Store& store) { store_ = &store; }  // of another owner, or of another process

  const std::set<InodeId>& orphans() const { return orphans_; }
  void open_again(OpenTable& opens) const {
    for (const auto& [handle, id] : open_)
      opens.open({.client = 1, .handle = handle, .id = id, .flags = O_RDWR, .directory = false});
  }
  std::vector<InodeId> open() const {
    std::vector<InodeId> ids;
    for (const auto& [handle, id] : open_) ids.push_back(id);
    return ids;
  }
  unsigned performed() const { return performed_; }
  // Files whose data may have been changed since the last call.
  std::set<InodeId> take_written() { return std::exchange(written_, {}); }

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
  std::string name() {
    if (below(25) != 0) return std::string(1, static_cast<char>('a' + below(10)));
    return below(2) == 0 ? std::string(255, static_cast<char>('a' + below(3))) : "\xff\n\\ %s\x01";
  }

  void ask(const pb::Request& request, std::string_view data = {},
           std::function<void(const pb::Outcome&)> then = {}) {
    ++in_flight_;
    store_->execute(request, as_bytes(data),
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
    switch (below(30)) {
      case 0:
      case 1:
      case 2:
        return create(parent, first);
      case 20:
        return replace(parent, first);
      case 21:
        return open_or_close(parent, first);
      case 22:
        return below(4) == 0 ? change(Found{kRootInode, S_IFDIR | 0755, 0}, kRootInode) : forget();
      case 23:
        return below(8) == 0 ? many(parent) : copy(parent, first);
      case 26:
        return change_nameless(parent);
      case 27:
        return below(30) == 0 ? deep(parent) : rewrite_unseen(parent, first);
      case 28:
        return below(8) == 0 ? lose_names(parent) : create(parent, first);
      case 29:
        return below(4) == 0 ? move_all(parent, directory()) : append(parent, first);
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
        op.set_flags(below(3) == 0 ? RENAME_EXCHANGE : below(8) == 0 ? RENAME_NOREPLACE : 0);
        return ask(r);
      }
      case 11: {
        r.mutable_symlink()->set_parent(parent);
        r.mutable_symlink()->set_name(first);
        r.mutable_symlink()->set_target("somewhere/" + std::string(below(10) == 0 ? 4000 : 0, 'l') +
                                        std::to_string(below(1000)));
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
    op.set_mode(below(10) != 0 ? S_IFREG | 0644u : below(2) == 0 ? S_IFIFO | 0600u : S_IFSOCK | 0640u);
    if (::geteuid() == 0 && below(40) == 0) {
      op.set_mode(S_IFCHR | 0600u);
      op.set_rdev(makedev(1, 3 + below(3)));
    }
    ask(r, {}, [this](const pb::Outcome& outcome) {
      if (outcome.error() == 0 && S_ISREG(outcome.attr().mode())) write(outcome.attr().id(), 0);
    });
  }

  void write(InodeId id, std::uint64_t offset) {
    pb::Request r = request();
    const std::string data(1 + below(below(20) == 0 ? 900'000 : 30000), static_cast<char>('A' + below(26)));
    written_.insert(id);
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
        // An ordinary user may at least look for names.
        r.mutable_setattr()->set_mode((below(8) << 9) +
                                      ((0500 + below(0300)) | (::geteuid() != 0 ? 0100 : 0)));
        return ask(r);
      case 1:
        r.mutable_setattr()->set_id(found.id);
        if (below(3) != 0) r.mutable_setattr()->set_mtime(time());
        if (below(3) == 0) r.mutable_setattr()->set_atime(time());
        if (::geteuid() == 0 && below(2) == 0) {
          r.mutable_setattr()->set_uid(below(3));
          r.mutable_setattr()->set_gid(below(3));
        }
        return ask(r);
      case 2:
        if (!file && !S_ISDIR(found.mode)) return;
        return change_xattr(found);
      case 3:
        if (S_ISDIR(found.mode)) return;
        r.mutable_link()->set_id(found.id);
        r.mutable_link()->set_parent(below(2) == 0 ? parent : directory());
        r.mutable_link()->set_name(name());
        return ask(r);
      case 4:
        r.mutable_setattr()->set_id(found.id);
        r.mutable_setattr()->set_size(below(3) == 0 ? 0 : below(60000));
        written_.insert(found.id);
        return ask(r);
      case 5: {
        static constexpr int kModes[] = {0,
                                         FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                         FALLOC_FL_ZERO_RANGE,
                                         FALLOC_FL_COLLAPSE_RANGE,
                                         FALLOC_FL_INSERT_RANGE,
                                         FALLOC_FL_KEEP_SIZE};
        r.mutable_fallocate()->set_id(found.id);
        r.mutable_fallocate()->set_offset(4096ull * below(6));
        r.mutable_fallocate()->set_length(4096ull * (1 + below(4)));
        r.mutable_fallocate()->set_mode(static_cast<std::uint32_t>(kModes[below(6)]));
        written_.insert(found.id);
        return ask(r);
      }
      default:
        if (below(60) == 0) return write(found.id, below(8u << 20));
        return write(found.id, below(3) == 0 ? below(200000) : below(20000));
    }
  }

  std::int64_t time() {
    return 1'000'000'000ll * (static_cast<int>(below(2'000'000'000)) - 100'000'000) + below(1'000'000'000);
  }

  // Another kind of inode at once under a name that has just become free.
  void replace(InodeId parent, const std::string& name) {
    pb::Request r = request();
    const auto found = look(parent, name);
    if (found && S_ISDIR(found->mode)) {
      r.mutable_rmdir()->set_parent(parent);
      r.mutable_rmdir()->set_name(name);
    } else if (found) {
      r.mutable_unlink()->set_parent(parent);
      r.mutable_unlink()->set_name(name);
    }
    if (found) ask(r);
    if (below(2) == 0) return create(parent, name);
    r = request();
    r.mutable_mkdir()->set_parent(parent);
    r.mutable_mkdir()->set_name(name);
    r.mutable_mkdir()->set_mode(0755);
    ask(r, {}, [this](const pb::Outcome& outcome) { made_directory(outcome); });
  }

  // What is open, or has lost its last name: reached by its id alone.
  void change_nameless(InodeId parent) {
    std::vector<InodeId> ids(orphans_.begin(), orphans_.end());
    for (const auto& [handle, id] : open_) ids.push_back(id);
    if (ids.empty()) return;
    pb::Request r = request();
    r.mutable_getattr()->set_id(ids[below(static_cast<unsigned>(ids.size()))]);
    std::optional<Found> found;
    ask(r, {}, [&found](const pb::Outcome& outcome) {
      if (outcome.error() == 0)
        found = Found{outcome.attr().id(), outcome.attr().mode(), outcome.attr().size()};
    });
    if (found) change(*found, parent);
  }

  // Other bytes under the size and the mtime that there were.
  void rewrite_unseen(InodeId parent, const std::string& name) {
    pb::Request r = request();
    const auto found = look(parent, name);
    if (!found || !S_ISREG(found->mode) || found->size == 0) return;
    std::int64_t mtime = 0;
    r.mutable_getattr()->set_id(found->id);
    ask(r, {}, [&mtime](const pb::Outcome& outcome) { mtime = outcome.attr().mtime(); });
    written_.insert(found->id);
    r = request();
    r.mutable_write()->set_id(found->id);
    r.mutable_write()->set_offset(below(static_cast<unsigned>(found->size)));
    r.mutable_write()->set_size(1);
    ask(r, std::string(1, static_cast<char>('0' + below(10))));
    r = request();
    r.mutable_setattr()->set_id(found->id);
    r.mutable_setattr()->set_mtime(mtime);
    ask(r);
  }

  void append(InodeId parent, const std::string& name) {
    const auto found = look(parent, name);
    if (found && S_ISREG(found->mode)) write(found->id, found->size);
  }

  // Directories below each other, with names so long that no path leads to the last one.
  void deep(InodeId parent) {
    for (int i = 0; i < 20; ++i) {
      pb::Request r = request();
      r.mutable_mkdir()->set_parent(parent);
      r.mutable_mkdir()->set_name(std::string(250, static_cast<char>('a' + i)));
      r.mutable_mkdir()->set_mode(0755);
      ask(r, {}, [&](const pb::Outcome& outcome) {
        if (outcome.error() == 0) parent = outcome.attr().id();
      });
    }
    directories_.push_back(parent);
    create(parent, name());
  }

  // Everything that is in one directory.
  void move_all(InodeId from, InodeId to) {
    for (char name = 'a'; name < 'k'; ++name) {
      pb::Request r = request();
      r.mutable_rename()->set_parent(from);
      r.mutable_rename()->set_name(std::string(1, name));
      r.mutable_rename()->set_new_parent(to);
      r.mutable_rename()->set_new_name(std::string(1, name));
      ask(r);
    }
  }

  // Files lose the names by which they are reached without file handles, having been written to; later, as
  // what was made here is to be known elsewhere by then. Now and then more than are kept in reach.
  void lose_names(InodeId parent) {
    constexpr int kMany = 150;
    static_assert(kMany > InodeTable::kKeptInodes);
    const auto name = [](int i) { return "lose" + std::to_string(i); };
    if (losing_.first == 0) {
      losing_ = {parent, directory()};
      for (int i = below(4) == 0 ? kMany : 10; i-- > 0;) {
        create(losing_.first, name(i));
        const auto found = look(losing_.first, name(i));
        if (!found || !S_ISREG(found->mode)) continue;
        pb::Request r = request();
        r.mutable_link()->set_id(found->id);
        r.mutable_link()->set_parent(losing_.second);
        r.mutable_link()->set_name("kept" + std::to_string(i) + "-" + std::to_string(below(1000)));
        ask(r);
      }
      return;
    }
    const InodeId from = std::exchange(losing_.first, 0);
    for (int i = 0; i < kMany; ++i) {
      const auto found = look(from, name(i));
      if (!found) break;
      if (S_ISREG(found->mode)) append(from, name(i));
      pb::Request r = request();
      r.mutable_unlink()->set_parent(from);
      r.mutable_unlink()->set_name(name(i));
      ask(r);
    }
  }

  // Some names more in one directory, or fewer.
  void many(InodeId parent) {
    const bool more = below(3) != 0;
    for (int i = 0; i < 40; ++i) {
      const std::string name = "many" + std::to_string(i);
      pb::Request r = request();
      if (more) {
        r.mutable_create()->set_parent(parent);
        r.mutable_create()->set_name(name);
        r.mutable_create()->set_mode(S_IFREG | 0600u);
      } else {
        r.mutable_unlink()->set_parent(parent);
        r.mutable_unlink()->set_name(name);
      }
      ask(r);
    }
  }

  void open_or_close(InodeId parent, const std::string& name) {
    pb::Request r = request();
    if (open_.size() > 5 || (!open_.empty() && below(3) == 0)) {
      auto it = open_.begin();
      std::advance(it, below(static_cast<unsigned>(open_.size())));
      r.mutable_release()->set_handle(it->first);
      r.mutable_release()->set_id(it->second);
      open_.erase(it);
      return ask(r);
    }
    const auto found = look(parent, name);
    if (!found || !S_ISREG(found->mode)) return;
    r.mutable_open()->set_id(found->id);
    r.mutable_open()->set_handle(++handles_);
    r.mutable_open()->set_flags(O_RDWR);
    ask(r, {}, [this, id = found->id, handle = handles_](const pb::Outcome& outcome) {
      if (outcome.error() == 0) open_[handle] = id;
    });
    if (below(2) == 0) return;
    r = request();
    r.mutable_unlink()->set_parent(parent);
    r.mutable_unlink()->set_name(name);
    ask(r);
    write(found->id, below(20000));
  }

  void copy(InodeId parent, const std::string& name) {
    const auto from = look(parent, name);
    const auto to = look(directory(), this->name());
    if (!from || !to || !S_ISREG(from->mode) || !S_ISREG(to->mode) || from->id == to->id) return;
    pb::Request r = request();
    r.mutable_copy_file_range()->set_id_in(from->id);
    r.mutable_copy_file_range()->set_id_out(to->id);
    r.mutable_copy_file_range()->set_offset_out(below(30000));
    r.mutable_copy_file_range()->set_length(1 + below(100'000));
    written_.insert(to->id);
    ask(r);
  }

  // One of its own, an access control list (a default one is for what is made in the directory), or a
  // capability.
  void change_xattr(const Found& found) {
    static constexpr std::array kNames{"user.x",
                                       "user.y",
                                       "trusted.z",
                                       "system.posix_acl_access",
                                       "system.posix_acl_default",
                                       "security.capability"};
    const std::size_t which = below(kNames.size());
    pb::Request r = request();
    if (below(3) == 0) {
      r.mutable_removexattr()->set_id(found.id);
      r.mutable_removexattr()->set_name(kNames[which]);
      return ask(r);
    }
    r.mutable_setxattr()->set_id(found.id);
    r.mutable_setxattr()->set_name(kNames[which]);
    std::string value(below(20) == 0 ? 1500 : below(20), static_cast<char>('a' + below(26)));
    const auto add = [&value](auto number) {
      std::array<char, sizeof number> bytes;
      std::memcpy(bytes.data(), &number, sizeof number);
      value.append(bytes.data(), bytes.size());
    };
    if (which == 3 || which == 4) {
      value.clear();
      add(std::uint32_t{2});
      const std::uint32_t nobody = ~std::uint32_t{0};
      const auto one = [&](std::uint16_t tag, unsigned permissions, std::uint32_t id) {
        add(tag);
        add(static_cast<std::uint16_t>(permissions));
        add(id);
      };
      one(1, 5 + below(2) * 2, nobody);
      one(2, below(8), 1 + below(4));
      one(4, below(8), nobody);
      one(16, below(8), nobody);
      one(32, below(8), nobody);
    } else if (which == 5) {
      value.clear();
      for (const std::uint32_t word : {0x02000001u, 1u << below(8), 0u, 0u, 0u}) add(word);
    }
    ask(r, value);
  }

  void forget() {
    if (orphans_.empty() || below(2) == 0) return;
    pb::Request r = request();
    auto it = orphans_.begin();
    std::advance(it, below(static_cast<unsigned>(orphans_.size())));
    for (const auto& [handle, id] : open_)
      if (id == *it) return;
    r.mutable_forget()->add_ids(*it);
    orphans_.erase(it);
    ask(r);
  }

  Reactor& reactor_;
  Store* store_;
  std::mt19937 random_;
  unsigned left_ = 0, performed_ = 0;
  int in_flight_ = 0;
  bool scheduled_ = false;
  std::vector<InodeId> directories_{kRootInode};
  std::set<InodeId> orphans_, written_;
  std::map<std::uint64_t, InodeId> open_;  // by handle
  std::pair<InodeId, InodeId> losing_;     // directories of lose_names(), between its two halves
  std::uint64_t handles_ = 0;
};

}  // namespace sharefs
