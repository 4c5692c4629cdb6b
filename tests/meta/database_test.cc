#include "meta/database.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <fstream>
#include <thread>
#include <vector>

#include "scratch.h"

namespace {
std::atomic<int> syncs = 0;
std::atomic<bool> disk_fails = false, disk_fails_once = false;
}  // namespace

// SQLite's calls land here: this is how the tests see what is made durable when.
extern "C" int fdatasync(int fd) {
  ++syncs;
  if (disk_fails || disk_fails_once.exchange(false)) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}
extern "C" int fsync(int fd) {
  ++syncs;
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace sharefs {
namespace {

std::int64_t count(Database& database, const char* sql) {
  Statement statement(database, sql);
  return statement.step() ? statement.integer(0) : -1;
}

TEST(Database, what_was_written_is_there_after_reopening) {
  const Scratch scratch;
  {
    Database database(scratch / "state.db");
    Statement(database, "INSERT INTO blob(key, value) VALUES(?, ?)").bind("k", as_bytes("v")).run();
  }
  Database database(scratch / "state.db");
  Statement select(database, "SELECT value FROM blob WHERE key = ?");
  ASSERT_TRUE(select.bind("k").step());
  EXPECT_EQ(select.blob(0), "v");
  EXPECT_FALSE(select.step());
}

TEST(Database, the_file_is_private_and_in_wal_mode_even_if_it_was_open_to_all) {
  const Scratch scratch;
  std::ofstream(scratch / "state.db").close();
  ::chmod((scratch / "state.db").c_str(), 0666);
  Database database(scratch / "state.db");
  struct stat status {};
  for (const char* name : {"state.db", "state.db-wal"}) {
    ASSERT_EQ(::stat((scratch / name).c_str(), &status), 0) << name;
    EXPECT_EQ(status.st_mode & 07777, 0600U) << name;
  }
  Statement mode(database, "PRAGMA journal_mode");
  ASSERT_TRUE(mode.step());
  EXPECT_EQ(mode.text(0), "wal");
}

TEST(Database, a_file_of_a_newer_version_is_refused_and_left_alone) {
  const Scratch scratch;
  { Database(scratch / "state.db").execute("PRAGMA user_version = 4"); }
  try {
    Database database(scratch / "state.db");
    FAIL() << "was opened";
  } catch (const DatabaseError& error) {
    EXPECT_NE(std::string(error.what()).find("newer"), std::string::npos) << error.what();
  }
}

TEST(Database, a_file_of_an_older_version_is_brought_up_to_date) {
  const Scratch scratch;
  {
    Database older(scratch / "state.db");
    older.execute(
        "ALTER TABLE handoff DROP COLUMN tries; INSERT INTO handoff(attempt) VALUES(7);"
        "DROP TABLE removed_site;"
        "PRAGMA user_version = 1");
  }
  Database database(scratch / "state.db");
  Statement kept(database, "SELECT attempt, tries FROM handoff");
  ASSERT_TRUE(kept.step());
  EXPECT_EQ(kept.integer(0), 7);
  EXPECT_EQ(kept.integer(1), 0);
  EXPECT_FALSE(Statement(database, "SELECT public_key FROM removed_site").step());
}

TEST(Database, a_file_that_is_no_database_and_a_folder_that_is_missing_are_refused_in_one_line) {
  const Scratch scratch;
  std::ofstream(scratch / "text") << std::string(4096, 'x');
  for (const auto& file : {scratch / "text", scratch / "missing/state.db"}) {
    try {
      Database database(file);
      FAIL() << file << " was opened";
    } catch (const DatabaseError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      EXPECT_NE(std::string(error.what()).find(file.string()), std::string::npos) << error.what();
    }
  }
}

TEST(Database, several_threads_may_create_and_write_it_at_once) {
  const Scratch scratch;
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&scratch, t] {
      Database database(scratch / "state.db");
      for (int i = 0; i < 25; ++i) {
        Transaction transaction(database);
        Statement(database, "INSERT INTO id_block(epoch, next) VALUES(?, 0)").bind(t * 100 + i).run();
        transaction.commit();
      }
    });
  for (auto& thread : threads) thread.join();
  Database database(scratch / "state.db");
  EXPECT_EQ(count(database, "SELECT count(*) FROM id_block"), 100);
}

TEST(Transaction, is_rolled_back_when_it_goes_out_of_scope_uncommitted) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  try {
    Transaction transaction(database, Durability::full);
    database.execute("INSERT INTO setting(key, value) VALUES('a', 'b')");
    throw std::runtime_error("on the way");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(count(database, "SELECT count(*) FROM setting"), 0);
  EXPECT_EQ(count(database, "PRAGMA synchronous"), 1);
  Transaction(database).commit();  // and the next one can begin
}

TEST(Transaction, does_not_nest_and_the_outer_one_survives_the_attempt) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  Transaction outer(database);
  database.execute("INSERT INTO setting(key, value) VALUES('a', 'b')");
  EXPECT_THROW(Transaction inner(database), DatabaseError);
  outer.commit();
  EXPECT_EQ(count(database, "SELECT count(*) FROM setting"), 1);
}

TEST(Transaction, a_full_commit_syncs_and_a_normal_one_does_not) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  const auto write = [&](Durability durability) {
    const int before = syncs;
    Transaction transaction(database, durability);
    database.execute("INSERT INTO setting(key, value) VALUES(random(), 'b')");
    transaction.commit();
    return syncs - before;
  };
  write(Durability::full);  // the first one also syncs the header of the WAL and the folder
  EXPECT_EQ(write(Durability::normal), 0);
  EXPECT_GE(write(Durability::full), 1);
  EXPECT_EQ(write(Durability::normal), 0);
}

TEST(Transaction, with_deferred_checkpoints_many_normal_commits_never_sync) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  database.defer_checkpoints();
  database.execute("INSERT INTO setting(key, value) VALUES('first', '')");
  const int before = syncs;
  for (int i = 0; i < 50; ++i)
    database.execute("INSERT INTO blob(key, value) VALUES(random(), zeroblob(200000))");
  EXPECT_EQ(syncs, before);
}

// What the failed sync was to write counts as written: the next one would succeed without it.
TEST(Database, nothing_counts_as_durable_behind_what_a_failed_sync_may_have_lost) {
  for (const bool commits : {false, true}) {
    const Scratch scratch;
    Database database(scratch / "state.db");
    database.execute("INSERT INTO setting(key, value) VALUES('first', 1)");
    disk_fails = true;
    if (commits) {
      Transaction transaction(database, Durability::full);
      database.execute("INSERT INTO setting(key, value) VALUES('second', 2)");
      EXPECT_THROW(transaction.commit(), DatabaseError);
    } else {
      EXPECT_THROW(database.sync_commits(), DatabaseError);
    }
    EXPECT_THROW(database.sync_commits(), DatabaseError) << "the disk still fails";
    disk_fails = false;
    database.sync_commits();
    // As after a power cut that has taken the log.
    std::filesystem::copy_file(scratch / "state.db", scratch / "after.db");
    Database after(scratch / "after.db");
    EXPECT_EQ(count(after, "SELECT count(*) FROM setting WHERE key = 'first'"), 1);
  }
}

// SQLite refuses it at once, whatever its busy timeout.
TEST(Database, what_follows_a_failed_sync_waits_for_the_checkpoint_of_another_process) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  database.execute("INSERT INTO setting(key, value) VALUES('first', 1)");
  disk_fails = true;
  EXPECT_THROW(database.sync_commits(), DatabaseError);
  disk_fails = false;
  std::array<int, 2> locked{};
  ASSERT_EQ(::pipe(locked.data()), 0);
  const pid_t other = ::fork();
  if (other == 0) {
    constexpr off_t kCheckpointLock = 121;  // see «WAL-index locks» in SQLite's walformat.html
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = kCheckpointLock;
    lock.l_len = 1;
    const int index = ::open((scratch / "state.db-shm").c_str(), O_RDWR | O_CLOEXEC);
    const bool ok = ::fcntl(index, F_SETLK, &lock) == 0 && ::write(locked[1], "", 1) == 1;
    ::usleep(200'000);
    ::_exit(ok ? 0 : 1);
  }
  ::close(locked[1]);
  char byte = 0;
  EXPECT_EQ(::read(locked[0], &byte, 1), 1);
  ::close(locked[0]);
  EXPECT_NO_THROW(database.sync_commits());
  int status = -1;
  EXPECT_EQ(::waitpid(other, &status, 0), other);
  EXPECT_EQ(status, 0);
}

// Each process runs the test from its beginning, and finds the file in its environment.
TEST(Database, a_new_process_does_not_trust_the_log_of_one_whose_sync_failed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Scratch scratch;
  constexpr const char* kFile = "SHAREFS_TEST_DATABASE";
  ::setenv(kFile, (scratch / "state.db").c_str(), 0);
  const std::filesystem::path file = ::getenv(kFile);
  const auto fail_to_sync = [&file] {
    Database database(file);
    database.execute("INSERT INTO setting(key, value) VALUES('first', 1)");
    disk_fails = true;
    EXPECT_THROW(database.sync_commits(), DatabaseError);
    ::_exit(testing::Test::HasFailure() ? 1 : 0);
  };
  const auto not_commit = [&file] {
    Database database(file);
    disk_fails_once = true;
    EXPECT_THROW(Transaction(database, Durability::full), DatabaseError) << "the kernel tells it once";
    ::_exit(testing::Test::HasFailure() ? 1 : 0);
  };
  const auto commit = [&file] {
    Database database(file);
    Transaction transaction(database, Durability::full);
    database.execute("INSERT INTO setting(key, value) VALUES('second', 2)");
    transaction.commit();
    ::_exit(0);
  };
  EXPECT_EXIT(fail_to_sync(), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(not_commit(), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(commit(), testing::ExitedWithCode(0), "");
  ::unsetenv(kFile);
  // As after a power cut that has taken the log.
  std::filesystem::copy_file(file, scratch / "after.db");
  Database after(scratch / "after.db");
  EXPECT_EQ(count(after, "SELECT count(*) FROM setting WHERE key = 'first'"), 1);
}

// That of an earlier process, of which nothing is known.
TEST(Database, who_reads_does_not_hold_up_a_new_process) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Scratch scratch;
  constexpr const char* kFile = "SHAREFS_TEST_DATABASE";
  ::setenv(kFile, (scratch / "state.db").c_str(), 0);
  const std::filesystem::path file = ::getenv(kFile);
  Database database(file);
  database.execute("INSERT OR IGNORE INTO setting(key, value) VALUES('first', 1)");
  database.execute("BEGIN");
  EXPECT_EQ(count(database, "SELECT count(*) FROM setting WHERE key = 'first'"), 1);
  const auto commit = [&file] {
    const auto began = std::chrono::steady_clock::now();
    Database other(file);
    Transaction(other, Durability::full).commit();
    const auto took = std::chrono::steady_clock::now() - began;
    ::_exit(took < std::chrono::seconds(5) ? 0 : 1);  // it would be ten
  };
  EXPECT_EXIT(commit(), testing::ExitedWithCode(0), "");
  ::unsetenv(kFile);
}

TEST(Statement, keeps_empty_values_null_and_bytes_apart) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  const std::string name("a\0\xff", 3);
  Statement insert(database, "INSERT INTO change_log(seq, kind, inode, name) VALUES(?, ?, ?, ?)");
  insert.bind(1, std::string_view(), ~std::uint64_t{0}, as_bytes(name)).run();
  insert.bind(2, "x", std::nullopt, Bytes()).run();
  Statement select(database, "SELECT kind, inode, name, typeof(name) FROM change_log ORDER BY seq");
  ASSERT_TRUE(select.step());
  EXPECT_FALSE(select.is_null(0));
  EXPECT_EQ(select.text(0), "");
  EXPECT_EQ(select.id(1), ~std::uint64_t{0});
  EXPECT_EQ(select.blob(2), name);
  ASSERT_TRUE(select.step());
  EXPECT_TRUE(select.is_null(1));
  EXPECT_FALSE(select.is_null(2));
  EXPECT_EQ(select.blob(2), "");
  EXPECT_EQ(select.text(3), "blob");
}

TEST(Statement, can_be_used_again_after_it_failed) {
  const Scratch scratch;
  Database database(scratch / "state.db");
  Statement insert(database, "INSERT INTO id_block(epoch, next) VALUES(?, ?)");
  insert.bind(1, 1).run();
  EXPECT_THROW(insert.bind(1, 2).run(), DatabaseError);
  insert.bind(2, 2).run();
  EXPECT_EQ(count(database, "SELECT sum(next) FROM id_block"), 3);
  EXPECT_THROW(insert.bind(1, 2, 3), DatabaseError);
  EXPECT_THROW(Statement(database, "SELECT nonsense FROM nowhere"), DatabaseError);
}

}  // namespace
}  // namespace sharefs
