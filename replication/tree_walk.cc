#include "replication/tree_walk.h"

#include <dirent.h>
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace sharefs {

namespace {

constexpr int kManifestInodes = 1000;
constexpr std::size_t kManifestsAhead = 2;
constexpr std::size_t kMaxNotAsked = 20'000;  // items and listed names, however few of them are inodes
constexpr int kListedAtOnce = 2048;           // names in one part of a listing

constexpr std::uint32_t type_of(const Backing& backing) {
  return backing.stx_mode & static_cast<std::uint32_t>(S_IFMT);
}

// The names of a directory, in the order of their inode numbers (see list_directory), in little memory: there
// may be millions.
class Listing {
 public:
  explicit Listing(int directory) {
    visit_directory(directory, [this](std::string_view name, const dirent64& entry) {
      items_.push_back({.ino = entry.d_ino,
                        .at = text_.size(),
                        .size = static_cast<std::uint8_t>(name.size()),
                        .type = entry.d_type});
      text_ += name;
    });
    std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.ino < b.ino; });
  }
  std::size_t size() const { return items_.size(); }
  unsigned type(std::size_t i) const { return items_[i].type; }
  ListedName operator[](std::size_t i) const {
    const Item& item = items_[i];
    return {text_.substr(item.at, item.size), item.ino, item.type};
  }

 private:
  struct Item {
    std::uint64_t ino, at;
    std::uint8_t size, type;
  };
  std::string text_;
  std::vector<Item> items_;
};

}  // namespace

void TreeWalk::image() {
  asking_ = holds_image_;
  if (sent_.insert(kRootInode)) {
    const auto root = open_inode(inodes_, kRootInode);
    if (!root) throw std::runtime_error("the root of the store cannot be opened");
    root_ = root->backing;
    announce_directory(kRootInode, *root, nullptr);
  }
  subtree(kRootInode);
  settle(0);
  asking_ = false;
  holes_ = Holes::send;
  orphans();
}

std::optional<OpenedInode> TreeWalk::open(InodeId id) {
  if (missed_.contains(id)) return std::nullopt;
  auto opened = open_inode(inodes_, id);
  if (!opened && inodes_.out_of_reach(id)) {
    sent_.erase(id);
    missed_.insert(id);
  }
  return opened;
}

void TreeWalk::send(InodeId id, const EntryName* entry) {
  const auto opened = open(id);
  if (!opened) return;
  sent_.insert(id);
  if (is_directory(opened->backing)) {
    announce_directory(id, *opened, entry);
    subtree(id);
  } else {
    shipper_.count(opened->backing);
    shipper_.whole(id, *opened, entry, holes_);
  }
}

void TreeWalk::find(const std::set<std::uint64_t>& inos) {
  const auto began = std::chrono::steady_clock::now();
  std::vector<InodeId> stack{kRootInode};
  while (!stack.empty()) {
    sender_.check();
    const InodeId directory = stack.back();
    stack.pop_back();
    const auto opened = open_inode(inodes_, directory);
    if (!opened) continue;
    visit_directory(opened->fd.get(), [&](std::string_view listed, const dirent64& entry) {
      const bool known_type = entry.d_type != DT_DIR && entry.d_type != DT_UNKNOWN;
      if (known_type && !inos.contains(entry.d_ino)) return;
      const std::string name(listed);
      if (directory == kRootInode && name == kPrivateArea) return;
      const auto child = open_name(opened->fd.get(), name, DT_UNKNOWN);
      const auto id =
          child ? identify_opened(inodes_, directory, name, opened->fd.get(), *child) : std::nullopt;
      if (id && is_directory(child->backing)) stack.push_back(*id);
    });
  }
  search_ += std::chrono::steady_clock::now() - began;
}

void TreeWalk::subtree(InodeId top) {
  std::vector<InodeId> stack{top};
  while (!stack.empty()) {
    const InodeId directory = stack.back();
    stack.pop_back();
    visit(directory, stack);
  }
}

// It was announced, and goes at the target as a whole, with what is left in it there of an older image: that
// may have other names. Should it live after all, the log names it and it is sent then.
void TreeWalk::gone(InodeId directory) {
  sent_.erase(directory);
  if (holds_image_) sender_.add_directory().set_id(directory);
  sender_.checkpoint();
}

void TreeWalk::visit(InodeId directory, std::vector<InodeId>& below) {
  const auto opened = open_inode(inodes_, directory);
  pb::DirectoryState listing;
  listing.set_id(directory);
  if (!opened && asking_) return queue_listing(listing, true);  // behind the parts of another one
  if (!opened) return gone(directory);
  const Listing names(opened->fd.get());
  for (const bool directories : {false, true}) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      if ((names.type(i) == DT_DIR) != directories) continue;
      const ListedName name = names[i];
      if (directory == kRootInode && name.name == kPrivateArea) continue;
      child(directory, opened->fd.get(), name, listing, below);
      if (listing.entries_size() < kListedAtOnce) continue;
      const std::uint32_t part = listing.part();
      listing.set_more(true);
      list(directory, *opened, listing);
      listing.Clear();
      listing.set_id(directory);
      listing.set_part(part + 1);
    }
  }
  list(directory, *opened, listing);
}

// Behind what it names: where the target is asked first, in the queue.
void TreeWalk::list(InodeId directory, const OpenedInode& opened, pb::DirectoryState& listing) {
  if (!asking_) return finish_directory(directory, opened, listing);
  queue_listing(listing);
}

void TreeWalk::queue_listing(pb::DirectoryState& listing, bool gone) {
  queue_.push_back({.inode = 0, .parent = listing.id(), .name = {}, .attr = {}, .listing = {}, .gone = gone});
  queue_.back().listing.Swap(&listing);
  ++not_asked_;
  names_not_asked_ += static_cast<std::size_t>(queue_.back().listing.entries_size());
  if (not_asked_ + names_not_asked_ >= kMaxNotAsked) ask();
}

void TreeWalk::child(InodeId directory, int directory_fd, const ListedName& listed,
                     pb::DirectoryState& listing, std::vector<InodeId>& below) {
  // Where the target is asked first, most files are never read.
  const unsigned hint = asking_ ? static_cast<unsigned>(DT_UNKNOWN) : listed.type;
  auto opened = open_name(directory_fd, listed.name, hint);
  if (!opened) return;
  if (mounted_there(opened->backing, root_)) {
    throw std::runtime_error("'" + listed.name + "' in the store is a mount point: unmount it first");
  }
  const auto id = identify_opened(inodes_, directory, listed.name, directory_fd, *opened);
  if (!id) return;
  const EntryName entry{directory, listed.name};
  if (holds_image_) {
    auto& listed_entry = *listing.add_entries();
    listed_entry.set_name(listed.name);
    listed_entry.set_id(*id);
    listed_entry.set_type(type_of(opened->backing));
  }
  if (!sent_.insert(*id)) {
    // Where the inode itself may still be queued, its further names wait for the listing of their directory.
    if (!asking_ || is_directory(opened->backing)) shipper_.entry(entry, *id, opened->backing.stx_mode);
    return;
  }
  if (is_directory(opened->backing)) {
    announce_directory(*id, *opened, &entry);
    below.push_back(*id);
    return;
  }
  shipper_.count(opened->backing);
  if (asking_) {
    enqueue({.inode = *id, .parent = directory, .name = listed.name, .attr = {}, .listing = {}}, *opened);
    return;
  }
  if (is_regular(opened->backing) && opened->path_only) {  // the listing did not tell its type
    opened = open_inode(inodes_, *id);
    if (!opened) return;
  }
  shipper_.whole(*id, *opened, &entry, holes_);
}

void TreeWalk::announce_directory(InodeId id, const OpenedInode& opened, const EntryName* entry) {
  shipper_.count(opened.backing);
  shipper_.announce(id, opened);
  if (entry != nullptr) sender_.add_entry(entry->parent, entry->name, id, S_IFDIR);
  sender_.checkpoint();
}

void TreeWalk::finish_directory(InodeId id, const OpenedInode& opened, pb::DirectoryState& listing) {
  const bool more = listing.more();
  if (holds_image_) sender_.add_directory().Swap(&listing);
  if (more) return sender_.checkpoint();
  shipper_.state(id, opened, ctime_floor());  // its listing is sent anew each time
  sender_.checkpoint();
}

// Inodes without a name that are still referenced; see InodeTable::set_orphan.
void TreeWalk::orphans() {
  const UniqueFd area = inodes_.open_private_area();
  if (!area) return;
  const UniqueFd folder(openat(area.get(), "orphans", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!folder && errno == ENOENT) return;
  if (!folder) throw_errno("cannot list the orphans");
  for (const auto& listed : list_directory(folder.get())) {
    const auto backing = stat_name(folder.get(), listed.name);
    const auto id = backing ? inodes_.find(*backing) : std::nullopt;
    if (!id || !inodes_.is_orphan(*id) || sent_.contains(*id)) continue;
    send(*id, nullptr);
  }
}

// ---- asking first

void TreeWalk::enqueue(Item item, const OpenedInode& opened) {
  item.attr = shipper_.attributes(item.inode, opened);
  item.bytes = data_bytes(opened.backing);
  queue_.push_back(std::move(item));
  ++not_asked_;
  ++inodes_not_asked_;
  if (inodes_not_asked_ >= kManifestInodes) ask();
}

void TreeWalk::ask() {
  pb::Envelope head;
  pb::Manifest& manifest = *head.mutable_manifest();
  manifest.set_attempt(attempt_);
  manifest.set_number(++manifests_);
  for (std::size_t i = queue_.size() - not_asked_; i < queue_.size(); ++i) {
    if (queue_[i].inode != 0) manifest.add_inodes()->Swap(&queue_[i].attr);
  }
  // The target answers in order: what it is asked about here may have been moved by what was sent before.
  sender_.flush();
  link_.send(std::move(head), {});
  groups_.push_back(not_asked_);
  not_asked_ = 0;
  names_not_asked_ = 0;
  inodes_not_asked_ = 0;
  if (groups_.size() > kManifestsAhead) settle(kManifestsAhead);
}

// Deals with the oldest groups until `leave_asked` are left; with 0, with everything.
void TreeWalk::settle(std::size_t leave_asked) {
  if (leave_asked == 0 && not_asked_ > 0) ask();
  while (groups_.size() > leave_asked) {
    const pb::Need need = link_.wait_need(++settled_);
    int answers = 0;
    for (std::size_t left = groups_.front(); left > 0; --left) {
      Item item = std::move(queue_.front());
      queue_.pop_front();
      if (item.inode != 0 && answers >= need.inodes_size()) {
        throw std::runtime_error("the target answered about fewer inodes than it was asked about");
      }
      settle_item(item, item.inode != 0 ? &need.inodes(answers++) : nullptr);
    }
    groups_.pop_front();
  }
}

void TreeWalk::settle_item(Item& item, const pb::Need::Inode* need) {
  // What the target has gets its name there from the listing of its directory.
  if (need != nullptr && need->what() == pb::Need::HAVE) return shipper_.passed(item.bytes);
  const InodeId id = need != nullptr ? item.inode : item.parent;
  if (item.gone) return gone(id);
  const auto opened = open_inode(inodes_, id);
  if (!opened && need == nullptr) {
    gone(id);
  } else if (!opened) {
    sent_.erase(id);
  } else if (need == nullptr) {
    finish_directory(id, *opened, item.listing);
  } else if (need->what() == pb::Need::BLOCKS && is_regular(opened->backing)) {
    shipper_.changed_blocks(id, *opened, *need);
  } else {
    const EntryName entry{item.parent, item.name};
    shipper_.whole(id, *opened, &entry, Holes::send);
  }
}

}  // namespace sharefs
