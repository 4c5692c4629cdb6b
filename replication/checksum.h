// The checksums of the wire: of a batch, and of a block of a file (Need).
#pragma once

#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <zmq.hpp>

namespace sharefs {

// The unit in which a file that the target holds is compared.
constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

// XXH3 of a stream of bytes.
class Checksum {
 public:
  Checksum() : state_(XXH3_createState()) { XXH3_64bits_reset(state_.get()); }
  void add(const void* bytes, std::size_t size) { XXH3_64bits_update(state_.get(), bytes, size); }
  std::uint64_t value() const { return XXH3_64bits_digest(state_.get()); }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

// Of the two parts of a batch.
inline std::uint64_t checksum(const zmq::message_t& cells, const zmq::message_t& data) {
  Checksum sum;
  sum.add(cells.data(), cells.size());
  sum.add(data.data(), data.size());
  return sum.value();
}

}  // namespace sharefs
