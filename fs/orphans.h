// Inodes without a name: which mounts may still refer to them, and when they may go.
//
// An orphan goes when no attached client refers to it any more. When the last name is taken away every client
// may: the one that did it says so by itself (Forget), the others are asked. A handle counts as a reference
// even if its client has said that it has none: its Release may still be on the way. A site that is away
// refers to what it has open only, or nothing that is deleted would make room.
//
// Part of Coherence. Threads: reactor thread only.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "fs/coherence.h"

namespace sharefs {

class Orphans {
 public:
  // Each with the clients that may refer to it.
  using Holders = std::map<InodeId, std::set<ClientId>>;

  // What nobody refers to is forgotten in `store`.
  Orphans(Executor& store, const OpenTable& opens, Reactor& reactor, const Recall& recall);

  const Holders& holders() const { return holders_; }

  // These have just lost their last name. Followed by ask(), when the caller has been answered.
  void made(const std::vector<InodeId>& ids);
  // Asks the holders, but for `asker`, whether they still are.
  void ask(const std::vector<InodeId>& ids, ClientId asker);
  // The client says that it does not refer to it (any more).
  void let_go(InodeId id, ClientId client);
  // A handle of it has been closed.
  void closed(InodeId id);
  // The client is no longer attached.
  void detached(ClientId client);

  void away(const SiteName& site);
  void back(const SiteName& site);

  // Found by a new process of the owner: a mount that it has not heard may refer to them, until all_heard().
  void found(const std::vector<InodeId>& ids);
  void all_heard();
  // From the owner before. Its holders are asked again: their answers may have gone there.
  void restore(Holders holders);
  // Another site is the owner. Late answers change nothing.
  void clear();

 private:
  void ask(InodeId id, ClientId except);
  void ask_later(InodeId id);
  bool unused(InodeId id);
  void free_unused(std::vector<InodeId> ids);

  Executor& store_;
  const OpenTable& opens_;
  Reactor& reactor_;
  const Recall& recall_;
  Holders holders_;
  std::set<SiteName> away_;
  std::shared_ptr<const bool> alive_ = std::make_shared<const bool>(true);  // replaced by clear()
};

}  // namespace sharefs
