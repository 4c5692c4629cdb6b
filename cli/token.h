// The invitation that `sharefs invite` prints and `sharefs join` takes: everything a new site needs to be
// admitted.
//
// Text: "sharefs1-" + base64url (no padding) of
//   string data_set, u64 data_set_id, string endpoint, 32 bytes server's public key, 32 bytes invitation's
//   secret key, u64 expires (seconds since 1970), u32 XXH32 of all before
// where string = u8 length + bytes, integers are little-endian. The holder of the secret key can join once,
// so a token is shown to nobody but the operator of the new site.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "replication/transport.h"

namespace sharefs {

struct Token {
  std::string data_set;
  std::uint64_t data_set_id = 0;
  std::string endpoint;
  std::string server_public_key;  // Z85
  CurveKeys invitation;
  std::int64_t expires = 0;  // seconds since 1970
};

std::string encode_token(const Token& token);
// Throws std::runtime_error with one clear line: not a token, damaged, of a newer version.
Token decode_token(std::string_view text);

}  // namespace sharefs
