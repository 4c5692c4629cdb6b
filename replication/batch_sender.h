// Collects cells and bytes into batches of about 1 MiB and sends them.
//
// The bytes of extents are read straight into the buffer that becomes the second part of the message. Cells
// of a batch are applied together, in an order of the target's (see cells_apply.h), and batches one after the
// other.
//
// Threads: the shipping thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "meta/types.h"
#include "replication/image_source.h"
#include "replication/ship_link.h"
#include "replication/wire.pb.h"

namespace sharefs {

class BufferPool;

class BatchSender {
 public:
  static constexpr std::size_t kBatchBytes = std::size_t{1} << 20;  // of data in one batch

  BatchSender(std::uint64_t attempt, ShipLink& link);
  ~BatchSender();

  // Cells of the batch being built.
  pb::InodeState& add_state();
  void add_entry(InodeId parent, std::string_view name, InodeId id, std::uint32_t type);
  pb::DirectoryState& add_directory();
  void add_hole(InodeId id, std::uint64_t offset, std::uint64_t length);
  void add_freed(InodeId id);

  // Free space of the data part. Bytes of an extent are put at its start and then added.
  std::span<std::byte> room();
  void add_data(InodeId id, std::uint64_t offset, std::size_t length);

  // Between cells that need not be in one batch: sends it if it is full.
  void checkpoint();
  void check() { link_.check(); }  // throws once the attempt is cancelled
  // Of a state that was added: what it has grown by.
  void grown(std::size_t bytes) { cell_bytes_ += bytes; }
  void flush();  // sends what there is

  std::uint64_t batches() const { return number_.load(std::memory_order_relaxed); }  // any thread
  std::uint64_t bytes() const { return bytes_; }

 private:
  // The cells of a batch are split when their encoding is about this large, or when there are this many
  // inodes.
  static constexpr std::size_t kCellBytes = std::size_t{512} << 10;
  static constexpr int kMaxStates = 4096;

  // constant after construction
  const std::uint64_t attempt_;
  ShipLink& link_;
  const std::shared_ptr<BufferPool> pool_;
  // shipping thread
  pb::Cells cells_;
  std::size_t cell_bytes_ = 0;  // estimated
  std::unique_ptr<std::byte[]> buffer_;
  std::size_t used_ = 0;
  std::uint64_t bytes_ = 0;
  std::atomic<std::uint64_t> number_{0};
};

}  // namespace sharefs
