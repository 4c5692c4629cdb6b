// The front end on a real mount. Not run where FUSE cannot be mounted.
#include "fs/front_end.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <set>
#include <sstream>

#include "tests/fs/mounted_store.h"

namespace sharefs {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr std::uint64_t kOwnSeq = 1ULL << 62;

// Mounts are this process's own where that is allowed, so that none is left when it crashes.
class OwnMounts : public testing::Environment {
 public:
  void SetUp() override {
    if (::unshare(CLONE_NEWNS) == 0) ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
  }
};
const auto* const own_mounts = testing::AddGlobalTestEnvironment(new OwnMounts);

class FrontEndTest : public testing::Test {
 protected:
  void SetUp() override {
    if (::access("/dev/fuse", F_OK) != 0) GTEST_SKIP() << "there is no /dev/fuse";
    mounted_ = std::make_unique<MountedStore>();
    try {
      mounted_->mount();
    } catch (const std::runtime_error& error) {
      const std::string why = error.what();
      if (why.find("ermission") == std::string::npos && why.find("not installed") == std::string::npos) throw;
      GTEST_SKIP() << why;
    }
  }
  MountedStore& m() { return *mounted_; }

  UniqueFd open(const std::string& name, int flags, mode_t mode = 0644) {
    UniqueFd fd(::open(m().path(name).c_str(), flags | O_CLOEXEC, mode));
    EXPECT_TRUE(fd) << name << ": " << std::strerror(errno);
    return fd;
  }
  void write_file(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }
  static std::string read_file(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }
  static struct stat look(const std::string& path) {
    struct stat status {};
    EXPECT_EQ(::lstat(path.c_str(), &status), 0) << path << ": " << std::strerror(errno);
    return status;
  }
  static bool soon(const std::function<bool()>& condition) {
    for (int i = 0; i < 500 && !condition(); ++i) std::this_thread::sleep_for(10ms);
    return condition();
  }
  // Runs in a process of its own; it may only make system calls.
  static int in_child(const std::function<int()>& body) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(body());
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  std::unique_ptr<MountedStore> mounted_;
};

TEST_F(FrontEndTest, says_in_one_line_why_it_cannot_mount) {
  Reactor reactor;
  const auto why = [&](const fs::path& mountpoint, std::vector<std::string> options) -> std::string {
    try {
      FrontEnd refused({mountpoint, "test", std::move(options)}, reactor, m().spy(), 1, [] {});
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "mounted";
  };
  EXPECT_EQ(why("/nowhere/at/all", {}),
            "cannot mount on /nowhere/at/all: the directory does not exist (create it first)");
  EXPECT_EQ(why("/etc/passwd", {}), "cannot mount on /etc/passwd: not a directory");
  TemporaryDirectory directory;
  EXPECT_NE(why(directory.path(), {"no_such_option"}).find("option"), std::string::npos);
}

TEST_F(FrontEndTest, is_shown_as_a_mount_of_its_data_set) {
  const std::string mounts = read_file("/proc/self/mounts");
  const auto at = mounts.find(" " + m().mountpoint().string() + " ");
  ASSERT_NE(at, std::string::npos);
  const std::string line =
      mounts.substr(mounts.rfind('\n', at) + 1, mounts.find('\n', at) - mounts.rfind('\n', at));
  EXPECT_TRUE(line.starts_with("test ")) << line;
  EXPECT_NE(line.find(" fuse.sharefs "), std::string::npos) << line;
  EXPECT_NE(line.find("default_permissions"), std::string::npos) << line;
}

TEST_F(FrontEndTest, files_directories_and_links_work) {
  write_file(m().path("a"), "hello");
  EXPECT_EQ(read_file(m().below("a")), "hello");
  EXPECT_EQ(read_file(m().path("a")), "hello");
  ASSERT_EQ(::mkdir(m().path("d").c_str(), 0750), 0);
  ASSERT_EQ(::symlink("../a", m().path("d/s").c_str()), 0);
  EXPECT_EQ(fs::read_symlink(m().path("d/s")), "../a");
  EXPECT_EQ(read_file(m().path("d/s")), "hello");
  ASSERT_EQ(::link(m().path("a").c_str(), m().path("d/b").c_str()), 0);
  EXPECT_EQ(look(m().path("a")).st_nlink, 2U);
  EXPECT_EQ(look(m().path("a")).st_ino, look(m().path("d/b")).st_ino);
  ASSERT_EQ(::mkfifo(m().path("p").c_str(), 0600), 0);
  EXPECT_TRUE(S_ISFIFO(look(m().path("p")).st_mode));
  ASSERT_EQ(::truncate(m().path("a").c_str(), 2), 0);
  EXPECT_EQ(read_file(m().path("d/b")), "he");
  ASSERT_EQ(::chmod(m().path("a").c_str(), 0600), 0);
  EXPECT_EQ(look(m().below("a")).st_mode & 07777U, 0600U);
  const std::array<timespec, 2> times{timespec{-5, 999'999'999}, timespec{1'000'000'000, 123'456'789}};
  ASSERT_EQ(::utimensat(AT_FDCWD, m().path("a").c_str(), times.data(), 0), 0);
  EXPECT_EQ(look(m().path("a")).st_atim.tv_sec, -5);
  EXPECT_EQ(look(m().path("a")).st_atim.tv_nsec, 999'999'999);
  EXPECT_EQ(look(m().path("a")).st_mtim.tv_nsec, 123'456'789);
  EXPECT_EQ(::rmdir(m().path("d").c_str()), -1);
  EXPECT_EQ(errno, ENOTEMPTY);
  ASSERT_EQ(::unlink(m().path("d/b").c_str()), 0);
  ASSERT_EQ(::unlink(m().path("d/s").c_str()), 0);
  ASSERT_EQ(::rmdir(m().path("d").c_str()), 0);
  EXPECT_FALSE(fs::exists(m().below("d")));
  struct statvfs whole {};
  ASSERT_EQ(::statvfs(m().mountpoint().c_str(), &whole), 0);
  EXPECT_GT(whole.f_blocks, 0U);
  EXPECT_EQ(whole.f_namemax, 255U);
}

TEST_F(FrontEndTest, large_writes_and_reads_keep_every_byte) {
  std::string text(5'000'000, '\0');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 7 + i / 251);
  write_file(m().path("big"), text);
  EXPECT_EQ(read_file(m().below("big")), text);
  EXPECT_EQ(read_file(m().path("big")), text);
  const UniqueFd in = open("big", O_RDONLY);
  const UniqueFd out = open("copy", O_RDWR | O_CREAT);
  std::size_t copied = 0;
  while (copied < text.size()) {
    const ssize_t got = ::copy_file_range(in.get(), nullptr, out.get(), nullptr, text.size() - copied, 0);
    ASSERT_GT(got, 0) << std::strerror(errno);
    copied += static_cast<std::size_t>(got);
  }
  EXPECT_EQ(read_file(m().path("copy")), text);
}

TEST_F(FrontEndTest, rename_replaces_refuses_and_exchanges) {
  write_file(m().path("a"), "A");
  write_file(m().path("b"), "B");
  EXPECT_EQ(::renameat2(AT_FDCWD, m().path("a").c_str(), AT_FDCWD, m().path("b").c_str(), RENAME_NOREPLACE),
            -1);
  EXPECT_EQ(errno, EEXIST);
  ASSERT_EQ(::renameat2(AT_FDCWD, m().path("a").c_str(), AT_FDCWD, m().path("b").c_str(), RENAME_EXCHANGE),
            0);
  EXPECT_EQ(read_file(m().path("a")), "B");
  EXPECT_EQ(read_file(m().path("b")), "A");
  ASSERT_EQ(::rename(m().path("a").c_str(), m().path("b").c_str()), 0);
  EXPECT_EQ(read_file(m().path("b")), "B");
  EXPECT_FALSE(fs::exists(m().path("a")));
}

TEST_F(FrontEndTest, holes_are_found_and_made) {
  const UniqueFd fd = open("holes", O_RDWR | O_CREAT);
  ASSERT_EQ(::ftruncate(fd.get(), 1 << 20), 0);
  ASSERT_EQ(::pwrite(fd.get(), "x", 1, 512 << 10), 1);
  EXPECT_EQ(::lseek(fd.get(), 0, SEEK_DATA), 512 << 10);
  EXPECT_EQ(::lseek(fd.get(), 512 << 10, SEEK_HOLE), (512 << 10) + 4096);
  ASSERT_EQ(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 512 << 10, 4096), 0);
  EXPECT_EQ(::lseek(fd.get(), 0, SEEK_DATA), -1);
  EXPECT_EQ(errno, ENXIO);
  EXPECT_EQ(::fsync(fd.get()), 0);
  EXPECT_EQ(::fdatasync(fd.get()), 0);
}

TEST_F(FrontEndTest, a_shared_mapping_reaches_the_store) {
  write_file(m().path("mapped"), std::string(8192, 'a'));
  const UniqueFd fd = open("mapped", O_RDWR);
  auto* memory = static_cast<char*>(::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0));
  ASSERT_NE(memory, MAP_FAILED);
  EXPECT_EQ(memory[5000], 'a');
  memory[5000] = 'b';
  ASSERT_EQ(::msync(memory, 8192, MS_SYNC), 0);
  ::munmap(memory, 8192);
  EXPECT_EQ(read_file(m().below("mapped"))[5000], 'b');
  const auto writes = m().spy().seen(pb::Request::kWrite);
  ASSERT_FALSE(writes.empty());
  EXPECT_TRUE(writes.back().write().writeback());
}

TEST_F(FrontEndTest, dirty_pages_reach_the_store_when_the_mount_ends) {
  write_file(m().path("mapped"), std::string(4096, 'a'));
  {
    const UniqueFd fd = open("mapped", O_RDWR);
    auto* memory = static_cast<char*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0));
    ASSERT_NE(memory, MAP_FAILED);
    memory[0] = 'c';
    ::munmap(memory, 4096);
  }
  m().stop();
  EXPECT_EQ(read_file(m().below("mapped"))[0], 'c');
}

TEST_F(FrontEndTest, appends_go_where_the_owner_sees_the_end) {
  write_file(m().path("log"), "1");
  const UniqueFd fd = open("log", O_WRONLY | O_APPEND);
  ASSERT_EQ(::write(fd.get(), "2", 1), 1);
  std::ofstream(m().below("log"), std::ios::app) << "by another site";
  ASSERT_EQ(::write(fd.get(), "3", 1), 1);
  EXPECT_EQ(read_file(m().below("log")), "12by another site3");
  EXPECT_EQ(read_file(m().path("log")), "12by another site3");
  for (const auto& request : m().spy().seen(pb::Request::kWrite)) {
    EXPECT_EQ(request.write().append(), request.write().handle() != 1);  // the first one made the file
  }
}

TEST_F(FrontEndTest, what_is_read_while_a_direct_write_is_on_its_way_does_not_stay) {
  write_file(m().path("f"), "old");
  const UniqueFd mapped = open("f", O_RDONLY);
  const UniqueFd appending = open("f", O_WRONLY | O_APPEND);
  void* memory = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, mapped.get(), 0);
  ASSERT_NE(memory, MAP_FAILED);
  const volatile char* text = static_cast<char*>(memory);
  m().spy().hold(pb::Request::kWrite);
  auto held = std::async(std::launch::async, [&] { return ::write(appending.get(), "new", 3); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  EXPECT_EQ(text[3], '\0');  // the page is here again
  m().on_reactor([&] { m().spy().let_go(); });
  EXPECT_EQ(held.get(), 3);
  EXPECT_EQ(text[3], 'n');
  ::munmap(memory, 4096);
}

// The file becomes shorter while it is on its way.
TEST_F(FrontEndTest, an_append_that_comes_to_lie_lower_than_it_was_asked_for_is_seen) {
  m().on_reactor([&] { m().front_end().set_policy({10s, 10s}); });
  write_file(m().path("f"), std::string(3UL * 4096, 'o'));
  const InodeId id = look(m().path("f")).st_ino;
  const UniqueFd reading = open("f", O_RDONLY), appending = open("f", O_WRONLY | O_APPEND);
  m().spy().hold(pb::Request::kWrite);
  auto held = std::async(std::launch::async, [&] { return ::write(appending.get(), "new", 3); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  ASSERT_EQ(::truncate(m().below("f").c_str(), 0), 0);
  std::promise<void> dropped;
  m().on_reactor([&] { m().front_end().invalidate(id, 0, 0, [&] { dropped.set_value(); }); });
  dropped.get_future().wait();
  std::array<char, 10> text{};
  ASSERT_EQ(::pread(reading.get(), text.data(), text.size(), 0), 0);  // from a page that is kept
  m().on_reactor([&] { m().spy().let_go(); });
  ASSERT_EQ(held.get(), 3);
  ASSERT_GE(::pread(reading.get(), text.data(), 3, 0), 3);
  EXPECT_EQ(std::string(text.data(), 3), "new");
}

// Opening the file drops its pages, also those that a write on its way has just changed: what is read now
// would stay.
TEST_F(FrontEndTest, what_is_read_while_a_write_is_on_its_way_does_not_stay) {
  constexpr std::size_t kPage = 4096;
  write_file(m().path("f"), std::string(2 * kPage, 'o'));
  const UniqueFd writing = open("f", O_RDWR);
  const auto first_of = [&](const UniqueFd& fd, off_t offset) {
    char text = 0;
    EXPECT_EQ(::pread(fd.get(), &text, 1, offset), 1);
    return text;
  };
  EXPECT_EQ(first_of(writing, 0), 'o');
  m().spy().hold(pb::Request::kWrite);
  auto held = std::async(std::launch::async, [&] { return ::pwrite(writing.get(), "n", 1, 0); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  const UniqueFd reading = open("f", O_RDONLY);
  ASSERT_EQ(::posix_fadvise(reading.get(), 0, 0, POSIX_FADV_RANDOM), 0);
  auto seen = std::async(std::launch::async, [&] { return first_of(reading, 0); });
  EXPECT_EQ(first_of(reading, kPage), 'o') << "what is not being written waits for nothing";
  std::this_thread::sleep_for(50ms);
  m().on_reactor([&] { m().spy().let_go(); });
  EXPECT_EQ(held.get(), 1);
  seen.get();
  EXPECT_EQ(first_of(reading, 0), 'n');
}

// Who writes in between is waited for by nobody, and hears of it with the answer. Other pages of the file
// were here before.
TEST_F(FrontEndTest, whose_write_was_met_by_another_sees_that_one_when_it_returns) {
  constexpr off_t kOther = 1 << 20;
  write_file(m().path("f"), std::string(kOther + 1, 'o'));
  for (const int flags : {0, O_DIRECT}) {
    const UniqueFd writing = open("f", O_RDWR | flags), reading = open("f", O_RDONLY);
    ASSERT_EQ(::posix_fadvise(reading.get(), 0, 0, POSIX_FADV_RANDOM), 0);
    alignas(4096) static const std::array<char, 4096> bytes{'n'};
    for (int i = 0; i < 100; ++i) {
      char text = 0;
      ASSERT_EQ(::pread(reading.get(), &text, 1, kOther), 1);  // the page is here
      const char newest = static_cast<char>('a' + i % 26);
      m().on_reactor([&] {
        m().spy().change_meanwhile([&] {
          const UniqueFd below(::open(m().below("f").c_str(), O_WRONLY | O_CLOEXEC));
          EXPECT_EQ(::pwrite(below.get(), &newest, 1, kOther), 1);
        });
      });
      const auto began = std::chrono::steady_clock::now();
      ASSERT_EQ(::pwrite(writing.get(), bytes.data(), bytes.size(), 0), 4096);
      // An answer waits for no longer, however busy the machine is.
      const bool waited = std::chrono::steady_clock::now() - began < std::chrono::milliseconds(100);
      ASSERT_EQ(::pread(reading.get(), &text, 1, kOther), 1);
      m().on_reactor([&] { m().spy().change_meanwhile({}); });
      if (waited) {
        ASSERT_EQ(text, newest) << i;
      }
    }
  }
}

// Others have not waited for the pages of an inode that this mount is changing: two records of one file, each
// with a lock of its own, be it of this file or of another one.
TEST_F(FrontEndTest, who_has_a_lock_sees_what_was_done_under_it_while_this_mount_was_changing) {
  constexpr off_t kNext = 4096;
  enum class By { write, truncate };
  struct Case {
    By by;
    bool posix;
    const char* lock;
  };
  for (const Case& one : {Case{By::write, true, "f"}, Case{By::write, false, "f"},
                          Case{By::write, false, "lock"}, Case{By::truncate, true, "lock"}}) {
    write_file(m().path("f"), std::string(kNext + 4, 'o'));
    write_file(m().path("lock"), "");
    const UniqueFd changing = open("f", O_RDWR), reading = open("f", O_RDONLY);
    const UniqueFd locking = open(one.lock, O_RDWR);
    ASSERT_EQ(::posix_fadvise(reading.get(), 0, 0, POSIX_FADV_RANDOM), 0);
    const auto first = [&] {
      char text = 0;
      EXPECT_EQ(::pread(reading.get(), &text, 1, 0), 1);
      return text;
    };
    ASSERT_EQ(first(), 'o');
    m().spy().clear();
    m().on_reactor([&] {
      m().spy().tell([](const pb::Request& request, pb::Outcome& outcome) {
        outcome.set_invalidate(request.has_write() || request.has_setattr());
        outcome.set_changes_met(request.has_setlock());
      });
    });
    m().spy().hold(one.by == By::truncate ? pb::Request::kSetattr : pb::Request::kWrite);
    auto changed = std::async(std::launch::async, [&] {
      return one.by == By::truncate ? ::ftruncate(changing.get(), kNext + 1)
                                    : ::pwrite(changing.get(), "w", 1, kNext);
    });
    ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
    {
      const UniqueFd below(::open(m().below("f").c_str(), O_WRONLY | O_CLOEXEC));
      ASSERT_EQ(::pwrite(below.get(), "n", 1, 0), 1);
    }
    const auto began = std::chrono::steady_clock::now();
    auto seen = std::async(std::launch::async, [&] {
      struct flock range {};
      range.l_type = F_WRLCK;
      range.l_len = 1;
      EXPECT_EQ(one.posix ? ::fcntl(locking.get(), F_SETLKW, &range) : ::flock(locking.get(), LOCK_EX), 0);
      return first();
    });
    ASSERT_TRUE(soon([&] { return m().spy().seen(pb::Request::kSetlock).size() == 1; }));
    seen.wait_for(20ms);
    m().on_reactor([&] { m().spy().let_go(); });
    const char found = seen.get();
    // A lock waits for no longer, however busy the machine is.
    if (std::chrono::steady_clock::now() - began < 100ms) {
      EXPECT_EQ(found, 'n') << one.lock << static_cast<int>(one.by);
    }
    EXPECT_GE(changed.get(), 0);
    m().on_reactor([&] { m().spy().tell({}); });
  }
}

TEST_F(FrontEndTest, a_lock_does_not_wait_for_ever_for_a_change_under_way) {
  write_file(m().path("f"), "o");
  write_file(m().path("lock"), "");
  m().on_reactor([&] {
    m().spy().tell([](const pb::Request& request, pb::Outcome& outcome) {
      outcome.set_changes_met(request.has_setlock());
    });
  });
  for (const char* const lock : {"f", "lock"}) {
    const UniqueFd changing = open("f", O_RDWR), locking = open(lock, O_RDWR);
    m().spy().hold(pb::Request::kWrite);
    auto changed = std::async(std::launch::async, [&] { return ::pwrite(changing.get(), "w", 1, 0); });
    ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
    EXPECT_EQ(::flock(locking.get(), LOCK_EX), 0);
    EXPECT_EQ(m().spy().held(), 1U);
    m().on_reactor([&] { m().spy().let_go(); });
    EXPECT_EQ(changed.get(), 1);
  }
  m().on_reactor([&] { m().spy().tell({}); });
}

TEST_F(FrontEndTest, an_append_handle_can_be_mapped) {
  write_file(m().path("log"), "mapped");
  const UniqueFd fd = open("log", O_RDWR | O_APPEND);
  auto* memory = static_cast<char*>(::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd.get(), 0));
  ASSERT_NE(memory, MAP_FAILED) << std::strerror(errno);
  EXPECT_EQ(std::string(memory, 6), "mapped");
  ::munmap(memory, 4096);
}

TEST_F(FrontEndTest, lists_ten_thousand_files_once_each) {
  ASSERT_EQ(::mkdir(m().path("many").c_str(), 0755), 0);
  for (int i = 0; i < 10'000; ++i) {
    const UniqueFd fd(
        ::open(m().below("many/file" + std::to_string(i)).c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
    ASSERT_TRUE(fd);
  }
  for (const bool plus :
       {true, false}) {  // the kernel asks for attributes as well if they were wanted last time
    std::set<std::string> names;
    DIR* directory = ::opendir(m().path("many").c_str());
    ASSERT_NE(directory, nullptr);
    while (const dirent* entry = ::readdir(directory)) {
      EXPECT_TRUE(names.insert(entry->d_name).second) << entry->d_name;
      if (plus && names.size() % 10 == 0) {
        EXPECT_EQ(look(m().path("many/" + std::string(entry->d_name))).st_ino, entry->d_ino) << entry->d_name;
      }
    }
    ::closedir(directory);
    EXPECT_EQ(names.size(), 10'002U);
  }
  std::set<bool> plus;
  for (const auto& request : m().spy().seen(pb::Request::kReaddir)) plus.insert(request.readdir().plus());
  EXPECT_TRUE(plus.contains(true));
}

TEST_F(FrontEndTest, extended_attributes_are_sized_cut_and_listed) {
  write_file(m().path("x"), "");
  const std::string path = m().path("x");
  ASSERT_EQ(::setxattr(path.c_str(), "user.colour", "green", 5, XATTR_CREATE), 0) << std::strerror(errno);
  EXPECT_EQ(::setxattr(path.c_str(), "user.colour", "red", 3, XATTR_CREATE), -1);
  EXPECT_EQ(errno, EEXIST);
  std::array<char, 100> value{};
  EXPECT_EQ(::getxattr(path.c_str(), "user.colour", nullptr, 0), 5);
  EXPECT_EQ(::getxattr(path.c_str(), "user.colour", value.data(), 3), -1);
  EXPECT_EQ(errno, ERANGE);
  ASSERT_EQ(::getxattr(path.c_str(), "user.colour", value.data(), value.size()), 5);
  EXPECT_EQ(std::string(value.data(), 5), "green");
  ASSERT_EQ(::setxattr(path.c_str(), "user.empty", "", 0, 0), 0);
  EXPECT_EQ(::getxattr(path.c_str(), "user.empty", value.data(), value.size()), 0);
  EXPECT_EQ(::listxattr(path.c_str(), nullptr, 0), 23);
  EXPECT_EQ(::listxattr(path.c_str(), value.data(), 5), -1);
  EXPECT_EQ(errno, ERANGE);
  ASSERT_EQ(::removexattr(path.c_str(), "user.colour"), 0);
  EXPECT_EQ(::getxattr(path.c_str(), "user.colour", nullptr, 0), -1);
  EXPECT_EQ(errno, ENODATA);
}

TEST_F(FrontEndTest, a_write_by_others_drops_setuid) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  write_file(m().path("tool"), "x");
  ASSERT_EQ(::chmod(m().path("tool").c_str(), 06777), 0);
  m().spy().clear();
  const std::string path = m().path("tool");
  EXPECT_EQ(in_child([&] {
              if (::setgid(65534) != 0 || ::setuid(65534) != 0) return 1;
              const int fd = ::open(path.c_str(), O_WRONLY);
              return fd >= 0 && ::write(fd, "y", 1) == 1 ? 0 : 2;
            }),
            0);
  EXPECT_EQ(look(path).st_mode & 07777U, 0777U);
  const auto writes = m().spy().seen(pb::Request::kWrite);
  ASSERT_EQ(writes.size(), 1U);
  EXPECT_TRUE(writes[0].write().kill_suidgid());
  EXPECT_EQ(writes[0].uid(), 65534U);

  ASSERT_EQ(::chmod(path.c_str(), 06777), 0);
  EXPECT_EQ(in_child([&] {
              if (::setgid(65534) != 0 || ::setuid(65534) != 0) return 1;
              return ::truncate(path.c_str(), 0);
            }),
            0);
  EXPECT_EQ(look(path).st_mode & 07777U, 0777U);
}

TEST_F(FrontEndTest, writes_are_not_preceded_by_questions_about_capabilities) {
  const UniqueFd fd = open("f", O_WRONLY | O_CREAT);
  for (int i = 0; i < 10; ++i) ASSERT_EQ(::write(fd.get(), "x", 1), 1);
  EXPECT_LE(m().spy().seen(pb::Request::kGetxattr).size(), 1U);
  EXPECT_EQ(m().spy().seen(pb::Request::kWrite).size(), 10U);
}

TEST_F(FrontEndTest, a_new_file_takes_the_callers_umask_owner_and_the_acl_of_its_directory) {
  const mode_t before = ::umask(027);
  write_file(m().path("plain"), "");
  ::umask(before);
  EXPECT_EQ(look(m().path("plain")).st_mode & 07777U, 0640U);
  if (::geteuid() != 0) GTEST_SKIP() << "the rest needs root";
  ASSERT_EQ(::mkdir(m().path("open").c_str(), 0755), 0);
  ASSERT_EQ(::chmod(m().path("open").c_str(), 0777), 0);
  const std::string path = m().path("open/theirs");
  EXPECT_EQ(in_child([&] {
              if (::setgid(65533) != 0 || ::setuid(65534) != 0) return 1;
              return ::open(path.c_str(), O_CREAT | O_WRONLY, 0600) >= 0 ? 0 : 2;
            }),
            0);
  EXPECT_EQ(look(path).st_uid, 65534U);
  EXPECT_EQ(look(path).st_gid, 65533U);
}

TEST_F(FrontEndTest, close_asks_the_owner_only_if_locks_were_taken) {
  write_file(m().path("f"), "x");
  EXPECT_TRUE(m().spy().seen(pb::Request::kFlush).empty());
  const UniqueFd fd = open("f", O_RDWR);
  struct flock lock {};
  lock.l_type = F_WRLCK;
  ASSERT_EQ(::fcntl(fd.get(), F_SETLK, &lock), 0);
  const auto try_lock = [path = m().path("f")] {
    const int other = ::open(path.c_str(), O_RDWR);
    struct flock wanted {};
    wanted.l_type = F_WRLCK;
    return ::fcntl(other, F_SETLK, &wanted) == 0 ? 0 : errno;
  };
  EXPECT_EQ(in_child(try_lock), EAGAIN);
  struct flock asked {};
  asked.l_type = F_RDLCK;
  asked.l_start = 5;
  EXPECT_EQ(in_child([&] {
              const int other = ::open(m().path("f").c_str(), O_RDWR);
              if (::fcntl(other, F_GETLK, &asked) != 0) return 1;
              return asked.l_type == F_WRLCK && asked.l_start == 0 && asked.l_len == 0 &&
                             asked.l_pid == ::getppid()
                         ? 0
                         : 2;
            }),
            0);
  open("f", O_RDONLY);  // closing any descriptor of the file releases them
  EXPECT_FALSE(m().spy().seen(pb::Request::kFlush).empty());
  EXPECT_EQ(in_child(try_lock), 0);
}

TEST_F(FrontEndTest, flock_and_posix_locks_do_not_meet) {
  write_file(m().path("f"), "x");
  const UniqueFd one = open("f", O_RDWR);
  const UniqueFd two = open("f", O_RDWR);
  ASSERT_EQ(::flock(one.get(), LOCK_EX), 0);
  EXPECT_EQ(::flock(two.get(), LOCK_SH | LOCK_NB), -1);
  EXPECT_EQ(errno, EWOULDBLOCK);
  struct flock lock {};
  lock.l_type = F_WRLCK;
  EXPECT_EQ(::fcntl(two.get(), F_SETLK, &lock), 0);
  ASSERT_EQ(::flock(one.get(), LOCK_UN), 0);
  EXPECT_EQ(::flock(two.get(), LOCK_SH | LOCK_NB), 0);
}

TEST_F(FrontEndTest, a_flock_goes_when_its_file_is_closed) {
  write_file(m().path("f"), "x");
  const UniqueFd two = open("f", O_RDWR);
  {
    const UniqueFd one = open("f", O_RDWR);
    ASSERT_EQ(::flock(one.get(), LOCK_EX), 0);
  }
  EXPECT_TRUE(soon([&] { return ::flock(two.get(), LOCK_EX | LOCK_NB) == 0; }));
}

TEST_F(FrontEndTest, who_waits_for_a_lock_gets_it_or_is_interrupted) {
  write_file(m().path("f"), "x");
  const UniqueFd one = open("f", O_RDWR);
  const UniqueFd two = open("f", O_RDWR);
  ASSERT_EQ(::flock(one.get(), LOCK_EX), 0);
  auto waiting = std::async(std::launch::async, [&] { return ::flock(two.get(), LOCK_EX); });
  EXPECT_EQ(waiting.wait_for(50ms), std::future_status::timeout);
  write_file(m().path("others"), "go on meanwhile");
  ASSERT_EQ(::flock(one.get(), LOCK_UN), 0);
  EXPECT_EQ(waiting.get(), 0);

  const std::string path = m().path("f");
  EXPECT_EQ(in_child([&] {
              struct sigaction action {};
              action.sa_handler = [](int) {};
              ::sigaction(SIGALRM, &action, nullptr);
              const int other = ::open(path.c_str(), O_RDWR);
              ::ualarm(100'000, 0);
              return ::flock(other, LOCK_EX) == -1 ? errno : 0;
            }),
            EINTR);
  const auto cancels = m().spy().seen(pb::Request::kCancel);
  ASSERT_EQ(cancels.size(), 1U);
  EXPECT_EQ(cancels[0].cancel().seq(), m().spy().seen(pb::Request::kSetlock).back().seq());
  EXPECT_GT(cancels[0].seq(), kOwnSeq);
}

// `first`: a signal that the caller survives comes before the one that kills it.
class KilledCaller : public FrontEndTest {
 protected:
  void kill_while_held(pb::Request::OpCase kind, const std::function<void()>& body, bool first) {
    m().spy().hold(kind);
    const pid_t child = ::fork();
    if (child == 0) {
      ::close_range(3, ~0U, 0);  // the device: the mount shall end with the test
      struct sigaction action {};
      action.sa_handler = [](int) {};
      action.sa_flags = SA_RESTART;
      ::sigaction(SIGUSR1, &action, nullptr);
      body();
      ::_exit(0);
    }
    EXPECT_TRUE(soon([&] { return m().spy().held() == 1; }));
    int status = 0;
    if (first) {
      ::kill(child, SIGUSR1);
      std::this_thread::sleep_for(150ms);
      EXPECT_EQ(::waitpid(child, &status, WNOHANG), 0) << "a signal that does not kill ends no request";
    }
    ::kill(child, SIGTERM);
    bool ended = false;
    EXPECT_TRUE(soon([&] { return ended = ended || ::waitpid(child, &status, WNOHANG) == child; }))
        << "it hangs";
    EXPECT_TRUE(WIFSIGNALED(status));
    const auto seq = m().spy().seen(kind).back().seq();
    // The caller is answered first.
    EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kCancel).size() == 1; }));
    for (const auto& cancel : m().spy().seen(pb::Request::kCancel)) EXPECT_EQ(cancel.cancel().seq(), seq);
    m().on_reactor([&] { m().spy().let_go(); });
  }
};

TEST_F(KilledCaller, ends_at_once_and_what_it_opened_is_released) {
  write_file(m().path("f"), "x");
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
  for (const bool first : {false, true}) {
    m().spy().clear();
    kill_while_held(
        pb::Request::kOpen, [&] { ::open(m().path("f").c_str(), O_RDONLY); }, first);
    ASSERT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
    EXPECT_EQ(m().spy().seen(pb::Request::kRelease)[0].release().handle(),
              m().spy().seen(pb::Request::kOpen)[0].open().handle());
  }
  m().spy().clear();
  kill_while_held(
      pb::Request::kCreate, [&] { ::open(m().path("g").c_str(), O_CREAT | O_RDWR, 0600); }, false);
  ASSERT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
  EXPECT_EQ(m().spy().seen(pb::Request::kRelease)[0].release().id(), look(m().path("g")).st_ino);
}

TEST_F(KilledCaller, leaves_no_stale_cache) {
  write_file(m().path("f"), "old");
  EXPECT_EQ(read_file(m().path("f")), "old");
  kill_while_held(
      pb::Request::kWrite,
      [&] {
        const int fd = ::open(m().path("f").c_str(), O_WRONLY);
        (void)!::write(fd, "newer", 5);
      },
      false);
  EXPECT_TRUE(soon([&] { return read_file(m().path("f")) == "newer"; }));
  EXPECT_EQ(look(m().path("f")).st_size, 5);
}

// The signal that kills a process interrupts also the Flush with which it ends.
TEST_F(KilledCaller, gives_its_locks_up_all_the_same) {
  write_file(m().path("f"), "x");
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
  m().spy().clear();
  m().spy().hold(pb::Request::kFlush);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close_range(3, ~0U, 0);
    const int fd = ::open(m().path("f").c_str(), O_RDWR);
    struct flock lock {};
    lock.l_type = F_WRLCK;
    ::fcntl(fd, F_SETLK, &lock);
    ::pause();
  }
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kSetlock).size() == 1; }));
  std::this_thread::sleep_for(50ms);
  ::kill(child, SIGKILL);
  int status = 0;
  bool ended = false;
  EXPECT_TRUE(soon([&] { return ended = ended || ::waitpid(child, &status, WNOHANG) == child; }));
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
  EXPECT_EQ(m().spy().held(), 1U);
  EXPECT_EQ(m().spy().seen(pb::Request::kCancel).size(), 0U);
  m().on_reactor([&] { m().spy().let_go(); });
}

// A close of another descriptor of the file gives up what the process has, not what one of its threads waits
// for.
TEST_F(KilledCaller, that_waits_for_a_lock_gives_it_up_though_the_file_was_closed_once_meanwhile) {
  write_file(m().path("f"), "x");
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kRelease).size() == 1; }));
  m().spy().clear();
  m().spy().hold(pb::Request::kSetlock);
  int go[2];
  ASSERT_EQ(::pipe(go), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close_range(3, static_cast<unsigned>(go[0]) - 1, 0);
    ::setpgid(0, 0);
    const int fd = ::open(m().path("f").c_str(), O_RDWR);
    // As a thread it has the same descriptors, by which the kernel tells the owners of locks apart.
    if (::syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0) == 0) {
      struct flock lock {};
      lock.l_type = F_WRLCK;
      ::fcntl(fd, F_SETLKW, &lock);
      ::pause();
    }
    char sent = 0;
    [[maybe_unused]] const auto count = ::read(go[0], &sent, 1);
    ::close(::open(m().path("f").c_str(), O_RDWR));
    ::pause();
  }
  ::close(go[0]);
  EXPECT_TRUE(soon([&] { return m().spy().held() == 1; }));
  EXPECT_EQ(::write(go[1], "g", 1), 1);
  ::close(go[1]);
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kFlush).size() == 1; }));
  ::kill(-child, SIGKILL);
  int status = 0;
  bool ended = false;
  EXPECT_TRUE(soon([&] { return ended = ended || ::waitpid(child, &status, WNOHANG) == child; }));
  EXPECT_TRUE(soon([&] { return m().spy().seen(pb::Request::kFlush).size() == 2; }));
  m().on_reactor([&] { m().spy().let_go(); });
}

TEST_F(KilledCaller, whose_name_the_kernel_may_keep_as_missing_waits) {
  m().on_reactor([&] { m().front_end().set_policy(kSoleMount); });
  EXPECT_FALSE(fs::exists(m().path("d")));
  m().spy().hold(pb::Request::kMkdir);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::mkdir(m().path("d").c_str(), 0700));
  EXPECT_TRUE(soon([&] { return m().spy().held() == 1; }));
  ::kill(child, SIGKILL);
  std::this_thread::sleep_for(200ms);
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, WNOHANG), 0);
  m().on_reactor([&] { m().spy().let_go(); });
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(fs::exists(m().path("d")));
}

TEST_F(FrontEndTest, every_handle_is_released_under_the_number_it_was_opened_with) {
  write_file(m().path("f"), "x");
  read_file(m().path("f"));
  for (const auto& entry : fs::directory_iterator(m().mountpoint())) EXPECT_EQ(entry.path().filename(), "f");
  std::multiset<std::uint64_t> opened, released;
  EXPECT_TRUE(soon([&] {
    opened.clear();
    released.clear();
    for (const auto& request : m().spy().all()) {
      if (request.has_open()) opened.insert(request.open().handle());
      if (request.has_create() && request.create().has_handle()) opened.insert(request.create().handle());
      if (request.has_opendir()) opened.insert(request.opendir().handle());
      if (request.has_release()) released.insert(request.release().handle());
      if (request.has_releasedir()) released.insert(request.releasedir().handle());
    }
    return opened == released && opened.size() == 3;
  }));
  EXPECT_EQ(std::set<std::uint64_t>(opened.begin(), opened.end()).size(), opened.size());
}

TEST_F(FrontEndTest, no_request_claims_that_an_unanswered_one_was_answered) {
  write_file(m().path("a"), "");
  write_file(m().path("b"), "");
  m().spy().clear();
  m().spy().hold(pb::Request::kUnlink);
  auto held = std::async(std::launch::async, [&] { return ::unlink(m().path("a").c_str()); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  for (int i = 0; i < 100; ++i) look(m().mountpoint());
  m().on_reactor([&] { m().spy().let_go(); });
  EXPECT_EQ(held.get(), 0);
  const std::uint64_t unanswered = m().spy().seen(pb::Request::kUnlink)[0].seq();
  std::uint64_t last = 0;
  bool after = false;
  for (const auto& request : m().spy().all()) {
    EXPECT_GT(request.seq(), last) << "the kernel counts upwards";
    last = request.seq();
    EXPECT_LE(request.answered_below(), request.seq());
    if (after && request.has_getattr()) {
      EXPECT_EQ(request.answered_below(), unanswered);
    }
    after = after || request.has_unlink();
  }
  ASSERT_EQ(::unlink(m().path("b").c_str()), 0);
  EXPECT_GT(m().spy().seen(pb::Request::kUnlink)[1].answered_below(), unanswered);
}

TEST_F(FrontEndTest, the_longest_wait_is_told_once_and_not_that_for_a_lock) {
  write_file(m().path("a"), "");
  m().on_reactor([&] { m().front_end().take_longest_wait(); });
  m().spy().hold(pb::Request::kUnlink);
  auto held = std::async(std::launch::async, [&] { return ::unlink(m().path("a").c_str()); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  std::this_thread::sleep_for(50ms);
  std::chrono::nanoseconds longest{};
  m().on_reactor([&] {
    m().spy().let_go();
    longest = m().front_end().take_longest_wait();
  });
  EXPECT_EQ(held.get(), 0);
  EXPECT_GE(longest, 50ms);
  EXPECT_LT(longest, 10s);
  m().on_reactor([&] { longest = m().front_end().take_longest_wait(); });
  EXPECT_LT(longest, 50ms);
}

TEST_F(FrontEndTest, invalidate_drops_pages_and_attributes_of_a_file_that_is_open) {
  m().on_reactor([&] { m().front_end().set_policy({10s, 10s}); });
  write_file(m().path("f"), "old");
  const UniqueFd fd = open("f", O_RDONLY);
  std::array<char, 10> text{};
  ASSERT_EQ(::pread(fd.get(), text.data(), text.size(), 0), 3);
  write_file(m().below("f"), "newer");
  ASSERT_EQ(::pread(fd.get(), text.data(), text.size(), 0), 3) << "the kernel answers by itself";
  const InodeId id = look(m().path("f")).st_ino;
  std::promise<void> done;
  m().on_reactor([&] { m().front_end().invalidate(id, 0, 0, [&] { done.set_value(); }); });
  done.get_future().wait();
  ASSERT_EQ(::pread(fd.get(), text.data(), text.size(), 0), 5);
  EXPECT_EQ(std::string(text.data(), 5), "newer");
}

TEST_F(FrontEndTest, pages_are_kept_between_opens_only_while_the_mount_has_been_the_only_one) {
  write_file(m().below("f"), "text");
  const auto reads_of_one_open = [&] {
    m().spy().clear();
    EXPECT_EQ(read_file(m().path("f")), "text");
    return m().spy().seen(pb::Request::kRead).size();
  };
  EXPECT_EQ(reads_of_one_open(), 1U);
  EXPECT_EQ(reads_of_one_open(), 1U);
  m().on_reactor([&] { m().front_end().set_policy(kSoleMount); });
  EXPECT_EQ(reads_of_one_open(), 1U) << "they may be from before";
  EXPECT_EQ(reads_of_one_open(), 0U);
  m().on_reactor([&] { m().front_end().set_policy(kSharedMount); });
  EXPECT_EQ(reads_of_one_open(), 1U);
  m().on_reactor([&] { m().front_end().set_policy(kSoleMount); });
  EXPECT_EQ(reads_of_one_open(), 1U);
  EXPECT_EQ(reads_of_one_open(), 0U);
}

// The kernel drops them in the thread that opens the file, after the answer: here it waits for a page that is
// being read, on a busy machine for its turn.
TEST_F(FrontEndTest, pages_are_not_kept_for_an_open_before_the_one_that_drops_them_has) {
  constexpr std::size_t kPage = 4096;
  write_file(m().path("f"), std::string(2 * kPage, 'o'));
  const UniqueFd reader = open("f", O_RDONLY);
  ASSERT_EQ(::posix_fadvise(reader.get(), 0, 0, POSIX_FADV_RANDOM), 0);
  const auto first_of = [](const UniqueFd& fd, off_t offset) {
    char text = 0;
    EXPECT_EQ(::pread(fd.get(), &text, 1, offset), 1);
    return text;
  };
  EXPECT_EQ(first_of(reader, kPage), 'o');
  write_file(m().store_path() / "f", std::string(2 * kPage, 'n'));
  m().on_reactor([&] { m().front_end().set_policy(kSoleMount); });
  m().spy().clear();
  m().spy().hold(pb::Request::kRead);
  const auto opens = [&](std::size_t count) {
    return soon([&] { return m().spy().seen(pb::Request::kOpen).size() == count; });
  };
  auto locking = std::async(std::launch::async, [&] { return first_of(reader, 0); });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  auto dropping = std::async(std::launch::async, [&] { return open("f", O_RDONLY); });
  ASSERT_TRUE(opens(1));
  auto seen = std::async(std::launch::async, [&] { return first_of(open("f", O_RDONLY), kPage); });
  ASSERT_TRUE(opens(2));
  EXPECT_EQ(seen.wait_for(100ms), std::future_status::timeout) << "it waits for that page, too";
  m().on_reactor([&] { m().spy().let_go(); });
  EXPECT_EQ(seen.get(), 'n');
  EXPECT_EQ(locking.get(), 'n');
  EXPECT_TRUE(dropping.get());
}

// What is read of a file that was opened early need not come from the owner, and so not behind the open.
TEST_F(FrontEndTest, what_was_read_before_the_owner_knows_of_the_open_goes_with_the_promise) {
  MountedStore early;
  FrontEnd::Options options;
  options.opens_at_once = [](InodeId, std::uint32_t) { return true; };
  early.mount(options);
  write_file(early.below("f"), "old");
  early.spy().hold(pb::Request::kOpen);
  const UniqueFd file(::open(early.path("f").c_str(), O_RDONLY | O_CLOEXEC));
  const auto text = [&] {
    std::array<char, 8> bytes{};
    const auto size = ::pread(file.get(), bytes.data(), bytes.size(), 0);
    return std::string(bytes.data(), static_cast<std::size_t>(std::max<ssize_t>(0, size)));
  };
  EXPECT_EQ(text(), "old");
  write_file(early.below("f"), "new");
  const std::vector<InodeId> changed{look(early.path("f")).st_ino};
  std::promise<void> forgotten;
  early.on_reactor([&] { early.front_end().promise_broken(&changed, {}, [&] { forgotten.set_value(); }); });
  EXPECT_EQ(forgotten.get_future().wait_for(5s), std::future_status::ready);
  EXPECT_EQ(text(), "new");
  early.on_reactor([&] { early.spy().let_go(); });
}

// The kernel counts from when the thread that asked goes on, which may be behind a change by another thread.
TEST_F(FrontEndTest, lent_attributes_that_may_not_have_been_taken_up_go_before_a_change_is_answered) {
  MountedStore lending;
  FrontEnd::Options options;
  options.lend_attributes = [](const pb::Attr&, bool held) { return held ? 60s : 0s; };
  lending.mount(options);
  write_file(lending.path("f"), "text");
  const UniqueFd file(::open(lending.path("f").c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status {};
  const auto look = [&] { EXPECT_EQ(::fstat(file.get(), &status), 0); };
  look();
  std::promise<void> dropped, looked, over;
  lending.on_reactor([&, none = std::vector<InodeId>()] {
    lending.front_end().promise_broken(&none, {status.st_ino}, [&] { dropped.set_value(); });
  });
  dropped.get_future().wait();
  std::thread other([&] {
    look();
    looked.set_value();
    over.get_future().wait();
  });
  looked.get_future().wait();
  lending.on_reactor([&] {
    lending.spy().tell([id = status.st_ino](const pb::Request& request, pb::Outcome& outcome) {
      if (request.has_mkdir()) outcome.add_changed()->set_id(id);
    });
  });
  const auto asks_after = [&](const char* directory) {
    EXPECT_EQ(::mkdir(lending.path(directory).c_str(), 0755), 0);
    lending.spy().clear();
    look();
    return lending.spy().seen(pb::Request::kGetattr).size();
  };
  EXPECT_EQ(asks_after("d1"), 1U);
  EXPECT_EQ(asks_after("d2"), 0U) << "lent to this thread, which has gone on";
  over.set_value();
  other.join();
}

TEST_F(FrontEndTest, an_orphan_is_forgotten_when_its_last_user_closes_it) {
  write_file(m().path("f"), "still here");
  {
    const UniqueFd fd = open("f", O_RDONLY);
    ASSERT_EQ(::unlink(m().path("f").c_str()), 0);
    EXPECT_EQ(look("/proc/self/fd/" + std::to_string(fd.get())).st_nlink, 1U);  // of the link in /proc
    struct stat status {};
    ASSERT_EQ(::fstat(fd.get(), &status), 0);
    EXPECT_EQ(status.st_nlink, 0U);
    std::array<char, 20> text{};
    EXPECT_EQ(::pread(fd.get(), text.data(), text.size(), 0), 10);
    EXPECT_TRUE(m().spy().seen(pb::Request::kForget).empty());
  }
  ASSERT_TRUE(soon([&] { return !m().spy().seen(pb::Request::kForget).empty(); }));
  EXPECT_GT(m().spy().seen(pb::Request::kForget)[0].seq(), kOwnSeq);
}

TEST_F(FrontEndTest, tells_when_it_is_unmounted_from_outside) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  EXPECT_FALSE(m().unmounted());
  ASSERT_EQ(::umount2(m().mountpoint().c_str(), 0), 0) << std::strerror(errno);
  EXPECT_TRUE(soon([&] { return m().unmounted(); }));
}

TEST_F(FrontEndTest, a_file_handle_outlives_the_mount_that_issued_it) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  write_file(m().path("f"), "text");
  alignas(file_handle) std::array<char, sizeof(file_handle) + MAX_HANDLE_SZ> space{};
  auto* handle = reinterpret_cast<file_handle*>(space.data());
  handle->handle_bytes = MAX_HANDLE_SZ;
  int mount_id = 0;
  ASSERT_EQ(::name_to_handle_at(AT_FDCWD, m().path("f").c_str(), handle, &mount_id, 0), 0)
      << std::strerror(errno);
  m().stop();
  m().mount();
  const UniqueFd root = open("", O_RDONLY | O_DIRECTORY);
  const UniqueFd fd(::open_by_handle_at(root.get(), handle, O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(fd) << std::strerror(errno);
  std::array<char, 10> text{};
  EXPECT_EQ(::read(fd.get(), text.data(), text.size()), 4);
}

TEST_F(FrontEndTest, who_still_waits_at_the_end_gets_an_error) {
  write_file(m().path("a"), "");
  m().spy().hold(pb::Request::kUnlink);
  auto held =
      std::async(std::launch::async, [&] { return ::unlink(m().path("a").c_str()) == 0 ? 0 : errno; });
  ASSERT_TRUE(soon([&] { return m().spy().held() == 1; }));
  m().on_reactor([] {});
  m().stop();
  EXPECT_EQ(held.get(), ENOTCONN);
  m().spy().let_go();  // an answer that comes too late harms nobody
}

TEST_F(FrontEndTest, mounts_over_the_store_itself_and_over_a_dead_mount) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  MountedStore over(true);
  std::ofstream(over.below("kept")) << "text";
  over.mount();
  EXPECT_EQ(read_file(over.path("kept")), "text");
  EXPECT_NE(look(over.mountpoint()).st_dev, look(over.mountpoint().parent_path()).st_dev);
  over.stop();
  EXPECT_EQ(read_file(over.path("kept")), "text");

  MountedStore dead;
  {
    const UniqueFd device(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
    const std::string data = "fd=" + std::to_string(device.get()) + ",rootmode=40000,user_id=0,group_id=0";
    ASSERT_EQ(::mount("dead", dead.mountpoint().c_str(), "fuse.dead", 0, data.c_str()), 0);
  }
  struct stat status {};
  ASSERT_EQ(::stat(dead.mountpoint().c_str(), &status), -1);
  ASSERT_EQ(errno, ENOTCONN);
  dead.mount();
  EXPECT_EQ(::stat(dead.mountpoint().c_str(), &status), 0);
}

}  // namespace
}  // namespace sharefs
