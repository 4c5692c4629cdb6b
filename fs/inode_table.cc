#include "fs/inode_table.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "fs/identity_cache.h"
#include "fs/identity_flusher.h"
#include "fs/identity_journal.h"
#include "fs/identity_rows.h"
#include "fs/private_area.h"
#include "fs/stamps.h"

namespace sharefs {
namespace {

using Lock = IdentityFlusher::Lock;
using Entry = IdentityCache::Entry;

constexpr unsigned kBackingMask = STATX_BASIC_STATS | STATX_BTIME;
constexpr unsigned kMaxDepth = 4096;   // of parents, where file handles cannot be used
constexpr unsigned kMaxAttempts = 16;  // to look at a name that others change meanwhile

std::int64_t birth(const Backing& backing) {
  return (backing.stx_mask & STATX_BTIME) != 0 ? timestamp_ns(backing.stx_btime) : 0;
}

std::uint32_t file_type(const Backing& backing) {
  return backing.stx_mode & static_cast<std::uint32_t>(S_IFMT);
}

bool same_inode(const Backing& a, const Backing& b) { return a.stx_ino == b.stx_ino && birth(a) == birth(b); }

bool look(int directory_fd, const std::string& name, Backing& backing) {
  const int flags = AT_SYMLINK_NOFOLLOW | (name.empty() ? AT_EMPTY_PATH : 0);
  return ::statx(directory_fd, name.c_str(), flags, kBackingMask, &backing) == 0;
}

UniqueFd open_root_again(int root, int flags) { return UniqueFd(::openat(root, ".", flags | O_CLOEXEC)); }

// struct file_handle with room for the longest handle.
struct HandleBuffer {
  alignas(file_handle) std::array<char, sizeof(file_handle) + FileHandle::kMax> bytes;
  file_handle* get() { return reinterpret_cast<file_handle*>(bytes.data()); }
};

// The handle of `name` in the directory, or of the directory itself. False: errno says why.
bool read_handle(int directory_fd, const char* name, FileHandle& handle) {
  HandleBuffer buffer;
  buffer.get()->handle_bytes = FileHandle::kMax;
  int mount = 0;
  const int flags = *name == '\0' ? AT_EMPTY_PATH : 0;
  if (::name_to_handle_at(directory_fd, name, buffer.get(), &mount, flags) != 0) return false;
  handle.type = static_cast<std::uint32_t>(buffer.get()->handle_type);
  handle.bytes.assign(reinterpret_cast<const char*>(buffer.get()->f_handle), buffer.get()->handle_bytes);
  return true;
}

UniqueFd open_handle(int mount, std::uint32_t type, const char* bytes, std::size_t size, int flags) {
  HandleBuffer buffer;
  buffer.get()->handle_bytes = static_cast<unsigned>(size);
  buffer.get()->handle_type = static_cast<int>(type);
  std::memcpy(buffer.get()->f_handle, bytes, size);
  return UniqueFd(::open_by_handle_at(mount, buffer.get(), flags | O_CLOEXEC));
}

// Whether the handle is known to be of this inode without another look: the common layouts start with its
// number.
bool handle_names_inode(const FileHandle& handle, const Backing& backing) {
  constexpr std::uint32_t kInoGeneration = 1, kXfsInoGeneration = 0x81;
  std::uint64_t ino = 0;
  if (handle.type == kInoGeneration && handle.bytes.size() == 8) {
    std::memcpy(&ino, handle.bytes.data(), 4);
  } else if (handle.type == kXfsInoGeneration && handle.bytes.size() == 12) {
    std::memcpy(&ino, handle.bytes.data(), 8);
  }
  return ino != 0 && ino == backing.stx_ino;
}

UniqueFd reopen(UniqueFd path, int flags) {
  if ((flags & O_PATH) != 0) return path;
  const std::string link = "/proc/self/fd/" + std::to_string(path.get());
  return UniqueFd(::open(link.c_str(), (flags & ~O_NOFOLLOW) | O_CLOEXEC));
}

int refusal(std::uint32_t type, int flags) {
  if ((flags & O_PATH) != 0 || type == S_IFREG || type == S_IFDIR) return 0;
  return type == S_IFLNK ? ELOOP : ENXIO;
}

std::uint64_t journal_tail(const std::filesystem::path& database) {
  return IdentityRows(database).journal_tail();
}

}  // namespace

std::int64_t timestamp_ns(const statx_timestamp& time) {
  constexpr std::int64_t kSecond = 1'000'000'000;
  constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max() / kSecond - 1;
  return std::clamp<std::int64_t>(time.tv_sec, -kLast, kLast) * kSecond +
         static_cast<std::int64_t>(time.tv_nsec);
}

bool mounted_there(const Backing& found, const Backing& root) {
  return found.stx_dev_major != root.stx_dev_major || found.stx_dev_minor != root.stx_dev_minor ||
         (found.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

UniqueFd open_above(int directory_fd, int flags) {
  open_how how{};
  how.flags = static_cast<std::uint64_t>(flags) | O_DIRECTORY | O_CLOEXEC;
  how.resolve = RESOLVE_NO_XDEV;
  return UniqueFd(static_cast<int>(::syscall(SYS_openat2, directory_fd, "..", &how, sizeof how)));
}

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

struct InodeTable::Impl {
  Impl(const std::filesystem::path& database, const std::filesystem::path& journal_file, UniqueFd root_fd,
       const Options& options);

  // All of these with the mutex held; pointers to entries are valid until it is released or an entry is put.
  Lock ready();  // takes the mutex, with room in the journal: nothing below waits
  Entry& read_again(const Identity& row);
  Entry* load(InodeId id);
  Entry* load_ino(std::uint64_t ino);
  void put(const Lock& lock, const Identity& identity);
  void bind_root(const Lock& lock);
  void adopt_root(UniqueFd fd);
  bool is(const Entry& entry, const Backing& backing, int directory_fd, const std::string& name);
  bool describe(Identity& identity, InodeId parent, const std::string& name, int directory_fd, int fd,
                const Backing& backing);
  void erase(const Lock& lock, const Entry& entry);
  InodeId add(const Lock& lock, Identity identity);
  Presented present(InodeId id, const Backing& backing);
  void note_name(const Lock& lock, Identity identity, InodeId parent, std::string_view name);
  bool let_go(InodeId id);
  UniqueFd open_kept(InodeId id, int flags, std::uint32_t* type, Lock& lock);

  // One step of a way that leads from an open directory to an inode.
  struct Step {
    std::string name;
    std::uint64_t ino;
    std::int64_t born;
  };
  UniqueFd open_way(InodeId id, int flags, std::uint32_t* type, Lock& lock);

  // Where inodes are reached by their names: held while these are followed.
  std::shared_lock<std::shared_mutex> follow_names() {
    return handles ? std::shared_lock<std::shared_mutex>() : std::shared_lock(names);
  }

  // constant after construction
  bool handles = false;
  std::shared_mutex names;  // taken before the mutex
  // under the mutex
  mutable std::mutex mutex;
  UniqueFd root;
  Backing root_seen{};
  UniqueFd mount;  // the root, opened for open_by_handle_at
  // Inodes that lost the name by which they were reached; the last one is the newest.
  struct Kept {
    InodeId id;
    UniqueFd fd;
    bool open;
  };
  std::vector<Kept> kept;
  void keep(Kept one);
  IdentityCache cache;
  IdentityRows rows;
  IdentityJournal journal;
  std::atomic<bool> any_import{false};  // read without the mutex
  IdentityFlusher flusher;              // last: its thread ends first
};

InodeTable::Impl::Impl(const std::filesystem::path& database, const std::filesystem::path& journal_file,
                       UniqueFd root_fd, const Options& options)
    : cache(options.cache_entries),
      rows(database),
      journal(journal_file, options.journal_slots, journal_tail(database)),
      flusher(database, journal, mutex) {
  any_import = flusher.imported_before();
  adopt_root(std::move(root_fd));
  FileHandle handle;
  handles = options.use_handles && read_handle(mount.get(), "", handle) &&
            open_handle(mount.get(), handle.type, handle.bytes.data(), handle.bytes.size(), O_PATH);
  const Lock lock = ready();
  bind_root(lock);
}

void InodeTable::Impl::adopt_root(UniqueFd fd) {
  UniqueFd again = open_root_again(fd.get(), O_RDONLY | O_DIRECTORY);
  if (!again || !look(again.get(), "", root_seen))
    throw std::system_error(errno, std::generic_category(), "the root of the store cannot be opened");
  root = std::move(fd);
  mount = std::move(again);
}

Lock InodeTable::Impl::ready() {
  Lock lock(mutex);
  flusher.wait_for_space(lock);
  return lock;
}

// It is in SQLite, and perhaps not on the disk yet: sync() waits for all that is.
Entry& InodeTable::Impl::read_again(const Identity& row) {
  return cache.put(row, flusher.flushed(), flusher.flushed());
}

Entry* InodeTable::Impl::load(InodeId id) {
  Entry* entry = cache.by_id(id);
  if (entry == nullptr) {
    const auto row = rows.by_id(id);
    if (!row || cache.by_ino(row->ino) != nullptr) return nullptr;  // the inode has another id by now
    return &read_again(*row);
  }
  return entry->erased() ? nullptr : entry;
}

Entry* InodeTable::Impl::load_ino(std::uint64_t ino) {
  if (Entry* entry = cache.by_ino(ino)) return entry;
  const auto row = rows.by_ino(ino);
  if (!row || cache.by_id(row->id) != nullptr) return nullptr;  // erased, or bound to another inode since
  return &read_again(*row);
}

// Journal first: what the cache says may be told to a kernel.
void InodeTable::Impl::put(const Lock& lock, const Identity& identity) {
  if (!journal.append(identity)) throw std::logic_error("the identity journal is full");
  cache.put(identity, journal.head(), flusher.flushed());
  flusher.appended(lock);
}

void InodeTable::Impl::erase(const Lock& lock, const Entry& entry) {
  Identity identity = cache.identity(entry);
  identity.erased = true;
  put(lock, identity);
}

InodeId InodeTable::Impl::add(const Lock& lock, Identity identity) {
  identity.id = flusher.take_id(lock);
  put(lock, identity);
  return identity.id;
}

void InodeTable::Impl::bind_root(const Lock& lock) {
  Backing backing{};
  if (!look(mount.get(), "", backing))
    throw std::system_error(errno, std::generic_category(), "the root of the store cannot be read");
  Entry* entry = load(kRootInode);
  if (entry != nullptr && entry->ino == backing.stx_ino && entry->born == birth(backing)) return;
  Identity identity = entry != nullptr ? cache.identity(*entry) : Identity{};
  if (Entry* other = load_ino(backing.stx_ino); other != nullptr && other->id != kRootInode)
    erase(lock, *other);
  identity.id = kRootInode;
  if (!describe(identity, 0, "", mount.get(), mount.get(), backing))
    throw std::system_error(errno, std::generic_category(), "the root of the store has no file handle");
  put(lock, identity);
}

// Fills in what names the backing inode. False: the name leads elsewhere by now, or nowhere.
bool InodeTable::Impl::describe(Identity& identity, InodeId parent, const std::string& name, int directory_fd,
                                int fd, const Backing& backing) {
  identity.ino = backing.stx_ino;
  identity.born = birth(backing);
  identity.type = file_type(backing);
  identity.handle = {};
  identity.parent = 0;
  identity.name.clear();
  if (handles) {
    const bool direct = fd >= 0 || name.empty();
    if (read_handle(fd >= 0 ? fd : directory_fd, direct ? "" : name.c_str(), identity.handle)) {
      if (direct || handle_names_inode(identity.handle, backing)) return true;
      Backing now{};
      return look(directory_fd, name, now) && same_inode(now, backing);
    }
    if (errno != EOPNOTSUPP && errno != EOVERFLOW) return false;
  }
  if (name.empty() && identity.id != kRootInode)
    throw std::system_error(ESTALE, std::generic_category(), "an inode without a name");
  if (Backing now{};
      identity.id != kRootInode && (!look(directory_fd, name, now) || !same_inode(now, backing)))
    return false;
  identity.parent = parent;
  identity.name = name;
  return true;
}

bool InodeTable::Impl::is(const Entry& entry, const Backing& backing, int directory_fd,
                          const std::string& name) {
  if (entry.born != birth(backing) || entry.type() != file_type(backing)) return false;
  if (entry.born != 0 || !entry.has_handle()) return true;
  // No birth time: only the generation in the handle tells a reused inode.
  FileHandle handle;
  return !read_handle(directory_fd, name.c_str(), handle) ||
         handle.bytes == std::string_view(entry.handle(), entry.handle_size);
}

InodeTable::Presented InodeTable::Impl::present(InodeId id, const Backing& backing) {
  const std::int64_t ctime = timestamp_ns(backing.stx_ctime);
  const Entry* entry = load(id);
  if (entry == nullptr) return {ctime, false};
  if (!entry->imported()) return {ctime, entry->orphan()};
  if (entry->backing_ctime == ctime) return {entry->imported_ctime, entry->orphan()};
  return {std::max(entry->imported_ctime + 1, ctime), entry->orphan()};
}

// Opens along parents and names, each step verified, from the nearest ancestor that can be opened otherwise.
UniqueFd InodeTable::Impl::open_way(InodeId id, int flags, std::uint32_t* type, Lock& lock) {
  std::vector<Step> steps;
  UniqueFd at;
  while (!at) {
    const Entry* entry = id == kRootInode ? nullptr : load(id);
    if (id == kRootInode) {
      at = open_root_again(root.get(), O_PATH | O_DIRECTORY);
    } else if (entry == nullptr || steps.size() == kMaxDepth) {
      errno = ESTALE;
      return {};
    } else if (entry->has_handle()) {
      at = open_handle(mount.get(), entry->handle_type, entry->handle(), entry->handle_size, O_PATH);
    } else {
      steps.push_back({cache.identity(*entry).name, entry->ino, entry->born});
      id = entry->parent;
      if (id != 0) continue;
      at = sharefs::open_private_area(root.get());
      if (!at) at = UniqueFd(::openat(root.get(), "..", O_PATH | O_DIRECTORY | O_CLOEXEC));
    }
    if (!at) return {};
  }
  lock.unlock();
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    UniqueFd next(::openat(at.get(), step->name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    Backing backing{};
    if (!next || !look(next.get(), "", backing) || backing.stx_ino != step->ino ||
        birth(backing) != step->born) {
      if (next || errno == ENOENT || errno == ENOTDIR) errno = ESTALE;
      return {};
    }
    if (type != nullptr) *type = file_type(backing);
    if (const int error = refusal(file_type(backing), flags); error != 0 && step + 1 == steps.rend()) {
      errno = error;
      return {};
    }
    at = std::move(next);
  }
  return reopen(std::move(at), flags);
}

// Invalid, with errno 0: it is not kept.
UniqueFd InodeTable::Impl::open_kept(InodeId id, int flags, std::uint32_t* type, Lock& lock) {
  errno = 0;
  const auto found = std::find_if(kept.begin(), kept.end(), [id](const Kept& one) { return one.id == id; });
  if (found == kept.end()) return {};
  UniqueFd path(::fcntl(found->fd.get(), F_DUPFD_CLOEXEC, 0));
  lock.unlock();
  Backing backing{};
  if (!path || !look(path.get(), "", backing)) return {};
  if (type != nullptr) *type = file_type(backing);
  if (errno = refusal(file_type(backing), flags); errno != 0) return {};
  return reopen(std::move(path), flags);
}

bool InodeTable::Impl::let_go(InodeId id) {
  return std::erase_if(kept, [id](const Kept& one) { return one.id == id; }) > 0;
}

void InodeTable::Impl::keep(Kept one) {
  const auto same = [&one](const Kept& other) { return other.open == one.open; };
  if (std::count_if(kept.begin(), kept.end(), same) == kKeptInodes)
    kept.erase(std::find_if(kept.begin(), kept.end(), same));
  kept.push_back(std::move(one));
}

void InodeTable::Impl::note_name(const Lock& lock, Identity identity, InodeId parent, std::string_view name) {
  let_go(identity.id);
  identity.parent = parent;
  identity.name = name;
  put(lock, identity);
}

InodeTable::InodeTable(const std::filesystem::path& database, const std::filesystem::path& journal,
                       UniqueFd root)
    : InodeTable(database, journal, std::move(root), Options()) {}

InodeTable::InodeTable(const std::filesystem::path& database, const std::filesystem::path& journal,
                       UniqueFd root, const Options& options)
    : impl_(std::make_unique<Impl>(database, journal, std::move(root), options)) {}

InodeTable::~InodeTable() = default;

void InodeTable::set_epoch(Epoch epoch) {
  if (epoch == 0) throw std::logic_error("epochs count from 1");
  const Lock lock(impl_->mutex);
  impl_->flusher.set_epoch(lock, epoch, impl_->rows.reserve_block(epoch, IdentityFlusher::kBlock));
}

void InodeTable::make_room() {
  Lock lock(impl_->mutex);
  impl_->flusher.wait_for_request(lock);
}

InodeId InodeTable::identify(InodeId parent, std::string_view name_view, int directory_fd,
                             const Backing& seen) {
  const auto names = impl_->follow_names();
  Lock lock(impl_->mutex);
  if (mounted_there(seen, impl_->root_seen))
    throw std::system_error(EXDEV, std::generic_category(), "an inode of another file system");
  if (const Entry* entry = impl_->cache.by_ino(seen.stx_ino);
      entry != nullptr && entry->born != 0 && entry->born == birth(seen) && entry->has_handle())
    return entry->id;

  const std::string name(name_view);
  Backing backing = seen;
  for (unsigned attempt = 0; attempt < kMaxAttempts; ++attempt) {
    impl_->flusher.wait_for_space(lock);
    const Entry* entry = impl_->load_ino(backing.stx_ino);
    if (entry != nullptr && impl_->is(*entry, backing, directory_fd, name)) {
      const InodeId id = entry->id;
      if (entry->has_handle() || id == kRootInode || name.empty()) return id;
      const Identity identity = impl_->cache.identity(*entry);
      const bool noted = identity.parent == parent && identity.name == name;
      if (noted && impl_->kept.empty()) return id;
      // It may have moved since it was seen: then it is known better already.
      if (Backing now{}; !look(directory_fd, name, now) || !same_inode(now, backing)) return id;
      if (!noted || impl_->let_go(id)) impl_->note_name(lock, identity, parent, name);
      return id;
    }
    if (entry == nullptr) impl_->flusher.wait_for_id(lock);
    Identity identity;
    // An id must not end because somebody looked a moment too early: what is seen is looked at once more.
    Backing now = backing;
    if ((entry == nullptr || (look(directory_fd, name, now) && same_inode(now, backing))) &&
        impl_->describe(identity, parent, name, directory_fd, -1, backing)) {
      if (entry != nullptr) {
        impl_->erase(lock, *entry);
        continue;
      }
      if (impl_->load_ino(backing.stx_ino) == nullptr) return impl_->add(lock, std::move(identity));
      continue;  // while this waited for a block of ids, another thread was faster
    }
    if (!look(directory_fd, name, backing))
      throw std::system_error(errno == ENOENT ? ESTALE : errno, std::generic_category(), "looking at a name");
  }
  throw std::system_error(ESTALE, std::generic_category(), "a name that changes too fast");
}

InodeId InodeTable::issue(InodeId parent, std::string_view name, int directory_fd, int fd,
                          const Backing& backing) {
  Lock lock = impl_->ready();
  impl_->flusher.wait_for_id(lock);
  if (const Entry* entry = impl_->cache.by_ino(backing.stx_ino)) {
    // Of an inode that is gone, or another thread came across the new one already.
    if (entry->born != 0 && entry->born == birth(backing)) return entry->id;
    impl_->erase(lock, *entry);
  }
  Identity identity;
  if (!impl_->describe(identity, parent, std::string(name), directory_fd, impl_->handles ? fd : -1, backing))
    throw std::system_error(ESTALE, std::generic_category(), "a new inode is gone");
  return impl_->add(lock, std::move(identity));
}

std::optional<InodeId> InodeTable::find(const Backing& backing) {
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->load_ino(backing.stx_ino);
  if (entry == nullptr || entry->born != birth(backing)) return std::nullopt;
  return entry->id;
}

std::optional<InodeId> InodeTable::peek(std::uint64_t ino) {
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->cache.by_ino(ino);
  if (entry == nullptr) return std::nullopt;
  return entry->id;
}

void InodeTable::bind(InodeId id, InodeId parent, std::string_view name, int directory_fd,
                      const Backing& backing) {
  const Lock lock = impl_->ready();
  if (const Entry* other = impl_->load_ino(backing.stx_ino); other != nullptr && other->id != id)
    impl_->erase(lock, *other);
  impl_->let_go(id);
  Identity identity;
  identity.id = id;
  if (!impl_->describe(identity, parent, std::string(name), directory_fd, -1, backing))
    throw std::system_error(ESTALE, std::generic_category(), "an inode to bind is gone");
  impl_->put(lock, identity);
}

std::unique_lock<std::shared_mutex> InodeTable::change_names() {
  return impl_->handles ? std::unique_lock<std::shared_mutex>() : std::unique_lock(impl_->names);
}

void InodeTable::moved(InodeId id, InodeId parent, std::string_view name) {
  const Lock lock = impl_->ready();
  const Entry* entry = impl_->load(id);
  if (entry == nullptr || entry->has_handle() || id == kRootInode) return;
  impl_->note_name(lock, impl_->cache.identity(*entry), parent, name);
}

void InodeTable::linked(InodeId id, InodeId parent, std::string_view name) {
  bool reached = false;
  {
    const Lock lock(impl_->mutex);
    const Entry* entry = impl_->load(id);
    if (entry == nullptr || entry->has_handle()) return;
    reached = !impl_->let_go(id);
  }
  if (!reached || !open(id, O_PATH | O_NOFOLLOW)) moved(id, parent, name);
}

void InodeTable::losing(InodeId id, InodeId parent, std::string_view name_view, int directory_fd, bool open) {
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->load(id);
  if (entry == nullptr || entry->has_handle()) return;
  const Identity identity = impl_->cache.identity(*entry);
  const std::string name(name_view);
  if (identity.parent != parent || identity.name != name) return;
  UniqueFd fd(::openat(directory_fd, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  Backing backing{};
  if (!fd || !look(fd.get(), "", backing) || backing.stx_ino != identity.ino ||
      birth(backing) != identity.born)
    return;
  impl_->let_go(id);
  impl_->keep({id, std::move(fd), open});
}

void InodeTable::closed(InodeId id) {
  if (impl_->handles) return;
  const Lock lock(impl_->mutex);
  auto& kept = impl_->kept;
  const auto found = std::find_if(kept.begin(), kept.end(), [id](const auto& one) { return one.id == id; });
  if (found == kept.end()) return;
  UniqueFd fd = std::move(found->fd);
  kept.erase(found);
  impl_->keep({id, std::move(fd), false});
}

std::optional<std::uint64_t> InodeTable::out_of_reach(InodeId id) {
  if (impl_->handles) return std::nullopt;
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->load(id);
  return entry != nullptr && !entry->has_handle() ? std::optional(entry->ino) : std::nullopt;
}

bool InodeTable::is_reached_by(InodeId id, InodeId parent, std::string_view name) {
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->load(id);
  if (entry == nullptr || entry->has_handle() || id == kRootInode) return true;
  const Identity identity = impl_->cache.identity(*entry);
  return identity.parent == parent && identity.name == name;
}

void InodeTable::erase(InodeId id) {
  const Lock lock = impl_->ready();
  impl_->let_go(id);
  if (const Entry* entry = impl_->load(id); entry != nullptr && id != kRootInode) impl_->erase(lock, *entry);
}

UniqueFd InodeTable::open(InodeId id, int flags, std::uint32_t* type) {
  const auto names = impl_->follow_names();
  Lock lock(impl_->mutex);
  if (id == kRootInode) {
    if (type != nullptr) *type = S_IFDIR;
    return open_root_again(impl_->root.get(), flags & ~O_NOFOLLOW);
  }
  const Entry* entry = impl_->load(id);
  if (entry == nullptr) {
    errno = ESTALE;
    return {};
  }
  if (!entry->has_handle()) {
    UniqueFd kept = impl_->open_kept(id, flags, type, lock);
    return kept || errno != 0 ? std::move(kept) : impl_->open_way(id, flags, type, lock);
  }
  if (type != nullptr) *type = entry->type();
  if (const int error = refusal(entry->type(), flags); error != 0) {
    errno = error;
    return {};
  }
  std::array<char, FileHandle::kMax> handle;
  const std::size_t size = entry->handle_size;
  const std::uint32_t handle_type = entry->handle_type;
  std::memcpy(handle.data(), entry->handle(), size);
  const int mount = impl_->mount.get();
  lock.unlock();
  return open_handle(mount, handle_type, handle.data(), size, flags);
}

std::int64_t InodeTable::presented_ctime(InodeId id, const Backing& backing) {
  return presented(id, backing).ctime;
}

InodeTable::Presented InodeTable::presented(InodeId id, const Backing& backing) {
  const Lock lock(impl_->mutex);
  return impl_->present(id, backing);
}

void InodeTable::import_ctime(InodeId id, std::int64_t ctime, const Backing& backing) {
  const Lock lock = impl_->ready();
  const Entry* entry = impl_->load(id);
  if (entry == nullptr) return;
  Identity identity = impl_->cache.identity(*entry);
  identity.imported = true;
  identity.imported_ctime = ctime;
  identity.backing_ctime = timestamp_ns(backing.stx_ctime);
  impl_->any_import = true;
  impl_->put(lock, identity);
}

void InodeTable::changing(InodeId id) {
  if (!impl_->any_import.load(std::memory_order_relaxed)) return;
  Lock lock(impl_->mutex);
  const Entry* entry = impl_->load(id);
  if (entry == nullptr || !entry->imported()) return;
  // The former owner's clock may be ahead of this one's: until that is passed each change shows a later
  // ctime.
  if (entry->backing_ctime == kOverrideEnded && entry->imported_ctime < ctime_floor()) return;
  impl_->flusher.wait_for_space(lock);
  entry = impl_->load(id);
  if (entry == nullptr) return;
  Identity identity = impl_->cache.identity(*entry);
  if (identity.backing_ctime == kOverrideEnded) ++identity.imported_ctime;
  identity.backing_ctime = kOverrideEnded;
  impl_->put(lock, identity);
}

void InodeTable::set_orphan(InodeId id, bool orphan) {
  const Lock lock = impl_->ready();
  const Entry* entry = impl_->load(id);
  if (entry == nullptr || entry->orphan() == orphan) return;
  Identity identity = impl_->cache.identity(*entry);
  identity.orphan = orphan;
  impl_->put(lock, identity);
}

bool InodeTable::is_orphan(InodeId id) {
  const Lock lock(impl_->mutex);
  const Entry* entry = impl_->load(id);
  return entry != nullptr && entry->orphan();
}

void InodeTable::set_root(UniqueFd root) {
  const Lock lock = impl_->ready();
  impl_->adopt_root(std::move(root));
  impl_->bind_root(lock);
}

int InodeTable::root() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->root.get();
}

bool InodeTable::uses_handles() const { return impl_->handles; }

UniqueFd InodeTable::open_private_area() const {
  const std::lock_guard lock(impl_->mutex);
  UniqueFd inside = sharefs::open_private_area(impl_->root.get());
  if (inside) return inside;
  const int error = errno;
  // Only a directory above that calls this root its `tree` is one.
  UniqueFd above(::openat(impl_->root.get(), "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  Backing tree{}, root{};
  if (above && look(above.get(), "tree", tree) && look(impl_->root.get(), "", root) &&
      same_inode(tree, root) && is_private(above.get()))
    return above;
  errno = error;
  return {};
}

void InodeTable::flush() {
  Lock lock(impl_->mutex);
  impl_->flusher.wait_flushed(lock, impl_->journal.head());
}

void InodeTable::sync(InodeId id) {
  Lock lock(impl_->mutex);
  const Entry* entry = impl_->cache.by_id(id);
  // With a directory go the identities of what was made in it. What is no longer cached is in SQLite.
  const std::uint64_t position = entry == nullptr           ? impl_->flusher.flushed()
                                 : entry->type() == S_IFDIR ? impl_->journal.head()
                                                            : entry->position;
  impl_->flusher.wait_durable(lock, position);
}

}  // namespace sharefs
