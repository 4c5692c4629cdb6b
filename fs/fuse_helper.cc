#include "fs/fuse_helper.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

#include "fs/inode_table.h"

namespace sharefs {
namespace {

constexpr const char* kHelper = "fusermount3";
constexpr int kHelperSocket = 3;  // where the helper finds its socket

std::string error_text(int error) { return std::generic_category().message(error); }

std::string read_all(int fd) {
  std::string text;
  std::array<char, 512> piece{};
  while (true) {
    const ssize_t got = ::read(fd, piece.data(), piece.size());
    if (got > 0) text.append(piece.data(), static_cast<std::size_t>(got));
    if (got == 0 || (got < 0 && errno != EINTR)) break;
  }
  const std::size_t end = text.find('\n');
  return end == std::string::npos ? text : text.substr(0, end);
}

}  // namespace

FusermountResult run_fusermount(std::vector<std::string> arguments, int socket) {
  arguments.insert(arguments.begin(), kHelper);
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::string variable = "_FUSE_COMMFD=" + std::to_string(kHelperSocket);
  std::string path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  std::array<char*, 3> environment{path.data(), socket >= 0 ? variable.data() : nullptr, nullptr};

  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return {errno, error_text(errno)};
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, write_end.get(), STDERR_FILENO);
  if (socket >= 0) posix_spawn_file_actions_adddup2(&actions, socket, kHelperSocket);
  pid_t child = 0;
  const int error = ::posix_spawnp(&child, kHelper, &actions, nullptr, argv.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return {error, std::string(kHelper) + " is not installed (package fuse3)"};
  write_end = UniqueFd();
  FusermountResult result{0, read_all(read_end.get())};
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  return result;
}

}  // namespace sharefs
