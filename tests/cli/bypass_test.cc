#include "cli/bypass.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>

#include "tests/cli/scratch.h"

namespace sharefs {
namespace {

// A process that does `something` and then waits to be killed.
class Bystander {
 public:
  explicit Bystander(const std::function<void()>& something) {
    int ready[2];
    if (pipe(ready) != 0) abort();
    pid_ = fork();
    if (pid_ == 0) {
      something();
      [[maybe_unused]] const auto written = write(ready[1], "x", 1);
      for (;;) pause();
    }
    char byte = 0;
    if (read(ready[0], &byte, 1) != 1) abort();
    close(ready[0]);
    close(ready[1]);
  }
  ~Bystander() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Bystander(const Bystander&) = delete;
  Bystander& operator=(const Bystander&) = delete;
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = 0;
};

TEST(Bypass, NobodyWorksInAFreshDirectory) {
  const Scratch scratch;
  EXPECT_TRUE(find_bypassing(scratch.folder()).empty());
}

TEST(Bypass, NamesOpenFilesWorkingDirectoriesAndMappings) {
  const Scratch scratch;
  const auto store = scratch.directory("store");
  const auto file = scratch.file("store/file", "content");
  const auto neighbour = scratch.file("store-not", "content");
  const Bystander opener([&] { [[maybe_unused]] const int fd = open(file.c_str(), O_RDONLY); });
  const Bystander worker([&] { std::filesystem::current_path(store); });
  const Bystander mapper([&] {
    const int fd = open(file.c_str(), O_RDONLY);
    mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
  });
  const Bystander elsewhere([&] { [[maybe_unused]] const int fd = open(neighbour.c_str(), O_RDONLY); });

  const auto found = find_bypassing(store);
  ASSERT_EQ(found.size(), 3u);
  for (const auto& process : found) {
    if (process.pid == opener.pid()) {
      EXPECT_EQ(process.how, "open file");
      EXPECT_EQ(process.example, file);
    } else if (process.pid == worker.pid()) {
      EXPECT_EQ(process.how, "working directory");
    } else {
      EXPECT_EQ(process.pid, mapper.pid());
      EXPECT_EQ(process.how, "mapping");
    }
    EXPECT_FALSE(process.command.empty());
  }
}

// Whoever may make a file in the store chooses what is written on the terminal of who mounts it.
TEST(Bypass, WritesNothingButTextToTheTerminal) {
  const Scratch scratch;
  const auto store = scratch.directory("store");
  const auto file = scratch.file("store/\x1b[2J\nsharefs: all is well", "content");
  const Bystander opener([&] { [[maybe_unused]] const int fd = open(file.c_str(), O_RDONLY); });
  testing::internal::CaptureStderr();
  warn_of_bypassing(store);
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_EQ(text.find('\x1b'), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
}

}  // namespace
}  // namespace sharefs
