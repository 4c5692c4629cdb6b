#include "replication/verify.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <map>
#include <optional>
#include <stdexcept>

#include "replication/checksum.h"
#include "replication/inode_io.h"

namespace sharefs {

namespace {

constexpr std::uint32_t kMaxPage = 10'000;
constexpr std::size_t kMaxDifferences = 100;

template <class Integer>
void add_number(Checksum& sum, Integer number) {
  const auto wide = static_cast<std::uint64_t>(number);
  sum.add(&wide, sizeof wide);
}

void add_text(Checksum& sum, std::string_view text) {
  add_number(sum, text.size());
  sum.add(text.data(), text.size());
}

// Sizes and link counts of directories say something of the file system, not of the tree.
std::uint64_t attributes_of(const OpenedInode& opened) {
  const Backing& backing = opened.backing;
  Checksum sum;
  add_number(sum, backing.stx_mode);
  add_number(sum, backing.stx_uid);
  add_number(sum, backing.stx_gid);
  add_number(sum, backing.stx_rdev_major);
  add_number(sum, backing.stx_rdev_minor);
  add_number(sum, timestamp_ns(backing.stx_mtime));
  if (!is_directory(backing)) {
    add_number(sum, backing.stx_nlink);
    add_number(sum, backing.stx_size);
  }
  for (const auto& [name, value] : read_xattrs(opened.fd.get(), opened.path_only)) {
    add_text(sum, name);
    add_text(sum, value);
  }
  return sum.value();
}

void check(const std::atomic<bool>& ending) {
  if (ending) throw std::runtime_error("this site ends");
}

std::uint64_t data_of(int fd, const std::atomic<bool>& ending) {
  Checksum sum;
  std::vector<char> block(kBlockBytes);
  for (std::uint64_t at = 0;;) {
    check(ending);
    const ssize_t count = pread(fd, block.data(), block.size(), static_cast<off_t>(at));
    if (count < 0) throw_errno("cannot read");
    if (count == 0) return sum.value();
    sum.add(block.data(), static_cast<std::size_t>(count));
    at += static_cast<std::uint64_t>(count);
  }
}

std::uint64_t listing_of(InodeTable& inodes, InodeId id, int fd) {
  std::map<std::string, InodeId> entries;
  for (const auto& listed : list_directory(fd)) {
    if (id == kRootInode && listed.name == kPrivateArea) continue;
    const auto opened = open_name(fd, listed.name, DT_UNKNOWN);
    const auto entry = opened ? identify_opened(inodes, id, listed.name, fd, *opened) : std::nullopt;
    if (entry) entries.emplace(listed.name, *entry);
  }
  Checksum sum;
  for (const auto& [name, entry] : entries) {
    add_text(sum, name);
    add_number(sum, entry);
  }
  return sum.value();
}

std::uint64_t content_of(InodeTable& inodes, InodeId id, const OpenedInode& opened,
                         const std::atomic<bool>& ending) {
  const int fd = opened.fd.get();
  if (is_directory(opened.backing)) return listing_of(inodes, id, fd);
  if (is_regular(opened.backing)) return data_of(fd, ending);
  if (!S_ISLNK(opened.backing.stx_mode)) return 0;
  const std::string target = read_link(fd);
  return XXH3_64bits(target.data(), target.size());
}

// Nothing: it is gone, or has no name.
std::optional<pb::Digest> digest(InodeTable& inodes, Store& store, InodeId id,
                                 const std::atomic<bool>& ending) {
  const auto opened = open_inode(inodes, id);
  if (!opened || inodes.is_orphan(id)) return std::nullopt;
  pb::Digest digest;
  digest.set_id(id);
  digest.set_attributes(attributes_of(*opened));
  digest.set_content(content_of(inodes, id, *opened, ending));
  // Last: what has changed while it was read counts as changed, not as different.
  digest.set_ctime(store.attributes(id, opened->fd.get()).ctime());
  return digest;
}

}  // namespace

void identify_all(InodeTable& inodes, const std::atomic<bool>& ending) {
  std::vector<InodeId> left{kRootInode};
  while (!left.empty()) {
    check(ending);
    const InodeId id = left.back();
    left.pop_back();
    const auto directory = open_inode(inodes, id);
    if (!directory) continue;
    const int fd = directory->fd.get();
    for (const auto& listed : list_directory(fd)) {
      if (id == kRootInode && listed.name == kPrivateArea) continue;
      const auto opened = open_name(fd, listed.name, DT_UNKNOWN);
      const auto entry = opened ? identify_opened(inodes, id, listed.name, fd, *opened) : std::nullopt;
      if (entry && is_directory(opened->backing)) left.push_back(*entry);
    }
  }
}

pb::VerifyReply digest_inodes(InodeTable& inodes, Store& store, const std::filesystem::path& database,
                              const pb::VerifyAsk& ask, const std::atomic<bool>& ending) {
  pb::VerifyReply reply;
  reply.set_number(ask.number());
  try {
    inodes.flush();
    Database connection(database);
    Statement ids(connection, "SELECT id FROM inode WHERE id > ? ORDER BY id LIMIT ?");
    const std::uint32_t count = std::clamp(ask.count(), 1u, kMaxPage);
    std::vector<InodeId> page;
    InodeId after = ask.after();
    // A page of nothing but ids without an inode would not lead on.
    do {
      page.clear();
      for (ids.bind(after, count); ids.step();) page.push_back(ids.id(0));
      for (const InodeId id : page) {
        if (auto found = digest(inodes, store, id, ending)) *reply.add_inodes() = std::move(*found);
      }
      if (!page.empty()) after = page.back();
    } while (page.size() == count && reply.inodes_size() == 0);
    reply.set_end(page.size() < count);
  } catch (const std::exception& error) {
    reply.set_error(error.what());
  }
  return reply;
}

// ---- comparison

void DigestComparison::owner_page(const pb::VerifyReply& page) {
  for (const auto& digest : page.inodes()) owner_.push_back(digest);
  if (page.inodes_size() > 0) owner_next_ = page.inodes(page.inodes_size() - 1).id();
  owner_end_ = owner_end_ || page.end();
  compare();
}

void DigestComparison::other_page(const pb::VerifyReply& page) {
  for (const auto& digest : page.inodes()) other_.push_back(digest);
  if (page.inodes_size() > 0) other_next_ = page.inodes(page.inodes_size() - 1).id();
  other_end_ = other_end_ || page.end();
  compare();
}

std::uint64_t DigestComparison::owner_next() const { return owner_next_; }
std::uint64_t DigestComparison::other_next() const { return other_next_; }
bool DigestComparison::owner_wanted() const { return !owner_end_ && owner_.empty(); }
bool DigestComparison::other_wanted() const { return !other_end_ && other_.empty(); }
bool DigestComparison::done() const { return owner_end_ && other_end_ && owner_.empty() && other_.empty(); }

// Deals with everything that both sides have told of.
void DigestComparison::compare() {
  while (!owner_.empty() || !other_.empty()) {
    if ((owner_.empty() && !owner_end_) || (other_.empty() && !other_end_)) return;
    if (other_.empty()) {  // issued since
      owner_.pop_front();
      ++result_.changed_since;
    } else if (owner_.empty() || other_.front().id() < owner_.front().id()) {  // deleted since
      other_.pop_front();
      ++result_.changed_since;
    } else if (owner_.front().id() < other_.front().id()) {
      report(owner_.front().id(), "is missing in the other copy");
      owner_.pop_front();
    } else {
      compare_pair(owner_.front(), other_.front());
      owner_.pop_front();
      other_.pop_front();
    }
  }
}

void DigestComparison::compare_pair(const pb::Digest& owner, const pb::Digest& other) {
  ++result_.compared;
  if (owner.ctime() > other.ctime()) {
    ++result_.changed_since;
  } else if (owner.ctime() < other.ctime()) {
    report(owner.id(), "is newer in the other copy than on the owner");
  } else {
    if (owner.attributes() != other.attributes())
      report(owner.id(), "has other attributes in the other copy");
    if (owner.content() != other.content()) report(owner.id(), "has another content in the other copy");
  }
}

void DigestComparison::report(InodeId id, const char* what) {
  if (result_.differences.size() >= kMaxDifferences) return;
  result_.differences.push_back("inode " + std::to_string(id) + " " + what);
}

}  // namespace sharefs
