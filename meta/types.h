// The few words that every layer uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace sharefs {

// Issued once by the owner that creates or adopts an inode; the same on every later owner (FUSE nodeid and
// st_ino).
using InodeId = std::uint64_t;
constexpr InodeId kRootInode = 1;

// Counts attempts to hand ownership over; burnt by every attempt, so no two sites ever hold the same one.
using Epoch = std::uint64_t;

// The name of a site as given at init or join: [A-Za-z0-9._-]{1,64}, unique within a data set.
using SiteName = std::string;

// Borrowed bytes: valid only as long as the call that received them.
using Bytes = std::span<const std::byte>;

inline Bytes as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
inline std::string_view as_text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The private area: the one name in the root of a store that is hidden from mounts, images and readdir.
constexpr std::string_view kPrivateArea = ".sharefs";

}  // namespace sharefs
