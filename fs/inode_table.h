// InodeId <-> backing inode: the identity of every inode, for processes and machines to come.
//
// Invariants
//  - An id names one inode for ever: a file handle carries the generation of its inode, and where there is
//    none the backing ino and birth time are compared; so a reused backing inode is never taken for the old
//    one.
//  - Ids are (epoch - 1) << 40 | counter, the counter reserved durably in blocks: owners of different epochs
//    never collide, and one owner never issues an id twice, crash or not.
//  - Every identity that was told to a kernel survives kill -9: it is in the mapped journal before identify()
//    returns, and in SQLite soon after (a flusher thread, in batches). sync() makes it survive a power cut.
//  - Memory is bounded by the number of cached entries, not by the size of the tree; each costs well under
//    200 bytes.
//  - Devices, FIFOs and sockets of the store are only ever opened with O_PATH: opening one could block or
//    have effects.
//
// Threads: thread-safe; one mutex inside, held for hash look-ups and at most one SQLite point query. Lock
// order: a leaf.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>

#include "meta/database.h"
#include "meta/types.h"

namespace sharefs {

// Closes on destruction.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_ = -1;
};

// The directory above an open one; EXDEV where something is mounted over it: over the root of a store that is
// sharefs itself, which must not wait for its own answers. `flags` as for open(2). In errno why it is none.
UniqueFd open_above(int directory_fd, int flags);

// What the table needs of a statx(2) of a backing inode: STATX_BASIC_STATS | STATX_BTIME.
using Backing = struct statx;

// Whether something is mounted where this was found by its name: another file system, or a part of the same
// one (a bind mount). It is not of the data set, whose root `root` is. What is reached by an id never is.
bool mounted_there(const Backing& found, const Backing& root);

// Nanoseconds since 1970. File systems know times that 64 bits of these do not (from 2262 on, before 1678):
// they stay within the last second that there is, and never become others.
std::int64_t timestamp_ns(const statx_timestamp& time);

class InodeTable {
 public:
  static constexpr std::ptrdiff_t kKeptInodes = 64;
  struct Options {
    bool use_handles = true;  // false: work by parent and name even where file handles could be used
    std::uint32_t cache_entries = 1u << 17;
    std::uint32_t journal_slots = 1u << 14;  // of 128 bytes
  };
  // What stat presents of an inode beside its backing statx.
  struct Presented {
    std::int64_t ctime = 0;
    bool orphan = false;
  };

  // `root`: the directory that is the root of the tree now (the store itself on the owner, the old image's
  // directory inside the private area elsewhere). `journal`: the file of the mapped journal.
  InodeTable(const std::filesystem::path& database, const std::filesystem::path& journal, UniqueFd root);
  InodeTable(const std::filesystem::path& database, const std::filesystem::path& journal, UniqueFd root,
             const Options& options);
  ~InodeTable();
  InodeTable(const InodeTable&) = delete;
  InodeTable& operator=(const InodeTable&) = delete;

  // The ids issued from now on are of this epoch. Reserves the first block durably.
  void set_epoch(Epoch epoch);

  // There is room for what one change of names tells this table. Throws if there will be none, before
  // anything is changed.
  void make_room();

  // The id of the inode that is `name` in directory `parent` (open as `directory_fd`) and whose statx is
  // `backing`; issues one if it has none. Parent and name are remembered where file handles cannot be used.
  // An inode of another file system, which is mounted there, has none (EXDEV).
  // `name` may be empty: then `directory_fd` is the inode itself, and is only looked up, never issued, where
  // file handles cannot be used.
  InodeId identify(InodeId parent, std::string_view name, int directory_fd, const Backing& backing);

  // The same for an inode that was made just now: no old identity is looked for in SQLite. `fd`, if not
  // negative, is the inode itself.
  InodeId issue(InodeId parent, std::string_view name, int directory_fd, int fd, const Backing& backing);

  // The id that this backing inode has, if it has one (nothing is issued).
  std::optional<InodeId> find(const Backing& backing);
  // The same from memory alone and unverified: good enough for the inode numbers in a directory listing.
  std::optional<InodeId> peek(std::uint64_t ino);

  // Binds a known id (issued by another owner) to a backing inode of this store. Replaces an earlier binding.
  void bind(InodeId id, InodeId parent, std::string_view name, int directory_fd, const Backing& backing);

  // Held around a change of names and the moved() that tells of it: where inodes are reached by their names,
  // other threads see both or neither. Nothing is opened or identified meanwhile. Does nothing with file
  // handles.
  [[nodiscard]] std::unique_lock<std::shared_mutex> change_names();

  // The name by which the inode is reached changed (rename): only kept where file handles cannot be used.
  // Parent 0: `name` is a path within the private area (an orphan, a parked inode).
  void moved(InodeId id, InodeId parent, std::string_view name);
  // The inode got one more name. The first one stays the one by which it is reached, if it is.
  void linked(InodeId id, InodeId parent, std::string_view name);
  // The inode is about to lose this name and has others. If it is reached by this one, a descriptor keeps it
  // in reach of this process until another is seen, or until kKeptInodes more: `open` ones, or such as are
  // only to be read for a handoff that is under way, whose log names them.
  void losing(InodeId id, InodeId parent, std::string_view name, int directory_fd, bool open);
  void closed(InodeId id);  // it is not open any more, and may still have to be read
  // Of an inode that open() has not found (ESTALE): its backing number if it lives, but has lost the name by
  // which it is reached and is not kept: whoever identifies another of its names brings it back. Nothing with
  // file handles.
  std::optional<std::uint64_t> out_of_reach(InodeId id);

  // Whether this is the name by which the inode is reached; true of every name with file handles.
  bool is_reached_by(InodeId id, InodeId parent, std::string_view name);

  // The backing inode is gone: the id is never used again.
  void erase(InodeId id);

  // Opens the inode: flags as for open(2), O_PATH | O_NOFOLLOW included. Verified. On failure errno is set:
  // ESTALE when the inode no longer exists; without O_PATH ELOOP for a symbolic link and ENXIO for a device,
  // FIFO or socket. `type` receives the S_IFMT of the inode.
  UniqueFd open(InodeId id, int flags, std::uint32_t* type = nullptr);

  // ctime that stat presents. An imported inode shows the ctime it had on the owner before until it is first
  // changed here; ctime never goes back.
  std::int64_t presented_ctime(InodeId id, const Backing& backing);
  Presented presented(InodeId id, const Backing& backing);
  void import_ctime(InodeId id, std::int64_t ctime,
                    const Backing& backing);  // from now on `backing` shows `ctime`
  void changing(
      InodeId id);  // a mutation is about to change the inode: ends the presentation of an imported ctime

  // Orphans: inodes without a name that are still referenced, kept in the private area as `orphans/<id in
  // hex>`.
  void set_orphan(InodeId id, bool orphan);
  bool is_orphan(InodeId id);

  // Replaces the root directory (the tree moved into or out of the private area).
  void set_root(UniqueFd root);
  int root() const;  // borrowed; constant between set_root calls
  // The private area that belongs to the root: its `.sharefs`, or the directory above while the tree lies in
  // there. Invalid if there is none yet.
  UniqueFd open_private_area() const;
  bool uses_handles() const;

  void flush();           // everything known is in SQLite (survives kill -9 without the journal)
  void sync(InodeId id);  // the identity of this inode (of a directory: all) survives a power cut

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
