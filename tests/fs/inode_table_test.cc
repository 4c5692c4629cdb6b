// The InodeTable against a real directory: identities that outlive processes, renames and reused inodes.
#include "fs/inode_table.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fs/identity_flusher.h"
#include "fs/identity_journal.h"
#include "tests/fs/temporary_directory.h"

namespace {
std::atomic<unsigned> syncs{0};
}

// SQLite's, too.
extern "C" int fdatasync(int fd) {
  ++syncs;
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}

namespace sharefs {
namespace {

namespace fs = std::filesystem;

// Both ways of finding an inode again: by file handle (needs privilege) and by parent and name.
class InodeTableTest : public testing::TestWithParam<bool> {
 protected:
  InodeTableTest() {
    fs::create_directory(store());
    options_.use_handles = GetParam();
    open_table();
  }
  void SetUp() override {
    if (GetParam() && !table_->uses_handles()) GTEST_SKIP() << "file handles need privilege";
  }

  fs::path store() const { return directory_.path() / "store"; }
  UniqueFd root_fd() const { return UniqueFd(::open(store().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)); }

  void open_table(Epoch epoch = 1) {
    table_.reset();
    table_ = std::make_unique<InodeTable>(directory_.path() / "state.db", directory_.path() / "journal",
                                          root_fd(), options_);
    table_->set_epoch(epoch);
  }

  static Backing look(int fd, const char* name) {
    Backing backing{};
    const int flags = AT_SYMLINK_NOFOLLOW | (*name == '\0' ? AT_EMPTY_PATH : 0);
    EXPECT_EQ(::statx(fd, name, flags, STATX_BASIC_STATS | STATX_BTIME, &backing), 0) << name;
    return backing;
  }
  Backing look(const std::string& name) { return look(root_fd().get(), name.c_str()); }
  InodeId identify(const std::string& name) {
    const UniqueFd root = root_fd();
    return table_->identify(kRootInode, name, root.get(), look(root.get(), name.c_str()));
  }
  void make(const std::string& name) const { std::ofstream(store() / name) << name; }
  std::uint64_t opened_ino(InodeId id) {
    const UniqueFd fd = table_->open(id, O_PATH | O_NOFOLLOW);
    return fd ? look(fd.get(), "").stx_ino : 0;
  }

  TemporaryDirectory directory_;
  InodeTable::Options options_;
  std::unique_ptr<InodeTable> table_;
};

TEST_P(InodeTableTest, the_root_is_1) {
  const UniqueFd root = root_fd();
  EXPECT_EQ(table_->identify(7, "x", root.get(), look(root.get(), "")), kRootInode);
  EXPECT_EQ(table_->find(look(root.get(), "")), kRootInode);
  EXPECT_EQ(opened_ino(kRootInode), look(root.get(), "").stx_ino);
}

TEST_P(InodeTableTest, an_inode_keeps_its_id_and_opens_again_by_it) {
  make("a");
  make("b");
  const InodeId a = identify("a"), b = identify("b");
  EXPECT_NE(a, b);
  EXPECT_EQ(identify("a"), a);
  EXPECT_EQ(table_->find(look("b")), b);
  EXPECT_EQ(opened_ino(a), look("a").stx_ino);
  const UniqueFd fd = table_->open(a, O_RDONLY);
  char text[8] = {};
  EXPECT_EQ(::read(fd.get(), text, sizeof text), 1);
  EXPECT_STREQ(text, "a");
}

TEST_P(InodeTableTest, ids_are_the_same_in_the_next_process) {
  fs::create_directory(store() / "d");
  make("d/f");
  const InodeId d = identify("d");
  const UniqueFd inside = table_->open(d, O_RDONLY | O_DIRECTORY);
  const InodeId f = table_->identify(d, "f", inside.get(), look(inside.get(), "f"));
  open_table();
  EXPECT_EQ(opened_ino(f), look("d/f").stx_ino) << "opened from cold";
  EXPECT_EQ(table_->find(look("d/f")), f);
  EXPECT_EQ(identify("d"), d);
  make("g");
  EXPECT_GT(identify("g"), f) << "no id is issued twice";
}

TEST_P(InodeTableTest, an_id_that_was_told_survives_kill_9) {
  table_.reset();
  int pipes[2];
  ASSERT_EQ(::pipe(pipes), 0);
  constexpr int kFiles = 3000;
  const pid_t child = ::fork();
  if (child == 0) {
    open_table();
    for (int i = 0; i < kFiles; ++i) {
      make("f" + std::to_string(i));
      const InodeId id = identify("f" + std::to_string(i));
      if (::write(pipes[1], &id, sizeof id) != sizeof id) ::_exit(1);
    }
    ::raise(SIGKILL);
  }
  ::close(pipes[1]);
  std::vector<InodeId> ids;
  InodeId id = 0;
  while (::read(pipes[0], &id, sizeof id) == sizeof id) ids.push_back(id);
  ::close(pipes[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  ASSERT_EQ(ids.size(), static_cast<std::size_t>(kFiles));

  open_table();
  for (int i = 0; i < kFiles; ++i) {
    const std::string name = "f" + std::to_string(i);
    ASSERT_EQ(table_->find(look(name)), ids[static_cast<std::size_t>(i)]) << name;
    ASSERT_EQ(opened_ino(ids[static_cast<std::size_t>(i)]), look(name).stx_ino) << name;
  }
  make("later");
  EXPECT_GT(identify("later"), ids.back());
}

TEST_P(InodeTableTest, a_reused_backing_inode_gets_a_new_id) {
  make("a");
  const InodeId old = identify("a");
  const std::uint64_t ino = look("a").stx_ino;
  bool reused = false;
  for (int attempt = 0; attempt < 200 && !reused; ++attempt) {
    fs::remove(store() / "a");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    make("a");
    reused = look("a").stx_ino == ino;
  }
  if (!reused) GTEST_SKIP() << "this file system does not reuse inodes at once";
  EXPECT_FALSE(table_->find(look("a")).has_value());
  EXPECT_FALSE(table_->open(old, O_PATH));
  EXPECT_EQ(errno, ESTALE);
  const InodeId fresh = identify("a");
  EXPECT_NE(fresh, old);
  EXPECT_EQ(opened_ino(fresh), ino);
  open_table();
  EXPECT_EQ(identify("a"), fresh);
  EXPECT_FALSE(table_->open(old, O_PATH));
}

TEST_P(InodeTableTest, what_is_gone_is_stale) {
  make("a");
  const InodeId a = identify("a");
  fs::remove(store() / "a");
  EXPECT_FALSE(table_->open(a, O_RDONLY));
  EXPECT_EQ(errno, ESTALE);
  EXPECT_FALSE(table_->open(12345678, O_RDONLY));
  EXPECT_EQ(errno, ESTALE);
  make("b");
  const InodeId b = identify("b");
  table_->erase(b);
  EXPECT_FALSE(table_->open(b, O_RDONLY));
  EXPECT_EQ(errno, ESTALE);
  open_table();
  EXPECT_FALSE(table_->open(b, O_RDONLY)) << "erased for good";
}

TEST_P(InodeTableTest, a_moved_inode_is_found_at_its_new_place) {
  fs::create_directory(store() / "d");
  make("a");
  const InodeId a = identify("a"), d = identify("d");
  fs::rename(store() / "a", store() / "d/b");
  table_->moved(a, d, "b");
  EXPECT_EQ(opened_ino(a), look("d/b").stx_ino);
  fs::rename(store() / "d", store() / "e");
  table_->moved(d, kRootInode, "e");
  open_table();
  EXPECT_EQ(opened_ino(a), look("e/b").stx_ino);
}

TEST_P(InodeTableTest, only_files_and_directories_are_opened) {
  ASSERT_EQ(::mkfifo((store() / "fifo").c_str(), 0600), 0);
  fs::create_symlink("elsewhere", store() / "link");
  const InodeId fifo = identify("fifo"), link = identify("link");
  EXPECT_FALSE(table_->open(fifo, O_RDONLY));
  EXPECT_EQ(errno, ENXIO);
  EXPECT_FALSE(table_->open(link, O_RDONLY));
  EXPECT_EQ(errno, ELOOP);
  std::uint32_t type = 0;
  EXPECT_TRUE(table_->open(link, O_PATH | O_NOFOLLOW, &type));
  EXPECT_EQ(type, static_cast<std::uint32_t>(S_IFLNK));
}

TEST_P(InodeTableTest, epochs_do_not_share_ids) {
  make("a");
  make("b");
  const InodeId a = identify("a");
  table_->set_epoch(5);
  const InodeId b = identify("b");
  EXPECT_EQ(a >> 40, 0u);
  EXPECT_EQ(b >> 40, 4u);
}

TEST_P(InodeTableTest, more_ids_than_a_block_and_more_inodes_than_the_cache) {
  options_.cache_entries = 256;
  options_.journal_slots = 128;  // the flusher must keep up
  table_.reset();
  fs::remove(directory_.path() / "journal");
  open_table();
  constexpr int kFiles = 2000;
  std::vector<InodeId> ids;
  for (int i = 0; i < kFiles; ++i) {
    make(std::to_string(i));
    ids.push_back(identify(std::to_string(i)));
  }
  EXPECT_EQ(std::set<InodeId>(ids.begin(), ids.end()).size(), ids.size());
  for (int i = 0; i < kFiles; i += 7) {
    ASSERT_EQ(identify(std::to_string(i)), ids[static_cast<std::size_t>(i)]);
    ASSERT_EQ(opened_ino(ids[static_cast<std::size_t>(i)]), look(std::to_string(i)).stx_ino);
  }
}

TEST_P(InodeTableTest, an_imported_inode_keeps_the_id_and_ctime_of_its_former_owner) {
  make("a");
  constexpr InodeId kImported = (InodeId{7} << 40) | 99;
  const UniqueFd root = root_fd();
  table_->bind(kImported, kRootInode, "a", root.get(), look("a"));
  EXPECT_EQ(identify("a"), kImported);
  const Backing backing = look("a");
  const std::int64_t own = backing.stx_ctime.tv_sec * 1'000'000'000 + backing.stx_ctime.tv_nsec;
  EXPECT_EQ(table_->presented_ctime(kImported, backing), own);
  table_->import_ctime(kImported, 1234567890, backing);
  EXPECT_EQ(table_->presented_ctime(kImported, backing), 1234567890);
  open_table();
  EXPECT_EQ(table_->presented_ctime(kImported, backing), 1234567890);
  table_->changing(kImported);
  EXPECT_EQ(table_->presented_ctime(kImported, backing), own)
      << "ended, even if no clock tick shows the change";
  open_table();
  EXPECT_EQ(table_->presented_ctime(kImported, backing), own);

  const std::int64_t ahead = own + 3600'000'000'000;
  table_->import_ctime(kImported, ahead, backing);
  EXPECT_EQ(table_->presented_ctime(kImported, backing), ahead);
  table_->changing(kImported);
  EXPECT_EQ(table_->presented_ctime(kImported, backing), ahead + 1) << "ctime never goes back";
  for (int change = 2; change < 5; ++change) {
    table_->changing(kImported);
    EXPECT_EQ(table_->presented_ctime(kImported, backing), ahead + change) << "each change shows another one";
  }
  open_table();
  EXPECT_EQ(table_->presented_ctime(kImported, backing), ahead + 4);
}

TEST_P(InodeTableTest, an_orphan_is_found_in_the_private_area) {
  fs::create_directories(store() / ".sharefs/orphans");
  fs::permissions(store() / ".sharefs", fs::perms::owner_all);
  make("a");
  const InodeId a = identify("a");
  EXPECT_FALSE(table_->is_orphan(a));
  fs::rename(store() / "a", store() / ".sharefs/orphans/x");
  table_->moved(a, 0, "orphans/x");
  table_->set_orphan(a, true);
  open_table();
  EXPECT_TRUE(table_->is_orphan(a));
  EXPECT_EQ(opened_ino(a), look(".sharefs/orphans/x").stx_ino);
}

TEST_P(InodeTableTest, the_root_can_move) {
  fs::create_directories(store() / ".sharefs/tree");
  fs::permissions(store() / ".sharefs", fs::perms::owner_all);
  make(".sharefs/tree/a");
  UniqueFd tree(::open((store() / ".sharefs/tree").c_str(), O_RDONLY | O_DIRECTORY));
  const std::uint64_t ino = look(".sharefs/tree").stx_ino;
  table_->set_root(std::move(tree));
  EXPECT_EQ(opened_ino(kRootInode), ino);
  const InodeId a = table_->identify(kRootInode, "a", table_->root(), look(".sharefs/tree/a"));
  EXPECT_EQ(opened_ino(a), look(".sharefs/tree/a").stx_ino);
  const UniqueFd area = table_->open_private_area();
  EXPECT_EQ(look(area.get(), "").stx_ino, look(".sharefs").stx_ino);
}

TEST_P(InodeTableTest, sync_and_flush_leave_everything_in_sqlite) {
  make("a");
  const InodeId a = identify("a");
  table_->sync(a);
  Database database(directory_.path() / "state.db");
  Statement select(database, "SELECT ino FROM inode WHERE id=?");
  ASSERT_TRUE(select.bind(a).step());
  EXPECT_EQ(select.id(0), look("a").stx_ino);
  make("b");
  const InodeId b = identify("b");
  table_->flush();
  ASSERT_TRUE(select.bind(b).step());
}

// A row that SQLite still has counts for as little as a look at a name: the inode has another id by now.
TEST_P(InodeTableTest, an_id_that_is_asked_for_late_does_not_hide_who_has_its_inode_now) {
  options_.cache_entries = 16;
  open_table();
  make("a");
  const InodeId old = identify("a");
  const std::uint64_t ino = look("a").stx_ino;
  table_->flush();
  for (int i = 0; i < 64; ++i) {
    make("f" + std::to_string(i));
    identify("f" + std::to_string(i));
  }
  table_->flush();
  bool reused = false;
  std::string name;
  for (int i = 0; i < 200 && !reused; ++i) {
    if (i == 0) fs::remove(store() / "a");
    name = "g" + std::to_string(i);
    make(name);
    reused = look(name).stx_ino == ino;
  }
  if (!reused) GTEST_SKIP() << "this file system does not reuse inodes at once";
  const UniqueFd root = root_fd();
  const InodeId now = table_->issue(kRootInode, name, root.get(), -1, look(name));
  EXPECT_FALSE(table_->open(old, O_PATH | O_NOFOLLOW));
  EXPECT_EQ(table_->find(look(name)), now);
}

// Every file system counts its inodes from the beginning.
TEST_P(InodeTableTest, what_is_mounted_in_the_store_ends_no_identity) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root: it mounts";
  table_.reset();
  const fs::path inner = store() / "inner";
  ASSERT_EQ(::mount("none", store().c_str(), "tmpfs", 0, ""), 0);
  fs::create_directory(inner);
  ASSERT_EQ(::mount("none", inner.c_str(), "tmpfs", 0, ""), 0);
  open_table();
  EXPECT_EQ(look("").stx_ino, look("inner").stx_ino);
  EXPECT_THROW(identify("inner"), std::system_error);
  EXPECT_EQ(table_->find(look("")), kRootInode);
  table_.reset();
  ::umount(inner.c_str());
  ::umount(store().c_str());
}

// A power cut takes some pages of the journal and leaves others.
TEST(IdentityJournalTest, what_lies_behind_a_lost_record_never_comes_back) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "journal";
  constexpr std::uint32_t kSlots = 64;
  constexpr off_t kFirstSlot = 4096, kSlot = 128;
  Identity identity;
  identity.type = S_IFREG;
  const auto append = [&](IdentityJournal& journal, InodeId id) {
    identity.id = identity.ino = id;
    ASSERT_TRUE(journal.append(identity));
  };
  {
    IdentityJournal journal(file, kSlots, 0);
    journal.replay([](const Identity&) {});
    for (const InodeId id : {1, 2, 3}) append(journal, id);
  }
  const UniqueFd fd(::open(file.c_str(), O_RDWR | O_CLOEXEC));
  const std::string zeros(kSlot, '\0');
  ASSERT_EQ(::pwrite(fd.get(), zeros.data(), zeros.size(), kFirstSlot + kSlot), kSlot);

  const auto database = directory.path() / "state.db";
  std::mutex mutex;
  {
    IdentityJournal journal(file, kSlots, 0);
    IdentityFlusher flusher(database, journal, mutex);
    const std::lock_guard lock(mutex);
    append(journal, 4);
  }
  IdentityJournal journal(file, kSlots, IdentityRows(database).journal_tail());
  journal.replay([](const Identity& again) { ADD_FAILURE() << again.id; });
}

TEST_P(InodeTableTest, sync_holds_for_what_was_forgotten_and_read_again) {
  options_.cache_entries = 16;
  open_table();
  const unsigned before = syncs;
  make("a");
  const InodeId a = identify("a");
  table_->flush();
  for (int i = 0; i < 64; ++i) {
    make("f" + std::to_string(i));
    identify("f" + std::to_string(i));
  }
  table_->flush();
  EXPECT_TRUE(table_->open(a, O_PATH));
  table_->sync(a);
  EXPECT_GT(syncs, before);
}

TEST_P(InodeTableTest, several_threads_agree_on_ids) {
  constexpr int kFiles = 500;
  for (int i = 0; i < kFiles; ++i) make(std::to_string(i));
  std::vector<std::vector<InodeId>> ids(3);
  std::vector<std::thread> threads;
  for (auto& mine : ids)
    threads.emplace_back([&mine, this] {
      for (int i = 0; i < kFiles; ++i) mine.push_back(identify(std::to_string(i)));
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(ids[0], ids[1]);
  EXPECT_EQ(ids[0], ids[2]);
  EXPECT_EQ(std::set<InodeId>(ids[0].begin(), ids[0].end()).size(), static_cast<std::size_t>(kFiles));
}

INSTANTIATE_TEST_SUITE_P(Ways, InodeTableTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "handles" : "parent_and_name"; });

}  // namespace
}  // namespace sharefs
