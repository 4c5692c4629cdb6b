// What a request costs through the whole local path (kernel, front end, coherence, store), next to the bare
// directory: run by hand, as root. `front_end_bench [--unpinned] [DIRECTORY]...` also measures directories
// given, e.g. other mounts.
//
// Client and server are pinned to one core, unless told otherwise: waking a thread on another one costs many
// times what a request does, and would be most of what is measured. Kernel timeouts are 0, so a stat is three
// requests: may this caller search the root, the name, and the attributes.
#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/fs/mounted_store.h"

namespace sharefs {
namespace {

constexpr int kRounds = 3;

void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

void pin_to_one_core() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(0, &cores);
  check(::sched_setaffinity(0, sizeof cores, &cores) == 0, "sched_setaffinity");
}

// Microseconds per call, the best of several rounds.
double cost(int calls, const std::function<void()>& call) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) call();
    const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - start;
    best = std::min(best, spent.count() / calls);
  }
  return best;
}

void measure(const std::string& label, const std::string& directory) {
  const std::string path = directory + "/file", other = directory + "/other";
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  check(static_cast<bool>(fd), path.c_str());
  std::array<char, 4096> small{};
  std::vector<char> large(128 * 1024);
  struct stat status {};
  const double stat_cost = cost(10'000, [&] { check(::stat(path.c_str(), &status) == 0, "stat"); });
  const double fstat_cost = cost(10'000, [&] { check(::fstat(fd.get(), &status) == 0, "fstat"); });
  const double write_cost =
      cost(10'000, [&] { check(::pwrite(fd.get(), small.data(), small.size(), 0) > 0, "write"); });
  const double large_cost =
      cost(2'000, [&] { check(::pwrite(fd.get(), large.data(), large.size(), 0) > 0, "write"); });
  const double open_cost =
      cost(5'000, [&] { check(::close(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) == 0, "open"); });
  const double create_cost = cost(1'000, [&] {
    check(::close(::open(other.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644)) == 0, "create");
    check(::unlink(other.c_str()) == 0, "unlink");
  });
  std::printf("%-24s %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f\n", label.c_str(), stat_cost, fstat_cost, write_cost,
              large_cost, open_cost, create_cost);
}

void run(std::vector<std::string> others) {
  if (std::erase(others, "--unpinned") == 0) pin_to_one_core();
  std::printf("%-24s %8s %8s %8s %8s %8s %8s\n", "us", "stat", "fstat", "4k", "128k", "open", "create");
  MountedStore mounted;
  mounted.spy().set_noting(false);
  mounted.mount();
  measure("the bare directory", mounted.store_path());
  measure("mounted", mounted.mountpoint());
  for (const std::string& other : others) measure(other, other);
}

}  // namespace
}  // namespace sharefs

int main(int argc, char** argv) {
  try {
    sharefs::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "front_end_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
