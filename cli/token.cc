#include "cli/token.h"

#include <xxhash.h>
#include <zmq.h>

#include <array>
#include <stdexcept>

namespace sharefs {
namespace {

constexpr std::string_view kPrefix = "sharefs1-";
constexpr std::string_view kAnyVersion = "sharefs";
constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
constexpr std::size_t kKeyBytes = 32;
constexpr std::size_t kKeyText = 40;  // Z85

[[noreturn]] void damaged() {
  throw std::runtime_error(
      "the token is damaged or incomplete: copy the whole line that \"sharefs invite\" printed");
}

std::string to_base64(std::string_view bytes) {
  std::string text;
  std::uint32_t bits = 0;
  int count = 0;
  for (const unsigned char byte : bytes) {
    bits = bits << 8 | byte;
    for (count += 8; count >= 6; count -= 6) text += kAlphabet[bits >> (count - 6) & 63];
  }
  if (count > 0) text += kAlphabet[bits << (6 - count) & 63];
  return text;
}

std::string from_base64(std::string_view text) {
  std::string bytes;
  std::uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    const auto value = kAlphabet.find(c);
    if (value == std::string_view::npos) damaged();
    bits = bits << 6 | static_cast<std::uint32_t>(value);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes += static_cast<char>(bits >> count & 255);
    }
  }
  return bytes;
}

template <class Integer>
void put(std::string& out, Integer value) {
  for (std::size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i) & 255);
}

void put_string(std::string& out, std::string_view text) {
  if (text.size() > 255) throw std::runtime_error("the endpoint is too long for a token");
  put(out, static_cast<std::uint8_t>(text.size()));
  out += text;
}

void put_key(std::string& out, const std::string& z85) {
  std::array<std::uint8_t, kKeyBytes> key{};
  if (z85.size() != kKeyText || zmq_z85_decode(key.data(), z85.c_str()) == nullptr) {
    throw std::runtime_error("a key in the state of this site is damaged");
  }
  out.append(reinterpret_cast<const char*>(key.data()), key.size());
}

// Takes apart what encode_token() put together; whatever does not fit is `damaged`.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::string_view take(std::size_t size) {
    if (rest_.size() < size) damaged();
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }
  template <class Integer>
  Integer integer() {
    Integer value = 0;
    const std::string_view bytes = take(sizeof value);
    for (std::size_t i = 0; i < sizeof value; ++i) {
      value =
          static_cast<Integer>(value | static_cast<Integer>(static_cast<unsigned char>(bytes[i])) << (8 * i));
    }
    return value;
  }
  std::string string() { return std::string(take(integer<std::uint8_t>())); }
  std::string key() {
    std::array<char, kKeyText + 1> z85{};
    zmq_z85_encode(z85.data(), reinterpret_cast<const std::uint8_t*>(take(kKeyBytes).data()), kKeyBytes);
    return z85.data();
  }
  bool at_end() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

std::uint32_t checksum(std::string_view bytes) { return XXH32(bytes.data(), bytes.size(), 0); }

}  // namespace

std::string encode_token(const Token& token) {
  std::string bytes;
  put_string(bytes, token.data_set);
  put(bytes, token.data_set_id);
  put_string(bytes, token.endpoint);
  put_key(bytes, token.server_public_key);
  put_key(bytes, token.invitation.secret_key);
  put(bytes, static_cast<std::uint64_t>(token.expires));
  put(bytes, checksum(bytes));
  return std::string(kPrefix) + to_base64(bytes);
}

Token decode_token(std::string_view text) {
  if (!text.starts_with(kPrefix)) {
    if (text.starts_with(kAnyVersion)) {
      throw std::runtime_error(
          "the token was made by another version of sharefs: use the same version on both sites");
    }
    throw std::runtime_error(
        "this is not a token: give the line that \"sharefs invite\" printed on the other site");
  }
  const std::string bytes = from_base64(text.substr(kPrefix.size()));
  // A stray character at the end may hold bits of no byte.
  if (to_base64(bytes) != text.substr(kPrefix.size())) damaged();
  constexpr std::size_t kChecksum = sizeof(std::uint32_t);
  if (bytes.size() < kChecksum) damaged();
  const std::string_view body = std::string_view(bytes).substr(0, bytes.size() - kChecksum);
  if (Reader(std::string_view(bytes).substr(body.size())).integer<std::uint32_t>() != checksum(body))
    damaged();

  Reader reader(body);
  Token token;
  token.data_set = reader.string();
  token.data_set_id = reader.integer<std::uint64_t>();
  token.endpoint = reader.string();
  token.server_public_key = reader.key();
  token.invitation.secret_key = reader.key();
  token.expires = static_cast<std::int64_t>(reader.integer<std::uint64_t>());
  if (!reader.at_end()) damaged();
  std::array<char, kKeyText + 1> public_key{};
  if (zmq_curve_public(public_key.data(), token.invitation.secret_key.c_str()) != 0) damaged();
  token.invitation.public_key = public_key.data();
  return token;
}

}  // namespace sharefs
