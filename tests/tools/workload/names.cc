// Modes that work on names: renames, creation and removal, directory streams.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>
#include <thread>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {
namespace {

using Random = std::mt19937_64;

// The renamers' world: two directories with twice as many places as files.
std::string place(const Options& options, std::uint64_t number) {
  return options.dirs.at(0) + "/r" + std::to_string(number % 2) + "/place-" + std::to_string(number / 2);
}

std::set<std::string> list(Report& report, const std::string& directory) {
  std::set<std::string> names;
  DIR* stream = opendir(directory.c_str());
  if (stream == nullptr) {
    report.fail("opendir " + directory + ": " + std::strerror(errno));
    return names;
  }
  while (const dirent* entry = readdir(stream)) {
    const std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    const bool is_new = names.insert(name).second;
    if (!is_new) report.fail("listed twice: " + name);
  }
  closedir(stream);
  return names;
}

}  // namespace

void prepare_renamer(const Options& options, Report& report) {
  for (const char* name : {"/r0", "/r1"})
    report.run("mkdir", [&] { return mkdir((options.dirs.at(0) + name).c_str(), 0755); });
  for (unsigned i = 0; i < options.files; ++i) {
    File file = open_file(report, place(options, i * 2ull), O_WRONLY | O_CREAT | O_EXCL);
    report.run("write", [&] { return write(file.fd(), &i, sizeof i); });
  }
}

// Moves and exchanges files whose places other renamers change too: a missing or taken place is no error, but
// no file may ever be replaced.
void run_renamer(const Options& options, Report& report) {
  Random random(options.seed);
  while (!report.stopped()) {
    const std::string from = place(options, random() % (options.files * 4ull));
    const std::string to = place(options, random() % (options.files * 4ull));
    const unsigned flags = random() % 2 == 0 ? RENAME_NOREPLACE : RENAME_EXCHANGE;
    report.pace();
    if (from == to) continue;
    errno = 0;
    report.run("renameat2", [&] {
      int result = renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags);
      return result != 0 && (errno == ENOENT || (errno == EEXIST && flags == RENAME_NOREPLACE)) ? 0 : result;
    });
  }
}

void verify_renamer(const Options& options, Report& report) {
  std::vector<unsigned> copies(options.files);
  for (const char* name : {"/r0", "/r1"}) {
    const std::string directory = options.dirs.at(0) + name;
    for (const std::string& entry : list(report, directory)) {
      const std::string path =
          directory + "/" + entry;  // NOLINT(performance-inefficient-string-concatenation)
      File file = open_file(report, path, O_RDONLY);
      unsigned content = ~0u;
      report.run("read", [&] { return read(file.fd(), &content, sizeof content); });
      if (content >= options.files) return report.fail("a wrong content: " + path);
      ++copies[content];
    }
  }
  for (unsigned i = 0; i < options.files; ++i)
    if (copies[i] != 1)
      report.fail("file " + std::to_string(i) + " is there " + std::to_string(copies[i]) + " times");
}

namespace {

// One directory of its own, in which every outcome is known beforehand.
class Creator {
 public:
  Creator(const Options& options, Report& report)
      : report_(report), random_(options.seed), directory_(options.dirs.at(0) + "/c-" + options.id) {
    report_.run(
        "mkdir", [&] { return mkdir(directory_.c_str(), 0755); }, EEXIST);
  }

  void step() {
    const std::string name = "n" + std::to_string(random_() % 40);
    const std::string path = directory_ + "/" + name;
    if (names_.count(name) == 0) {
      create(name, path);
    } else if (names_[name] == S_IFREG && random_() % 2 == 0) {
      replace(path);
    } else {
      remove(name, path);
    }
    if (random_() % 50 == 0) check();
  }

  void check() {
    std::set<std::string> wanted;
    for (const auto& [name, type] : names_) wanted.insert(name);
    if (list(report_, directory_) != wanted) report_.fail(directory_ + " does not list what was made in it");
  }

 private:
  void create(const std::string& name, const std::string& path) {
    static constexpr mode_t kTypes[] = {S_IFREG, S_IFREG, S_IFDIR, S_IFLNK, S_IFIFO};
    const mode_t type = kTypes[random_() % std::size(kTypes)];
    report_.run("create", [&] {
      if (type == S_IFDIR) return mkdir(path.c_str(), 0750);
      if (type == S_IFLNK) return symlink("some/where", path.c_str());
      if (type == S_IFIFO) return mkfifo(path.c_str(), 0640);
      int fd = open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0640);
      if (fd >= 0) close(fd);
      return fd < 0 ? -1 : 0;
    });
    names_[name] = type;
    struct stat found {};
    if (report_.run("lstat", [&] { return lstat(path.c_str(), &found); }) == 0 &&
        (found.st_mode & S_IFMT) != type)
      report_.fail(path + " is of another type than what was made");
    // A second one must be refused: a request performed twice would have shown as EEXIST above.
    if (report_.run(
            "mkdir", [&] { return mkdir(path.c_str(), 0755); }, EEXIST) == 0)
      report_.fail(path + " could be made twice");
  }

  // As editors save: a new file is renamed over the old one.
  void replace(const std::string& path) {
    const std::string fresh = directory_ + "/fresh";
    const std::string text = std::to_string(random_());
    {
      File file = open_file(report_, fresh, O_CREAT | O_EXCL | O_WRONLY);
      report_.run("write", [&] { return write(file.fd(), text.data(), text.size()); });
    }
    report_.run("rename", [&] { return rename(fresh.c_str(), path.c_str()); });
    File file = open_file(report_, path, O_RDONLY);
    std::string found(text.size(), '\0');
    report_.run("read", [&] { return read(file.fd(), found.data(), found.size()); });
    if (found != text) report_.fail(path + " is not what was renamed to it");
  }

  void remove(const std::string& name, const std::string& path) {
    const mode_t type = names_[name];
    report_.run("remove", [&] { return type == S_IFDIR ? rmdir(path.c_str()) : unlink(path.c_str()); });
    names_.erase(name);
    struct stat found {};
    if (report_.run(
            "lstat", [&] { return lstat(path.c_str(), &found); }, ENOENT) == 0)
      report_.fail(path + " is still there after its removal");
  }

  Report& report_;
  Random random_;
  std::string directory_;
  std::map<std::string, mode_t> names_;
};

// Reads a directory in small pieces, with pauses, and remembers the offsets.
class Stream {
 public:
  explicit Stream(File file) : file_(std::move(file)) {}

  std::multiset<std::string> read_from(Report& report, off_t offset) {
    std::multiset<std::string> names;
    lseek(file_.fd(), offset, SEEK_SET);
    alignas(8) char buffer[1024];
    for (;;) {
      long got = report.run("getdents64",
                            [&] { return syscall(SYS_getdents64, file_.fd(), buffer, sizeof buffer); });
      if (got <= 0) return names;
      for (long at = 0; at < got;) {
        // linux_dirent64: u64 ino, s64 offset, u16 length, u8 type, name
        std::int64_t next = 0;
        std::uint16_t length = 0;
        std::memcpy(&next, buffer + at + 8, sizeof next);
        std::memcpy(&length, buffer + at + 16, sizeof length);
        const std::string name = buffer + at + 19;
        if (name.starts_with("stable-")) {
          names.insert(name);
          offsets_[name] = next;
        }
        at += length;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  off_t offset_after(const std::string& name) const { return offsets_.at(name); }

 private:
  File file_;
  std::map<std::string, off_t> offsets_;
};

void churn(const std::string& directory, std::uint64_t seed, const std::atomic<bool>& stop, Report& report) {
  Random random(seed);
  while (!stop) {
    const std::string path = directory + "/churn-" + std::to_string(random() % 60);
    report.run("churn", [&] {
      int fd = open(path.c_str(), O_CREAT | O_EXCL | O_CLOEXEC, 0644);
      if (fd >= 0) return close(fd);
      return unlink(path.c_str());
    });
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
}

}  // namespace

void run_creator(const Options& options, Report& report) {
  Creator creator(options, report);
  while (!report.stopped()) {
    report.pace();
    creator.step();
  }
  creator.check();
}

// Names that are there all the time are listed exactly once, whatever comes and goes (through the last --dir)
// meanwhile, and reading goes on from a remembered offset with exactly what followed it.
void run_directory_stream(const Options& options, Report& report) {
  const std::string name = "/s-" + options.id;
  const std::string directory = options.dirs.at(0) + name;
  report.run("mkdir", [&] { return mkdir(directory.c_str(), 0755); });
  const unsigned stable = options.files * 16;
  for (unsigned i = 0; i < stable; ++i)
    open_file(report, directory + "/stable-" + std::to_string(i), O_CREAT | O_EXCL | O_WRONLY);
  std::atomic<bool> stop{false};
  Options quiet = options;
  Report churn_report(quiet);
  std::thread churner([&] { churn(options.dirs.back() + name, options.seed, stop, churn_report); });
  Stream stream(open_file(report, directory, O_RDONLY | O_DIRECTORY));
  std::uint64_t passes = 0;
  while (!report.stopped() && !report.failed()) {
    auto all = stream.read_from(report, 0);
    if (all.size() != stable || std::set(all.begin(), all.end()).size() != stable)
      report.fail("a pass listed " + std::to_string(all.size()) + " of " + std::to_string(stable) +
                  " stable names");
    if (all.empty()) break;
    const std::string middle = *std::next(all.begin(), static_cast<long>(all.size() / 2));
    const auto rest = stream.read_from(report, stream.offset_after(middle));
    const auto again = stream.read_from(report, stream.offset_after(middle));
    if (rest != again || rest.count(middle) != 0) report.fail("reading on from an offset gave two results");
    ++passes;
  }
  stop = true;
  churner.join();
  if (churn_report.failed()) report.fail("churn: " + churn_report.json());
  report.put("passes", passes);
}

}  // namespace sharefs::workload
