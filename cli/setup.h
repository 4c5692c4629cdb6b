// Making a data set (init), inviting a site, and joining: what needs no daemon.
#pragma once

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>

#include "cli/home.h"
#include "cli/token.h"

namespace sharefs {

// Where a site listens, and what other sites are told to connect to.
struct Address {
  std::string listen;    // for bind: "tcp://*:7440", "tcp://10.0.0.1:7440"
  std::string endpoint;  // for connect: "tcp://alpha.example:7440"
};
constexpr int kDefaultPort = 7440;
// "tcp://HOST:PORT". A HOST of * or 0.0.0.0 (all interfaces) is made known as this machine's name; a HOST
// that is a name is listened for on all interfaces, because a socket cannot be bound to a name. UsageError.
Address parse_address(const std::string& text);

struct InitOptions {
  std::string name;
  std::filesystem::path store;
  std::string site;    // empty: this machine's name
  std::string listen;  // empty: no other site can join
};
// Adopts a directory in place. What fails leaves nothing behind; repeating it after an interruption completes
// it.
void init_data_set(const Home& home, const InitOptions& options);

constexpr auto kInvitationLifetime = std::chrono::hours(24);
// Registers a new one-use invitation in the site's state. `listen`, if given, becomes the site's address.
Token make_invitation(const DataSetPaths& paths, const std::optional<std::string>& listen);

struct JoinOptions {
  std::string token;
  std::filesystem::path store;  // made if it is missing; empty, or an old image of this data set
  std::string site;             // empty: this machine's name
  std::string listen;           // empty: tcp://<this machine's name>:7440
};
struct Joined {
  std::string name, site, owner;
};
// Asks the inviting site to be admitted, then keeps what it answered.
Joined join_data_set(const Home& home, const JoinOptions& options);

// Fails if what is called like the private area was made by somebody else, who may write to the directory.
void refuse_foreign_area(const std::filesystem::path& store);
// The `data_set` file of the private area: which data set a store belongs to (its id, in decimal). Whoever
// may write to the directory may have put anything there: it is not waited for, nor followed, nor read at
// length.
std::optional<std::string> read_store_marker(const std::filesystem::path& store);

std::string host_name();

}  // namespace sharefs
