// fsbench LABEL=DIR...: what single operations cost on several file systems.
//
// Each round does the same on every file system, one after the other, so that a slow moment of the machine
// hits all. A figure is the median over the rounds of the median over the operations of a round, in
// microseconds. Prints JSON: {operation: {label: microseconds}}.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace sharefs {
namespace {

constexpr std::size_t kSmall = 4096;
constexpr std::size_t kLarge = 1 << 20;
constexpr unsigned kBlocks = 1024;  // of kSmall in the data file
constexpr unsigned kLargeOps = 16;

struct FileSystem {
  std::string label, directory;
};

using Figures =
    std::map<std::string, std::map<std::string, std::vector<double>>>;  // operation, label, rounds

void check(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what + ": " + std::strerror(errno));
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<long>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Names and inodes are forgotten by the kernel, so that the next look goes to the file system.
void forget_names() {
  int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  if (write(fd, "2", 1) < 0) std::perror("drop_caches");
  close(fd);
}

class Round {
 public:
  Round(const FileSystem& where, unsigned files, Figures& figures)
      : where_(where), directory_(where.directory + "/bench"), files_(files), figures_(figures) {}

  void names() {
    mkdir(directory_.c_str(), 0755);
    const std::vector<char> data(kSmall, 'x');
    measure("create", files_, [&](unsigned i) {
      int fd = open(name("f", i).c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
      check(fd >= 0 && write(fd, data.data(), data.size()) == kSmall && close(fd) == 0, "create");
    });
    measure("rename", files_,
            [&](unsigned i) { check(rename(name("f", i).c_str(), name("g", i).c_str()) == 0, "rename"); });
    forget_names();
    struct stat found {};
    measure("stat", files_, [&](unsigned i) { check(lstat(name("g", i).c_str(), &found) == 0, "stat"); });
    measure("stat again", files_,
            [&](unsigned i) { check(lstat(name("g", i).c_str(), &found) == 0, "stat"); });
    std::vector<char> buffer(kSmall);
    measure("open+read+close", files_, [&](unsigned i) {
      int fd = open(name("g", i).c_str(), O_RDONLY | O_CLOEXEC);
      check(fd >= 0 && read(fd, buffer.data(), buffer.size()) == kSmall && close(fd) == 0, "open+read+close");
    });
    measure("unlink", files_, [&](unsigned i) { check(unlink(name("g", i).c_str()) == 0, "unlink"); });
  }

  void data() {
    const std::string path = directory_ + "/data";
    int fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
    check(fd >= 0 && ftruncate(fd, kBlocks * kSmall) == 0, "data file");
    std::vector<char> buffer(kLarge, 'y');
    auto small_at = [](unsigned i) { return static_cast<off_t>((i * 661u % kBlocks) * kSmall); };
    auto large_at = [](unsigned i) { return static_cast<off_t>(i % (kBlocks / 256) * kLarge); };
    // Written once beforehand: what is measured is the request, not the allocation of pages and blocks.
    for (unsigned i = 0; i < kBlocks / 256; ++i)
      check(pwrite(fd, buffer.data(), kLarge, large_at(i)) == kLarge, "write");
    measure("write 1 MiB", kLargeOps, [&](unsigned i) {
      check(pwrite(fd, buffer.data(), kLarge, large_at(i)) == kLarge, "write 1 MiB");
    });
    measure("write 4k", files_,
            [&](unsigned i) { check(pwrite(fd, buffer.data(), kSmall, small_at(i)) == kSmall, "write 4k"); });
    measure("read 1 MiB", kLargeOps, [&](unsigned i) {
      check(pread(fd, buffer.data(), kLarge, large_at(i)) == kLarge, "read 1 MiB");
    });
    measure("read 4k", files_,
            [&](unsigned i) { check(pread(fd, buffer.data(), kSmall, small_at(i)) == kSmall, "read 4k"); });
    close(fd);
    unlink(path.c_str());
    rmdir(directory_.c_str());
  }

 private:
  std::string name(const char* kind, unsigned i) const { return directory_ + "/" + kind + std::to_string(i); }

  void measure(const char* operation, unsigned count, const std::function<void(unsigned)>& perform) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> microseconds;
    microseconds.reserve(count);
    for (unsigned i = 0; i < count; ++i) {
      const auto start = Clock::now();
      perform(i);
      microseconds.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    figures_[operation][where_.label].push_back(median(std::move(microseconds)));
  }

  const FileSystem& where_;
  std::string directory_;
  unsigned files_;
  Figures& figures_;
};

int run(int argc, char** argv) {
  unsigned rounds = 9, files = 400;
  std::vector<FileSystem> systems;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto equals = word.find('=');
    if (equals == std::string::npos)
      throw std::invalid_argument("usage: fsbench [rounds=N] [files=N] LABEL=DIR...");
    const std::string key = word.substr(0, equals), value = word.substr(equals + 1);
    if (key == "rounds") {
      rounds = static_cast<unsigned>(std::stoul(value));
    } else if (key == "files") {
      files = static_cast<unsigned>(std::stoul(value));
    } else {
      systems.push_back({key, value});
    }
  }
  Figures figures;
  for (unsigned round = 0; round < rounds + 1; ++round) {
    if (round == 1) figures.clear();  // the first one warms everything up
    for (const FileSystem& where : systems) {
      Round one(where, files, figures);
      one.names();
      one.data();
    }
  }
  nlohmann::json out;
  for (const auto& [operation, labels] : figures)
    for (const auto& [label, values] : labels) out[operation][label] = median(values);
  std::printf("%s\n", out.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace sharefs

int main(int argc, char** argv) {
  try {
    return sharefs::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fsbench: %s\n", error.what());
    return 1;
  }
}
