#include "cli/token.h"

#include <gtest/gtest.h>

#include "tests/cli/scratch.h"

namespace sharefs {
namespace {

Token example() {
  Token token;
  token.data_set = "projects";
  token.data_set_id = 0xfedcba9876543210;
  token.endpoint = "tcp://alpha.example:7440";
  token.server_public_key = make_curve_keys().public_key;
  token.invitation = make_curve_keys();
  token.expires = 1'900'000'000;
  return token;
}

TEST(Token, CarriesEverythingThatAJoinNeeds) {
  const Token token = example();
  const std::string text = encode_token(token);
  const Token read = decode_token(text);
  EXPECT_EQ(read.data_set, token.data_set);
  EXPECT_EQ(read.data_set_id, token.data_set_id);
  EXPECT_EQ(read.endpoint, token.endpoint);
  EXPECT_EQ(read.server_public_key, token.server_public_key);
  EXPECT_EQ(read.invitation.secret_key, token.invitation.secret_key);
  EXPECT_EQ(read.invitation.public_key, token.invitation.public_key);
  EXPECT_EQ(read.expires, token.expires);
}

TEST(Token, IsOneWordThatNoShellTouches) {
  const std::string text = encode_token(example());
  EXPECT_EQ(text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"),
            std::string::npos);
  EXPECT_LT(text.size(), 250u);
}

TEST(Token, EveryShorteningIsNoticed) {
  const std::string text = encode_token(example());
  for (std::size_t size = 0; size < text.size(); ++size)
    EXPECT_NE(error_of([&] { decode_token(text.substr(0, size)); }), "");
}

TEST(Token, EveryChangedCharacterIsNoticed) {
  const std::string text = encode_token(example());
  for (std::size_t at = 0; at < text.size(); ++at) {
    std::string changed = text;
    changed[at] = changed[at] == 'A' ? 'B' : 'A';
    EXPECT_NE(error_of([&] { decode_token(changed); }), "") << at;
  }
}

TEST(Token, StrayCharactersAtItsEndAreNoticed) {
  Token token = example();
  for (int length = 0; length < 3; ++length, token.endpoint += "0")  // three bytes are four characters
    for (const char* stray : {"A", "B", "AA", "_", ".", " ", "\n"})
      EXPECT_NE(error_of([&] { decode_token(encode_token(token) + stray); }), "") << stray;
}

TEST(Token, SaysWhatIsWrongWithIt) {
  EXPECT_NE(error_of([] { decode_token("hello"); }).find("not a token"), std::string::npos);
  EXPECT_NE(error_of([] { decode_token("sharefs2-abc"); }).find("another version"), std::string::npos);
  EXPECT_NE(error_of([] { decode_token("sharefs1-abc"); }).find("damaged"), std::string::npos);
}

}  // namespace
}  // namespace sharefs
