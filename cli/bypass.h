// Processes that have files of a store open directly, and so see and change it behind the mount's back.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace sharefs {

struct BypassingProcess {
  pid_t pid = 0;
  std::string command;
  std::string how;                // "open file", "working directory", "root", "program", "mapping"
  std::filesystem::path example;  // one of its files
};

// Looks through /proc. Processes of other users are seen by root only.
std::vector<BypassingProcess> find_bypassing(const std::filesystem::path& store);

// One warning on standard error that names them (at most ten).
void warn_of_bypassing(const std::filesystem::path& store);

}  // namespace sharefs
