// Moves the top-level entries of the tree between S/.sharefs/tree (a site that is not the owner) and S (the
// owner), in the background, while the tree is served.
//
// How: the directory that the entries move to becomes the root (InodeTable::set_root) at once, with the
// attributes of the old one; from then on the store performs every request there. A name that is still behind
// is pulled over before a request that mentions it reaches the store (before()), so no request can see a
// half-moved root.
//
// Invariants
//  - A name is in exactly one of the two directories: a name is created in the new root only after before()
//  found it in
//    neither or pulled it.
//  - A moved entry and the root itself present the same ctime and mtime as before the move. But for an entry
//    whose file may have lost bytes with the power (`doubtful`): the move ends what its own ctime tells of
//    that, and with the ctime that it had before it would be taken for whole.
//  - Crash-safe: the private area's symbolic link `relocation` says `up` or `down` from when the root's
//  attributes have
//    been copied until the last entry has been moved. A Relocation made again in the same direction goes on;
//    one in the other direction turns round. (The root's own times may show the moment of a crash.)
//  - An ordinary user can move names into and out of a root that may not be written: it gets its mode, which
//  the link
//    says, when everything has been moved.
//
// Threads: reactor thread only; nothing else may walk the root while it is under way (call all() before a
// handoff or a verification).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "fs/inode_table.h"
#include "meta/vocabulary.pb.h"
#include "replication/power.h"

namespace sharefs {

class Relocation {
 public:
  enum class Direction { up, down };  // up: from the private area into S; down: back

  // Makes the destination the root; drop the store's cached descriptors after it. Throws std::runtime_error.
  // `moved` is called when everything has been moved, while the link still says that it is under way; if it
  // throws it is called again.
  Relocation(InodeTable& inodes, const std::filesystem::path& store, Direction direction,
             std::function<void()> moved = {}, std::function<Power::Interval()> doubtful = {});
  ~Relocation();
  Relocation(const Relocation&) = delete;
  Relocation& operator=(const Relocation&) = delete;

  // True if a relocation of this store was begun and has not ended (the process died): make one to go on.
  static bool under_way(const std::filesystem::path& store);

  // Moves up to `entries`; false: everything has been moved. Throws when some cannot be, the others are moved
  // all the same.
  bool step(unsigned entries);
  bool pull(const std::string& name);  // moves this one now; false: it was not behind
  void all();
  bool done() const;
  // Of the directories that are behind: what the root's number of links lacks. 0 if the file system does not
  // count them.
  std::uint32_t links_behind() const;

  // Moves whatever this request can see in the root. Called with each request before it reaches the store.
  void before(const pb::Request& request);
  // What that is: calls `named` with names, or `all`.
  static void visit_root(const pb::Request& request, const std::function<void(const std::string&)>& named,
                         const std::function<void()>& all);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
