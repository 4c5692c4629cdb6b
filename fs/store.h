// Performs requests on the plain directory that holds the data set: the Executor of the owner.
//
// Every operation works on inodes opened through the InodeTable, never on paths: no path length limit, no
// race with renames, nothing outside the store can be named. Names are checked: not empty, no '/', not "." or
// "..", and in the root not the private area.
//
// Invariants
//  - Before an effect, its cells are reported to the ChangeObserver (see meta/change_log.h).
//  - The last unlink of an inode moves it to the private area as an orphan while any client may refer to it;
//    Forget from every attached client (or its Detach) removes it.
//  - The number of open descriptors is bounded (a cache), whatever the number of inodes and handles.
//
// Threads: reactor thread only. What may block (Sync, CopyFileRange, Fallocate, cold READs) runs on Workers.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fs/inode_table.h"
#include "meta/change_log.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

class LockTable;
class OpenTable;

class Store final : public Executor {
 public:
  struct Options {
    std::filesystem::path directory;  // the store; its private area is `directory/.sharefs`
    std::string data_set;             // keys the directory offsets
    unsigned descriptor_limit = 512;  // of the cache
  };
  Store(Options options, InodeTable& inodes, OpenTable& opens, LockTable& locks, Workers& workers);
  ~Store() override;

  // Where changes are reported; nullptr: nowhere. Not owned.
  void observe(ChangeObserver* observer);

  // Called when a request that has had no effect yet has to wait, for its turn or for space. What it returns
  // is called with the next attempt, when the request is taken up again.
  using TakeUp = std::function<void(const pb::Request&, const std::function<void()>& attempt)>;
  void on_put_aside(std::function<TakeUp(const pb::Request&)> put_aside);

  // Applications are held up until everything under way is answered: nobody waits long for space.
  void hurry(bool hurry);

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // When the oldest of the changes that are under way began, ns since 1970; the greatest number if none is.
  // Whatever is stamped before has happened as a whole. Any thread.
  std::int64_t oldest_change() const;

  // Closes what the cache holds (before the store is unmounted, or its tree moved).
  void drop_descriptors();

  // The inodes without a name that the private area keeps: what a new process starts from.
  std::vector<InodeId> orphans();

  // Between requests the reactor thread keeps the file-system identity (fsuid, fsgid, umask) of the last
  // caller who made a file. To be called before anything else makes files on that thread.
  void rest();

  // Presented attributes of an inode opened as `fd`. Throws std::system_error. Any thread.
  pb::Attr attributes(InodeId id, int fd);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sharefs
