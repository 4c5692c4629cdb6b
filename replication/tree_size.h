// How much a tree holds, and what it takes to make it again elsewhere: what a handoff asks of its target
// before anything is sent.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>

namespace sharefs {

struct TreeSize {
  // Beyond so many only root will do.
  static constexpr std::size_t kMaxOwners = 64;

  std::uint64_t bytes = 0;  // on disk
  std::uint64_t data = 0;   // to send: without holes, and without what the last blocks have left
  std::uint64_t files = 0;  // inodes of all kinds
  bool devices = false;     // only root can make them
  std::string trouble;      // with an entry that cannot be handed over, and what helps; empty: none
  std::set<uid_t> owners;
  std::set<gid_t> groups;
};

// Walks the tree below `directory`, without a private area in it. What vanishes meanwhile, or does not exist,
// is not counted. Any thread; takes as long as `du`.
TreeSize measure(const std::filesystem::path& directory);

}  // namespace sharefs
