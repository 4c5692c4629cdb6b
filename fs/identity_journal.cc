#include "fs/identity_journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "meta/log.h"

namespace sharefs {
namespace {

constexpr std::uint64_t kMagic = 0x316e726a66726873;  // "shrfjrn1"
constexpr std::size_t kHeaderSize = 4096;
constexpr std::size_t kSlotSize = 128;
constexpr std::size_t kMaxName = 1024;
constexpr auto kHolderPatience = std::chrono::seconds(10);

enum Flag : std::uint8_t { kErased = 1, kImported = 2, kOrphan = 4 };

[[noreturn]] void fail(const std::filesystem::path& file, const char* what) {
  throw std::runtime_error(file.string() + ": " + what + ": " + std::generic_category().message(errno));
}

// Two processes must never map one journal; the one that is being replaced may need a moment to end.
void lock_file(int fd, const std::filesystem::path& file) {
  const auto deadline = std::chrono::steady_clock::now() + kHolderPatience;
  while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail(file, "cannot be locked");
    if (std::chrono::steady_clock::now() > deadline)
      throw std::runtime_error(file.string() +
                               ": in use by another process that serves this data set; end it first");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace

struct IdentityJournal::Header {
  std::uint64_t magic;
  std::uint64_t slots;
  std::uint64_t tail;
};

struct IdentityJournal::RecordHeader {
  std::uint64_t position;  // its own, plus one: a zeroed slot is no record
  std::uint64_t checksum;  // XXH3 of everything after this field, and of handle and name
  std::uint64_t id;
  std::uint64_t ino;
  std::int64_t born;
  std::uint64_t parent;
  std::int64_t imported_ctime;
  std::int64_t backing_ctime;
  std::uint32_t handle_type;
  std::uint8_t flags;
  std::uint8_t handle_size;
  std::uint16_t name_and_type;  // size of the name in the low 12 bits, S_IFMT >> 12 above
};

IdentityJournal::IdentityJournal(const std::filesystem::path& file, std::uint32_t slots,
                                 std::uint64_t tail_in_database)
    : slots_(slots), length_(kHeaderSize + std::size_t{slots} * kSlotSize) {
  static_assert(sizeof(RecordHeader) == 72 && sizeof(RecordHeader) < kSlotSize);
  static_assert(kMaxName < (1u << 12));
  fd_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd_ < 0) fail(file, "cannot be opened");
  try {
    lock_file(fd_, file);
    struct stat status {};
    if (::fstat(fd_, &status) != 0) fail(file, "cannot be read");
    const bool fresh = static_cast<std::size_t>(status.st_size) != length_;
    // Allocated, so that a full disk fails here and not with a signal at a store into the mapping.
    if (fresh && ::ftruncate(fd_, 0) != 0) fail(file, "cannot be truncated");
    if (const int error = ::posix_fallocate(fd_, 0, static_cast<off_t>(length_)); error != 0) {
      errno = error;
      fail(file, "no space for the journal");
    }
    void* map = ::mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, 0);
    if (map == MAP_FAILED) fail(file, "cannot be mapped");
    map_ = static_cast<char*>(map);
  } catch (...) {
    ::close(fd_);
    throw;
  }
  header_ = reinterpret_cast<Header*>(map_);
  if (header_->magic != kMagic || header_->slots != slots_) {
    if (header_->magic != 0) log::warn("{}: not a journal of this format, started anew", file.string());
    std::memset(map_, 0, length_);
    header_->slots = slots_;
    header_->magic = kMagic;
  }
  // SQLite knows best: after a power cut it may have lost commits that the header, written later, counts on.
  // The header only helps where SQLite does not lead to a record.
  Identity ignored;
  tail_ = tail_in_database;
  if (header_->tail > tail_ && parse(tail_, ignored) == 0) tail_ = header_->tail;
  head_ = tail_;
}

IdentityJournal::~IdentityJournal() {
  ::munmap(map_, length_);
  ::close(fd_);
}

void IdentityJournal::copy_in(std::uint64_t position, std::size_t offset, const void* bytes,
                              std::size_t size) {
  const std::size_t ring = std::size_t{slots_} * kSlotSize;
  const std::size_t at = (position % slots_ * kSlotSize + offset) % ring;
  const std::size_t first = std::min(size, ring - at);
  std::memcpy(map_ + kHeaderSize + at, bytes, first);
  std::memcpy(map_ + kHeaderSize, static_cast<const char*>(bytes) + first, size - first);
}

void IdentityJournal::copy_out(std::uint64_t position, std::size_t offset, void* bytes,
                               std::size_t size) const {
  const std::size_t ring = std::size_t{slots_} * kSlotSize;
  const std::size_t at = (position % slots_ * kSlotSize + offset) % ring;
  const std::size_t first = std::min(size, ring - at);
  std::memcpy(bytes, map_ + kHeaderSize + at, first);
  std::memcpy(static_cast<char*>(bytes) + first, map_ + kHeaderSize, size - first);
}

namespace {
std::uint64_t slots_for(std::size_t payload, std::size_t header) {
  return (header + payload + kSlotSize - 1) / kSlotSize;
}
}  // namespace

bool IdentityJournal::append(const Identity& identity) {
  const std::size_t handle = identity.handle.bytes.size(), name = identity.name.size();
  if (handle > FileHandle::kMax || name > kMaxName)
    throw std::runtime_error("the identity of inode " + std::to_string(identity.id) + " is too long");
  const std::uint64_t count = slots_for(handle + name, sizeof(RecordHeader));
  if (used() + count > slots_) return false;

  RecordHeader record{};
  record.position = head_ + 1;
  record.id = identity.id;
  record.ino = identity.ino;
  record.born = identity.born;
  record.parent = identity.parent;
  record.imported_ctime = identity.imported_ctime;
  record.backing_ctime = identity.backing_ctime;
  record.handle_type = identity.handle.type;
  record.flags =
      static_cast<std::uint8_t>((identity.erased ? kErased : 0) | (identity.imported ? kImported : 0) |
                                (identity.orphan ? kOrphan : 0));
  record.handle_size = static_cast<std::uint8_t>(handle);
  record.name_and_type = static_cast<std::uint16_t>(name | identity.type);  // S_IFMT is the top 4 of 16 bits

  char bytes[sizeof(RecordHeader) + FileHandle::kMax + kMaxName];
  const std::size_t size = sizeof record + handle + name;
  std::copy_n(identity.handle.bytes.data(), handle, bytes + sizeof record);
  std::copy_n(identity.name.data(), name, bytes + sizeof record + handle);
  std::memcpy(bytes, &record, sizeof record);
  constexpr std::size_t kHashed = offsetof(RecordHeader, id);
  record.checksum = XXH3_64bits(bytes + kHashed, size - kHashed);
  std::memcpy(bytes, &record, sizeof record);
  copy_in(head_, 0, bytes, size);
  std::atomic_signal_fence(std::memory_order_release);  // all of it before anything that tells the id
  head_ += count;
  return true;
}

// Returns the position after the record at `position`, or 0 if there is none.
std::uint64_t IdentityJournal::parse(std::uint64_t position, Identity& identity) const {
  char bytes[sizeof(RecordHeader) + FileHandle::kMax + kMaxName];
  RecordHeader record{};
  copy_out(position, 0, &record, sizeof record);
  if (record.position != position + 1) return 0;
  const std::size_t handle = record.handle_size, name = record.name_and_type & 0xfff;
  if (handle > FileHandle::kMax || name > kMaxName) return 0;
  const std::size_t size = sizeof record + handle + name;
  copy_out(position, 0, bytes, size);
  constexpr std::size_t kHashed = offsetof(RecordHeader, id);
  if (record.checksum != XXH3_64bits(bytes + kHashed, size - kHashed)) return 0;

  identity.id = record.id;
  identity.ino = record.ino;
  identity.born = record.born;
  identity.type = record.name_and_type & 0xf000u;
  identity.parent = record.parent;
  identity.imported_ctime = record.imported_ctime;
  identity.backing_ctime = record.backing_ctime;
  identity.erased = (record.flags & kErased) != 0;
  identity.imported = (record.flags & kImported) != 0;
  identity.orphan = (record.flags & kOrphan) != 0;
  identity.handle.type = record.handle_type;
  identity.handle.bytes.assign(bytes + sizeof record, handle);
  identity.name.assign(bytes + sizeof record + handle, name);
  return position + slots_for(handle + name, sizeof record);
}

void IdentityJournal::replay(const Visit& visit) {
  Identity identity;
  while (const std::uint64_t next = parse(head_, identity)) {
    visit(identity);
    head_ = next;
  }
}

std::uint64_t IdentityJournal::read(std::uint64_t from, std::uint64_t to, unsigned limit,
                                    const Visit& visit) const {
  Identity identity;
  for (; from < to && limit > 0; --limit) {
    const std::uint64_t next = parse(from, identity);
    if (next == 0) throw std::runtime_error("the identity journal was damaged while in use");
    visit(identity);
    from = next;
  }
  return from;
}

std::uint64_t IdentityJournal::begin_anew() {
  constexpr std::uint64_t kMoreThanIsEverLost = std::uint64_t{1} << 32;
  return head_ = tail_ = head_ + kMoreThanIsEverLost;
}

void IdentityJournal::release(std::uint64_t position) {
  tail_ = position;
  header_->tail = position;
}

}  // namespace sharefs
