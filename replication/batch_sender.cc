#include "replication/batch_sender.h"

#include <xxhash.h>

#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "meta/fault.h"
#include "replication/checksum.h"

namespace sharefs {

// Buffers of batches, used again once ZeroMQ has let go of them: the page faults of a fresh megabyte cost as
// much as filling it. Thread-safe; lives until the last buffer is back.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  using Buffer = std::unique_ptr<std::byte[]>;

  Buffer take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return Buffer(new std::byte[BatchSender::kBatchBytes]);
    Buffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }

  // A message of the first `size` bytes; the buffer comes back when the message is gone.
  zmq::message_t message(Buffer buffer, std::size_t size) {
    auto lent = std::make_unique<Lent>(Lent{shared_from_this(), std::move(buffer)});
    std::byte* bytes = lent->buffer.get();
    return {bytes, size, &BufferPool::give_back, lent.release()};
  }

 private:
  struct Lent {
    std::shared_ptr<BufferPool> pool;
    Buffer buffer;
  };
  static void give_back(void* /*bytes*/, void* hint) {
    const std::unique_ptr<Lent> lent(static_cast<Lent*>(hint));
    const std::lock_guard lock(lent->pool->mutex_);
    lent->pool->free_.push_back(std::move(lent->buffer));
  }

  std::mutex mutex_;
  std::vector<Buffer> free_;
};

BatchSender::BatchSender(std::uint64_t attempt, ShipLink& link)
    : attempt_(attempt), link_(link), pool_(std::make_shared<BufferPool>()) {}

BatchSender::~BatchSender() = default;

pb::InodeState& BatchSender::add_state() {
  cell_bytes_ += 100;
  return *cells_.add_inodes();
}

void BatchSender::add_entry(InodeId parent, std::string_view name, InodeId id, std::uint32_t type) {
  auto& entry = *cells_.add_entries();
  entry.set_parent(parent);
  entry.set_name(name.data(), name.size());
  entry.set_id(id);
  entry.set_type(type);
  cell_bytes_ += name.size() + 24;
}

pb::DirectoryState& BatchSender::add_directory() { return *cells_.add_directories(); }

void BatchSender::add_hole(InodeId id, std::uint64_t offset, std::uint64_t length) {
  if (const int count = cells_.extents_size(); count > 0) {
    auto& last = *cells_.mutable_extents(count - 1);
    if (last.id() == id && last.hole() && last.offset() + last.length() == offset)
      return last.set_length(last.length() + length);
  }
  auto& extent = *cells_.add_extents();
  extent.set_id(id);
  extent.set_offset(offset);
  extent.set_length(length);
  extent.set_hole(true);
  cell_bytes_ += 32;
}

void BatchSender::add_freed(InodeId id) {
  cells_.add_freed(id);
  cell_bytes_ += 8;
}

std::span<std::byte> BatchSender::room() {
  if (!buffer_) buffer_ = pool_->take();
  return {buffer_.get() + used_, kBatchBytes - used_};
}

void BatchSender::add_data(InodeId id, std::uint64_t offset, std::size_t length) {
  used_ += length;
  if (const int count = cells_.extents_size(); count > 0) {
    auto& last = *cells_.mutable_extents(count - 1);
    if (last.id() == id && !last.hole() && last.offset() + last.length() == offset) {
      last.set_length(last.length() + length);
      return;
    }
  }
  auto& extent = *cells_.add_extents();
  extent.set_id(id);
  extent.set_offset(offset);
  extent.set_length(length);
  cell_bytes_ += 32;
}

void BatchSender::checkpoint() {
  std::size_t listings = 0;
  if (cells_.directories_size() > 0) listings = cells_.ByteSizeLong();
  if (used_ == kBatchBytes || cell_bytes_ + listings >= kCellBytes || cells_.inodes_size() >= kMaxStates)
    flush();
}

void BatchSender::flush() {
  const std::size_t size = cells_.ByteSizeLong();
  if (size == 0) return;
  if (fault_point("image.source.batch")) throw std::runtime_error("fault point image.source.batch");
  std::vector<zmq::message_t> parts;
  parts.emplace_back(size);
  if (!cells_.SerializeToArray(parts[0].data(), static_cast<int>(size))) {
    throw std::runtime_error("a batch of the image could not be encoded");
  }
  if (used_ > 0) {
    parts.push_back(pool_->message(std::move(buffer_), used_));
  } else {
    parts.emplace_back();
  }
  pb::Envelope head;
  pb::Batch& batch = *head.mutable_batch();
  batch.set_attempt(attempt_);
  batch.set_number(number_ + 1);
  batch.set_checksum(checksum(parts[0], parts[1]));
  link_.acquire(size + used_);
  link_.send(std::move(head), std::move(parts));
  number_ += 1;
  bytes_ += size + used_;
  used_ = 0;
  cell_bytes_ = 0;
  cells_.Clear();
}

}  // namespace sharefs
