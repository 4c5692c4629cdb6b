// Compares two copies of the data set by their digests (`sharefs verify`).
//
// While the other copy is an old image, an inode whose ctime on the owner is newer has been changed since the
// handoff: it is counted, not reported. With equal ctime everything else must be equal. Ids only grow, so an
// id above all that the other copy has was issued since; one that only the other copy has was deleted since.
// A loss hidden behind these two rules shows in the content of its directory, whose ctime is then equal.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <string>
#include <vector>

#include "fs/inode_table.h"
#include "fs/store.h"
#include "replication/wire.pb.h"

namespace sharefs {

// Gives every inode of the tree below InodeTable::root() its id. Once before the first page of a comparison:
// inodes of an adopted directory that nobody looked at yet have none. Blocks on the disk: not on the reactor
// thread. `ending`, here and below: from when it is true on, this is given up.
void identify_all(InodeTable& inodes, const std::atomic<bool>& ending);

// Digests of up to `count` inodes with ids above `after`, in ascending order of id; inodes without a name
// (orphans) are left out. `database` is the site's, opened anew. Blocks on the disk: not on the reactor
// thread. A failure is told in the reply's `error`.
pb::VerifyReply digest_inodes(InodeTable& inodes, Store& store, const std::filesystem::path& database,
                              const pb::VerifyAsk& ask, const std::atomic<bool>& ending);

struct VerifyResult {
  std::uint64_t compared = 0;
  std::uint64_t changed_since = 0;
  std::vector<std::string> differences;  // at most 100, one line each
};
// Merges two ascending streams of digests. `owner` is the live copy. Fed page by page.
class DigestComparison {
 public:
  void owner_page(const pb::VerifyReply& page);
  void other_page(const pb::VerifyReply& page);
  std::uint64_t owner_next() const;  // `after` of the next page to ask
  std::uint64_t other_next() const;
  bool owner_wanted() const;  // false: wait for the other side first, or at its end
  bool other_wanted() const;
  bool done() const;
  const VerifyResult& result() const { return result_; }

 private:
  void compare();
  void compare_pair(const pb::Digest& owner, const pb::Digest& other);
  void report(InodeId id, const char* what);
  std::deque<pb::Digest> owner_, other_;
  bool owner_end_ = false, other_end_ = false;
  std::uint64_t owner_next_ = 0, other_next_ = 0;
  VerifyResult result_;
};

}  // namespace sharefs
