// Where the tree lies, and its way to where it belongs: the store itself on the owner, the private area on
// any other site. In front of the store, so that no request sees a name in the wrong place.
//
//   settled --move()--> moving --(the last entry)--> settled
//              \------> due ----(it can be begun)--> moving
//
// Invariants
//  - In every state but `moving` the whole tree lies in one place, and the root is there. A setting says in
//  which: an empty tree does not tell, but its root has a mode, an owner, and times.
//  - What cannot be begun (a full disk) keeps nobody waiting: it is `due`, tried again every second and by
//  finish(). An owner serves the tree from the private area meanwhile, and hands it over from there; on any
//  other site nobody looks at it.
//  - What has been begun and cannot be gone on with (a disk that fails, no descriptor left) is `due`, too,
//  with the tree in two places: served is what can be seen of it. Whatever needs to know of a name that may
//  be behind tries again first, and fails if that does; nothing is handed over.
//
// Threads: reactor thread only.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>

#include "fs/store.h"
#include "meta/reactor.h"
#include "meta/state.h"
#include "replication/power.h"
#include "replication/relocate.h"

namespace sharefs {

class TreePlace final : public Executor {
 public:
  using Direction = Relocation::Direction;
  // `walked`: whether somebody walks the tree now, who must find it where it was.
  TreePlace(Store& store, InodeTable& inodes, State& state, Power& power, std::filesystem::path directory,
            Reactor& reactor, std::function<bool()> walked);
  ~TreePlace() override;

  void execute(const pb::Request& request, Bytes data, Reply reply) override;

  // A process begins: the tree is where `direction` leads to, or on its way there, or due.
  void resume(Direction direction);
  // Ownership has changed: the tree lies where the opposite direction has left it.
  void move(Direction direction);
  // Moves what is left at once. Throws if it is not in one place then; on a site that is not the owner also
  // if it is not where it belongs.
  void finish();

  // Whether the tree lies where it belongs, of a site whose daemon does not run.
  static bool in_place(State& state);

  bool settled() const { return way_ == Way::settled; }
  bool moving() const { return way_ == Way::moving; }
  // Where an owner's tree lies, or is on its way to.
  std::filesystem::path root() const;

 private:
  enum class Way { settled, moving, due };

  std::filesystem::path place(Direction direction) const;
  bool lies_in_place(Direction direction);
  void note(Direction direction);
  void begin();
  void try_to_begin();
  void try_later();
  bool may_be_behind(const pb::Request& request) const;
  void step();
  void end();

  // constant after construction
  Store& store_;
  InodeTable& inodes_;
  State& state_;
  Power& power_;
  const std::filesystem::path directory_;  // the store
  Reactor& reactor_;
  const std::function<bool()> walked_;
  // reactor thread
  Way way_ = Way::settled;
  Direction direction_ = Direction::up;     // of what is under way, or due
  std::unique_ptr<Relocation> relocation_;  // moving
  Reactor::TimerId timer_ = 0;              // to go on, or to try again
  bool parted_ = false;                     // due: begun, by an earlier process or in vain
};

}  // namespace sharefs
