#include "cli/setup.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <spdlog/fmt/fmt.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "cli/units.h"
#include "fs/inode_table.h"
#include "tests/cli/scratch.h"

namespace sharefs {
namespace {

namespace fs = std::filesystem;

// Listens on a port that nobody else has, until it goes.
class Listener {
 public:
  Listener() {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (::bind(fd_.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(fd_.get(), 1) != 0 ||
        ::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0)
      throw std::system_error(errno, std::generic_category(), "listener");
    endpoint = "tcp://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }
  std::string endpoint;

 private:
  UniqueFd fd_{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
};

std::string free_endpoint() { return Listener().endpoint; }

class SetupTest : public testing::Test {
 protected:
  Home home() const { return Home(scratch_ / "home"); }
  void init(const std::string& name, const fs::path& store, const std::string& listen = "") const {
    init_data_set(home(), {name, store, "alpha", listen});
  }
  std::string setting(const std::string& name, const char* key) const {
    return OpenState(home().paths(name)).state.setting(key);
  }
  Scratch scratch_;
};

TEST_F(SetupTest, InitAdoptsADirectoryWithoutTouchingItsFiles) {
  const auto store = scratch_.directory("data");
  scratch_.file("data/file", "content");
  const auto endpoint = free_endpoint();
  init("projects", store, endpoint);
  EXPECT_TRUE(fs::exists(store / "file"));
  for (const char* part : {"tree", "parked", "orphans"})
    EXPECT_TRUE(fs::is_directory(store / ".sharefs" / part));
  struct stat status {};
  ASSERT_EQ(stat((store / ".sharefs").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  ASSERT_EQ(stat(home().paths("projects").folder.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  EXPECT_EQ(read_store_marker(store), setting("projects", "data_set_id"));
  EXPECT_EQ(setting("projects", "store"), store.string());
  EXPECT_EQ(setting("projects", "site"), "alpha");
  EXPECT_EQ(setting("projects", "endpoint"), endpoint);
  EXPECT_EQ(setting("projects", "secret_key").size(), 40u);
  OpenState open(home().paths("projects"));
  EXPECT_EQ(open.state.ownership().owner, "alpha");
  EXPECT_EQ(open.state.ownership().epoch, 1u);
}

TEST_F(SetupTest, InitTwiceSaysThatItWasDone) {
  const auto store = scratch_.directory("data");
  init("projects", store);
  EXPECT_TRUE(error_of([&] { init("projects", store); }).starts_with("already initialised"));
}

TEST_F(SetupTest, OneOfSeveralInitsOfOneStoreHasIt) {
  for (int round = 0; round < 20; ++round) {
    const auto store = scratch_.directory("data" + std::to_string(round));
    std::atomic<int> ready = 0;
    std::atomic<int> succeeded = 0;
    std::vector<std::thread> threads;
    for (const char* name : {"one", "two"}) {
      threads.emplace_back([&, name] {
        const Home home(scratch_ / fmt::format("{}{}", name, round));
        for (++ready; ready != 2;) {
        }
        try {
          init_data_set(home, {"d", store, "alpha", ""});
          ++succeeded;
        } catch (const std::exception&) {
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(succeeded, 1);
  }
}

TEST_F(SetupTest, AnInterruptedInitIsCompletedWithTheSameIdentity) {
  const auto store = scratch_.directory("data");
  init("projects", store);
  const std::string id = setting("projects", "data_set_id");
  const std::string key = setting("projects", "public_key");
  OpenState(home().paths("projects"))
      .state.set_setting("data_set", "");  // as if it had ended just before its last step
  EXPECT_FALSE(home().has("projects"));
  init("projects", store);
  EXPECT_EQ(setting("projects", "data_set_id"), id);
  EXPECT_EQ(setting("projects", "public_key"), key);
}

TEST_F(SetupTest, InitRefusesWhatIsNoFreshDirectory) {
  const auto store = scratch_.directory("data");
  scratch_.directory("data/sub");
  init("projects", store);
  EXPECT_NE(error_of([&] { init("other", store); }).find("store of another data set"), std::string::npos);
  EXPECT_NE(error_of([&] { init("other", store / "sub"); }).find("lies inside"), std::string::npos);
  EXPECT_NE(error_of([&] { init("other", scratch_ / "missing"); }).find("No such file"), std::string::npos);
  EXPECT_NE(error_of([&] { init("other", scratch_.file("file")); }).find("not a directory"),
            std::string::npos);
  EXPECT_NE(error_of([&] { init("other", scratch_.folder()); }).find("state folder"), std::string::npos);
  EXPECT_THROW(init("a/b", scratch_.directory("b")), UsageError);
  EXPECT_FALSE(fs::exists(home().paths("other").folder));
}

TEST_F(SetupTest, InitRefusesWhatHoldsTheStoreOfAnotherDataSet) {
  init("projects", scratch_.directory("data/inner"));
  const auto error = error_of([&] { init("other", scratch_ / "data"); });
  EXPECT_NE(error.find("data/inner, which is the store of a data set already"), std::string::npos) << error;
  EXPECT_FALSE(fs::exists(scratch_ / "data/.sharefs"));
  fs::remove_all(scratch_ / "data/inner/.sharefs");  // it is not any more
  init("other", scratch_ / "data");
}

TEST_F(SetupTest, AnOldImageIsNotCalledUnwanted) {
  const auto store = scratch_.directory("data");
  init("projects", store);
  const auto refused = [&] { return error_of([&] { init("other", store); }); };
  EXPECT_NE(refused().find("delete that if the data set is not wanted"), std::string::npos) << refused();
  scratch_.file("data/.sharefs/tree/file");
  EXPECT_NE(refused().find("data/.sharefs/tree holds files of it: move out"), std::string::npos) << refused();
}

TEST_F(SetupTest, AnAddressAtWhichThisMachineCannotListenIsRefusedBeforeAnythingIsMade) {
  const auto store = scratch_.directory("data");
  const Listener somebody;
  // 192.0.2.0/24 is nobody's (RFC 5737).
  for (const std::string& wrong : {std::string("tcp://192.0.2.1:7440"), somebody.endpoint}) {
    const auto error = error_of([&] { init("projects", store, wrong); });
    EXPECT_TRUE(error.starts_with("cannot listen on " + wrong)) << error;
    EXPECT_NE(error.find("--listen"), std::string::npos) << error;
  }
  EXPECT_TRUE(fs::is_empty(store));
  EXPECT_FALSE(fs::exists(home().paths("projects").folder));
  init("projects", store, free_endpoint());
  EXPECT_NE(error_of([&] { make_invitation(home().paths("projects"), somebody.endpoint); }).find("--listen"),
            std::string::npos);
}

TEST_F(SetupTest, TwoDataSetsOfOneMachineDoNotGetOnePort) {
  const auto endpoint = free_endpoint();
  init("projects", scratch_.directory("data"), endpoint);
  EXPECT_NE(error_of([&] { init("other", scratch_.directory("more"), endpoint); }).find("\"projects\""),
            std::string::npos);
  EXPECT_EQ(error_of([&] { make_invitation(home().paths("projects"), endpoint); }), "");
}

TEST_F(SetupTest, APrivateAreaThatSomebodyElseMadeIsNotTaken) {
  const auto store = scratch_.directory("data");
  const auto refused = [&] { return error_of([&] { init("projects", store); }).find("see who made it"); };
  fs::create_directory_symlink(scratch_.directory("victim"), store / ".sharefs");
  EXPECT_NE(refused(), std::string::npos);
  fs::remove(store / ".sharefs");
  fs::create_directory(store / ".sharefs");
  fs::permissions(store / ".sharefs", fs::perms::owner_all | fs::perms::group_exec);
  EXPECT_NE(refused(), std::string::npos);
  if (::geteuid() == 0) {
    fs::permissions(store / ".sharefs", fs::perms::owner_all);
    ASSERT_EQ(::chown((store / ".sharefs").c_str(), 65534, 65534), 0);
    EXPECT_NE(refused(), std::string::npos);
  }
}

TEST_F(SetupTest, AMarkerIsNotWaitedForNorFollowedNorReadAtLength) {
  const auto store = scratch_.directory("data/inner");
  for (const auto& place : {scratch_ / "data", store}) {
    fs::create_directory(place / ".sharefs");
    fs::permissions(place / ".sharefs", fs::perms::owner_all);
    ASSERT_EQ(::mkfifo((place / ".sharefs/data_set").c_str(), 0666), 0);
  }
  EXPECT_NE(error_of([&] { init("projects", store); }).find("store of another data set"), std::string::npos);
  fs::remove_all(store / ".sharefs");
  EXPECT_EQ(error_of([&] { init("projects", store); }), "");
  const auto marker = scratch_ / "data/.sharefs/data_set";
  fs::remove(marker);
  fs::create_symlink(store / ".sharefs/data_set", marker);
  EXPECT_EQ(read_store_marker(scratch_ / "data"), std::nullopt);
  fs::remove(marker);
  scratch_.file("data/.sharefs/data_set", std::string(1u << 20, '1'));
  EXPECT_EQ(read_store_marker(scratch_ / "data").value_or("").size(), 32u);
}

TEST_F(SetupTest, InitDoesNotTakeOverWhatAJoinHasBegun) {
  const auto store = scratch_.directory("data");
  init("projects", store);
  OpenState(home().paths("projects")).state.set_setting("data_set", "");
  OpenState(home().paths("projects")).state.set_setting("began", "join");
  EXPECT_NE(error_of([&] { init("projects", store); }).find("was begun"), std::string::npos);
}

TEST_F(SetupTest, AddressesSayWhereToBindAndWhereToConnect) {
  EXPECT_EQ(parse_address("tcp://10.0.0.1:7440").listen, "tcp://10.0.0.1:7440");
  EXPECT_EQ(parse_address("tcp://10.0.0.1:7440").endpoint, "tcp://10.0.0.1:7440");
  EXPECT_EQ(parse_address("tcp://*:7440").listen, "tcp://*:7440");
  EXPECT_EQ(parse_address("tcp://*:7440").endpoint, "tcp://" + host_name() + ":7440");
  EXPECT_EQ(parse_address("tcp://0.0.0.0:7440").endpoint, "tcp://" + host_name() + ":7440");
  EXPECT_EQ(parse_address("tcp://alpha.example:7440").listen, "tcp://*:7440");
  EXPECT_EQ(parse_address("tcp://alpha.example:7440").endpoint, "tcp://alpha.example:7440");
  EXPECT_EQ(parse_address("tcp://localhost:7440").listen, "tcp://127.0.0.1:7440");
  EXPECT_EQ(parse_address("tcp://[::1]:7440").listen, "tcp://[::1]:7440");
  for (const char* wrong :
       {"", "7440", "host:7440", "tcp://host", "tcp://:7440", "tcp://host:0", "tcp://host:65536",
        "tcp://host:x", "udp://host:1", "tcp://a/b:1", "tcp://a b:1", "tcp://be+ta:1", "tcp://bêta:1"}) {
    EXPECT_THROW(parse_address(wrong), UsageError) << wrong;
  }
}

TEST_F(SetupTest, InviteNeedsAnAddressAndRegistersTheKey) {
  init("projects", scratch_.directory("data"));
  const DataSetPaths paths = home().paths("projects");
  EXPECT_NE(error_of([&] { make_invitation(paths, std::nullopt); }).find("does not listen"),
            std::string::npos);
  const auto endpoint = free_endpoint();
  const Token token = make_invitation(paths, endpoint);
  EXPECT_EQ(token.data_set, "projects");
  EXPECT_EQ(token.endpoint, endpoint);
  EXPECT_EQ(std::to_string(token.data_set_id), setting("projects", "data_set_id"));
  EXPECT_EQ(token.server_public_key, setting("projects", "public_key"));
  OpenState open(paths);
  EXPECT_EQ(open.state.invitations(token.expires - 1), std::vector<std::string>{token.invitation.public_key});
  EXPECT_TRUE(open.state.invitations(token.expires + 1).empty());
}

TEST_F(SetupTest, JoinRefusesBeforeItAsksAnybody) {
  init("projects", scratch_.directory("data"), free_endpoint());
  Token token = make_invitation(home().paths("projects"), std::nullopt);
  const Home other(scratch_ / "other");
  const auto join = [&](const Home& at, const Token& with, const fs::path& store) {
    return error_of([&] { join_data_set(at, {encode_token(with), store, "beta", free_endpoint()}); });
  };
  EXPECT_TRUE(join(home(), token, scratch_ / "b").starts_with("already joined"));
  scratch_.directory("full");
  scratch_.file("full/file");
  EXPECT_NE(join(other, token, scratch_ / "full").find("not empty"), std::string::npos);
  init("another", scratch_.directory("another"));
  EXPECT_NE(join(other, token, scratch_ / "another").find("another data set"), std::string::npos);
  scratch_.directory("disk/lost+found");
  EXPECT_NE(join(other, token, scratch_ / "disk").find("give a subdirectory"), std::string::npos);
  scratch_.file("disk/file");
  EXPECT_EQ(join(other, token, scratch_ / "disk").find("give a subdirectory"), std::string::npos);
  token.expires = 1;
  EXPECT_NE(join(other, token, scratch_ / "b").find("expired"), std::string::npos);
}

TEST_F(SetupTest, ARefusedJoinLeavesNothingBehind) {
  init("projects", scratch_.directory("data"), free_endpoint());
  Token token = make_invitation(home().paths("projects"), std::nullopt);
  const Home other(scratch_ / "deep/other");
  const auto join = [&](const fs::path& store) {
    return error_of([&] { join_data_set(other, {encode_token(token), store, "beta", free_endpoint()}); });
  };
  EXPECT_NE(join(scratch_ / "data/inside/store").find("lies inside"), std::string::npos);
  EXPECT_FALSE(fs::exists(scratch_ / "data/inside"));
  EXPECT_FALSE(fs::exists(scratch_ / "deep"));
  const auto there = scratch_.directory("there");
  token.endpoint = "nobody";
  EXPECT_NE(join(there), "");
  EXPECT_TRUE(fs::is_empty(there));
  EXPECT_FALSE(fs::exists(scratch_ / "deep"));
}

}  // namespace
}  // namespace sharefs
