#include "replication/write_journal.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <stdexcept>
#include <utility>

#include "fs/inode_table.h"
#include "meta/caller.h"
#include "meta/log.h"

namespace sharefs {

struct WriteJournal::Page {
  static constexpr std::uint64_t kMagic = 0x6c6e726a66687331;
  static constexpr std::size_t kSize = 4096;
  std::uint64_t magic;
  std::uint64_t power;
  std::uint64_t key;
  std::atomic<Position> tail;
};

struct WriteJournal::Header {
  static constexpr std::uint32_t kSkip = 0xffffffff;  // request_size: the rest of the ring is not used
  std::atomic<Position> position;                     // written last, plus 1: an empty file has no entry
  std::uint64_t checksum;
  std::uint32_t request_size;
  std::uint32_t data_size;
  std::uint64_t unused;
};

namespace {

constexpr std::size_t kHeader = 32;

constexpr std::size_t rounded(std::size_t size) { return (size + kHeader - 1) / kHeader * kHeader; }

std::uint64_t checksum(std::uint64_t key, std::uint64_t position, const char* bytes,
                       std::uint32_t request_size, std::uint32_t data_size) {
  const std::uint64_t head[] = {key, position, request_size, data_size};
  return XXH3_64bits_withSeed(bytes, std::size_t{request_size} + data_size, XXH3_64bits(head, sizeof head));
}

}  // namespace

WriteJournal::WriteJournal(std::filesystem::path file, std::uint64_t power)
    : file_(std::move(file)), power_(power) {
  static_assert(sizeof(Header) == kHeader && kCapacity % kHeader == 0);
  if (!std::filesystem::exists(file_)) return;
  map(false);
  find_entries();
}

WriteJournal::~WriteJournal() {
  if (map_ != nullptr) ::munmap(map_, Page::kSize + kCapacity);
}

void WriteJournal::map(bool make) {
  become_self();
  const auto why = [this](const char* what, int error) {
    return std::runtime_error(std::string(what) + " " + file_.string() + ": " + std::strerror(error));
  };
  UniqueFd fd(::open(file_.c_str(), O_RDWR | O_CLOEXEC | (make ? O_CREAT : 0), 0600));
  if (!fd) throw why("cannot open", errno);
  // Allocated, so that a full disk fails here and not with a signal at a store into the mapping.
  if (const int error = ::posix_fallocate(fd.get(), 0, Page::kSize + kCapacity); error != 0) {
    if (make) ::unlink(file_.c_str());
    throw why("no space for", error);
  }
  void* map = ::mmap(nullptr, Page::kSize + kCapacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (map == MAP_FAILED) throw why("cannot map", errno);
  map_ = map;
}

WriteJournal::Header& WriteJournal::at(Position position) const {
  return *reinterpret_cast<Header*>(static_cast<char*>(map_) + Page::kSize + position % kCapacity);
}

bool WriteJournal::is_whole(Position position) const {
  const Header& header = at(position);
  if (header.position != position + 1) return false;
  const bool skip = header.request_size == Header::kSkip;
  const std::size_t size = skip ? 0 : std::size_t{header.request_size} + header.data_size;
  return size <= kCapacity - position % kCapacity - kHeader &&
         header.checksum == checksum(static_cast<Page*>(map_)->key, position,
                                     reinterpret_cast<const char*>(&header + 1),
                                     skip ? 0 : header.request_size, skip ? 0 : header.data_size);
}

void WriteJournal::find_entries() {
  auto& page = *static_cast<Page*>(map_);
  if (page.magic != Page::kMagic || page.power != power_ || page.tail % kHeader != 0) return;
  const Position tail = page.tail;
  for (next_ = tail; next_ - tail < kCapacity && is_whole(next_);) {
    const Header& header = at(next_);
    if (header.request_size == Header::kSkip) {
      next_ += kCapacity - next_ % kCapacity;
      continue;
    }
    entries_.push_back({next_});
    next_ += rounded(kHeader + header.request_size + header.data_size);
  }
}

std::optional<WriteJournal::Position> WriteJournal::append(const pb::Request& request, Bytes data) {
  if (map_ == nullptr) {
    if (failed_) return std::nullopt;
    try {
      map(true);
    } catch (const std::exception& error) {
      failed_ = true;
      log::warn("writes wait for the owner, since they cannot be noted here: {}", error.what());
      return std::nullopt;
    }
  }
  // A power cut may have left entries behind one that it took, which must not follow a new one.
  if (!fresh_) {
    if (!entries_.empty()) return std::nullopt;
    next_ += kCapacity;
    fresh_ = true;
    std::random_device random;
    auto& page = *static_cast<Page*>(map_);
    page.tail = next_;
    page.key = std::uint64_t{random()} << 32 | random();
    page.power = power_;
    page.magic = Page::kMagic;
  }
  const std::size_t request_size = request.ByteSizeLong();
  const std::size_t size = rounded(kHeader + request_size + data.size());
  const std::size_t rest = kCapacity - next_ % kCapacity;
  const std::size_t skipped = size <= rest ? 0 : rest;
  const Position tail = entries_.empty() ? next_ : entries_.front().position;
  if (size > kCapacity / 2 || next_ + skipped + size - tail > kCapacity) return std::nullopt;
  if (entries_.empty()) static_cast<Page*>(map_)->tail = next_;
  if (skipped != 0) {
    at(next_).request_size = Header::kSkip;
    at(next_).checksum = checksum(static_cast<Page*>(map_)->key, next_, nullptr, 0, 0);
    at(next_).position.store(next_ + 1, std::memory_order_release);
    next_ += skipped;
  }
  Header& header = at(next_);
  auto* const bytes = reinterpret_cast<char*>(&header + 1);
  request.SerializeToArray(bytes, static_cast<int>(request_size));
  std::memcpy(bytes + request_size, data.data(), data.size());
  header.request_size = static_cast<std::uint32_t>(request_size);
  header.data_size = static_cast<std::uint32_t>(data.size());
  header.checksum =
      checksum(static_cast<Page*>(map_)->key, next_, bytes, header.request_size, header.data_size);
  header.position.store(next_ + 1, std::memory_order_release);
  entries_.push_back({next_});
  return std::exchange(next_, next_ + size);
}

void WriteJournal::done(Position position) {
  const auto found = std::lower_bound(entries_.begin(), entries_.end(), position,
                                      [](const Entry& entry, Position at) { return entry.position < at; });
  if (found == entries_.end() || found->position != position) return;
  found->done = true;
  while (!entries_.empty() && entries_.front().done) entries_.pop_front();
  static_cast<Page*>(map_)->tail = entries_.empty() ? next_ : entries_.front().position;
}

Bytes WriteJournal::data(Position position) const {
  const Header& header = at(position);
  const auto* const bytes = reinterpret_cast<const char*>(&header + 1);
  return as_bytes(std::string_view(bytes + header.request_size, header.data_size));
}

void WriteJournal::for_each(const std::function<void(Position, const pb::Request&, Bytes)>& visit) const {
  const auto entries = entries_;  // visiting one may end it
  for (const Entry& entry : entries) {
    if (entry.done) continue;
    const Header& header = at(entry.position);
    pb::Request request;
    if (request.ParseFromArray(&header + 1, static_cast<int>(header.request_size)) &&
        request.write().lease() != 0)
      visit(entry.position, request, data(entry.position));
  }
}

std::size_t WriteJournal::size() const {
  return static_cast<std::size_t>(std::ranges::count(entries_, false, &Entry::done));
}

void WriteJournal::sync() {
  if (map_ != nullptr && !entries_.empty() && ::msync(map_, Page::kSize + kCapacity, MS_SYNC) != 0)
    log::error("{} is not on the disk: {}", file_.string(), std::strerror(errno));
}

}  // namespace sharefs
