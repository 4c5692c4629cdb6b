// Anything that performs requests: the Store on the owner, the Peer that asks another site, the Gate and the
// Router in front of them. One interface, so that a request takes the same path whoever asked.
#pragma once

#include <functional>

#include "meta/types.h"
#include "meta/vocabulary.pb.h"

namespace sharefs {

// Receives what came of a request. Called exactly once, on the reactor thread, possibly before execute()
// returns. The outcome and the bytes are borrowed: copy what must outlive the call. Keep captures within two
// pointers and std::function does not allocate.
using Reply = std::function<void(const pb::Outcome&, Bytes)>;

class Executor {
 public:
  Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  virtual ~Executor() = default;

  // Reactor thread only; never blocks on a network or a closed gate. The request and `data` (the bytes of a
  // WRITE or SETXATTR) are borrowed until the call returns; an executor that answers later copies them.
  virtual void execute(const pb::Request& request, Bytes data, Reply reply) = 0;
};

// How the gate and the log treat a request.
enum class OpClass { query, live, mutation };

// The class is part of the numbering in vocabulary.proto: below 40 queries, below 64 live state, the rest
// mutations.
constexpr OpClass op_class(pb::Request::OpCase op) {
  return op < 40 ? OpClass::query : op < 64 ? OpClass::live : OpClass::mutation;
}

// A mutation that does more than wait for the disk.
constexpr bool changes_files(pb::Request::OpCase op) {
  return op_class(op) == OpClass::mutation && op != pb::Request::kSync;
}

// Makes, moves or removes names.
bool changes_names(pb::Request::OpCase op);

// The inode whose bytes it changes: what its pages, its copies and its other changes have to be in order
// with. 0: none.
InodeId changes_data_of(const pb::Request& request);

// Writes that their mount has acknowledged (Write.lease) are numbered from here on; all else that kernels ask
// below.
constexpr std::uint64_t kAheadSeqBit = std::uint64_t{1} << 59;

// Answers with nothing but an errno (0: performed).
void reply_errno(const Reply& reply, int error);

}  // namespace sharefs
