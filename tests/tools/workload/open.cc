// Modes that hold something open: unlinked files, a removed working directory, descriptors whose stat must
// not change.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {
namespace {

void wait_a_little() { std::this_thread::sleep_for(std::chrono::milliseconds(5)); }

// What must stay the same of a file that nobody changes.
bool same(const struct stat& a, const struct stat& b) {
  auto equal = [](const timespec& x, const timespec& y) {
    return x.tv_sec == y.tv_sec && x.tv_nsec == y.tv_nsec;
  };
  return a.st_ino == b.st_ino && a.st_mode == b.st_mode && a.st_nlink == b.st_nlink && a.st_uid == b.st_uid &&
         a.st_gid == b.st_gid && a.st_size == b.st_size && a.st_rdev == b.st_rdev &&
         equal(a.st_mtim, b.st_mtim) && equal(a.st_ctim, b.st_ctim);
}

std::string describe(const struct stat& s) {
  return "ino " + std::to_string(s.st_ino) + " mode " + std::to_string(s.st_mode) + " nlink " +
         std::to_string(s.st_nlink) + " size " + std::to_string(s.st_size) + " mtime " +
         std::to_string(s.st_mtim.tv_sec) + "." + std::to_string(s.st_mtim.tv_nsec) + " ctime " +
         std::to_string(s.st_ctim.tv_sec) + "." + std::to_string(s.st_ctim.tv_nsec);
}

}  // namespace

void run_open_unlinked(const Options& options, Report& report) {
  const std::string path = options.dirs.at(0) + "/unlinked-" + options.id;
  const std::uint64_t writer = hash_of(options.id);
  File file = open_file(report, path, O_RDWR | O_CREAT | O_EXCL);
  report.run("unlink", [&] { return unlink(path.c_str()); });
  struct stat first {};
  report.run("fstat", [&] { return fstat(file.fd(), &first); });
  std::vector<std::uint64_t> seqs(options.blocks);
  std::vector<char> data(options.block);
  std::mt19937_64 random(options.seed);
  for (std::uint64_t seq = 1; !report.stopped() && !report.failed(); ++seq) {
    report.pace();
    const std::size_t index = random() % options.blocks;
    const auto at = static_cast<off_t>(index * options.block);
    fill_block(data, writer, 0, index, seq);
    report.run("pwrite", [&] { return pwrite(file.fd(), data.data(), data.size(), at); });
    seqs[index] = seq;
    const std::size_t other = random() % options.blocks;
    if (seqs[other] != 0) {
      report.run("pread", [&] {
        return pread(file.fd(), data.data(), data.size(), static_cast<off_t>(other * options.block));
      });
      if (block_seq(data, writer, 0, other) != static_cast<std::int64_t>(seqs[other]))
        report.fail("an unlinked file lost write " + std::to_string(seqs[other]));
    }
    struct stat now {};
    report.run("fstat", [&] { return fstat(file.fd(), &now); });
    if (now.st_ino != first.st_ino || now.st_nlink != 0)
      report.fail("an unlinked file is now " + describe(now) + ", it was " + describe(first));
  }
}

void run_removed_directory(const Options& options, Report& report) {
  const std::string path = options.dirs.at(0) + "/removed-" + options.id;
  report.run("mkdir", [&] { return mkdir(path.c_str(), 0755); });
  report.run("chdir", [&] { return chdir(path.c_str()); });
  report.run("rmdir", [&] { return rmdir(path.c_str()); });
  struct stat first {};
  report.run("stat", [&] { return stat(".", &first); });
  while (!report.stopped() && !report.failed()) {
    wait_a_little();
    struct stat now {};
    report.run("stat", [&] { return stat(".", &now); });
    if (now.st_ino != first.st_ino || now.st_nlink != first.st_nlink)
      report.fail("the removed directory is now " + describe(now) + ", it was " + describe(first));
    if (report.run(
            "open", [&] { return open("new", O_CREAT | O_WRONLY | O_CLOEXEC, 0644); }, ENOENT) >= 0)
      report.fail("a file could be made in a removed directory");
    if (report.run(
            "lstat", [&] { return lstat("new", &now); }, ENOENT) == 0)
      report.fail("a removed directory has an entry");
  }
}

// stat by name and by descriptor of files that nobody changes, against what they were at the start.
void run_stat_holder(const Options& options, Report& report) {
  struct Held {
    std::string path;
    File file;
    struct stat first;
  };
  std::vector<Held> held;
  for (unsigned i = 0; i < options.files; ++i) {
    const std::string path = options.dirs.at(0) + "/h-" + options.id + "-" + std::to_string(i);
    {
      File made = open_file(report, path, O_RDWR | O_CREAT | O_TRUNC, 0600 + (i % 8) * 011);
      report.run("write", [&] { return pwrite(made.fd(), path.data(), path.size(), i * 1000L); });
    }
    held.push_back({path, open_file(report, path, O_RDONLY), {}});
    report.run("fstat", [&] { return fstat(held.back().file.fd(), &held.back().first); });
  }
  while (!report.stopped() && !report.failed()) {
    for (const Held& one : held) {
      struct stat by_name {
      }, by_descriptor{};
      report.run("stat", [&] { return stat(one.path.c_str(), &by_name); });
      report.run("fstat", [&] { return fstat(one.file.fd(), &by_descriptor); });
      for (const struct stat& now : {by_name, by_descriptor})
        if (!same(now, one.first))
          report.fail(one.path + " is now " + describe(now) + ", it was " + describe(one.first));
    }
    wait_a_little();
  }
}

}  // namespace sharefs::workload
