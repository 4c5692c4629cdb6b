// Whether a request of another site may be performed at all. What only the store can know (names that exist,
// handles, permissions) is checked there; this is what a hostile or broken site could send.
#pragma once

#include <cstddef>
#include <cstdint>

#include "meta/types.h"
#include "meta/vocabulary.pb.h"

namespace sharefs {

// The most bytes that go with one request or come back with one answer: FUSE's largest, and what stands
// around it.
constexpr std::size_t kMaxPayload = (std::size_t{1} << 20) + 4096;

// 0, or the errno to answer with. `data`: the bytes that came beside the request.
int check_request(const pb::Request& request, Bytes data);

}  // namespace sharefs
