#include "replication/target_tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <vector>

#include "fs/private_area.h"

namespace sharefs {

namespace {

constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

UniqueFd open_folder(int area, const char* name) {
  if (mkdirat(area, name, 0700) != 0 && errno != EEXIST) throw_errno("cannot create " + std::string(name));
  UniqueFd fd(openat(area, name, kDirectoryFlags));
  if (!fd) throw_errno("cannot open " + std::string(name) + " in the private area");
  return fd;
}

std::optional<InodeId> id_of(std::string_view hex) {
  InodeId id = 0;
  const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), id, 16);
  if (error != std::errc() || end != hex.data() + hex.size() || id == 0) return std::nullopt;
  return id;
}

std::unordered_set<InodeId> ids_in(int folder) {
  std::unordered_set<InodeId> ids;
  for (const auto& entry : list_directory(folder)) {
    if (const auto id = id_of(entry.name)) ids.insert(*id);
  }
  return ids;
}

std::pair<std::uint64_t, std::uint64_t> hash_of(std::string_view name) {
  const XXH128_hash_t hash = XXH3_128bits(name.data(), name.size());
  return {hash.high64, hash.low64};
}

// Who may not write a directory of the private area, and is not root, can change nothing in it. If it is
// placed again its state comes with its name.
UniqueFd open_parked(int folder, const std::string& name) {
  const auto backing = ::geteuid() != 0 ? stat_name(folder, name) : std::nullopt;
  if (backing && (backing->stx_mode & S_IRWXU) != S_IRWXU)
    fchmodat(folder, name.c_str(), (backing->stx_mode & 07777u) | S_IRWXU, 0);
  UniqueFd fd(openat(folder, name.c_str(), kDirectoryFlags));
  if (!fd) throw_errno("cannot open '" + name + "'");
  return fd;
}

void set_mtime(int directory, const Backing& backing) {
  const std::array<struct timespec, 2> times{timespec{.tv_sec = 0, .tv_nsec = UTIME_OMIT},
                                             to_timespec(timestamp_ns(backing.stx_mtime))};
  if (futimens(directory, times.data()) != 0) throw_errno("cannot set the times of a directory");
}

}  // namespace

void check_name(InodeId parent, const std::string& name) {
  if (name.empty() || name == "." || name == ".." || name.size() > NAME_MAX ||
      name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
    throw Malformed("a name that no file can have");
  }
  if (parent == kRootInode && name == kPrivateArea) throw Malformed("it names the private area");
}

std::string hex_name(InodeId id) {
  char text[17];
  const auto [end, error] = std::to_chars(text, text + sizeof text, id, 16);
  return {text, end};
}

TargetTree::TargetTree(InodeTable& inodes, const std::filesystem::path& private_area,
                       const Power::Interval& doubtful, std::shared_ptr<SentSet> received)
    : inodes_(inodes), doubtful_(doubtful), received_(std::move(received)) {
  area_ = UniqueFd(::open(private_area.c_str(), kDirectoryFlags));
  if (!area_ || !is_private(area_.get())) throw_errno("cannot use the private area of the store");
  parked_fd_ = open_folder(area_.get(), "parked");
  orphans_fd_ = open_folder(area_.get(), "orphans");
  parked_ = ids_in(parked_fd_.get());
  orphans_ = ids_in(orphans_fd_.get());
  const UniqueFd root = inodes_.open(kRootInode, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (!root) throw_errno("cannot open the root of the tree");
  fresh_ = parked_.empty() && orphans_.empty() && list_directory(root.get()).empty();
}

// ---- inodes

// Attempts that ended early leave what was left under the id of an inode that they put elsewhere.
bool TargetTree::lies_in(const std::unordered_set<InodeId>& ids, InodeId id) const {
  if (!ids.contains(id)) return false;
  const auto backing = stat_name(folder_of(ids), hex_name(id));
  return backing && inodes_.find(*backing) == id;
}

bool TargetTree::known(InodeId id) {
  if (id == kRootInode || seen_.contains(id)) return true;
  if (fresh_) return false;
  if (!inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC)) {
    if (errno == EMFILE || errno == ENFILE) throw_errno("cannot open inode " + std::to_string(id));
    return false;
  }
  seen_.insert(id);
  return true;
}

OpenedInode TargetTree::open(InodeId id, std::uint32_t type) {
  OpenedInode opened;
  opened.path_only = type != S_IFREG && type != S_IFDIR;
  int flags = O_NOFOLLOW | O_CLOEXEC;
  if (type == S_IFREG) flags |= O_RDWR | O_NONBLOCK;
  if (type == S_IFDIR) flags |= O_RDONLY | O_DIRECTORY;
  if (opened.path_only) flags |= O_PATH;
  std::uint32_t found = 0;
  opened.fd = inodes_.open(id, flags, &found);
  if (!opened.fd && errno == EACCES && type == S_IFREG) {
    // Read-only for its owner, who is not root: its mode comes again with its state.
    if (const UniqueFd path = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        path && chmod(proc_path(path.get()).c_str(), 0600) == 0) {
      opened.fd = inodes_.open(id, flags, &found);
    }
  }
  const bool type_error = errno == ELOOP || errno == ENXIO || errno == EISDIR || errno == ENOTDIR;
  if ((opened.fd && found != type) || (!opened.fd && type_error)) {
    throw Malformed("inode " + std::to_string(id) + " is of another type here");
  }
  if (!opened.fd) throw_errno("cannot open inode " + std::to_string(id));
  opened.backing = stat_inode(opened.fd.get());
  return opened;
}

TargetTree::Directory TargetTree::directory(InodeId id) {
  if (const auto cached = directories_.find(id); cached != directories_.end()) return cached->second;
  if (!known(id)) return nullptr;
  unlock(id);
  auto opened = std::make_shared<const UniqueFd>(open(id, S_IFDIR).fd);
  if (directories_.size() >= kCachedDirectories) directories_.clear();
  directories_.emplace(id, opened);
  return opened;
}

// Ordinary users change nothing in a directory that they may not write: it may be written until lock_again().
void TargetTree::unlock(InodeId id) {
  if (::geteuid() == 0) return;
  const UniqueFd path = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
  if (!path) return;
  const Backing backing = stat_inode(path.get());
  const mode_t mode = backing.stx_mode & 07777u;
  if (!is_directory(backing) || (mode & S_IRWXU) == S_IRWXU) return;
  change_mode(id, path.get(), mode | S_IRWXU);
  unlocked_.emplace(id, mode);
}

void TargetTree::lock_again() {
  for (const auto& [id, mode] : unlocked_) {
    if (const UniqueFd path = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC))
      change_mode(id, path.get(), mode);
  }
  unlocked_.clear();
  if (::geteuid() != 0) directories_.clear();  // their states, which come next, may be what locks them
}

void TargetTree::change_mode(InodeId id, int path, mode_t mode) {
  CtimeKeeper ctime(inodes_, id, stat_inode(path), doubt_of(id));
  if (chmod(proc_path(path).c_str(), mode) != 0) throw_errno("cannot set the mode of a directory");
  ctime.restore(stat_inode(path));
}

UniqueFd TargetTree::try_create(const pb::InodeState& state, int directory, const std::string& name) const {
  const pb::Attr& attr = state.attr();
  const mode_t type = attr.mode() & static_cast<std::uint32_t>(S_IFMT);
  const mode_t permissions = attr.mode() & 0777u;
  constexpr int kNew = O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC;
  switch (type) {
    case S_IFREG:
      return UniqueFd(openat(directory, name.c_str(), kNew, permissions));
    case S_IFDIR:
      if (mkdirat(directory, name.c_str(), 0700) != 0) return {};
      return UniqueFd(openat(directory, name.c_str(), kDirectoryFlags));
    case S_IFLNK:
      if (symlinkat(state.link_target().c_str(), directory, name.c_str()) != 0) return {};
      break;
    default:
      if (mknodat(directory, name.c_str(), type | permissions, attr.rdev()) != 0) {
        if (errno == EPERM)
          throw_errno("cannot create the device '" + name + "' (sharefs must run as root here)");
        return {};
      }
  }
  return UniqueFd(openat(directory, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
}

// What lies in the private area under the same id is a left-over that has lost its identity.
OpenedInode TargetTree::create(const pb::InodeState& state, const pb::EntryState* place) {
  const InodeId id = state.attr().id();
  Directory parent;
  if (place != nullptr) parent = directory(place->parent());
  const int folder = parent ? parent->get() : parked_fd_.get();
  const std::string name = parent ? place->name() : hex_name(id);
  if (parent) inodes_.changing(place->parent());
  OpenedInode opened;
  opened.path_only = !S_ISREG(state.attr().mode()) && !S_ISDIR(state.attr().mode());
  opened.fd = try_create(state, folder, name);
  if (!opened.fd && errno == EEXIST) {
    if (const auto occupant = stat_name(folder, name); !parent) {
      discard(folder, name);
    } else if (occupant) {
      remove_name(place->parent(), folder, name, *occupant);
    }
    opened.fd = try_create(state, folder, name);
  }
  if (!opened.fd) throw_errno("cannot create '" + name + "'");
  opened.backing = stat_inode(opened.fd.get());
  if (parent) {
    inodes_.bind(id, place->parent(), name, folder, opened.backing);
    set_aside_.erase({place->parent(), name});
    parked_.erase(id);
  } else {
    inodes_.bind(id, 0, "parked/" + name, area_.get(), opened.backing);
    parked_.insert(id);
  }
  orphans_.erase(id);
  seen_.insert(id);
  return opened;
}

// ---- names

void TargetTree::detach(InodeId parent, const std::string& name) {
  set_aside_.erase({parent, name});
  const Directory folder = directory(parent);
  if (!folder) return;
  if (const auto backing = stat_name(folder->get(), name)) remove_name(parent, folder->get(), name, *backing);
}

void TargetTree::remove_name(InodeId parent, int directory, const std::string& name, const Backing& backing) {
  inodes_.changing(parent);
  if (is_directory(backing) || backing.stx_nlink == 1 || only_known_name(parent, name, backing)) {
    park(directory, name, backing, inodes_.find(backing));
  } else {
    unlink_kept(parent, directory, name, backing);
  }
}

// Without file handles: the inode has other names, which earlier processes have made, and which the source
// has not told of yet.
bool TargetTree::only_known_name(InodeId parent, const std::string& name, const Backing& backing) {
  if (inodes_.uses_handles()) return false;
  const auto id = inodes_.find(backing);
  return id && !more_names_.contains(*id) && inodes_.is_reached_by(*id, parent, name);
}

// The source says that it has a name that is there already. Without file handles it may be one that this
// process did not know, of an inode that is reached by a name that goes, or has gone into parked/.
void TargetTree::has_name(InodeId id, InodeId parent, const std::string& name, const Backing& backing) {
  if (inodes_.is_reached_by(id, parent, name)) return;
  if (is_parked(id)) {
    CtimeKeeper ctime(inodes_, id, backing, doubt_of(id));
    inodes_.moved(id, parent, name);
    if (unlinkat(parked_fd_.get(), hex_name(id).c_str(), 0) != 0) throw_errno("cannot unlink a parked inode");
    parked_.erase(id);
    const UniqueFd fd = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (!fd) throw_errno("cannot open inode " + std::to_string(id));
    return ctime.restore(stat_inode(fd.get()));
  }
  const auto [first, last] = more_names_.equal_range(id);
  if (std::none_of(first, last, [&](const auto& one) { return one.second == std::pair(parent, name); }))
    more_names_.emplace(id, std::pair(parent, name));
}

// One of several names of an inode.
void TargetTree::unlink_kept(InodeId parent, int directory, const std::string& name, const Backing& backing) {
  const UniqueFd fd(openat(directory, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  if (!fd) throw_errno("cannot open '" + name + "'");
  const auto id = inodes_.find(backing);
  std::optional<CtimeKeeper> ctime;
  if (id) ctime.emplace(inodes_, *id, backing, doubt_of(*id));
  if (unlinkat(directory, name.c_str(), 0) != 0) throw_errno("cannot unlink '" + name + "'");
  if (id) lost_name(*id, parent, name);
  if (ctime) ctime->restore(stat_inode(fd.get()));
}

// If it was the name by which the inode is reached, another one takes its place.
void TargetTree::lost_name(InodeId id, InodeId parent, const std::string& name) {
  const auto [first, last] = more_names_.equal_range(id);
  if (first == last) return;
  const auto lost =
      std::find_if(first, last, [&](const auto& one) { return one.second == std::pair(parent, name); });
  if (lost != last) {
    more_names_.erase(lost);
  } else if (parent == 0 || inodes_.is_reached_by(id, parent, name)) {
    inodes_.moved(id, first->second.first, first->second.second);
    more_names_.erase(first);
  }
}

void TargetTree::park(int directory, const std::string& name, const Backing& backing,
                      std::optional<InodeId> id) {
  if (!id) {
    park_unnamed(directory, name);
    return;
  }
  const std::string parked = hex_name(*id);
  CtimeKeeper ctime(inodes_, *id, backing, doubt_of(*id));
  if (!move_name(directory, name, parked_fd_.get(), parked)) {
    if (errno != EEXIST) throw_errno("cannot park '" + name + "'");
    discard(parked_fd_.get(), parked);  // a left-over that has lost its identity
    if (!move_name(directory, name, parked_fd_.get(), parked)) throw_errno("cannot park '" + name + "'");
  }
  parked_.insert(*id);
  more_names_.erase(*id);
  inodes_.moved(*id, 0, "parked/" + parked);
  if (const auto after = stat_name(parked_fd_.get(), parked)) ctime.restore(*after);
}

// What has no id here, or shall have none any more. Returns its name in parked/.
std::string TargetTree::park_unnamed(int directory, const std::string& name) {
  for (;;) {
    std::string unnamed = "unknown-" + std::to_string(++unnamed_);
    if (move_name(directory, name, parked_fd_.get(), unnamed)) return unnamed;
    if (errno != EEXIST) throw_errno("cannot park '" + name + "'");
  }
}

void TargetTree::attach(InodeId parent, const std::string& name, InodeId id) {
  set_aside_.erase({parent, name});
  if (place(parent, name, id)) return;
  if (set_aside_.size() >= kMaxSetAside) throw Malformed("too many names of inodes that have not arrived");
  set_aside_[{parent, name}] = id;
}

// False: not now.
bool TargetTree::place(InodeId parent, const std::string& name, InodeId id) {
  const Directory folder = directory(parent);
  if (!folder || !known(id)) return false;
  const UniqueFd fd = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
  if (!fd) throw_errno("cannot open inode " + std::to_string(id));
  const Backing backing = stat_inode(fd.get());
  if (const auto occupant = stat_name(folder->get(), name)) {
    if (same_inode(*occupant, backing)) {
      if (!is_directory(backing)) has_name(id, parent, name, backing);
      return true;
    }
    remove_name(parent, folder->get(), name, *occupant);
  }
  inodes_.changing(parent);
  CtimeKeeper ctime(inodes_, id, backing, doubt_of(id));
  const bool one_more = !is_directory(backing) && !is_parked(id) && !lies_in(orphans_, id);
  if (!move_to(folder->get(), name, id, fd.get(), backing)) return false;
  if (!one_more)
    inodes_.moved(id, parent, name);
  else if (!inodes_.uses_handles())
    more_names_.emplace(id, std::pair(parent, name));
  ctime.restore(stat_inode(fd.get()));
  return true;
}

// Out of the private area, from its only place (directories), or as one more name.
bool TargetTree::move_to(int directory, const std::string& name, InodeId id, int fd, const Backing& backing) {
  const std::string hex = hex_name(id);
  for (auto* folder : {&parked_, &orphans_}) {
    if (!lies_in(*folder, id)) continue;
    if (move_name(folder_of(*folder), hex, directory, name)) {
      folder->erase(id);
      if (folder == &orphans_) inodes_.set_orphan(id, false);
      return true;
    }
    if (errno == EINVAL && is_directory(backing)) return false;
    throw_errno("cannot move '" + name + "' out of the private area");
  }
  if (is_directory(backing)) return move_directory(directory, name, fd);
  return link_to(directory, name, fd);
}

bool TargetTree::move_directory(int directory, const std::string& name, int fd) {
  const Place now = find_directory(fd);
  if (const auto left = inodes_.find(stat_inode(now.directory.get()))) {
    inodes_.changing(*left);
    unlock(*left);
  }
  if (move_name(now.directory.get(), now.name, directory, name)) return true;
  if (errno == EINVAL) return false;  // into itself
  throw_errno("cannot move directory '" + name + "'");
}

// False: an inode can have no more names, until one that is to go has gone.
bool TargetTree::link_to(int directory, const std::string& name, int fd) {
  if (linkat(fd, "", directory, name.c_str(), AT_EMPTY_PATH) == 0) return true;
  // Without privilege only through /proc, which does not follow what the descriptor is.
  if (linkat(AT_FDCWD, proc_path(fd).c_str(), directory, name.c_str(), AT_SYMLINK_FOLLOW) == 0) return true;
  if (errno == EMLINK) return false;
  throw_errno("cannot link '" + name + "'");
}

void TargetTree::list(const pb::DirectoryState& state) {
  if (state.part() == 0) {
    listed_ = state.id();
    listed_parts_ = 0;
    listed_names_.clear();
  }
  if (state.id() != listed_ || state.part() != listed_parts_++)
    throw Malformed("a listing without its start");
  const Directory folder = directory(state.id());
  if (folder)
    for (const auto& entry : state.entries()) listed_names_.push_back(hash_of(entry.name()));
  if (!state.more()) {
    if (folder) detach_unlisted(state.id(), folder);
    listed_ = 0;
    listed_names_ = {};
  }
  for (const auto& entry : state.entries()) attach(state.id(), entry.name(), entry.id());
}

void TargetTree::detach_unlisted(InodeId id, const Directory& folder) {
  std::sort(listed_names_.begin(), listed_names_.end());
  const UniqueFd again(openat(folder->get(), ".", kDirectoryFlags));
  if (!again) throw_errno("cannot open directory " + std::to_string(id));
  std::vector<std::string> unlisted;
  visit_directory(again.get(), [&](std::string_view name, const dirent64&) {
    const bool hidden = id == kRootInode && name == kPrivateArea;
    if (!hidden && !std::binary_search(listed_names_.begin(), listed_names_.end(), hash_of(name)))
      unlisted.emplace_back(name);
  });
  for (const auto& name : unlisted) detach(id, name);
}

void TargetTree::settle() {
  for (bool progress = true; progress && !set_aside_.empty();) {
    progress = false;
    for (auto it = set_aside_.begin(); it != set_aside_.end();) {
      const InodeId parent = it->first.first;
      const Directory folder = directory(parent);
      const Backing before = folder ? stat_inode(folder->get()) : Backing();
      CtimeKeeper ctime(inodes_, parent, before, doubt_of(parent));
      if (place(parent, it->first.second, it->second)) {
        set_mtime(folder->get(), before);  // its state may have come
        ctime.restore(stat_inode(folder->get()));
        it = set_aside_.erase(it);
        progress = true;
      } else {
        ++it;
      }
    }
  }
}

// ---- ends

void TargetTree::freed(InodeId id) {
  if (id == kRootInode) throw Malformed("it frees the root");
  auto& ids = is_parked(id) ? parked_ : orphans_;
  if (!lies_in(ids, id)) return;
  const int folder = folder_of(ids);
  const std::string name = hex_name(id);
  if (unlinkat(folder, name.c_str(), 0) != 0 && errno != ENOENT) {
    directories_.erase(id);
    if (errno != EISDIR || unlinkat(folder, name.c_str(), AT_REMOVEDIR) != 0) return;  // discard_rest() does
  }
  ids.erase(id);
  seen_.erase(id);
  inodes_.erase(id);
}

void TargetTree::show_hidden() {
  std::vector<std::string> left;
  for (auto& entry : list_directory(parked_fd_.get())) left.push_back(std::move(entry.name));
  while (!left.empty() && !interrupted_) {
    const std::string name = std::move(left.back());
    left.pop_back();
    const auto backing = stat_name(parked_fd_.get(), name);
    if (!backing || !is_directory(*backing)) continue;
    const InodeId directory = inodes_.find(*backing).value_or(0);
    if (seen_.contains(directory)) continue;
    const UniqueFd fd = open_parked(parked_fd_.get(), name);
    for (const auto& entry : list_directory(fd.get())) {
      const auto inner = stat_name(fd.get(), entry.name);
      if (!inner) continue;
      const auto id = inodes_.find(*inner);
      if (!is_directory(*inner) && inner->stx_nlink > 1 && !only_known_name(directory, entry.name, *inner)) {
        unlink_kept(directory, fd.get(), entry.name, *inner);
      } else if (id) {
        park(fd.get(), entry.name, *inner, id);
        if (is_directory(*inner)) left.push_back(hex_name(*id));
      } else if (is_directory(*inner)) {
        left.push_back(park_unnamed(fd.get(), entry.name));
      }
    }
  }
}

bool TargetTree::make_room() {
  const bool files = discard_unseen(false);
  show_hidden();
  return discard_unseen(true) || files;
}

// Of what has no name the source has said nothing in this attempt: should it, it hears that it is not here.
bool TargetTree::discard_unseen(bool directories) {
  bool any = false;
  for (auto* ids : {&orphans_, &parked_}) {
    const int folder = folder_of(*ids);
    for (const auto& entry : list_directory(folder)) {
      const auto backing = stat_name(folder, entry.name);
      if (!backing || (is_directory(*backing) && !directories)) continue;
      if (const auto id = inodes_.find(*backing); id && seen_.contains(*id)) continue;
      discard(folder, entry.name);
      if (const auto id = id_of(entry.name)) ids->erase(*id);
      any = true;
    }
  }
  return any;
}

void TargetTree::keep_orphans(const std::set<InodeId>& orphans) {
  for (const InodeId id : orphans) {
    if (!lies_in(orphans_, id)) {
      const UniqueFd fd = inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC);
      if (!fd) continue;
      const Backing backing = stat_inode(fd.get());
      CtimeKeeper ctime(inodes_, id, backing, doubt_of(id));
      discard(orphans_fd_.get(), hex_name(id));  // a left-over that has lost its identity
      if (!move_to(orphans_fd_.get(), hex_name(id), id, fd.get(), backing)) continue;
      inodes_.moved(id, 0, "orphans/" + hex_name(id));
      ctime.restore(stat_inode(fd.get()));
    }
    inodes_.set_orphan(id, true);
    orphans_.erase(id);  // what is left there is discarded
  }
  if (orphans.empty()) return;
  // «Done» may get to another disk first, and then what is found in parked/ is deleted. It may also be an
  // earlier process that has moved them.
  for (const int folder : {orphans_fd_.get(), parked_fd_.get()}) {
    if (fsync(folder) != 0) throw_errno("cannot sync what is open without a name");
  }
}

void TargetTree::discard_rest() {
  directories_.clear();
  for (const InodeId id : orphans_) discard(orphans_fd_.get(), hex_name(id));
  orphans_.clear();
  for (const auto& entry : list_directory(parked_fd_.get())) discard(parked_fd_.get(), entry.name);
  parked_.clear();
}

void TargetTree::remove_file(int directory, const std::string& name, const Backing& backing) {
  if (backing.stx_nlink > 1) return unlink_kept(0, directory, name, backing);
  if (const auto id = inodes_.find(backing)) inodes_.erase(*id);
  if (unlinkat(directory, name.c_str(), 0) != 0) throw_errno("cannot remove '" + name + "'");
}

// Removes a tree without recursion: directories in it are first moved up, so depth costs neither stack nor
// descriptors.
void TargetTree::discard(int directory, const std::string& name) {
  std::vector<std::pair<int, std::string>> left{{directory, name}};
  while (!left.empty() && !interrupted_) {
    const auto [folder, top] = left.back();
    left.pop_back();
    const auto backing = stat_name(folder, top);
    if (!backing) continue;
    if (!is_directory(*backing)) {
      remove_file(folder, top, *backing);
      continue;
    }
    const UniqueFd fd = open_parked(folder, top);
    for (const auto& entry : list_directory(fd.get())) {
      if (interrupted_) return;
      const auto inner = stat_name(fd.get(), entry.name);
      if (inner && is_directory(*inner)) {
        left.emplace_back(parked_fd_.get(), park_unnamed(fd.get(), entry.name));
      } else if (inner) {
        remove_file(fd.get(), entry.name, *inner);
      }
    }
    if (const auto id = inodes_.find(*backing)) inodes_.erase(*id);
    if (unlinkat(folder, top.c_str(), AT_REMOVEDIR) != 0) throw_errno("cannot remove '" + top + "'");
  }
}

}  // namespace sharefs
