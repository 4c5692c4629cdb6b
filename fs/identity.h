// What the InodeTable knows of one inode, in the three places where it lives: the mapped journal (at once),
// SQLite (soon after) and the cache (while in use). Internal to the InodeTable.
#pragma once

#include <cstdint>
#include <string>

#include "meta/types.h"

namespace sharefs {

// A file handle of name_to_handle_at(2): opaque, and only good on the file system it came from.
struct FileHandle {
  static constexpr std::size_t kMax = 128;  // MAX_HANDLE_SZ
  std::uint32_t type = 0;
  std::string bytes;  // empty: there is none
};

// The recorded backing ctime of an override that has ended: equal to no real one.
constexpr std::int64_t kOverrideEnded = INT64_MIN;

// A whole row: writing one replaces everything that was known before, so replaying any suffix of the journal
// in order gives the newest state.
struct Identity {
  InodeId id = 0;
  std::uint64_t ino = 0;   // of the backing inode
  std::int64_t born = 0;   // its birth time in nanoseconds; 0 where the file system does not tell
  std::uint32_t type = 0;  // S_IFMT of its mode: never changes
  FileHandle handle;
  InodeId parent = 0;     // where there is no handle: the directory and the name it was last seen at;
  std::string name;       // parent 0: `name` is a path within the private area
  bool imported = false;  // an imported ctime is presented, or bounds what is
  std::int64_t imported_ctime = 0;
  std::int64_t backing_ctime = 0;  // seen at the import; kOverrideEnded after the first change
  bool orphan = false;
  bool erased = false;  // the row goes
};

}  // namespace sharefs
