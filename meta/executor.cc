#include "meta/executor.h"

#include <fcntl.h>

namespace sharefs {

// op_class() rests on the numbering of the vocabulary: the first and the last of each class.
static_assert(op_class(pb::Request::OP_NOT_SET) == OpClass::query);
static_assert(op_class(pb::Request::kLookup) == OpClass::query);
static_assert(op_class(pb::Request::kGetlock) == OpClass::query);
static_assert(op_class(pb::Request::kOpen) == OpClass::live);
static_assert(op_class(pb::Request::kDetach) == OpClass::live);
static_assert(op_class(pb::Request::kSetattr) == OpClass::mutation);
static_assert(op_class(pb::Request::kSync) == OpClass::mutation);

bool changes_names(pb::Request::OpCase op) {
  switch (op) {
    case pb::Request::kCreate:
    case pb::Request::kMkdir:
    case pb::Request::kSymlink:
    case pb::Request::kLink:
    case pb::Request::kUnlink:
    case pb::Request::kRmdir:
    case pb::Request::kRename:
      return true;
    default:
      return false;
  }
}

InodeId changes_data_of(const pb::Request& request) {
  switch (request.op_case()) {
    case pb::Request::kWrite:
      return request.write().id();
    case pb::Request::kSetattr:
      return request.setattr().has_size() ? request.setattr().id() : 0;
    case pb::Request::kFallocate:
      return request.fallocate().id();
    case pb::Request::kCopyFileRange:
      return request.copy_file_range().id_out();
    case pb::Request::kOpen:
      return (request.open().flags() & O_TRUNC) != 0 ? request.open().id() : 0;
    default:
      return 0;
  }
}

void reply_errno(const Reply& reply, int error) {
  pb::Outcome outcome;
  outcome.set_error(static_cast<std::uint32_t>(error));
  reply(outcome, {});
}

}  // namespace sharefs
