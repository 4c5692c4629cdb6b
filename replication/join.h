// What join_by_invitation() (replication/transport.h) throws beyond a plain refusal.
#pragma once

#include <stdexcept>

namespace sharefs {

// The question was sent and no answer came: this site may have been admitted, and asks again with the same
// keys.
struct JoinUnanswered : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace sharefs
