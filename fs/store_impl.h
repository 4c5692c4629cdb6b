// The inside of the Store, shared by its source files:
//   store.cc              dispatch, identities and attributes, changes, workers
//   store_order.cc        what waits for changes that are under way
//   store_attributes.cc   attributes, extended attributes, the file system
//   store_files.cc        data of files
//   store_directories.cc  looking up and making names
//   store_names.cc        removing and moving names, orphans
//   store_readdir.cc      listing directories
//
// A handler gets its part of the request and returns an errno, or kLater when a worker goes on with it. Order
// in a mutation: note the cells -> effect -> mark the inodes as changed -> attributes for the outcome.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fs/descriptor_cache.h"
#include "fs/live_state.h"
#include "fs/ongoing_changes.h"
#include "fs/store.h"

namespace sharefs {

constexpr int kLater = -1;
constexpr std::chrono::milliseconds kSpacePoll{5};
constexpr unsigned kTriesForSpace = 100;
constexpr unsigned kBackingMask = STATX_BASIC_STATS | STATX_BTIME;

// One request on its way through a handler.
struct StoreCall {
  const pb::Request& request;
  Bytes data;
  Reply& reply;
  pb::Outcome& outcome;
  std::string& buffer;  // for results; reused by later requests
  bool last_try;        // what a full disk leaves of it is all there will be; see wait_for_space
  Bytes result = {};    // within `buffer` or a string of the outcome
};

// A listing of one directory as of one moment, in the order of its offsets.
struct DirectorySnapshot {
  struct Item {
    std::uint64_t offset;
    std::uint64_t ino;
    std::uint32_t name;  // in `names`
    std::uint8_t size;
    std::uint8_t type;  // DT_*
  };
  std::vector<Item> items;
  std::string names;
  std::string_view name(const Item& item) const {
    return std::string_view(names).substr(item.name, item.size);
  }
  std::size_t bytes() const { return items.capacity() * sizeof(Item) + names.capacity(); }
};

struct Store::Impl {
  Impl(Options options, InodeTable& inodes, OpenTable& opens, Workers& workers);
  ~Impl();

  // ---- dispatch (store.cc)
  int dispatch(StoreCall& call);
  int perform(StoreCall& call);  // dispatch, with what is thrown turned into an errno

  // What users have deleted must not be in their way: a request that finds the disk full waits, up to a
  // bound, for what nobody has open any more. Kernels say late that they let go of an inode, and workers
  // delete it.
  struct Attempt {
    pb::Request request;
    std::string data;
    Reply reply;
    unsigned tries = 0;    // so far
    bool ordered = false;  // whether the reply is in_order()'s
    TakeUp take_up = {};   // of what is put aside
    std::chrono::steady_clock::time_point arrived = std::chrono::steady_clock::now();
  };
  std::function<TakeUp(const pb::Request&)> put_aside = [](const pb::Request&) -> TakeUp {
    return [](const pb::Request&, const std::function<void()>& attempt) { attempt(); };
  };
  unsigned least_tries = 0;  // that every request counts as having had
  void attempt(const pb::Request& request, Bytes data, Reply reply, unsigned tries, bool ordered);
  void wait_for_space(const std::shared_ptr<Attempt>& attempt);
  bool space_is_coming();

  // ---- the order of data (store_order.cc)
  // What of an inode's data is changed by a worker, or once there is space, is changed even if the caller is
  // gone by then. What arrives meanwhile is performed afterwards, or it would be overwritten.
  struct OrderedChanges {
    bool under_way = false;
    bool going_on = false;  // with those that wait
    std::deque<Attempt> waiting;
  };
  void execute(const pb::Request& request, Bytes data, Reply reply);
  int cancel(const pb::Request& request);
  // From now on until the reply that this returns, changes to the data of the inode wait.
  Reply in_order(InodeId id, Reply reply);
  void go_on(InodeId id);

  // What a worker does, and what follows on the reactor thread before the reply. The descriptor stays open.
  struct Job {
    Reply reply;
    pb::Outcome outcome;
    std::string result;
    int error = 0;
  };
  using Work = std::function<int(Job&)>;
  using Finish = std::function<void(Job&)>;
  int later(StoreCall& call, std::vector<DescriptorCache::Ref> pinned, Work work, Finish finish = {});
  // With descriptors of these inodes: `ref`, or where many are pinned already (each waits for its turn) ones
  // that are opened when its turn has come.
  struct Needed {
    DescriptorCache::Ref ref;
    InodeId id = 0;
    int access = O_RDONLY;
  };
  using WorkOn = std::function<int(const std::vector<int>& fds, Job&)>;
  int later_on(StoreCall& call, const std::vector<Needed>& files, WorkOn work, Finish finish = {});
  static int lost(Job& job);

  // ---- names, identities, attributes (store.cc)
  int check_name(InodeId parent, std::string_view name, bool making) const;
  // An open directory that names may be made in or removed from; an errno in `error` if there is none.
  DescriptorCache::Ref directory(InodeId id, int& error);
  bool foreign(const Backing& backing) const { return mounted_there(backing, root_seen_); }
  void fill(pb::Attr& attr, InodeId id, const Backing& backing);
  void fill_named(pb::Attr& attr, InodeId id, const Backing& backing);  // of what its name has led to
  int fill(StoreCall& call, InodeId id, int fd);  // statx, then the outcome's attributes
  void learn_root();
  int private_area(int& error);  // the directory orphans/ of it
  void recover_orphans();

  // ---- changes: cells are noted before the effect, changed() is called after it (store.cc)
  void note_entry(InodeId parent, const std::string& name);
  void note_attributes(InodeId id);
  void note_extent(InodeId id, std::uint64_t offset, std::uint64_t length);
  void changed(InodeId id) { inodes.changing(id); }

  // ---- store_attributes.cc
  int getattr(const pb::GetAttr& op, StoreCall& call);
  int setattr(const pb::SetAttr& op, StoreCall& call);
  int change_owner(const pb::SetAttr& op, const DescriptorCache::Ref& ref);
  int change_mode(const DescriptorCache::Ref& ref, std::uint32_t mode);
  int change_size(const pb::SetAttr& op);
  int change_times(const pb::SetAttr& op, const DescriptorCache::Ref& ref);
  int strip_privileges(const pb::Request& request, const DescriptorCache::Ref& ref, const Backing& backing);
  int statfs(StoreCall& call);
  int getxattr(const pb::GetXattr& op, StoreCall& call);
  int listxattr(const pb::ListXattr& op, StoreCall& call);
  int setxattr(const pb::SetXattr& op, StoreCall& call);
  int removexattr(const pb::RemoveXattr& op);

  // ---- store_files.cc
  int open(const pb::Open& op);
  int opendir(const pb::OpenDir& op);
  int release(const pb::Release& op);
  int read(const pb::Read& op, StoreCall& call);
  int read_cold(const pb::Read& op, StoreCall& call, const DescriptorCache::Ref& ref, std::size_t have);
  int write(const pb::Write& op, StoreCall& call);
  int seek(const pb::Seek& op, StoreCall& call);
  int fallocate(const pb::Fallocate& op, StoreCall& call);
  int copy_file_range(const pb::CopyFileRange& op, StoreCall& call);
  int sync(const pb::Sync& op, StoreCall& call);

  // ---- store_directories.cc
  int parent_of(int directory_fd, InodeId& id, Backing& backing);
  int lookup(const pb::Lookup& op, StoreCall& call);
  int readlink(const pb::ReadLink& op, StoreCall& call);
  int create(const pb::Create& op, StoreCall& call);
  int create_open(const pb::Create& op, StoreCall& call, int directory_fd);
  int open_existing(const pb::Create& op, StoreCall& call, int directory_fd);
  int mkdir(const pb::MkDir& op, StoreCall& call);
  int symlink(const pb::SymLink& op, StoreCall& call);
  int link(const pb::Link& op, StoreCall& call);
  int made(StoreCall& call, InodeId parent, const std::string& name, int directory_fd, int fd);

  // ---- store_names.cc
  // An inode that loses a name.
  struct Victim {
    Backing backing{};
    InodeId id = 0;  // 0: nobody was ever told of it
    bool exists = false;
    bool directory = false;
    bool last_name = false;
  };
  int find_victim(int directory_fd, const std::string& name, Victim& victim);
  int unlink(const pb::Unlink& op, StoreCall& call);
  int rmdir(const pb::RmDir& op, StoreCall& call);
  int rename(const pb::Rename& op, StoreCall& call);
  int rename_over(const pb::Rename& op, int from, int to, const Victim& victim);
  void keep_in_reach(InodeId parent, const std::string& name, int directory_fd, const Victim& victim);
  void orphan(StoreCall& call, const Victim& victim);
  int remove_name(StoreCall& call, InodeId parent, const std::string& name, int directory_fd,
                  const Victim& victim);
  int forget(const pb::Forget& op);
  void delete_doomed();
  void delete_doomed_now();

  // ---- store_readdir.cc
  using SnapshotKey = std::pair<std::uint64_t, std::uint64_t>;  // (client, handle)
  struct KeptSnapshot {
    SnapshotKey key;
    InodeId id;
    DirectorySnapshot snapshot;
  };
  int readdir(const pb::ReadDir& op, StoreCall& call);
  int releasedir(const pb::ReleaseDir& op, StoreCall& call);
  int take_snapshot(int fd, bool root, DirectorySnapshot& snapshot) const;  // any thread
  const DirectorySnapshot& keep_snapshot(SnapshotKey key, InodeId id, DirectorySnapshot snapshot);
  int list(const pb::ReadDir& op, pb::Outcome& outcome, const DirectorySnapshot& snapshot);
  bool add_entry(const pb::ReadDir& op, pb::Outcome& outcome, int fd, const DirectorySnapshot& snapshot,
                 const DirectorySnapshot::Item& item);
  std::uint64_t offset_of(std::string_view name) const;

  // constant after construction
  const Options options;
  InodeTable& inodes;
  OpenTable& opens;
  Workers& workers;
  std::uint64_t offset_seed = 0;
  // reactor thread
  ChangeObserver* observer = nullptr;
  DescriptorCache descriptors;
  UniqueFd orphans_directory;
  std::vector<std::string> doomed;  // names there that are erased from the table and still to be deleted
  unsigned deleting = 0;            // batches of them that workers are deleting
  std::unordered_map<InodeId, OrderedChanges> data_changes;  // where there is one under way
  std::list<KeptSnapshot> snapshots;                         // most recently used first
  struct Scratch {
    pb::Outcome outcome;
    std::string buffer;
  };
  std::vector<std::unique_ptr<Scratch>> scratch;  // one for each level of requests within replies
  std::size_t depth = 0;
  std::shared_ptr<bool> alive = std::make_shared<bool>(true);
  // Work of this store on workers; the destructor waits for it, since descriptors end with the store.
  const std::shared_ptr<OngoingChanges> ongoing = std::make_shared<OngoingChanges>();
  std::shared_ptr<std::atomic<unsigned>> working = std::make_shared<std::atomic<unsigned>>(0);
  // atomics: attributes() is called on any thread
  std::atomic<bool> root_has_private_area{false};
  Backing root_seen_{};  // constant
};

// The inode whose data the request changes in the order of arrival; 0: none. A writeback is not held up: the
// kernel keeps its pages from other changes.
InodeId ordered_inode(const pb::Request& request);

// Adds the errno of a call that returned -1.
inline int error_of(int result) { return result < 0 ? errno : 0; }

// The path by which calls that know no AT_EMPTY_PATH reach an O_PATH descriptor.
struct ProcPath {
  explicit ProcPath(int fd);
  char path[32];
};

}  // namespace sharefs
