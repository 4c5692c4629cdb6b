#include "fs/name_cache.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "fs/promises.h"

namespace sharefs {
namespace {

bool asked_for_attributes(pb::Request::OpCase op) {
  return op == pb::Request::kLookup || op == pb::Request::kGetattr;
}

// Every store knows attributes of such a name: an inode without any does not have it. (Of user attributes
// some say that there can be none, EOPNOTSUPP.)
bool is_everywhere(std::string_view xattr) {
  return xattr.starts_with("security.") || xattr.starts_with("system.posix_acl_");
}

}  // namespace

NameCache::NameCache(Executor& next, std::function<Reactor::Clock::duration()> trusted_for)
    : next_(next), trusted_for_(std::move(trusted_for)) {}

void NameCache::execute(const pb::Request& request, Bytes data, Reply reply) {
  if (epoch_ == 0) return next_.execute(request, data, std::move(reply));
  const auto op = request.op_case();
  // A killed caller holds nobody up any more: others of this mount change the same names, and may be answered
  // before it.
  if (request.has_cancel()) ++generation_;
  // «..» is no name of the directory: it changes with another one's.
  if (request.has_lookup() && request.lookup().name() == "..")
    return next_.execute(request, data, std::move(reply));
  if (asked_for_attributes(op)) {
    if (!answer(request, reply)) ask(request, data, std::move(reply));
  } else if (op == pb::Request::kGetxattr) {
    if (!answer_xattr(request.getxattr(), reply)) ask_xattr(request, std::move(reply));
  } else if (op == pb::Request::kListxattr) {
    if (!answer_xattrs(request.listxattr().id(), reply)) next_.execute(request, data, std::move(reply));
  } else if (op == pb::Request::kRead) {
    if (!answer_read(request.read(), reply)) ask_read(request, std::move(reply));
  } else if (op == pb::Request::kReaddir) {
    ask_listing(request, std::move(reply));
  } else if (changes_names(op)) {
    ask(request, data, std::move(reply));
  } else if (changes_files(op)) {
    change(request, data, std::move(reply));
  } else {
    next_.execute(request, data, std::move(reply));
  }
}

bool NameCache::answer(const pb::Request& request, const Reply& reply) const {
  InodeId id = request.getattr().id();
  if (request.has_lookup()) {
    const auto directory = directories_.find(request.lookup().parent());
    if (directory == directories_.end()) return false;
    const auto& names = directory->second.names;
    const auto found = names.find(std::string_view(request.lookup().name()));
    // Names too long to exist have an error of their own.
    if (found == names.end() && (!directory->second.complete || request.lookup().name().size() > NAME_MAX))
      return false;
    id = found == names.end() ? 0 : found->second;
    if (id == 0) {
      if (!trusted()) return false;
      reply_errno(reply, ENOENT);
      return true;
    }
  }
  const auto known = attributes_.find(id);
  if (known == attributes_.end() || !trusted()) return false;
  pb::Outcome outcome;
  outcome.unsafe_arena_set_allocated_attr(const_cast<pb::Attr*>(&known->second.attr));  // lent, not copied
  reply(outcome, {});
  outcome.unsafe_arena_release_attr();
  return true;
}

bool NameCache::answer_xattr(const pb::GetXattr& asked, const Reply& reply) const {
  const auto known = attributes_.find(asked.id());
  if (known == attributes_.end()) return false;
  const auto& xattrs = known->second.xattrs;
  const auto found =
      std::find_if(xattrs.begin(), xattrs.end(), [&](const Xattr& one) { return one.name == asked.name(); });
  const bool absent =
      found != xattrs.end() ? !found->present : known->second.bare && is_everywhere(asked.name());
  if ((found == xattrs.end() && !absent) || !trusted()) return false;
  pb::Outcome outcome;
  outcome.set_error(absent ? ENODATA : 0);
  reply(outcome, absent ? Bytes() : as_bytes(found->value));
  return true;
}

bool NameCache::answer_xattrs(InodeId id, const Reply& reply) const {
  const auto known = attributes_.find(id);
  if (known == attributes_.end() || !known->second.bare || !trusted()) return false;
  reply({}, {});
  return true;
}

bool NameCache::answer_read(const pb::Read& read, const Reply& reply) const {
  const std::string* content = contents_.find(read.id());
  if (content == nullptr || !attributes_.contains(read.id()) || !trusted()) return false;
  const auto begin = std::min<std::uint64_t>(read.offset(), content->size());
  reply({}, as_bytes(std::string_view(*content).substr(begin, read.size())));
  return true;
}

// Asks the owner, and keeps what it promises of names and attributes.
void NameCache::ask(const pb::Request& request, Bytes data, Reply reply) {
  next_.execute(
      request, data,
      [this, request, generation = generation_, reply = std::move(reply)](const pb::Outcome& outcome,
                                                                          Bytes result) {
        if (believable(outcome, generation))
          changed(request, outcome);
        else if (op_class(request.op_case()) == OpClass::mutation && outcome.error() == 0)
          forget_all();
        // The newest word, which may be lent to the kernel.
        if (asked_for_attributes(request.op_case()) && outcome.error() == 0 && answer(request, reply)) return;
        reply(outcome, result);
      });
}

void NameCache::ask_xattr(const pb::Request& request, Reply reply) {
  next_.execute(
      request, {},
      [this, asked = request.getxattr(), generation = generation_, reply = std::move(reply)](
          const pb::Outcome& outcome, Bytes value) {
        const auto known = attributes_.find(asked.id());
        if (believable(outcome, generation) && known != attributes_.end() && value.size() <= kMaxValue) {
          auto& xattrs = known->second.xattrs;
          if (xattrs.size() == kMaxXattrs) xattrs.erase(xattrs.begin());
          xattrs.push_back({asked.name(), outcome.error() == 0, std::string(as_text(value))});
        }
        reply(outcome, value);
      });
}

bool NameCache::has_size(InodeId id, std::uint64_t size) const {
  const auto known = attributes_.find(id);
  return known != attributes_.end() && known->second.attr.size() == size;
}

void NameCache::ask_read(const pb::Request& request, Reply reply) {
  const auto& read = request.read();
  if (!far_ || read.offset() != 0 || !attributes_.contains(read.id()))
    return next_.execute(request, {}, std::move(reply));
  next_.execute(request, {},
                [this, fill = contents_.begin(read.id()), reply = std::move(reply)](
                    const pb::Outcome& outcome, Bytes content) {
                  const bool whole = outcome.error() == 0 && content.size() <= ContentCache::kLongest &&
                                     has_size(fill->id, content.size());
                  if (whole) fill->content = as_text(content);
                  contents_.end(*fill, whole);
                  reply(outcome, content);
                });
}

// nullptr: the request does not tell the whole content.
ContentCache::FillPtr NameCache::begin_whole(const pb::Request& request, Bytes data) {
  if (!far_ || !request.has_write() || request.write().offset() != 0 || request.write().append() ||
      data.size() > ContentCache::kLongest)
    return nullptr;
  const auto known = attributes_.find(request.write().id());
  if (known == attributes_.end() || known->second.attr.size() > data.size()) return nullptr;
  return contents_.begin(known->first, std::string(as_text(data)));
}

// The kernel takes what fits into its buffer, and asks for the rest again.
void NameCache::ask_listing(const pb::Request& request, Reply reply) {
  pb::Request whole = request;
  whole.mutable_readdir()->set_bare(far_);
  if (far_ && !request.readdir().plus()) {
    const std::uint32_t room = request.readdir().max_bytes();
    whole.mutable_readdir()->set_plus(true);
    whole.mutable_readdir()->set_max_bytes(
        std::max(room, std::min(room, kMaxListing / kPlusFactor) * kPlusFactor));
  }
  next_.execute(whole, {},
                [this, directory = request.readdir().id(), generation = generation_,
                 reply = std::move(reply)](const pb::Outcome& outcome, Bytes result) {
                  if (believable(outcome, generation)) listed(directory, outcome);
                  reply(outcome, result);
                });
}

void NameCache::listed(InodeId directory, const pb::Outcome& outcome) {
  if (attributes_.size() + names_ >= kMaxEntries) forget_all();
  for (const auto& entry : outcome.entries()) {
    if (!tells_inode(entry)) continue;
    learn(entry.attr(), outcome.promise(), true);
    name(directory, entry.name(), entry.attr().id());
  }
}

// Asks for a change of data or attributes: it has many bytes, of which nothing need be remembered.
void NameCache::change(const pb::Request& request, Bytes data, Reply reply) {
  // Writing takes capabilities away and gives none; all else may change ACLs.
  const bool only_data = request.has_write() || request.has_fallocate() || request.has_copy_file_range();
  const InodeId id = changes_data_of(request);
  const auto whole = begin_whole(request, data);
  next_.execute(request, data,
                [this, only_data, id, whole, generation = generation_, reply = std::move(reply)](
                    const pb::Outcome& outcome, Bytes result) {
                  if (outcome.ahead()) {
                    attributes_.erase(id);
                    ahead_.insert(id);
                  } else if (believable(outcome, generation)) {
                    if (outcome.has_attr()) learn(outcome.attr(), outcome.promise(), only_data);
                    for (const auto& attr : outcome.changed()) learn(attr, outcome.promise(), only_data);
                  } else {
                    forget_all();  // also after an error: some of it may have been done
                  }
                  if (whole && !whole->spoiled && outcome.error() == 0 && !outcome.invalidate() &&
                      outcome.count() == whole->content.size() && has_size(id, outcome.count()))
                    contents_.end(*whole, true);
                  else if (id != 0)
                    contents_.changed(id);
                  reply(outcome, result);
                });
}

bool NameCache::believable(const pb::Outcome& outcome, std::uint64_t generation) const {
  return epoch_of_stamp(outcome.promise()) == epoch_ && epoch_ != 0 && outcome.promise() > last_recall_ &&
         generation == generation_;
}

// The newest word counts: outcomes may overtake each other. `same_xattrs`: no attribute was added or changed
// since.
void NameCache::learn(const pb::Attr& attr, std::uint64_t stamp, bool same_xattrs) {
  if (ahead_.contains(attr.id())) return;
  if (attr.mode() == 0) {  // gone
    attributes_.erase(attr.id());
    contents_.changed(attr.id());
    return;
  }
  auto& known = attributes_[attr.id()];
  if (!same_xattrs) {
    known.xattrs.clear();
    known.bare = false;
  } else {
    std::erase_if(known.xattrs, [](const Xattr& one) { return one.present; });
  }
  if (known.stamp > stamp) return;
  if (attr.bare()) known.bare = true;
  known.attr = attr;
  known.stamp = stamp;
}

void NameCache::name(InodeId parent, std::string_view name, InodeId id) {
  auto& names = directories_[parent].names;
  const auto [entry, added] = names.insert_or_assign(std::string(name), id);
  if (added) ++names_;
}

InodeId NameCache::named(InodeId parent, std::string_view name) const {
  const auto directory = directories_.find(parent);
  if (directory == directories_.end()) return 0;
  const auto found = directory->second.names.find(name);
  return found == directory->second.names.end() ? 0 : found->second;
}

bool NameCache::is_absent(InodeId parent, std::string_view name) const {
  const auto directory = directories_.find(parent);
  if (directory == directories_.end()) return false;
  const auto found = directory->second.names.find(name);
  return found == directory->second.names.end() ? directory->second.complete : found->second == 0;
}

void NameCache::drop_directory(InodeId id) {
  const auto found = directories_.find(id);
  if (found == directories_.end()) return;
  names_ -= found->second.names.size();
  directories_.erase(found);
}

void NameCache::changed(const pb::Request& request, const pb::Outcome& outcome) {
  if (attributes_.size() + names_ >= kMaxEntries) return forget_all();
  const auto stamp = outcome.promise();
  // Names come and go without changing the attributes beside stat's.
  if (outcome.has_attr()) learn(outcome.attr(), stamp, true);
  for (const auto& attr : outcome.changed()) learn(attr, stamp, true);
  const InodeId made = outcome.attr().id();
  switch (request.op_case()) {
    case pb::Request::kLookup:
      name(request.lookup().parent(), request.lookup().name(), outcome.error() == 0 ? made : 0);
      break;
    case pb::Request::kCreate:
      if ((request.create().flags() & O_TRUNC) != 0) contents_.changed(made);
      // A new file has no capability. (Its ACL may be its directory's.)
      if (is_absent(request.create().parent(), request.create().name()) && !ahead_.contains(made))
        attributes_[made].xattrs = {{.name = "security.capability", .present = false, .value = {}}};
      name(request.create().parent(), request.create().name(), made);
      break;
    case pb::Request::kMkdir:
      name(request.mkdir().parent(), request.mkdir().name(), made);
      drop_directory(made);
      directories_[made].complete = true;
      break;
    case pb::Request::kSymlink:
      name(request.symlink().parent(), request.symlink().name(), made);
      break;
    case pb::Request::kLink:
      name(request.link().parent(), request.link().name(), made);
      break;
    case pb::Request::kUnlink:
      name(request.unlink().parent(), request.unlink().name(), 0);
      break;
    case pb::Request::kRmdir:
      drop_directory(named(request.rmdir().parent(), request.rmdir().name()));
      name(request.rmdir().parent(), request.rmdir().name(), 0);
      break;
    case pb::Request::kRename: {
      const auto& rename = request.rename();
      const InodeId moved = named(rename.parent(), rename.name());
      const InodeId other = named(rename.new_parent(), rename.new_name());
      const bool exchange = (rename.flags() & RENAME_EXCHANGE) != 0;
      // Which inode it was is not known here; or somebody has looked since it was performed, if these are not
      // two names of one inode, which both stay. Of an exchange that cannot be seen.
      if (moved == 0 || moved == other || exchange) {
        drop_directory(rename.parent());
        drop_directory(rename.new_parent());
      } else {
        name(rename.parent(), rename.name(), 0);
        name(rename.new_parent(), rename.new_name(), moved);
      }
      break;
    }
    default:
      break;
  }
}

void NameCache::believe(Epoch epoch, bool far) {
  forget_all();
  far_ = far;
  epoch_ = epoch;
}

void NameCache::forget(const std::vector<InodeId>& ids, std::uint64_t stamp) {
  last_recall_ = std::max(last_recall_, stamp);
  for (const InodeId id : ids) {
    attributes_.erase(id);
    contents_.changed(id);
    drop_directory(id);
  }
}

void NameCache::performed(InodeId id, std::uint64_t stamp) {
  ahead_.erase(id);
  forget({id}, stamp);
}

// What is asked from now on is answered behind all recalls so far, perhaps by another process of the owner,
// whose stamps begin anew.
void NameCache::forget_all() {
  ++generation_;
  last_recall_ = 0;
  attributes_.clear();
  contents_.changed_all();
  directories_.clear();
  names_ = 0;
  if (on_forget_all_) on_forget_all_();
}

Reactor::Clock::duration NameCache::lend(const pb::Attr& attr, bool held) {
  const auto known = attributes_.find(attr.id());
  if (known == attributes_.end() || &known->second.attr != &attr) return {};
  if (!held && !lent_.contains(attr.id())) return {};
  const auto time = trusted_for_();
  if (time <= time.zero()) return {};
  const auto now = Reactor::Clock::now();
  if (lent_.size() >= kMostLent) {
    std::erase_if(lent_, [now](const auto& one) { return one.second < now; });
    if (lent_.size() >= kMostLent) return {};
  }
  auto& until = lent_[attr.id()];
  until = std::max(until, now + time + kTaken);
  return time;
}

std::vector<InodeId> NameCache::take_lent(const std::vector<InodeId>* ids) {
  std::vector<InodeId> taken;
  const auto now = Reactor::Clock::now();
  const auto take = [&](const auto& one) {
    if (one.second >= now) taken.push_back(one.first);
  };
  if (ids == nullptr) {
    std::for_each(lent_.begin(), lent_.end(), take);
    lent_.clear();
  } else {
    for (const InodeId id : *ids)
      if (const auto node = lent_.extract(id); !node.empty()) take(std::pair(node.key(), node.mapped()));
  }
  return taken;
}

bool NameCache::keeps_pages(InodeId id) {
  const auto known = attributes_.find(id);
  return known != attributes_.end() && trusted() && std::exchange(known->second.opened, true);
}

bool NameCache::is_there(InodeId id, std::uint32_t type) const {
  const auto known = attributes_.find(id);
  return known != attributes_.end() && (known->second.attr.mode() & S_IFMT) == type && trusted();
}

}  // namespace sharefs
