#include "meta/executor.h"

namespace sharefs {

// op_class() rests on the numbering of the vocabulary: the first and the last of each class.
static_assert(op_class(pb::Request::OP_NOT_SET) == OpClass::query);
static_assert(op_class(pb::Request::kLookup) == OpClass::query);
static_assert(op_class(pb::Request::kGetlock) == OpClass::query);
static_assert(op_class(pb::Request::kOpen) == OpClass::live);
static_assert(op_class(pb::Request::kDetach) == OpClass::live);
static_assert(op_class(pb::Request::kSetattr) == OpClass::mutation);
static_assert(op_class(pb::Request::kSync) == OpClass::mutation);

void reply_errno(const Reply& reply, int error) {
  pb::Outcome outcome;
  outcome.set_error(static_cast<std::uint32_t>(error));
  reply(outcome, {});
}

}  // namespace sharefs
