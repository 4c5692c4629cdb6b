#include "cli/setup.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "cli/failure.h"
#include "cli/units.h"
#include "fs/mounts.h"
#include "fs/private_area.h"
#include "meta/types.h"
#include "replication/join.h"
#include "replication/transport.h"
#include "replication/wire.pb.h"

namespace sharefs {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kMarker = "data_set";
constexpr std::size_t kLongestMarker = 32;

// What setting «began» says from the first step of join to its last.
constexpr std::string_view kJoining = "join";

void make_private_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) fail(fmt::format("cannot make {}: {}", folder.string(), error.message()));
  fs::permissions(folder, fs::perms::owner_all, error);
  if (error) fail(fmt::format("cannot set the mode of {}: {}", folder.string(), error.message()));
}

std::string random_id() {
  std::uint64_t id = 0;
  while (id == 0) {
    if (getrandom(&id, sizeof id, 0) != sizeof id) fail("no random numbers from the kernel");
  }
  return std::to_string(id);
}

void sync_path(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (!synced) fail(fmt::format("cannot sync {}: {}", path.string(), strerror(error)));
}

// What init or join makes. One that fails leaves nothing behind, so that another attempt, or another purpose,
// finds what was there before.
class MadeDirectories {
 public:
  MadeDirectories() = default;
  ~MadeDirectories() {
    std::error_code error;
    for (const fs::path& path : ours_) fs::remove_all(path, error);
    for (auto path = made_.rbegin(); path != made_.rend(); ++path) fs::remove(*path, error);
  }
  MadeDirectories(const MadeDirectories&) = delete;
  MadeDirectories& operator=(const MadeDirectories&) = delete;

  // A folder that nobody else has a look into, with all that is put there.
  void make_private(const fs::path& folder) {
    if (make(folder)) ours_.push_back(folder);
    make_private_folder(folder);
  }
  void make_file(const fs::path& path, const std::string& content) {
    std::error_code error;
    if (!fs::exists(path, error)) ours_.push_back(path);
    std::ofstream file(path, std::ios::trunc);
    file << content;
    file.close();
    if (!file) fail(fmt::format("cannot write {}", path.string()));
  }
  // True: by this process, and no other one that does the same at this instant.
  bool make(const fs::path& folder) {
    std::error_code error;
    std::vector<fs::path> missing;
    for (fs::path path = fs::absolute(folder); !fs::exists(path, error) && path.has_relative_path();
         path = path.parent_path())
      missing.push_back(path);
    made_.insert(made_.end(), missing.rbegin(), missing.rend());
    const bool made = fs::create_directories(folder, error);
    if (error) fail(fmt::format("cannot make {}: {}", folder.string(), error.message()));
    return made;
  }
  void keep() {
    ours_.clear();
    made_.clear();
  }

 private:
  std::vector<fs::path> ours_;
  std::vector<fs::path> made_;  // each after those that it lies in
};

// Puts the private area into the store, durably; whatever of it is there already stays.
void make_private_area(MadeDirectories& made, const fs::path& store, const std::string& data_set_id) {
  const fs::path area = store / kPrivateArea;
  made.make_private(area);
  for (const char* part : {"tree", "parked", "orphans"}) made.make_private(area / part);
  const UniqueFd opened(open(area.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (opened && takes_two_names_for_one(opened.get()))
    fail(fmt::format("the file system of {} takes names that differ in case or accents for one: use another",
                     store.string()));
  made.make_file(area / kMarker, data_set_id + "\n");
  for (const fs::path& path : {area / kMarker, area, store}) sync_path(path);
}

// A store in a store would be copied with it, and its private area seen.
void refuse_inside_another_store(const fs::path& store) {
  for (fs::path above = store.parent_path(); !above.empty(); above = above.parent_path()) {
    if (read_store_marker(above)) {
      fail(fmt::format("{} lies inside {}, which is the store of a data set already", store.string(),
                       above.string()));
    }
    if (above == above.root_path()) break;
  }
}

void refuse_around_another_store(const Home& home, const fs::path& store) {
  for (const auto& name : home.data_sets()) {
    const fs::path other = home.setting_of(name, "store");
    if (!other.empty() && other != store && is_within(other, store) &&
        (fuse_mount_at(other) || read_store_marker(other)))
      fail(fmt::format("{} holds {}, which is the store of a data set already", store.string(),
                       other.string()));
  }
}

// What is in an old image may be the last copy of it.
[[noreturn]] void refuse_used_store(const fs::path& store) {
  const fs::path area = store / kPrivateArea, tree = area / "tree";
  std::error_code error;
  const bool holds_files = !fs::is_empty(tree, error) && !error;
  const std::string advice =
      holds_files
          ? fmt::format("{} holds files of it: move out what is wanted of them before you delete {}",
                        tree.string(), area.string())
          : fmt::format("it has {}: delete that if the data set is not wanted any more", area.string());
  fail(fmt::format("{} is the store of another data set already ({})", store.string(), advice));
}

void refuse_used_by_daemon(const fs::path& store) {
  const UniqueFd directory(open(store.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const UniqueFd area = open_private_area(directory.get());
  if (area && !lock_private_area(area.get()))
    fail(fmt::format("{} is the store of a running daemon", store.string()));
}

// What is checked of a store holds until that is let go of: nobody else makes a data set of it.
UniqueFd lock_store(const fs::path& store) {
  UniqueFd directory(open(store.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory && flock(directory.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    fail(fmt::format("{} is locked by another process, perhaps an init or join: try again when it has ended",
                     store.string()));
  return directory;
}

void check_store_place(const Home& home, const fs::path& store) {
  std::error_code error;
  const fs::path home_folder = fs::weakly_canonical(fs::absolute(home.folder()), error);
  if (!error && is_within(home_folder, store)) {
    fail(fmt::format("{} holds the state folder {}: keep the state outside of the store (--home)",
                     store.string(), home_folder.string()));
  }
  if (!error && is_within(store, home_folder))
    fail(fmt::format("{} lies inside the state folder {}: choose another directory", store.string(),
                     home_folder.string()));
  if (fuse_mount_at(store)) fail(fmt::format("{} is a FUSE mount: unmount it first", store.string()));
  if (const auto mount = mount_of(store); mount && mount->type == "fuse.sharefs")
    fail(fmt::format("{} lies in a mount of sharefs ({}): choose a directory of a disk", store.string(),
                     mount->mountpoint.string()));
  if (access(store.c_str(), R_OK | W_OK | X_OK) != 0) {
    fail(fmt::format("{} cannot be used as a store: {}", store.string(), strerror(errno)));
  }
  refuse_inside_another_store(store);
  refuse_around_another_store(home, store);
  refuse_foreign_area(store);
  refuse_used_by_daemon(store);
}

std::string site_name(const std::string& given) {
  std::string site = given.empty() ? host_name() : given;
  if (given.empty() && !valid_name(site)) throw UsageError("give this site a name with --site");
  require_valid_name(site, "site");
  return site;
}

// Before anything is made, and before others are told an address at which nobody can be reached.
void check_address(const Home& home, const std::string& name, const Address& address) {
  const auto port = [](const std::string& listen) { return listen.substr(listen.rfind(':') + 1); };
  for (const auto& one : home.data_sets()) {
    const std::string listen = home.setting_of(one, "listen");
    if (listen.empty() || port(listen) != port(address.listen)) continue;
    if (one == name) return;  // its own daemon may listen there now
    fail(fmt::format("port {} of this machine is that of data set \"{}\": give --listen another one",
                     port(listen), one));
  }
  try {
    check_can_listen(address.listen);
  } catch (const std::exception& error) {
    fail(fmt::format("{}: give --listen an address of this machine, and a port that nobody else uses",
                     error.what()));
  }
}

// The settings that init and join share, except `data_set`, which is set last of all (Home::has).
void put_settings(State& state, const std::string& id, const std::string& site, const fs::path& store,
                  const std::optional<Address>& address) {
  if (state.setting("secret_key").empty()) {
    const CurveKeys keys = make_curve_keys();
    state.set_setting("public_key", keys.public_key);
    state.set_setting("secret_key", keys.secret_key);
  }
  state.set_setting("data_set_id", id);
  state.set_setting("site", site);
  state.set_setting("store", store.string());
  state.set_setting("listen", address ? address->listen : "");
  state.set_setting("endpoint", address ? address->endpoint : "");
}

// The last step of init and join: from now on this is a data set (Home::has), whatever happens to the
// machine.
void set_data_set(OpenState& open, const std::string& name) {
  Transaction transaction(open.database, Durability::full);
  open.state.set_setting("data_set", name);
  transaction.commit();
}

std::int64_t now_seconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// join takes a directory only if nothing can be lost or mistaken for live data in it.
void require_empty_or_old_image(const fs::path& store, const std::string& data_set_id) {
  constexpr std::string_view kOfTheDisk = "lost+found";
  std::string found;
  for (const auto& entry : fs::directory_iterator(store)) {
    const std::string name = entry.path().filename().string();
    if (name == kPrivateArea) continue;
    if (found.empty() || found == kOfTheDisk) found = name;
  }
  if (!found.empty())
    fail(fmt::format(
        "{} is not empty (it has \"{}\"): join needs an empty directory or an old image of this data set{}",
        store.string(), found,
        found == kOfTheDisk ? fmt::format("; give a subdirectory: --store {}", (store / "store").string())
                            : ""));
  std::error_code error;
  const fs::path area = store / kPrivateArea;
  if (!fs::exists(area, error)) return;
  const auto marker = read_store_marker(store);
  if (!marker && fs::is_empty(area, error)) return;
  if (marker != data_set_id) fail(fmt::format("{} is the store of another data set", store.string()));
}

void keep_join_reply(State& state, const std::string& site, const pb::JoinReply& reply) {
  for (const auto& other : reply.sites()) {
    if (other.name() == site) continue;
    if (!valid_name(other.name())) fail("the other site answered with a malformed list of sites");
    state.put_site({other.name(), other.endpoint(), other.public_key()});
  }
  if (reply.owner().empty() || reply.epoch() == 0) fail("the other site did not say who owns the data set");
  state.set_ownership({reply.epoch(), reply.owner(), reply.epoch()});
}

}  // namespace

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) != 0) return "";
  return name;
}

Address parse_address(const std::string& text) {
  constexpr std::string_view kScheme = "tcp://";
  const auto colon = text.rfind(':');
  const auto usage = [&] {
    return UsageError(fmt::format("\"{}\" is not an address: write tcp://HOST:PORT, for example tcp://*:{}",
                                  text, kDefaultPort));
  };
  if (!text.starts_with(kScheme) || colon == std::string::npos || colon < kScheme.size() + 1) throw usage();
  const std::string host = text.substr(kScheme.size(), colon - kScheme.size());
  int port = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data() + colon + 1, last, port);
  if (error != std::errc() || end != last || port < 1 || port > 65535) throw usage();
  const bool bracketed = host.starts_with('[') && host.ends_with(']');
  try {
    check_endpoint(text);
  } catch (const std::runtime_error&) {
    throw usage();
  }

  in_addr ipv4{};
  const bool numeric = bracketed || inet_pton(AF_INET, host.c_str(), &ipv4) == 1;
  if (host == "*" || host == "0.0.0.0" || host == "[::]") {
    return {text, fmt::format("tcp://{}:{}", host_name(), port)};
  }
  if (numeric) return {text, text};
  if (host == "localhost")
    return {fmt::format("tcp://127.0.0.1:{}", port), fmt::format("tcp://127.0.0.1:{}", port)};
  return {fmt::format("tcp://*:{}", port), text};
}

void refuse_foreign_area(const fs::path& store) {
  const UniqueFd directory(open(store.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory && !open_private_area(directory.get()) && errno != ENOENT)
    fail(fmt::format("{} is not this user's own private directory: see who made it, and delete it",
                     (store / kPrivateArea).string()));
}

std::optional<std::string> read_store_marker(const fs::path& store) {
  const fs::path marker = store / kPrivateArea / kMarker;
  const UniqueFd file(open(marker.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat found {};
  if (!file || fstat(file.get(), &found) != 0 || !S_ISREG(found.st_mode)) return std::nullopt;
  std::array<char, kLongestMarker> text{};
  const ssize_t got = read(file.get(), text.data(), text.size());
  if (got <= 0) return std::nullopt;
  const std::string_view content(text.data(), static_cast<std::size_t>(got));
  return std::string(content.substr(0, content.find('\n')));
}

void init_data_set(const Home& home, const InitOptions& options) {
  require_valid_name(options.name, "data set");
  const std::string site = site_name(options.site);
  const auto address = options.listen.empty() ? std::nullopt : std::optional(parse_address(options.listen));
  if (home.has(options.name)) {
    OpenState open(home.paths(options.name));
    fail(fmt::format(
        "already initialised: data set \"{}\" with the store {}; \"sharefs mount {} MOUNTPOINT\" mounts it",
        options.name, open.state.setting("store"), options.name));
  }
  std::error_code error;
  const fs::path store = fs::canonical(options.store, error);
  if (error)
    fail(fmt::format("{}: {}: --store names the directory that is to be shared, which init does not make",
                     options.store.string(), error.message()));
  if (!fs::is_directory(store))
    fail(fmt::format("{} is not a directory: --store names the directory that is to be shared",
                     store.string()));
  const UniqueFd lock = lock_store(store);
  check_store_place(home, store);
  if (address) check_address(home, options.name, *address);

  const DataSetPaths paths = home.paths(options.name);
  const auto marker = read_store_marker(store);
  const fs::path area = store / kPrivateArea;
  std::string id;
  if (fs::exists(paths.database())) {
    OpenState open(paths);
    id = open.state.setting("data_set_id");
    if (open.state.setting("began") == kJoining)
      fail(fmt::format(
          "a \"sharefs join\" of another data set \"{}\" was begun and not finished: repeat it, or "
          "delete {}",
          options.name, paths.folder.string()));
  }
  const bool ours = marker ? marker == id : id.empty() ? !fs::exists(area) || fs::is_empty(area) : true;
  if (!ours) refuse_used_store(store);
  MadeDirectories made;
  made.make_private(paths.folder);
  OpenState open(paths);
  if (id.empty()) id = random_id();
  put_settings(open.state, id, site, store, address);
  make_private_area(made, store, id);
  if (open.state.ownership().epoch == 0) open.state.set_ownership({1, site, 1});
  set_data_set(open, options.name);
  made.keep();
}

Token make_invitation(const DataSetPaths& paths, const std::optional<std::string>& listen) {
  OpenState open(paths);
  State& state = open.state;
  if (listen) {
    const Address address = parse_address(*listen);
    if (state.setting("listen") != address.listen)
      check_address(Home(paths.folder.parent_path()), paths.folder.filename().string(), address);
    state.set_setting("listen", address.listen);
    state.set_setting("endpoint", address.endpoint);
  }
  Token token;
  token.endpoint = state.setting("endpoint");
  if (token.endpoint.empty()) {
    fail(
        fmt::format("this site does not listen, so no other site can reach it: give it an address with "
                    "\"sharefs invite {} --listen tcp://HOST:PORT\"",
                    state.setting("data_set")));
  }
  token.data_set = state.setting("data_set");
  token.data_set_id = std::stoull(state.setting("data_set_id"));
  token.server_public_key = state.setting("public_key");
  token.invitation = make_curve_keys();
  token.expires =
      now_seconds() + std::chrono::duration_cast<std::chrono::seconds>(kInvitationLifetime).count();
  state.add_invitation(token.invitation.public_key, token.expires);
  return token;
}

Joined join_data_set(const Home& home, const JoinOptions& options) {
  const Token token = decode_token(options.token);
  require_valid_name(token.data_set, "data set");
  const std::string site = site_name(options.site);
  const Address address = parse_address(
      options.listen.empty() ? fmt::format("tcp://{}:{}", host_name(), kDefaultPort) : options.listen);
  if (home.has(token.data_set)) {
    fail(fmt::format("already joined: data set \"{}\" is in {}", token.data_set, home.folder().string()));
  }
  if (token.expires < now_seconds()) {
    fail(fmt::format("the token has expired: ask for a new one (\"sharefs invite {}\" on a site that has it)",
                     token.data_set));
  }
  check_address(home, token.data_set, address);
  MadeDirectories made;
  made.make_private(home.paths(token.data_set).folder);
  made.make(options.store);
  const fs::path store = fs::canonical(options.store);
  const std::string id = std::to_string(token.data_set_id);
  const UniqueFd lock = lock_store(store);
  check_store_place(home, store);
  require_empty_or_old_image(store, id);

  // The keys are kept before they are sent: a join whose answer got lost is repeated with the same ones.
  OpenState open(home.paths(token.data_set));
  open.state.set_setting("began", kJoining);
  put_settings(open.state, id, site, store, address);
  pb::Join join;
  join.mutable_site()->set_name(site);
  join.mutable_site()->set_endpoint(address.endpoint);
  join.mutable_site()->set_public_key(open.state.setting("public_key"));
  join.set_data_set(token.data_set_id);
  join.set_version(kProtocolVersion);
  pb::JoinReply reply;
  try {
    reply = join_by_invitation(token.endpoint, token.server_public_key, token.invitation, join,
                               std::chrono::seconds(15));
  } catch (const JoinUnanswered&) {
    made.keep();
    throw;
  }
  made.keep();
  keep_join_reply(open.state, site, reply);
  make_private_area(made, store, id);
  make_private_folder(store);  // what is put in there would be in the way of the data set
  set_data_set(open, token.data_set);
  made.keep();
  return {token.data_set, site, reply.owner()};
}

}  // namespace sharefs
