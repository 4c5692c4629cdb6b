#include "cli/control.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "replication/json_line.h"
#include "tests/cli/scratch.h"

namespace sharefs {
namespace {

using nlohmann::json;

// A server on a reactor of its own. «echo» answers at once, «later» after 30 ms, «never» not at all, «throw»
// throws.
class ControlTest : public testing::Test {
 protected:
  ControlTest() : socket_(scratch_ / "control.sock") {
    thread_ = std::thread([this] {
      const ControlServer server(
          socket_, reactor_, [this](const json& request, const ControlServer::Reply& reply) {
            const auto command = request["command"].get<std::string>();
            if (command == "echo") reply(request);
            if (command == "later")
              reactor_.after(std::chrono::milliseconds(30), [request, reply] { reply(request); });
            if (command == "throw") throw std::runtime_error("went wrong");
            if (command == "long") reply({{"text", std::string(8u << 20, 'x')}});
          });
      reactor_.run();
    });
    while (!ControlClient::connect(socket_)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ~ControlTest() override {
    if (thread_.joinable()) end();
  }
  void end() {
    reactor_.stop();
    thread_.join();
  }
  ControlClient connect() { return std::move(*ControlClient::connect(socket_)); }

  // What the server answers to these bytes, one line.
  std::string exchange(const std::string& bytes) {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    socket_.string().copy(address.sun_path, sizeof address.sun_path - 1);
    std::string answer;
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
      [[maybe_unused]] const auto sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      char byte = 0;
      while (recv(fd, &byte, 1, 0) == 1 && byte != '\n') answer += byte;
    }
    close(fd);
    return answer;
  }

  Scratch scratch_;
  std::filesystem::path socket_;
  Reactor reactor_;
  std::thread thread_;
};

TEST_F(ControlTest, ARequestThatIsNestedDeeplyEndsNobody) {
  constexpr std::size_t kDeep = 500'000;
  const std::string nested = std::string(kDeep, '[') + std::string(kDeep, ']');
  EXPECT_EQ(exchange(R"({"command": "echo", "x": )" + nested + "}\n").substr(0, 17), R"({"command":"echo")");
  EXPECT_EQ(connect().ask({{"command", "echo"}}), (json{{"command", "echo"}}));
}

TEST_F(ControlTest, AnswersEachRequestOfAConnectionInTurn) {
  ControlClient client = connect();
  for (int i = 0; i < 10; ++i) {
    const json request = {{"command", i % 2 == 0 ? "echo" : "later"}, {"number", i}};
    EXPECT_EQ(client.ask(request), request);
  }
}

TEST_F(ControlTest, LinesThatAreSentAheadAreAnsweredInTheirOrder) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socket_.string().copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  const std::string lines = "{\"command\":\"later\",\"n\":1}\n{\"command\":\"echo\",\"n\":2}\n";
  ASSERT_EQ(send(fd, lines.data(), lines.size(), 0), static_cast<ssize_t>(lines.size()));
  std::string answers;
  char byte = 0;
  while (std::count(answers.begin(), answers.end(), '\n') < 2 && recv(fd, &byte, 1, 0) == 1) answers += byte;
  close(fd);
  EXPECT_LT(answers.find("\"n\":1"), answers.find("\"n\":2"));
}

TEST_F(ControlTest, ClientsDoNotWaitForEachOther) {
  ControlClient waiting = connect();
  std::thread waiter([&] {
    EXPECT_THROW(waiting.ask({{"command", "never"}}, std::chrono::milliseconds(200)),
                 ControlClient::ConnectionLost);
  });
  std::vector<std::thread> others(8);
  for (auto& other : others) {
    other = std::thread([&] { EXPECT_EQ(connect().ask({{"command", "echo"}})["command"], "echo"); });
  }
  for (auto& other : others) other.join();
  waiter.join();
}

TEST_F(ControlTest, ALongReplyArrivesWhole) {
  EXPECT_EQ(connect().ask({{"command", "long"}})["text"].get<std::string>().size(), 8u << 20);
}

TEST_F(ControlTest, AnExceptionBecomesTheReply) {
  EXPECT_EQ(connect().ask({{"command", "throw"}})["error"], "went wrong");
}

TEST_F(ControlTest, GarbageGetsAnErrorAndTheServerLivesOn) {
  for (const char* garbage : {"hello\n", "[]\n", "{}\n", "{\"command\":1}\n", "\n"}) {
    EXPECT_NE(exchange(garbage).find("error"), std::string::npos) << garbage;
  }
  EXPECT_EQ(exchange(std::string(3u << 20, 'x')), "");  // a line without an end is cut off
  EXPECT_EQ(connect().ask({{"command", "echo"}})["command"], "echo");
}

TEST_F(ControlTest, AClientThatLeavesIsForgotten) {
  {
    ControlClient client = connect();
    EXPECT_THROW(client.ask({{"command", "later"}}, std::chrono::milliseconds(1)),
                 ControlClient::ConnectionLost);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(connect().ask({{"command", "echo"}})["command"], "echo");
}

TEST_F(ControlTest, OnlyItsUserCanConnect) {
  struct stat status {};
  ASSERT_EQ(stat(socket_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
}

TEST_F(ControlTest, TheEndOfTheServerIsNoticed) {
  ControlClient client = connect();
  std::thread asking([&] {
    EXPECT_THROW(client.ask({{"command", "never"}}), ControlClient::ConnectionLost);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  end();
  asking.join();
  EXPECT_FALSE(std::filesystem::exists(socket_));
  EXPECT_FALSE(ControlClient::connect(socket_));
}

TEST(Control, WorksInAFolderWhosePathIsTooLongForASocket) {
  const Scratch scratch;
  const auto folder = scratch.directory(std::string(100, 'a') + "/" + std::string(100, 'b'));
  Reactor reactor;
  const ControlServer server(folder / "control.sock", reactor,
                             [&](const json& request, const ControlServer::Reply& reply) { reply(request); });
  std::thread client([&] {
    EXPECT_EQ(ControlClient::connect(folder / "control.sock")->ask({{"command", "x"}})["command"], "x");
    reactor.stop();
  });
  reactor.run();
  client.join();
}

TEST(Control, NamesThatAreNotUtf8DoNotStopAReply) {
  EXPECT_NE(to_line({{"name", "\xff\xfe"}}).find("name"), std::string::npos);
}

// A command right after the daemon was started, or while it ends.
TEST(WaitForDaemon, WaitsWhileItStartsOrEnds) {
  const Scratch scratch;
  const DataSetPaths paths{scratch.folder()};
  EXPECT_FALSE(wait_for_daemon(paths, std::chrono::seconds(30)));
  Reactor reactor;
  std::thread starting;
  {
    const auto lock = DaemonLock::try_take(paths);
    EXPECT_FALSE(wait_for_daemon(paths, std::chrono::milliseconds(20)));
    starting = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      const ControlServer server(paths.control_socket(), reactor, [](const json&, const auto&) {});
      reactor.run();
    });
    EXPECT_TRUE(wait_for_daemon(paths, std::chrono::seconds(30)));
    reactor.stop();
    starting.join();
  }
  auto lock = DaemonLock::try_take(paths);
  std::thread ending([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    lock.reset();
  });
  EXPECT_FALSE(wait_for_daemon(paths, std::chrono::seconds(30)));
  ending.join();
}

}  // namespace
}  // namespace sharefs
