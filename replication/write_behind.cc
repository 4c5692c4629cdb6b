#include "replication/write_behind.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <system_error>
#include <utility>

#include "fs/named_files.h"
#include "fs/promises.h"
#include "meta/caller.h"
#include "meta/fault.h"
#include "meta/log.h"

namespace sharefs {
namespace {

// Other requests of the WriteBehind; those of the kernel and of other parts have other bits.
constexpr std::uint64_t kOwnSeqBit = std::uint64_t{1} << 58;
// So much waits for a moment, to travel together.
constexpr std::size_t kSendAtOnce = 128 << 10;
// Files that large are rare, and the owner's file system may have a limit.
constexpr std::uint64_t kMostOffset = std::uint64_t{1} << 40;

// A write that may be acknowledged before it is performed. What reads by itself where it goes, takes
// privileges away, or is to be durable, is not.
bool may_be_early(const pb::Write& write) {
  return write.size() != 0 && !write.append() && !write.writeback() && !write.kill_suidgid() &&
         !write.sync() && write.offset() < kMostOffset;
}

}  // namespace

// A look at names. Of an inode that is written to it may tell what was before: then it is asked again.
struct WriteBehind::Look {
  pb::Request request;
  Reply reply;
  std::set<InodeId> told{};  // those
};

WriteBehind::WriteBehind(Executor& next, Options options)
    : next_(next), options_(std::move(options)), journal_(options_.journal, options_.power) {}

void WriteBehind::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (request.has_cancel() && cancel(request.cancel().seq())) return reply_errno(reply, 0);
  if (request.has_write()) return write(request, data, std::move(reply));
  if (const InodeId id = named_ahead(request); id != 0) {
    files_[id].waiting.push_back({request, std::string(as_text(data)), std::move(reply)});
    return;
  }
  const auto op = request.op_case();
  if (request.has_flush() || request.has_sync() || request.has_release())
    return close(request, data, std::move(reply));
  if (ahead_.empty()) return next_.execute(request, data, std::move(reply));
  if (request.has_readdir()) return list(request, std::move(reply));
  if (request.has_lookup()) return look(std::make_shared<Look>(Look{request, std::move(reply)}));
  if (changes_names(op)) return change(request, data, std::move(reply));
  next_.execute(request, data, std::move(reply));
}

bool WriteBehind::is_ahead(InodeId id) const {
  const auto found = files_.find(id);
  return found != files_.end() && found->second.ahead != 0;
}

InodeId WriteBehind::named_ahead(const pb::Request& request) const {
  InodeId found = 0;
  if (!ahead_.empty())
    visit_named_files(request, [&](InodeId id) {
      if (is_ahead(id)) found = id;
    });
  return found;
}

// ---- writing

void WriteBehind::write(const pb::Request& request, Bytes data, Reply reply) {
  const pb::Write& write = request.write();
  if (!may_be_early(write) || options_.trusted_for() <= Reactor::Clock::duration::zero())
    return next_.execute(request, data, std::move(reply));
  File& file = files_[write.id()];
  if (file.period == 0) file.period = ++periods_;
  const bool awaited = file.looks != 0 || !file.waiting.empty() || !file.when_performed.empty();
  if (file.lease != 0 && !awaited && go_ahead(file, request, data, reply)) return;
  // A file that is written once needs no lease.
  if (file.lease != 0 || !std::exchange(file.written, true))
    return next_.execute(request, data, std::move(reply));
  pb::Request asking = request;
  asking.mutable_write()->set_wants_lease(true);
  next_.execute(asking, data,
                [this, id = write.id(), generation = generation_, period = file.period,
                 reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                  const auto found = files_.find(id);
                  if (found != files_.end() && generation == generation_ && found->second.period == period &&
                      outcome.lease() != 0)
                    found->second.lease = outcome.lease();
                  reply(outcome, result);
                });
}

bool WriteBehind::may_go_ahead(std::size_t size) const {
  if (ahead_.size() >= kMost || bytes_ + size > kMostBytes) return false;
  if (ahead_.empty()) return true;
  const auto longest = kLongest + 2 * options_.round_trip();
  return Reactor::Clock::now() - ahead_.begin()->second.acknowledged < longest;
}

bool WriteBehind::go_ahead(File& file, const pb::Request& request, Bytes data, const Reply& reply) {
  if (!may_go_ahead(data.size())) return false;
  const std::uint64_t seq = kAheadSeqBit | (last_ + 1);
  pb::Request early = request;
  early.set_seq(seq);
  early.set_ahead_answered_below(ahead_.empty() ? seq : ahead_.begin()->first);
  early.mutable_write()->set_lease(file.lease);
  lazy_bytes_ += data.size();
  early.set_lazy(lazy_bytes_ < kSendAtOnce);
  if (!early.lazy()) lazy_bytes_ = 0;
  const auto position = journal_.append(early, data);
  if (!position) return false;
  ++last_;
  const pb::Write& write = request.write();
  ahead_[seq] = {.id = write.id(),
                 .handle = write.handle(),
                 .offset = write.offset(),
                 .size = data.size(),
                 .position = *position,
                 .acknowledged = Reactor::Clock::now()};
  bytes_ += data.size();
  ++file.ahead;
  fault_point("ahead.noted");
  pb::Outcome outcome;
  outcome.set_count(data.size());
  outcome.set_ahead(true);
  reply(outcome, {});
  next_.execute(early, data, [this, seq](const pb::Outcome& performed, Bytes) { answered(seq, performed); });
  return true;
}

void WriteBehind::answered(std::uint64_t seq, const pb::Outcome& outcome) {
  const auto node = ahead_.extract(seq);
  if (node.empty()) return;
  const Ahead& write = node.mapped();
  bytes_ -= write.size;
  File& file = files_[write.id];
  if (outcome.error() != 0 || outcome.count() < write.size) {
    const int error = outcome.error() != 0 ? static_cast<int>(outcome.error()) : ENOSPC;
    lost(write, error);
    tell_handles(write, error);
  }
  journal_.done(write.position);
  if (outcome.invalidate()) options_.drop_pages(write.id);
  file.stamp = std::max(file.stamp, outcome.promise());
  if (--file.ahead != 0) return;
  auto waiting = std::exchange(file.waiting, {});
  const auto when_performed = std::exchange(file.when_performed, {});
  options_.performed(write.id, file.stamp);
  for (const auto& performed : when_performed) performed();
  for (Waiting& one : waiting) execute(one.request, as_bytes(one.data), std::move(one.reply));
}

void WriteBehind::lost(const Ahead& write, int error) {
  log::error("{} bytes at {} of inode {:x} were not written: {}{}", write.size, write.offset, write.id,
             error == ESTALE ? "others have changed it while this site was away" : std::strerror(error),
             keep(write) ? ". They are kept in " + options_.unwritten.string() : "");
}

// As by a local disk each open file is told once. What follows waits for the owner, which tells it at once.
void WriteBehind::tell_handles(const Ahead& write, int error) {
  File& file = files_[write.id];
  file.lease = 0;
  const int told = error == ESTALE ? EIO : error;
  file.errors[write.handle] = told;
  for (const std::uint64_t handle : options_.handles(write.id)) file.errors[handle] = told;
  options_.drop_pages(write.id);
}

void WriteBehind::drop_if_idle(InodeId id) {
  const auto found = files_.find(id);
  if (found == files_.end()) return;
  const File& file = found->second;
  if (file.idle() && file.lease == 0 && !file.written && file.errors.empty()) files_.erase(found);
}

bool WriteBehind::keep(const Ahead& write) {
  become_self();
  const Bytes bytes = journal_.data(write.position);
  char name[64];
  std::snprintf(name, sizeof name, "%lx-%lu-%lu", write.id, write.offset, write.position);
  std::error_code failed;
  std::filesystem::create_directories(options_.unwritten, failed);
  std::ofstream file(options_.unwritten / name, std::ios::binary);
  file.write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  return !file.fail();
}

// ---- everything else

// Meanwhile nothing more goes ahead of it.
void WriteBehind::look(const std::shared_ptr<Look>& look) {
  next_.execute(look->request, {}, [this, look](const pb::Outcome& outcome, Bytes result) {
    const InodeId told = outcome.has_attr() && is_ahead(outcome.attr().id()) ? outcome.attr().id() : 0;
    if (told != 0) {
      File& file = files_[told];
      if (look->told.insert(told).second) ++file.looks;
      file.when_performed.push_back([this, look] { this->look(look); });
      return;
    }
    for (const InodeId id : look->told) {
      --files_[id].looks;
      drop_if_idle(id);
    }
    look->reply(outcome, result);
  });
}

// A listing would have to be asked again and again beside many writers.
void WriteBehind::list(const pb::Request& request, Reply reply) {
  next_.execute(request, {}, [this, reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
    const auto hidden = [this](const pb::DirEntry& entry) {
      return tells_inode(entry) && is_ahead(entry.attr().id());
    };
    if (std::ranges::none_of(outcome.entries(), hidden)) return reply(outcome, result);
    pb::Outcome told = outcome;
    for (auto& entry : *told.mutable_entries())
      if (hidden(entry)) strip_attributes(entry);
    reply(told, result);
  });
}

// The same of a change, which cannot be asked again.
void WriteBehind::change(const pb::Request& request, Bytes data, Reply reply) {
  next_.execute(
      request, data,
      [this, client = request.client(), reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
        const bool about = outcome.has_attr() && is_ahead(outcome.attr().id());
        const bool told = about || std::ranges::any_of(outcome.changed(), [&](const pb::Attr& attr) {
                            return is_ahead(attr.id());
                          });
        if (!told) return reply(outcome, result);
        const auto kept = std::make_shared<pb::Outcome>(outcome);
        kept->clear_promise();
        if (!about) return reply(*kept, result);
        const InodeId id = outcome.attr().id();
        files_[id].when_performed.push_back([this, client, id, kept, reply] {
          pb::Request again;
          again.set_client(client);
          again.set_seq(kOwnSeqBit | ++last_);
          again.mutable_getattr()->set_id(id);
          next_.execute(again, {}, [kept, reply](const pb::Outcome& now, Bytes) {
            if (now.error() == 0) *kept->mutable_attr() = now.attr();
            reply(*kept, {});
          });
        });
      });
}

// Whoever syncs or closes hears what became of what it has written.
void WriteBehind::close(const pb::Request& request, Bytes data, Reply reply) {
  const InodeId id = request.has_flush()  ? request.flush().id()
                     : request.has_sync() ? request.sync().id()
                                          : request.release().id();
  const auto found = files_.find(id);
  const bool asks_owner = !request.has_flush() || request.flush().lock_owner() != 0;
  if (found == files_.end())
    return asks_owner ? next_.execute(request, data, std::move(reply)) : reply_errno(reply, 0);
  const std::uint64_t handle = request.has_flush()  ? request.flush().handle()
                               : request.has_sync() ? request.sync().handle()
                                                    : request.release().handle();
  const auto told = found->second.errors.extract(handle);
  // The lease ends where nobody has the file open any more, and is told again where somebody has.
  if (request.has_release()) {
    found->second.lease = 0;
    found->second.written = false;
    found->second.period = ++periods_;
    drop_if_idle(id);
  }
  if (!asks_owner) return reply_errno(reply, told.empty() ? 0 : told.mapped());
  if (told.empty()) return next_.execute(request, data, std::move(reply));
  next_.execute(request, data,
                [error = told.mapped(), reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                  if (outcome.error() != 0) return reply(outcome, result);
                  reply_errno(reply, error);
                });
}

bool WriteBehind::must_flush(InodeId id, std::uint64_t handle) const {
  const auto found = files_.find(id);
  return found != files_.end() && (found->second.ahead != 0 || found->second.errors.contains(handle));
}

bool WriteBehind::cancel(std::uint64_t seq) {
  for (auto& [id, file] : files_) {
    const auto killed =
        std::ranges::find_if(file.waiting, [seq](const Waiting& one) { return one.request.seq() == seq; });
    if (killed == file.waiting.end()) continue;
    const Waiting one = std::move(*killed);
    file.waiting.erase(killed);
    reply_errno(one.reply, EINTR);
    return true;
  }
  return false;
}

// ---- leases

void WriteBehind::recall(InodeId id, std::uint64_t lease, std::function<void()> returned) {
  const auto found = files_.find(id);
  if (found == files_.end()) return returned();
  if (found->second.lease == lease) found->second.lease = 0;
  if (found->second.ahead == 0) return returned();
  found->second.when_performed.push_back(std::move(returned));
}

void WriteBehind::distrust() {
  ++generation_;
  // Another process of the owner counts its stamps anew.
  for (auto& [id, file] : files_) file.lease = file.stamp = 0;
}

void WriteBehind::replay(const std::function<void()>& sent) {
  const auto clients = std::make_shared<std::set<std::uint64_t>>();
  const auto left = std::make_shared<std::size_t>(1);
  const auto one_less = [this, left, clients, sent] {
    if (--*left == 0) detach(*clients, sent);
  };
  journal_.for_each([&](WriteJournal::Position position, const pb::Request& request, Bytes data) {
    ++*left;
    clients->insert(request.client());
    const Ahead write{.id = request.write().id(),
                      .handle = request.write().handle(),
                      .offset = request.write().offset(),
                      .size = data.size(),
                      .position = position};
    pb::Request again = request;
    again.set_lazy(false);
    next_.execute(again, data, [this, write, one_less](const pb::Outcome& outcome, Bytes) {
      // The file may have been deleted, and have been open here alone.
      const bool gone = outcome.error() == ENOENT;
      if (!gone && (outcome.error() != 0 || outcome.count() < write.size))
        lost(write, outcome.error() != 0 ? static_cast<int>(outcome.error()) : ENOSPC);
      journal_.done(write.position);
      one_less();
    });
  });
  if (*left > 1) log::info("sending {} writes that an earlier process has left", *left - 1);
  one_less();
}

// The owner has let these clients in once more. (Sent along with what it is to perform, this would turn it
// back.)
void WriteBehind::detach(const std::set<std::uint64_t>& clients, const std::function<void()>& detached) {
  const auto left = std::make_shared<std::size_t>(clients.size() + 1);
  const auto one_less = [left, detached](const pb::Outcome&, Bytes) {
    if (--*left == 0) detached();
  };
  for (const std::uint64_t client : clients) {
    pb::Request detach;
    detach.set_client(client);
    detach.set_seq(kOwnSeqBit | ++last_);
    detach.mutable_detach();
    next_.execute(detach, {}, one_less);
  }
  one_less({}, {});
}

}  // namespace sharefs
