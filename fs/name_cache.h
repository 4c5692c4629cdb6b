// What this site has been promised of names and attributes, so that looking again does not cross the network.
//
// Between the mount and the Router. It answers Lookup, GetAttr, GetXattr and
// ListXattr from what outcomes with a promise have told (fs/promises.h), and keeps what this mount's own
// changes make of it; a directory that this mount made is known completely, so that looking for new names
// costs nothing either. Reads of small files of another site it answers from their contents, as long as the
// attributes are promised. On the owner it saves little by itself, but what it keeps may be lent to the
// kernel. A listing is asked of another site with attributes in any case: whoever lists a directory mostly
// looks at what is in it, often after the kernel has stopped asking for them.
//
// Invariants
//  - Only what carries a promise of the present owner is kept, and it is believed only while that owner has
//  answered within kPromiseTrust.
//  - An outcome older than the last recall is not kept, nor one that was asked for before everything was
//  forgotten, or before a caller of this mount was killed.
//  - A change of this mount's own whose outcome carries no promise makes everything forgotten.
//  - Of what this mount writes ahead of the owner nothing is known: what the owner tells is from before.
//  - Attributes are lent to the kernel for no longer than the owner is believed, and no recall is answered
//  before they were taken back.
//
// Bounded: when it is full, everything is forgotten. Threads: reactor thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fs/content_cache.h"
#include "meta/executor.h"
#include "meta/reactor.h"

namespace sharefs {

class NameCache final : public Executor {
 public:
  // `trusted_for`: how long the owner may still be believed without another answer of its; zero: not at all.
  NameCache(Executor& next, std::function<Reactor::Clock::duration()> trusted_for);

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // Keeps what is promised at this epoch from now on; 0: nothing (this is the only mount). `far`: by another
  // site.
  void believe(Epoch epoch, bool far = true);
  Epoch epoch() const { return epoch_; }
  // The owner recalls what it promised of these inodes before `stamp`.
  void forget(const std::vector<InodeId>& ids, std::uint64_t stamp);
  void forget_all();
  // The mount has acknowledged writes to this inode ahead (Outcome.ahead), and all of them are performed now:
  // what was told before `stamp` is old.
  void performed(InodeId id, std::uint64_t stamp);

  // The inode is opened: are the pages that the kernel has of it those of the owner's file? They are if it
  // was opened here before, and the promise of its attributes has not been broken since: whoever changes data
  // changes attributes. (While it is open, Coherence looks after them.)
  bool keeps_pages(InodeId id);

  // The kernel is told these attributes, which execute() has just handed out: how long it may answer with
  // them by itself. `held`: it holds the inode, since it asked by number. Otherwise a recall might reach it
  // before these attributes do, and find no inode; so nothing is lent until it has asked by number once.
  Reactor::Clock::duration lend(const pb::Attr& attr, bool held);
  // It does not know the inode any more.
  void let_go(InodeId id) { lent_.erase(id); }
  // Of which of these (nullptr: of all) the kernel may still believe attributes; the caller tells it not to.
  std::vector<InodeId> take_lent(const std::vector<InodeId>* ids);

  // Called when everything is forgotten.
  void on_forget_all(std::function<void()> forgotten) { on_forget_all_ = std::move(forgotten); }

  // An inode of this type (S_IFMT) that is promised to be there, so that it can be opened without waiting for
  // the owner.
  bool is_there(InodeId id, std::uint32_t type) const;

  std::size_t size() const { return attributes_.size() + names_; }

 private:
  static constexpr std::size_t kMaxEntries = 60'000;
  // An entry with attributes takes at most so many times the bytes that it takes without.
  static constexpr std::uint32_t kPlusFactor = 5;
  static constexpr std::uint32_t kMaxListing = 256 << 10;
  struct NameHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view name) const { return std::hash<std::string_view>()(name); }
  };
  struct Directory {
    bool complete = false;  // a name that is not in it does not exist
    std::unordered_map<std::string, InodeId, NameHash, std::equal_to<>> names;  // 0: no such name
  };
  // What GetXattr said: the kernel asks for capabilities and ACLs over and over.
  struct Xattr {
    std::string name;
    bool present = false;
    std::string value;
  };
  static constexpr std::size_t kMostLent = 60'000;
  // The kernel counts from when it takes the reply. After more than this the owner waits for nobody.
  static constexpr auto kTaken = std::chrono::milliseconds(500);
  static constexpr std::size_t kMaxXattrs = 4;  // of one inode
  static constexpr std::size_t kMaxValue = 256;
  struct Known {
    pb::Attr attr;
    std::uint64_t stamp = 0;
    bool bare = false;    // has no extended attribute
    bool opened = false;  // since it is known
    std::vector<Xattr> xattrs;
  };

  bool trusted() const { return trusted_for_() > Reactor::Clock::duration::zero(); }
  bool answer(const pb::Request& request, const Reply& reply) const;
  bool answer_xattr(const pb::GetXattr& asked, const Reply& reply) const;
  bool answer_xattrs(InodeId id, const Reply& reply) const;
  bool answer_read(const pb::Read& read, const Reply& reply) const;
  void ask(const pb::Request& request, Bytes data, Reply reply);
  void ask_xattr(const pb::Request& request, Reply reply);
  void ask_listing(const pb::Request& request, Reply reply);
  void ask_read(const pb::Request& request, Reply reply);
  void change(const pb::Request& request, Bytes data, Reply reply);
  bool has_size(InodeId id, std::uint64_t size) const;
  ContentCache::FillPtr begin_whole(const pb::Request& write, Bytes data);
  bool believable(const pb::Outcome& outcome, std::uint64_t generation) const;
  void learn(const pb::Attr& attr, std::uint64_t stamp, bool same_xattrs);
  void name(InodeId parent, std::string_view name, InodeId id);
  bool is_absent(InodeId parent, std::string_view name) const;
  InodeId named(InodeId parent, std::string_view name) const;
  void drop_directory(InodeId id);
  void listed(InodeId directory, const pb::Outcome& outcome);
  void changed(const pb::Request& request, const pb::Outcome& outcome);

  // constant after construction
  Executor& next_;
  const std::function<Reactor::Clock::duration()> trusted_for_;
  std::function<void()> on_forget_all_;
  // reactor thread
  Epoch epoch_ = 0;
  bool far_ = true;
  std::uint64_t generation_ = 0;   // what was asked in an earlier one is not believed
  std::uint64_t last_recall_ = 0;  // its stamp; of this generation
  std::unordered_map<InodeId, Known> attributes_;
  std::unordered_set<InodeId> ahead_;
  std::unordered_map<InodeId, Directory> directories_;
  std::size_t names_ = 0;  // in all directories
  ContentCache contents_;  // of inodes in attributes_
  // Until when the kernel may answer by itself. Kept when everything is forgotten: the owner recalls what it
  // has promised all the same.
  std::unordered_map<InodeId, Reactor::Clock::time_point> lent_;
};

}  // namespace sharefs
