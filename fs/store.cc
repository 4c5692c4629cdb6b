#include "fs/store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <future>
#include <system_error>
#include <thread>

#include "fs/store_impl.h"
#include "meta/caller.h"
#include "meta/log.h"

namespace sharefs {
namespace {

constexpr std::size_t kMaxName = 255;
constexpr unsigned kTriesInAHurry = 6;

bool is_full(int error) { return error == ENOSPC || error == EDQUOT; }

// 0: not the name of an orphan.
InodeId parse_orphan(std::string_view name) {
  InodeId id = 0;
  const auto parsed = std::from_chars(name.begin(), name.end(), id, 16);
  return parsed.ec == std::errc() && parsed.ptr == name.end() ? id : 0;
}

struct CloseDirectory {
  void operator()(DIR* directory) const { ::closedir(directory); }
};

}  // namespace

ProcPath::ProcPath(int fd) { std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd); }

Store::Impl::Impl(Options given, InodeTable& inode_table, OpenTable& open_table, Workers& worker_threads)
    : options(std::move(given)),
      inodes(inode_table),
      opens(open_table),
      workers(worker_threads),
      offset_seed(XXH3_64bits(options.data_set.data(), options.data_set.size())),
      descriptors(inode_table, options.descriptor_limit) {
  if (::statx(inodes.root(), "", AT_EMPTY_PATH, kBackingMask, &root_seen_) != 0)
    throw std::system_error(errno, std::generic_category(), options.directory.string() + ": cannot be read");
  learn_root();
  recover_orphans();
}

Store::Impl::~Impl() {
  while (const unsigned left = *working) working->wait(left);
  delete_doomed_now();
}

// The private area is a directory of the root that stat must not count, as long as the tree is the store
// itself.
void Store::Impl::learn_root() {
  Backing area{}, root{};
  root_has_private_area = ::statx(inodes.root(), std::string(kPrivateArea).c_str(), AT_SYMLINK_NOFOLLOW,
                                  kBackingMask, &area) == 0 &&
                          S_ISDIR(area.stx_mode) &&
                          ::statx(inodes.root(), "", AT_EMPTY_PATH, kBackingMask, &root) == 0 &&
                          root.stx_nlink > 2;
}

int Store::Impl::private_area(int& error) {
  if (orphans_directory) return orphans_directory.get();
  become_self();
  UniqueFd area = inodes.open_private_area();
  if (!area) {
    const std::string name(kPrivateArea);
    if (::mkdirat(inodes.root(), name.c_str(), 0700) == 0) learn_root();
    area = inodes.open_private_area();
  }
  if (area) {
    ::mkdirat(area.get(), "orphans", 0700);
    orphans_directory =
        UniqueFd(::openat(area.get(), "orphans", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  }
  if (!orphans_directory) error = errno;
  return orphans_directory.get();
}

// A process that died between the steps of a removal left the private area and the table in disagreement. An
// inode with another name is no orphan (the name there was only meant to become its last); one without is.
void Store::Impl::recover_orphans() {
  const UniqueFd area = inodes.open_private_area();
  if (!area) return;
  const int fd = ::openat(area.get(), "orphans", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return;
  const std::unique_ptr<DIR, CloseDirectory> listing(::fdopendir(fd));
  while (const dirent* entry = listing ? ::readdir(listing.get()) : nullptr) {
    const InodeId id = parse_orphan(entry->d_name);
    Backing backing{};
    if (id == 0 || inodes.is_orphan(id) ||
        ::statx(fd, entry->d_name, AT_SYMLINK_NOFOLLOW, kBackingMask, &backing) != 0)
      continue;
    const bool directory = S_ISDIR(backing.stx_mode);
    if (inodes.find(backing) != id || (!directory && backing.stx_nlink > 1)) {
      ::unlinkat(fd, entry->d_name, directory ? AT_REMOVEDIR : 0);
    } else {
      inodes.moved(id, 0, std::string("orphans/") + entry->d_name);
      inodes.set_orphan(id, true);
    }
  }
}

int Store::Impl::check_name(InodeId parent, std::string_view name, bool making) const {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string_view::npos ||
      name.find('\0') != std::string_view::npos)
    return EINVAL;
  if (name.size() > kMaxName) return ENAMETOOLONG;
  if (parent == kRootInode && name == kPrivateArea) return making ? EPERM : ENOENT;
  return 0;
}

DescriptorCache::Ref Store::Impl::directory(InodeId id, int& error) {
  const DescriptorCache::Ref ref = descriptors.any(id);
  if (!ref) {
    error = errno;
  } else if (ref.type != S_IFDIR) {
    error = ENOTDIR;
  } else if (inodes.is_orphan(id)) {
    error = ENOENT;  // removed, and only known to who was in it
  } else {
    error = 0;
  }
  return ref;
}

void Store::Impl::fill(pb::Attr& attr, InodeId id, const Backing& backing) {
  const InodeTable::Presented presented = inodes.presented(id, backing);
  attr.set_id(id);
  attr.set_mode(backing.stx_mode);
  attr.set_uid(backing.stx_uid);
  attr.set_gid(backing.stx_gid);
  std::uint32_t nlink = presented.orphan ? 0 : backing.stx_nlink;
  if (id == kRootInode && root_has_private_area.load(std::memory_order_relaxed)) --nlink;
  attr.set_nlink(nlink);
  attr.set_rdev(makedev(backing.stx_rdev_major, backing.stx_rdev_minor));
  attr.set_size(backing.stx_size);
  attr.set_blocks(backing.stx_blocks);
  attr.set_atime(timestamp_ns(backing.stx_atime));
  attr.set_mtime(timestamp_ns(backing.stx_mtime));
  attr.set_ctime(presented.ctime);
}

// Nothing that has a name is an orphan, but what a power cut has given its name back, when the table is on a
// disk that had the removal already.
void Store::Impl::fill_named(pb::Attr& attr, InodeId id, const Backing& backing) {
  fill(attr, id, backing);
  if (attr.nlink() != 0) return;
  inodes.set_orphan(id, false);
  fill(attr, id, backing);
}

int Store::Impl::fill(StoreCall& call, InodeId id, int fd) {
  Backing backing{};
  if (::statx(fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0) return errno;
  fill(*call.outcome.mutable_attr(), id, backing);
  return 0;
}

void Store::Impl::note_entry(InodeId parent, const std::string& name) {
  if (observer == nullptr) return;
  observer->changing({.kind = Change::Kind::entry, .id = parent, .name = name});
  note_attributes(parent);
}

void Store::Impl::note_attributes(InodeId id) {
  if (observer != nullptr) observer->changing({.kind = Change::Kind::attributes, .id = id});
}

void Store::Impl::note_extent(InodeId id, std::uint64_t offset, std::uint64_t length) {
  if (observer == nullptr) return;
  if (length > 0)
    observer->changing({.kind = Change::Kind::extent, .id = id, .offset = offset, .length = length});
  note_attributes(id);
}

namespace {

// A local disk needs no space for that. A place in the private area is ours, whoever's request it is.
bool removes_name(const pb::Request& request) {
  return request.has_unlink() || request.has_rmdir() || request.has_rename();
}

}  // namespace

int Store::Impl::later(StoreCall& call, std::vector<DescriptorCache::Ref> pinned, Work work, Finish finish) {
  auto job = std::make_shared<Job>();
  job->reply = std::move(call.reply);
  for (const auto& ref : pinned) descriptors.pin(ref);
  working->fetch_add(1);
  const bool changes = changes_files(call.request.op_case());
  const auto since = changes ? std::optional(ongoing->enlist()) : std::nullopt;
  const auto caller =
      changes ? std::optional(std::pair(call.request.uid(), call.request.gid())) : std::nullopt;
  const auto run = [job, work = std::move(work), working = working, ongoing = ongoing, since, caller] {
    try {
      if (caller) become_caller(caller->first, caller->second);
      job->error = work(*job);
    } catch (const std::exception& error) {
      log::error("a request on a worker failed: {}", error.what());
      job->error = EIO;
    }
    if (since) ongoing->ended(*since);
    working->fetch_sub(1);
    working->notify_all();
  };
  const auto done = [this, job, pinned = std::move(pinned), finish = std::move(finish),
                     still_there = std::weak_ptr<bool>(alive)] {
    if (still_there.expired()) return;
    for (const auto& ref : pinned) descriptors.unpin(ref);
    try {
      if (finish) finish(*job);
    } catch (const std::exception& error) {
      log::error("a request on a worker failed: {}", error.what());
      job->error = EIO;
    }
    job->outcome.set_error(static_cast<std::uint32_t>(job->error));
    job->reply(job->outcome, as_bytes(job->result));
  };
  workers.submit(run, done);
  return kLater;
}

int Store::Impl::later_on(StoreCall& call, const std::vector<Needed>& files, WorkOn work, Finish finish) {
  std::vector<int> fds;
  if (!descriptors.crowded()) {
    std::vector<DescriptorCache::Ref> pinned;
    for (const Needed& file : files) {
      pinned.push_back(file.ref);
      fds.push_back(file.ref.fd);
    }
    const auto run = [fds = std::move(fds), work = std::move(work)](Job& job) { return work(fds, job); };
    return later(call, std::move(pinned), run, std::move(finish));
  }
  const auto run = [this, files, work = std::move(work)](Job& job) {
    std::vector<UniqueFd> own;
    std::vector<int> opened;
    for (const Needed& file : files) {
      own.push_back(inodes.open(file.id, file.access | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
      if (!own.back()) return errno;
      opened.push_back(own.back().get());
    }
    return work(opened, job);
  };
  return later(call, {}, run, std::move(finish));
}

int Store::Impl::dispatch(StoreCall& call) {
  const pb::Request& request = call.request;
  switch (request.op_case()) {
    case pb::Request::kLookup:
      return lookup(request.lookup(), call);
    case pb::Request::kGetattr:
      return getattr(request.getattr(), call);
    case pb::Request::kReadlink:
      return readlink(request.readlink(), call);
    case pb::Request::kRead:
      return read(request.read(), call);
    case pb::Request::kReaddir:
      return readdir(request.readdir(), call);
    case pb::Request::kStatfs:
      return statfs(call);
    case pb::Request::kGetxattr:
      return getxattr(request.getxattr(), call);
    case pb::Request::kListxattr:
      return listxattr(request.listxattr(), call);
    case pb::Request::kSeek:
      return seek(request.seek(), call);
    case pb::Request::kOpen:
      return open(request.open());
    case pb::Request::kRelease:
      return release(request.release());
    case pb::Request::kOpendir:
      return opendir(request.opendir());
    case pb::Request::kReleasedir:
      return releasedir(request.releasedir(), call);
    case pb::Request::kForget:
      return forget(request.forget());
    case pb::Request::kSetattr:
      return setattr(request.setattr(), call);
    case pb::Request::kCreate:
      return create(request.create(), call);
    case pb::Request::kMkdir:
      return mkdir(request.mkdir(), call);
    case pb::Request::kSymlink:
      return symlink(request.symlink(), call);
    case pb::Request::kLink:
      return link(request.link(), call);
    case pb::Request::kUnlink:
      return unlink(request.unlink(), call);
    case pb::Request::kRmdir:
      return rmdir(request.rmdir(), call);
    case pb::Request::kRename:
      return rename(request.rename(), call);
    case pb::Request::kWrite:
      return write(request.write(), call);
    case pb::Request::kFallocate:
      return fallocate(request.fallocate(), call);
    case pb::Request::kCopyFileRange:
      return copy_file_range(request.copy_file_range(), call);
    case pb::Request::kSetxattr:
      return setxattr(request.setxattr(), call);
    case pb::Request::kRemovexattr:
      return removexattr(request.removexattr());
    case pb::Request::kSync:
      return sync(request.sync(), call);
    case pb::Request::kCancel:
      return cancel(request);
    // Locks and clients are not the files' business.
    case pb::Request::kGetlock:
    case pb::Request::kSetlock:
    case pb::Request::kFlush:
    case pb::Request::kAttach:
    case pb::Request::kDetach:
    case pb::Request::OP_NOT_SET:
      break;
  }
  return ENOSYS;
}

int Store::Impl::perform(StoreCall& call) {
  // One may be performed from within the reply to another, but that one has happened by then.
  struct Ongoing {
    OngoingChanges* changes;
    explicit Ongoing(OngoingChanges* which) : changes(which) {
      if (changes != nullptr) changes->begin();
    }
    ~Ongoing() {
      if (changes != nullptr) changes->end();
    }
    Ongoing(const Ongoing&) = delete;
    Ongoing& operator=(const Ongoing&) = delete;
  };
  const Ongoing mark(changes_files(call.request.op_case()) ? ongoing.get() : nullptr);
  try {
    if (changes_names(call.request.op_case())) inodes.make_room();
    if (changes_files(call.request.op_case())) become_caller(call.request.uid(), call.request.gid());
    const int error = dispatch(call);
    if (!is_full(error) || !removes_name(call.request)) return error;
    become_self();
    return dispatch(call);
  } catch (const std::system_error& error) {
    log::warn("request {} of client {:x}: {}", call.request.seq(), call.request.client(), error.what());
    return error.code().category() == std::generic_category() ? error.code().value() : EIO;
  } catch (const std::exception& error) {
    log::error("request {} of client {:x}: {}", call.request.seq(), call.request.client(), error.what());
    return EIO;
  }
}

Store::Store(Options options, InodeTable& inodes, OpenTable& opens, LockTable&, Workers& workers)
    : impl_(std::make_unique<Impl>(std::move(options), inodes, opens, workers)) {
  // Throws now, not in the first change, if it may not serve others. On a thread that ends: whatever is
  // started from this one shall not inherit that.
  std::async(std::launch::async, [] { become_caller(::geteuid(), ::getegid()); }).get();
}

Store::~Store() = default;

void Store::observe(ChangeObserver* observer) { impl_->observer = observer; }

void Store::on_put_aside(std::function<TakeUp(const pb::Request&)> put_aside) {
  impl_->put_aside = std::move(put_aside);
}

void Store::hurry(bool hurry) { impl_->least_tries = hurry ? kTriesForSpace - kTriesInAHurry : 0; }

std::int64_t Store::oldest_change() const { return impl_->ongoing->oldest(); }

void Store::execute(const pb::Request& request, Bytes data, Reply reply) {
  impl_->execute(request, data, std::move(reply));
}

void Store::Impl::attempt(const pb::Request& request, Bytes data, Reply reply, unsigned tries, bool ordered) {
  const bool last_try = tries >= kTriesForSpace;
  const bool by_worker = request.has_fallocate() || request.has_copy_file_range();
  if (by_worker && !std::exchange(ordered, true)) reply = in_order(ordered_inode(request), std::move(reply));
  if (by_worker && !last_try) {
    // Workers do these; there is nothing left of the request when they find that the disk is full.
    auto attempt = std::make_shared<Attempt>(Attempt{request, {}, std::move(reply), tries, ordered});
    reply = [this, attempt = std::move(attempt)](const pb::Outcome& outcome, Bytes result) {
      if (is_full(static_cast<int>(outcome.error()))) return wait_for_space(attempt);
      attempt->reply(outcome, result);
    };
  }
  // A reply may ask for the next request before this one's outcome is let go of, so there is one for each
  // level.
  if (depth == scratch.size()) scratch.push_back(std::make_unique<Scratch>());
  Scratch& own = *scratch[depth];
  own.outcome.Clear();
  StoreCall call{request, data, reply, own.outcome, own.buffer, last_try};
  const int error = perform(call);
  if (error == kLater) return;
  if (is_full(error) && !last_try) {
    if (const InodeId id = ordered_inode(request); id != 0 && !std::exchange(ordered, true))
      reply = in_order(id, std::move(reply));
    return wait_for_space(std::make_shared<Attempt>(
        Attempt{request, std::string(as_text(data)), std::move(reply), tries, ordered}));
  }
  if (error != 0) {
    own.outcome.Clear();
    own.outcome.set_error(static_cast<std::uint32_t>(error));
    call.result = {};
  }
  ++depth;
  try {
    reply(own.outcome, call.result);
  } catch (...) {
    --depth;
    throw;
  }
  --depth;
}

void Store::Impl::wait_for_space(const std::shared_ptr<Attempt>& attempt) {
  const auto again = [this, attempt, still_there = std::weak_ptr<bool>(alive)] {
    if (still_there.expired()) return;
    attempt->take_up(attempt->request, [&] {
      this->attempt(attempt->request, as_bytes(attempt->data), std::move(attempt->reply), attempt->tries,
                    attempt->ordered);
    });
  };
  attempt->take_up = put_aside(attempt->request);
  attempt->tries = std::max(attempt->tries + 1, least_tries);
  if (!doomed.empty()) {
    delete_doomed_now();
  } else if (space_is_coming()) {
    workers.submit([] { std::this_thread::sleep_for(kSpacePoll); }, again);
    return;
  } else {
    attempt->tries = kTriesForSpace;
  }
  again();
}

bool Store::Impl::space_is_coming() {
  if (deleting > 0) return true;  // names go before blocks
  if (!orphans_directory) return false;
  become_self();
  const int fd = ::openat(orphans_directory.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, CloseDirectory> directory(fd >= 0 ? ::fdopendir(fd) : nullptr);
  while (const dirent* entry = directory ? ::readdir(directory.get()) : nullptr) {
    const InodeId id = parse_orphan(entry->d_name);
    if (id != 0 && entry->d_type != DT_DIR && !opens.is_open(id)) return true;
  }
  return false;
}

void Store::drop_descriptors() {
  impl_->delete_doomed_now();
  impl_->descriptors.clear();
  impl_->snapshots.clear();
  impl_->orphans_directory = {};
  impl_->learn_root();
}

std::vector<InodeId> Store::orphans() {
  std::vector<InodeId> result;
  int error = 0;
  const int fd = impl_->private_area(error);
  if (fd < 0) throw std::system_error(error, std::generic_category(), "the private area cannot be opened");
  const int again = ::openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, CloseDirectory> directory(::fdopendir(again));
  while (const dirent* entry = directory ? ::readdir(directory.get()) : nullptr) {
    const InodeId id = parse_orphan(entry->d_name);
    if (id != 0 && impl_->inodes.is_orphan(id)) result.push_back(id);
  }
  return result;
}

void Store::rest() { become_self(); }

pb::Attr Store::attributes(InodeId id, int fd) {
  Backing backing{};
  if (::statx(fd, "", AT_EMPTY_PATH, kBackingMask, &backing) != 0)
    throw std::system_error(errno, std::generic_category(), "attributes of an inode");
  pb::Attr attr;
  impl_->fill(attr, id, backing);
  return attr;
}

}  // namespace sharefs
