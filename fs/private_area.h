// The private area of a store: the directory `.sharefs` in its root, with tree/, parked/ and orphans/.
#pragma once

#include <string>

#include "fs/inode_table.h"

namespace sharefs {

// Opens the private area of the store, or none, with errno. Whoever may write to the store's root may put
// something else in its place: EPERM if it is not a directory of this user's own which nobody else may enter,
// and what is in it therefore nobody else's work. Any thread.
UniqueFd open_private_area(int store);

// Whether the file system takes two names for one that differ in case, or in how an accent is written: what
// has both elsewhere would lose one of them here. Makes a file in the area, and removes it. Any thread.
bool takes_two_names_for_one(int area);

// Whose store it is: a lock as long as the descriptor is open. False: another process has it. Two daemons of
// one store, each with its own state folder, would be two owners of the same files.
bool lock_private_area(int area);

// Whether this descriptor is such a directory; errno is EPERM if not.
bool is_private(int directory);

// Moves a name, never onto another one; false: errno says why not. A directory that may not be written cannot
// be moved, but by root, since its «..» changes: it may be written meanwhile.
bool move_name(int from, const std::string& name, int to, const std::string& new_name);

}  // namespace sharefs
