// What the store costs without FUSE around it, beside the bare system calls that it cannot do without.
//   store_bench [DIRECTORY]     (default: a temporary one)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fs/live_state.h"
#include "fs/store.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

constexpr int kRounds = 5;
constexpr int kFiles = 4000;

// Time that this thread spent on a core: the same whatever else the machine does.
double now() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}

// The best of several rounds, in microseconds for each operation.
double measure(const std::function<void()>& prepare, const std::function<void(int)>& operation) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    prepare();
    const double start = now();
    for (int i = 0; i < kFiles; ++i) operation(i);
    best = std::min(best, (now() - start) / kFiles);
  }
  return best;
}

struct Bench {
  explicit Bench(const std::filesystem::path& home)
      : directory(home / "store"),
        root(::open(directory.c_str(), O_RDONLY | O_DIRECTORY)),
        inodes(home / "state.db", home / "journal",
               UniqueFd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY))),
        store({.directory = directory, .data_set = "bench"}, inodes, opens, locks, workers) {
    inodes.set_epoch(1);
    outcome_ids.resize(kFiles);
  }

  InodeId ask(std::string_view data = {}) {
    InodeId id = 0;
    store.execute(request, as_bytes(data), [&id](const pb::Outcome& outcome, Bytes) {
      if (outcome.error() != 0) std::printf("error %u\n", outcome.error());
      id = outcome.attr().id();
    });
    return id;
  }
  void line(const char* what, double bare, double mine) {
    std::printf("%-28s %8.2f %8.2f   %.2f\n", what, bare, mine, mine / bare);
  }
  const char* name(int i) {
    std::snprintf(text, sizeof text, "f%d", i);
    return text;
  }

  std::filesystem::path directory;
  UniqueFd root;
  Reactor reactor;
  Workers workers{reactor, 1};
  OpenTable opens;
  LockTable locks;
  InodeTable inodes;
  Store store;
  pb::Request request;
  std::vector<InodeId> outcome_ids;
  char text[32];
  struct statx status {};
};

void run(const std::filesystem::path& home) {
  std::filesystem::create_directories(home / "store");
  Bench b(home);
  const int root = b.root.get();
  constexpr unsigned kMask = STATX_BASIC_STATS | STATX_BTIME;
  const auto nothing = [] {};
  std::printf("%-28s %8s %8s   %s\n", "microseconds of CPU", "bare", "store", "ratio");

  const auto remove_bare = [&] {
    for (int i = 0; i < kFiles; ++i) ::unlinkat(root, b.name(i), 0);
  };
  const double bare_create = measure(remove_bare, [&](int i) {
    const int fd = ::openat(root, b.name(i), O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0644);
    ::statx(fd, "", AT_EMPTY_PATH, kMask, &b.status);
    ::close(fd);
  });
  const auto make_bare = [&] {
    for (int i = 0; i < kFiles; ++i) ::mknodat(root, b.name(i), S_IFREG | 0644, 0);
  };
  const double bare_unlink = measure(make_bare, [&](int i) { ::unlinkat(root, b.name(i), 0); });
  double unlink = 1e9, forget = 1e9;
  const auto remove_stored = [&] {
    if (b.outcome_ids[0] == 0) return;
    const double start = now();
    for (int i = 0; i < kFiles; ++i) {
      b.request.mutable_unlink()->set_parent(kRootInode);
      b.request.mutable_unlink()->set_name(b.name(i));
      b.ask();
    }
    const double middle = now();
    for (int i = 0; i < kFiles; ++i) {
      b.request.mutable_forget()->clear_ids();
      b.request.mutable_forget()->add_ids(b.outcome_ids[static_cast<std::size_t>(i)]);
      b.ask();
    }
    const double end = now();
    unlink = std::min(unlink, (middle - start) / kFiles);
    forget = std::min(forget, (end - middle) / kFiles);
  };
  const double create = measure(remove_stored, [&](int i) {
    pb::Create& op = *b.request.mutable_create();
    op.set_parent(kRootInode);
    op.set_name(b.name(i));
    op.set_mode(S_IFREG | 0644);
    op.set_handle(1);
    op.set_flags(O_RDWR | O_CREAT | O_EXCL);
    b.outcome_ids[static_cast<std::size_t>(i)] = b.ask();
  });
  b.line("create", bare_create, create);
  b.line("unlink", bare_unlink, unlink);
  b.line("forget", bare_unlink, forget);

  b.line("lookup",
         measure(nothing, [&](int i) { ::statx(root, b.name(i), AT_SYMLINK_NOFOLLOW, kMask, &b.status); }),
         measure(nothing, [&](int i) {
           b.request.mutable_lookup()->set_parent(kRootInode);
           b.request.mutable_lookup()->set_name(b.name(i));
           b.ask();
         }));
  const int fd = ::openat(root, "f0", O_RDWR);
  const auto getattr = [&](InodeId id) {
    b.request.mutable_getattr()->set_id(id);
    b.ask();
  };
  const double bare_statx = measure(nothing, [&](int) { ::statx(fd, "", AT_EMPTY_PATH, kMask, &b.status); });
  b.line("getattr, one inode", bare_statx, measure(nothing, [&](int) { getattr(b.outcome_ids[0]); }));
  b.line("getattr, 400 inodes", bare_statx,
         measure(nothing, [&](int i) { getattr(b.outcome_ids[static_cast<std::size_t>(i) % 400]); }));
  b.line("getattr, all cold", bare_statx,
         measure(nothing, [&](int i) { getattr(b.outcome_ids[static_cast<std::size_t>(i)]); }));
  const std::string block(4096, 'x');
  std::string buffer(4096, '\0');
  b.line("write 4k", measure(nothing, [&](int i) { (void)!::pwrite(fd, block.data(), 4096, i * 4096L); }),
         measure(nothing, [&](int i) {
           pb::Write& op = *b.request.mutable_write();
           op.set_id(b.outcome_ids[0]);
           op.set_offset(static_cast<std::uint64_t>(i) * 4096);
           op.set_size(4096);
           b.ask(block);
         }));
  b.line("read 4k", measure(nothing, [&](int i) { (void)!::pread(fd, buffer.data(), 4096, i * 4096L); }),
         measure(nothing, [&](int i) {
           pb::Read& op = *b.request.mutable_read();
           op.set_id(b.outcome_ids[0]);
           op.set_offset(static_cast<std::uint64_t>(i) * 4096);
           op.set_size(4096);
           b.ask();
         }));
  b.line("open, all cold", measure(nothing, [&](int i) { ::close(::openat(root, b.name(i), O_RDONLY)); }),
         measure(nothing, [&](int i) {
           b.request.mutable_open()->set_id(b.outcome_ids[static_cast<std::size_t>(i)]);
           b.request.mutable_open()->set_flags(O_RDONLY);
           b.ask();
         }));
  ::close(fd);
}

}  // namespace
}  // namespace sharefs

int main(int argc, char** argv) {
  if (argc > 1) {
    sharefs::run(argv[1]);
  } else {
    const sharefs::TemporaryDirectory directory;
    sharefs::run(directory.path());
  }
}
