#include "fs/descriptor_cache.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "fs/store_impl.h"

namespace sharefs {
namespace {

// Of the most recently used inodes, whatever is pinned beside them, or when the process runs out of
// descriptors: a request works on two at most.
constexpr std::size_t kKept = 4;

// Half of what the process may open is left to everything else.
unsigned affordable(unsigned limit) {
  constexpr unsigned kLeast = 16;
  rlimit limits{};
  if (::getrlimit(RLIMIT_NOFILE, &limits) != 0 || limits.rlim_cur == RLIM_INFINITY)
    return std::max(limit, kLeast);
  return std::max(kLeast, std::min(limit, static_cast<unsigned>(limits.rlim_cur / 2)));
}

}  // namespace

DescriptorCache::DescriptorCache(InodeTable& inodes, unsigned limit)
    : inodes_(inodes), limit_(affordable(limit)) {}

DescriptorCache::~DescriptorCache() {
  for (auto* list : {&nodes_, &doomed_})
    for (Node& node : *list)
      for (int& fd : node.fds) close(fd);
}

DescriptorCache::Node* DescriptorCache::find(InodeId id) {
  if (!nodes_.empty() && nodes_.front().id == id) return &nodes_.front();
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) return nullptr;
  nodes_.splice(nodes_.begin(), nodes_, found->second);
  return &*found->second;
}

DescriptorCache::Node& DescriptorCache::at(InodeId id, std::uint32_t type) {
  if (Node* node = find(id)) return *node;
  nodes_.push_front(Node{.id = id, .type = type});
  by_id_[id] = nodes_.begin();
  return nodes_.front();
}

UniqueFd DescriptorCache::open(InodeId id, Kind kind, std::uint32_t& type, bool& write_only) {
  static constexpr int kFlags[] = {O_PATH | O_NOFOLLOW, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY,
                                   O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY};
  UniqueFd fd = inodes_.open(id, kFlags[kind], &type);
  if (!fd && (errno == EMFILE || errno == ENFILE)) {
    while (nodes_.size() > kKept) release(&nodes_.back());
    fd = inodes_.open(id, kFlags[kind], &type);
  }
  // A file that the (unprivileged) owner may write and not read.
  write_only = false;
  if (!fd && errno == EACCES && kind == kWrite) {
    fd = inodes_.open(id, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, &type);
    write_only = true;
  }
  if (!fd && errno == EACCES && kind == kWrite) fd = open_read_only(id, type);
  return fd;
}

// Who had the file open for writing before goes on with it: the kernel has looked at the mode when it was
// opened. An ordinary user's process may not have been the one that made the file.
UniqueFd DescriptorCache::open_read_only(InodeId id, std::uint32_t& type) {
  const UniqueFd path = inodes_.open(id, O_PATH | O_NOFOLLOW, &type);
  struct stat found {};
  if (!path || ::fstat(path.get(), &found) != 0) return {};
  const ProcPath by(path.get());
  const mode_t mode = found.st_mode & 07777u;
  errno = EACCES;
  if (!S_ISREG(found.st_mode) || (mode & S_IWUSR) != 0 || ::chmod(by.path, mode | S_IRUSR | S_IWUSR) != 0)
    return {};
  UniqueFd fd = inodes_.open(id, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, &type);
  const int error = errno;
  ::chmod(by.path, mode);
  errno = error;
  return fd;
}

DescriptorCache::Ref DescriptorCache::get(InodeId id, Kind kind) {
  Node* node = find(id);
  if (node != nullptr) {
    // What can do more serves as well.
    for (unsigned k = kWrite + 1; k-- > kind;)
      if (node->fds[k] >= 0 && !(k == kWrite && kind == kRead && node->write_only))
        return {node->fds[k], node->type, k == kPath, node};
  }
  std::uint32_t type = 0;
  bool write_only = false;
  UniqueFd fd = open(id, kind, type, write_only);
  if (!fd) return {};
  Node& kept = at(id, type);
  if (kind == kWrite) kept.write_only = write_only;
  kept.fds[kind] = fd.release();
  ++count_;
  make_room();
  return {kept.fds[kind], kept.type, kind == kPath, &kept};
}

DescriptorCache::Ref DescriptorCache::any(InodeId id) { return get(id, kPath); }
DescriptorCache::Ref DescriptorCache::readable(InodeId id) { return get(id, kRead); }
DescriptorCache::Ref DescriptorCache::writable(InodeId id) { return get(id, kWrite); }

void DescriptorCache::adopt(InodeId id, std::uint32_t type, UniqueFd writable) {
  Node& node = at(id, type);
  close(node.fds[kWrite]);
  node.fds[kWrite] = writable.release();
  node.write_only = false;
  ++count_;
  make_room();
}

void DescriptorCache::make_room() {
  while (count_ > limit_ && nodes_.size() > kKept) release(&nodes_.back());
}

void DescriptorCache::release(Node* node) {
  const auto place = by_id_.find(node->id);
  const auto position = place->second;
  by_id_.erase(place);
  if (node->pins > 0) {
    node->doomed = true;
    doomed_.splice(doomed_.begin(), nodes_, position);
    return;
  }
  for (int& fd : node->fds) close(fd);
  nodes_.erase(position);
}

void DescriptorCache::pin(const Ref& ref) {
  if (ref.node->pins++ == 0) ++pinned_;
}

void DescriptorCache::unpin(const Ref& ref) {
  Node* node = ref.node;
  if (--node->pins > 0) return;
  --pinned_;
  if (!node->doomed) return;
  for (int& fd : node->fds) close(fd);
  doomed_.remove_if([node](const Node& other) { return &other == node; });
}

void DescriptorCache::drop_writable(InodeId id) {
  const auto found = by_id_.find(id);
  if (found == by_id_.end() || found->second->fds[kWrite] < 0) return;
  if (found->second->pins > 0) {
    release(&*found->second);
  } else {
    close(found->second->fds[kWrite]);
  }
}

void DescriptorCache::drop(InodeId id) {
  if (const auto found = by_id_.find(id); found != by_id_.end()) release(&*found->second);
}

void DescriptorCache::clear() {
  while (!nodes_.empty()) release(&nodes_.back());
}

void DescriptorCache::close(int& fd) {
  if (fd < 0) return;
  ::close(fd);
  fd = -1;
  --count_;
}

}  // namespace sharefs
