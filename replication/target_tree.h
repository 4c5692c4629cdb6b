// The names of a tree that is being received: creates inodes, attaches, detaches, parks and removes them.
//
// Invariants
//  - Everything happens relative to descriptors of directories of the tree or of the private area, by names
//  that were
//    checked (check_name), and never through a symbolic link.
//  - An inode that loses its last name is renamed to `parked/<id in hex>`; so is every directory that loses
//  its
//    place. Nothing is deleted before discard_rest(), but ids that the source says are free, and, where the
//    disk is full, what the source has not spoken of.
//  - A name that cannot be given yet (its inode or directory has not arrived, or it would close a cycle) is
//  set aside,
//    until settle() can, or a later word on the same name replaces it.
//  - Changing an inode's names leaves the ctime that it presents as it was.
//
// Threads: the applying thread; keep_orphans() and is_parked() on any other while that one is idle.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fs/inode_table.h"
#include "replication/inode_io.h"
#include "replication/sent_set.h"
#include "replication/wire.pb.h"

namespace sharefs {

// A batch that no honest source sends; what() says in which way.
struct Malformed : std::runtime_error {
  explicit Malformed(const std::string& what) : std::runtime_error("malformed batch: " + what) {}
};

// Throws Malformed unless `name` may be a name in directory `parent`.
void check_name(InodeId parent, const std::string& name);

// A number in hexadecimal, as the private area names inodes.
std::string hex_name(InodeId id);

class TargetTree {
 public:
  // `private_area` holds (or gets) parked/ and orphans/. The tree is at InodeTable::root(). `doubtful` and
  // `received`: see ImageTarget::Options.
  TargetTree(InodeTable& inodes, const std::filesystem::path& private_area,
             const Power::Interval& doubtful = {},
             std::shared_ptr<SentSet> received = std::make_shared<SentSet>());

  bool known(InodeId id);
  // Opens a known inode: a regular file for writing, a directory for reading, anything else as a path. Throws
  // Malformed if its type is not `type`.
  OpenedInode open(InodeId id, std::uint32_t type);
  // Creates an inode, at `place` if that is given and its directory is known, otherwise parked.
  OpenedInode create(const pb::InodeState& state, const pb::EntryState* place);
  bool is_parked(InodeId id) const { return lies_in(parked_, id); }
  // All of it has been received.
  void received(InodeId id) { received_->insert(id); }
  // What its attributes say is not believed while this contains its ctime.
  Power::Interval doubt_of(InodeId id) const { return was_received(id) ? Power::Interval() : doubtful_; }
  bool was_received(InodeId id) const { return received_->contains(id); }

  void detach(InodeId parent, const std::string& name);
  void attach(InodeId parent, const std::string& name, InodeId id);
  // Behind the last part of a listing names that are in none of its parts go.
  void list(const pb::DirectoryState& directory);
  void freed(InodeId id);

  void settle();  // attaches what was set aside and fits by now
  std::size_t set_aside() const { return set_aside_.size(); }

  // What was parked with its directory gets a parked name of its own, or, if it was named again elsewhere
  // since, loses this one: how many names an inode has decides later whether it is kept without one. But a
  // directory that the source has spoken of is whole, whether it is on its way to another name or gone: its
  // listing takes out what is not in it, and is not sent again.
  void show_hidden();
  // The disk is full: removes what the source has not spoken of. False: there is nothing.
  bool make_room();
  // To be called when names have been changed, before states are set: directories get their modes again.
  void lock_again();

  // The attempt won. keep_orphans() moves these to orphans/, durably; discard_rest() removes all that is
  // parked or another orphan, until interrupt() (any thread).
  void keep_orphans(const std::set<InodeId>& orphans);
  void discard_rest();
  void interrupt() { interrupted_ = true; }
  bool interrupted() const { return interrupted_; }  // any thread

 private:
  using Directory = std::shared_ptr<const UniqueFd>;
  using NameHash = std::pair<std::uint64_t, std::uint64_t>;  // 128 bits: what tells names apart
  static constexpr std::size_t kCachedDirectories = 128;
  static constexpr std::size_t kMaxSetAside = 1'000'000;

  // Whether the inode is in parked/ or orphans/, not only something that was left there under its id.
  bool lies_in(const std::unordered_set<InodeId>& ids, InodeId id) const;
  int folder_of(const std::unordered_set<InodeId>& ids) const {
    return (&ids == &parked_ ? parked_fd_ : orphans_fd_).get();
  }
  Directory directory(InodeId id);  // null: not known
  void detach_unlisted(InodeId id, const Directory& folder);
  void unlock(InodeId id);
  void change_mode(InodeId id, int path, mode_t mode);
  bool discard_unseen(bool directories);
  UniqueFd try_create(const pb::InodeState& state, int directory, const std::string& name) const;
  bool place(InodeId parent, const std::string& name, InodeId id);
  bool move_to(int directory, const std::string& name, InodeId id, int fd, const Backing& backing);
  bool move_directory(int directory, const std::string& name, int fd);
  static bool link_to(int directory, const std::string& name, int fd);
  void remove_name(InodeId parent, int directory, const std::string& name, const Backing& backing);
  void park(int directory, const std::string& name, const Backing& backing, std::optional<InodeId> id);
  std::string park_unnamed(int directory, const std::string& name);
  void unlink_kept(InodeId parent, int directory, const std::string& name, const Backing& backing);
  bool only_known_name(InodeId parent, const std::string& name, const Backing& backing);
  void has_name(InodeId id, InodeId parent, const std::string& name, const Backing& backing);
  void lost_name(InodeId id, InodeId parent, const std::string& name);
  void remove_file(int directory, const std::string& name, const Backing& backing);
  void discard(int directory, const std::string& name);

  // constant after construction
  InodeTable& inodes_;
  const Power::Interval doubtful_;
  const std::shared_ptr<SentSet> received_;  // what is in it: applying thread
  UniqueFd area_, parked_fd_, orphans_fd_;
  bool fresh_ = false;  // nothing was here: what is not in seen_ is not known
  // applying thread
  SentSet seen_;
  std::unordered_set<InodeId> parked_, orphans_;  // names that are there; see lies_in()
  std::unordered_map<InodeId, Directory> directories_;
  std::unordered_map<InodeId, mode_t> unlocked_;  // their own modes
  std::map<std::pair<InodeId, std::string>, InodeId> set_aside_;
  // The listing of which the last part has not come.
  InodeId listed_ = 0;
  std::uint32_t listed_parts_ = 0;
  std::vector<NameHash> listed_names_;
  // Without file handles: names of inodes beyond the one by which InodeTable reaches them. While an image
  // changes, an inode that moves has two names for a time, and may lose either.
  std::multimap<InodeId, std::pair<InodeId, std::string>> more_names_;
  std::atomic<bool> interrupted_{false};
  std::uint64_t unnamed_ = 0;  // counts what was parked without an id
};

}  // namespace sharefs
