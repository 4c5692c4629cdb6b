// The Store: data of files and listings of directories.
#include <linux/falloc.h>
#include <sys/mount.h>
#include <sys/xattr.h>

#include <future>
#include <map>
#include <set>

#include "fs/promises.h"
#include "tests/fs/store_fixture.h"

namespace sharefs {
namespace {

namespace fs = std::filesystem;

class StoreDataTest : public StoreFixture {
 protected:
  Answer seek(InodeId id, std::uint64_t offset, int whence) {
    SHAREFS_ASK(Seek, seek);
    op.set_id(id);
    op.set_offset(offset);
    op.set_whence(static_cast<std::uint32_t>(whence));
    return ask(r);
  }
  Answer copy(InodeId in, std::uint64_t offset_in, InodeId out, std::uint64_t offset_out,
              std::uint64_t length) {
    SHAREFS_ASK(CopyFileRange, copy_file_range);
    op.set_id_in(in);
    op.set_offset_in(offset_in);
    op.set_id_out(out);
    op.set_offset_out(offset_out);
    op.set_length(length);
    return ask(r);
  }
  // Asks without waiting; answered() says in which order the answers came.
  void ask_later(const std::string& name, const pb::Request& request, std::string_view data = {}) {
    ++unanswered_;
    store_->execute(request, as_bytes(data), [this, name](const pb::Outcome& outcome, Bytes) {
      answered_.push_back(outcome.error() == 0 ? name : name + " failed");
      if (--unanswered_ == 0) reactor_.stop();
    });
  }
  const std::vector<std::string>& answered() {
    if (unanswered_ > 0) reactor_.run();
    return answered_;
  }
  pb::Request copy_of(InodeId in, InodeId out, std::uint64_t length) {
    SHAREFS_ASK(CopyFileRange, copy_file_range);
    op.set_id_in(in);
    op.set_id_out(out);
    op.set_length(length);
    return r;
  }
  pb::Request write_of(InodeId id, std::uint64_t offset, std::size_t size, bool writeback = false) {
    SHAREFS_ASK(Write, write);
    op.set_id(id);
    op.set_offset(offset);
    op.set_size(static_cast<std::uint32_t>(size));
    op.set_writeback(writeback);
    return r;
  }
  pb::Request fallocate_of(InodeId id, std::uint64_t length, std::uint32_t mode) {
    SHAREFS_ASK(Fallocate, fallocate);
    op.set_id(id);
    op.set_length(length);
    op.set_mode(mode);
    return r;
  }
  pb::Request truncation_of(InodeId id, std::uint64_t size) {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(id);
    op.set_size(size);
    return r;
  }
  unsigned unanswered_ = 0;
  std::vector<std::string> answered_;

  Answer sync(InodeId id, bool directory = false) {
    SHAREFS_ASK(Sync, sync);
    op.set_id(id);
    op.set_directory(directory);
    return ask(r);
  }
  // The whole directory, a little at a time, as (name, id).
  std::map<std::string, InodeId> list(InodeId id, std::uint32_t max_bytes, bool plus,
                                      bool restart_between = false) {
    std::map<std::string, InodeId> result;
    const std::uint64_t handle = ++handle_;
    std::uint64_t offset = 0;
    while (true) {
      const Answer page = readdir(id, handle, offset, max_bytes, plus);
      EXPECT_EQ(page.error(), 0);
      if (page.error() != 0 || page.outcome.entries_size() == 0) return result;
      for (const auto& entry : page.outcome.entries()) {
        EXPECT_GT(entry.offset(), offset);
        offset = entry.offset();
        EXPECT_TRUE(result.emplace(entry.name(), entry.attr().id()).second) << "twice: " << entry.name();
      }
      if (restart_between) restart();
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, StoreDataTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "handles" : "parent_and_name"; });

TEST_P(StoreDataTest, what_is_written_is_read) {
  const Answer file = create(kRootInode, "file");
  EXPECT_EQ(write(file.id(), 0, "hello").outcome.count(), 5u);
  EXPECT_EQ(write(file.id(), 3, "p me").outcome.count(), 4u);
  EXPECT_EQ(read(file.id(), 0, 100).data, "help me");
  EXPECT_EQ(read(file.id(), 5, 1).data, "m");
  EXPECT_EQ(read(file.id(), 7, 10).data, "");
  EXPECT_EQ(content("file"), "help me");
  EXPECT_EQ(getattr(file.id()).outcome.attr().size(), 7u);
  const Answer directory = mkdir(kRootInode, "d");
  EXPECT_EQ(read(directory.id(), 0, 10).error(), EISDIR);
  EXPECT_EQ(write(directory.id(), 0, "x").error(), EISDIR);
  EXPECT_EQ(write(file.id(), UINT64_MAX, "x").error(), EFBIG);
}

TEST_P(StoreDataTest, a_large_file_from_cold) {
  std::string bytes(3'000'000, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7 >> 8);
  const Answer file = create(kRootInode, "file");
  write(file.id(), 0, bytes);
  EXPECT_EQ(sync(file.id()).error(), 0);
  const UniqueFd fd(::open(path("file").c_str(), O_RDONLY | O_CLOEXEC));
  ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  restart();
  const Answer answer = read(file.id(), 0, 4'000'000);
  EXPECT_EQ(answer.error(), 0);
  EXPECT_TRUE(answer.data == bytes);
  EXPECT_EQ(read(file.id(), 2'999'990, 100).data, bytes.substr(2'999'990));
}

TEST_P(StoreDataTest, appends_go_to_the_end_that_the_owner_sees) {
  const Answer file = create(kRootInode, "file");
  write(file.id(), 0, "one");
  const Answer appended = write(file.id(), 0, " two", true);
  EXPECT_EQ(appended.outcome.count(), 4u);
  EXPECT_EQ(appended.outcome.attr().size(), 7u);
  EXPECT_EQ(write(file.id(), 9999, " three", true, false, true).outcome.attr().size(), 13u);
  EXPECT_EQ(content("file"), "one two three");
  EXPECT_FALSE(write(file.id(), 0, "x").outcome.has_attr());
}

TEST_P(StoreDataTest, holes_stay_holes) {
  const Answer file = create(kRootInode, "file");
  constexpr std::uint64_t kFar = 1 << 20;
  write(file.id(), kFar, "end");
  EXPECT_EQ(read(file.id(), kFar - 2, 10).data, std::string("\0\0end", 5));
  EXPECT_LT(getattr(file.id()).outcome.attr().blocks(), kFar / 512);
  EXPECT_EQ(seek(file.id(), 0, SEEK_DATA).outcome.count(), kFar);
  EXPECT_EQ(seek(file.id(), 0, SEEK_HOLE).outcome.count(), 0u);
  EXPECT_EQ(seek(file.id(), kFar + 10, SEEK_DATA).error(), ENXIO);
  EXPECT_EQ(seek(file.id(), 0, SEEK_SET).error(), EINVAL);
  truncate(file.id(), 10);
  truncate(file.id(), 2 * kFar);
  EXPECT_EQ(seek(file.id(), 0, SEEK_DATA).error(), ENXIO);
}

TEST_P(StoreDataTest, fallocate_and_copy) {
  const Answer file = create(kRootInode, "file"), copied = create(kRootInode, "copied");
  write(file.id(), 0, std::string(16384, 'x'));
  EXPECT_EQ(fallocate(file.id(), 4096, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE).error(), 0);
  EXPECT_EQ(read(file.id(), 4095, 2).data, std::string("x\0", 2));
  EXPECT_EQ(fallocate(file.id(), 0, 1 << 16, FALLOC_FL_KEEP_SIZE).error(), 0);
  EXPECT_EQ(getattr(file.id()).outcome.attr().size(), 16384u);
  EXPECT_EQ(fallocate(file.id(), 0, 1 << 16, 0).error(), 0);
  EXPECT_EQ(getattr(file.id()).outcome.attr().size(), 1u << 16);
  EXPECT_EQ(fallocate(file.id(), 0, 1, 0xff00).error(), EOPNOTSUPP);
  EXPECT_EQ(copy(file.id(), 0, copied.id(), 100, 1000).outcome.count(), 1000u);
  EXPECT_EQ(read(copied.id(), 100, 5).data, "xxxxx");
  EXPECT_EQ(copy(file.id(), 1 << 20, copied.id(), 0, 1000).outcome.count(), 0u) << "behind the end";
}

TEST_P(StoreDataTest, a_copy_of_an_ordinary_user_ends_the_privileges_of_the_target) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs privilege";
  const Answer file = create(kRootInode, "file"), program = create(kRootInode, "program");
  write(file.id(), 0, "content");
  chmod(program.id(), 06777);
  EXPECT_EQ(copy(file.id(), 0, program.id(), 0, 7).error(), 0);
  EXPECT_EQ(getattr(program.id()).outcome.attr().mode() & 07777, 06777u);
  uid = gid = 1000;
  EXPECT_EQ(copy(file.id(), 7, program.id(), 0, 7).outcome.count(), 0u);
  EXPECT_EQ(getattr(program.id()).outcome.attr().mode() & 07777, 06777u) << "nothing was copied";
  EXPECT_EQ(copy(file.id(), 0, program.id(), 0, 7).outcome.count(), 7u);
  EXPECT_EQ(getattr(program.id()).outcome.attr().mode() & 07777, 0777u);
}

TEST_P(StoreDataTest, changes_of_data_wait_behind_those_that_workers_make) {
  const Answer source = create(kRootInode, "source"), target = create(kRootInode, "target");
  write(source.id(), 0, std::string(8192, 's'));
  std::promise<void> go;
  workers_.submit([future = go.get_future().share()] { future.wait(); }, [] {});
  ask_later("copy", copy_of(source.id(), target.id(), 8192));
  RecordingObserver observer;
  store_->observe(&observer);
  ask_later("truncation", truncation_of(target.id(), 0));
  EXPECT_TRUE(observer.has("attributes " + std::to_string(target.id())))
      << "who was promised them is recalled";
  store_->observe(nullptr);
  ask_later("write", write_of(target.id(), 0, 3), std::string("new"));
  ask_later("bad fallocate", fallocate_of(target.id(), 4096, 0xff00));
  ask_later("fallocate", fallocate_of(target.id(), 4096, FALLOC_FL_KEEP_SIZE));
  pb::Request killed = write_of(target.id(), 0, 4), cancel;
  killed.set_client(5);
  killed.set_seq(100);
  ask_later("killed", killed, std::string("away"));
  ask_later("second write", write_of(target.id(), 3, 1), std::string("!"));
  EXPECT_TRUE(answered_.empty());
  cancel.set_client(5);
  cancel.mutable_cancel()->set_seq(100);
  ask_later("cancel", cancel);
  EXPECT_EQ(std::exchange(answered_, {}), (std::vector<std::string>{"killed failed", "cancel"}));
  EXPECT_EQ(create(kRootInode, "target", 0644, O_WRONLY | O_TRUNC).error(), ESTALE);
  EXPECT_EQ(getattr(target.id()).outcome.attr().size(), 0u) << "a query does not wait";
  ask_later("writeback", write_of(target.id(), 8191, 1, true), std::string("b"));
  ask_later("other file", write_of(source.id(), 8192, 1), std::string("o"));
  EXPECT_EQ(answered_, (std::vector<std::string>{"writeback", "other file"})) << "nor do these";
  go.set_value();
  EXPECT_EQ(answered(), (std::vector<std::string>{"writeback", "other file", "copy", "truncation", "write",
                                                  "bad fallocate failed", "fallocate", "second write"}));
  EXPECT_EQ(content("target"), "new!");
  ask_later("after", write_of(target.id(), 0, 1), std::string("N"));
  EXPECT_EQ(answered_.back(), "after") << "nothing is under way any more";
}

TEST_P(StoreDataTest, changes_of_data_wait_behind_one_that_waits_for_space) {
  stop();
  if (::mount("tmpfs", tree().c_str(), "tmpfs", 0, "size=4m") != 0) {
    start();
    GTEST_SKIP() << "needs privilege";
  }
  start();
  const Answer large = create(kRootInode, "large"), file = create(kRootInode, "file");
  write(large.id(), 0, std::string(3 << 20, 'l'));
  std::vector<std::string> aside;
  store_->on_put_aside([&](const pb::Request& put) -> Store::TakeUp {
    aside.push_back(std::to_string(put.write().size()) + " waits");
    return [&](const pb::Request& again, const std::function<void()>& attempt) {
      aside.push_back(std::to_string(again.write().size()) + " again");
      attempt();
    };
  });
  EXPECT_EQ(unlink(kRootInode, "large").error(), 0);  // nobody has it open: space is coming
  const std::string bytes(2 << 20, 'f');
  ask_later("write", write_of(file.id(), 0, bytes.size()), bytes);
  ask_later("second write", write_of(file.id(), 0, 3), std::string("new"));
  EXPECT_TRUE(answered_.empty());
  ask_later("writeback", write_of(file.id(), 10, 1, true), std::string("b"));
  EXPECT_EQ(answered_, std::vector<std::string>{"writeback"});
  EXPECT_EQ(forget(large.id()).error(), 0);
  EXPECT_EQ(answered(), (std::vector<std::string>{"writeback", "write", "second write"}));
  EXPECT_EQ(read(file.id(), 0, 4).data, "newf");
  ASSERT_GE(aside.size(), 4u);
  EXPECT_EQ(aside[0], "2097152 waits") << "without an effect";
  EXPECT_EQ(aside[1], "3 waits");
  EXPECT_EQ(aside[aside.size() - 2], "2097152 again");
  EXPECT_EQ(aside.back(), "3 again");
  stop();
  EXPECT_EQ(::umount(tree().c_str()), 0);
}

// Names have changed by the time of the next try: it changes an inode of which the first one knew nothing.
TEST_P(StoreDataTest, what_is_changed_once_there_is_space_is_recalled) {
  constexpr ClientId kWriter = 1, kHolder = 2;
  stop();
  if (::mount("tmpfs", tree().c_str(), "tmpfs", 0, "size=4m,nr_inodes=100") != 0) {
    start();
    GTEST_SKIP() << "needs privilege";
  }
  start();
  opens_.attach(kWriter, "writer");
  opens_.attach(kHolder, "holder");
  std::set<InodeId> recalled;
  RecordingObserver log;
  {
    Promises promises(*store_, log, opens_, kWriter, reactor_,
                      [&](const RecallOrder& order, const std::function<void(bool)>& done) {
                        if (order.client == kHolder) recalled.insert(order.names.begin(), order.names.end());
                        done(false);
                      });
    promises.begin(1, {});
    store_->observe(&promises);
    store_->on_put_aside([&](const pb::Request&) -> Store::TakeUp {
      return [within = promises.put_aside()](const pb::Request&, const std::function<void()>& attempt) {
        within(attempt);
      };
    });
    const InodeId file = create(kRootInode, "a").id();
    write(file, 0, "data");
    create(kRootInode, "early");
    EXPECT_EQ(unlink(kRootInode, "early").error(), 0);  // nobody has it open: space is coming
    int error = 0;
    for (int i = 0; (error = create(kRootInode, "f" + std::to_string(i)).error()) == 0; ++i) continue;
    EXPECT_EQ(error, ENOSPC);
    EXPECT_EQ(rename(kRootInode, "a", kRootInode, "kept").error(), 0);
    SHAREFS_ASK(Create, create);
    op.set_parent(kRootInode);
    op.set_name("b");
    op.set_mode(S_IFREG | 0644);
    op.set_handle(1);
    op.set_flags(O_RDWR | O_CREAT | O_TRUNC);
    Answer answer;
    bool answered = false;
    promises.execute(r, {}, [&](const pb::Outcome& outcome, Bytes) {
      answer.outcome = outcome;
      answered = true;
      reactor_.stop();
    });
    ASSERT_FALSE(answered) << "there is no inode left";
    EXPECT_EQ(rename(kRootInode, "kept", kRootInode, "b").error(), 0);
    pb::Request look;
    look.set_client(kHolder);
    look.mutable_getattr()->set_id(file);
    std::uint64_t size = 0;
    promises.execute(look, {}, [&](const pb::Outcome& outcome, Bytes) {
      EXPECT_NE(outcome.promise(), 0U);
      size = outcome.attr().size();
    });
    EXPECT_EQ(size, 4U);
    recalled.clear();
    if (!answered) reactor_.run();
    EXPECT_EQ(answer.error(), 0);
    EXPECT_EQ(answer.outcome.attr().size(), 0U);
    EXPECT_TRUE(recalled.contains(file)) << "who was told its size is not told that it was truncated";
    store_->observe(nullptr);
  }
  stop();
  EXPECT_EQ(::umount(tree().c_str()), 0);
}

TEST_P(StoreDataTest, data_changes_are_noted) {
  const Answer file = create(kRootInode, "file"), other = create(kRootInode, "other");
  write(file.id(), 0, std::string(8192, 'x'));
  RecordingObserver observer;
  store_->observe(&observer);
  const std::string extent = "extent " + std::to_string(file.id()) + " ";
  write(file.id(), 8000, "0123");
  EXPECT_TRUE(observer.has(extent + "8000+4"));
  EXPECT_TRUE(observer.has("attributes " + std::to_string(file.id())));
  write(file.id(), 0, "0123", true);
  EXPECT_TRUE(observer.has(extent + "8192+4"));
  truncate(file.id(), 4096);
  EXPECT_TRUE(observer.has(extent + "4096+4100"));
  truncate(file.id(), 10000);
  EXPECT_TRUE(observer.has(extent + "4096+5904"));
  observer.lines.clear();
  fallocate(file.id(), 0, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
  EXPECT_EQ(std::count(observer.lines.begin(), observer.lines.end(), extent + "0+4096"), 2)
      << "before and after";
  observer.lines.clear();
  copy(file.id(), 0, other.id(), 5, 20000);
  const std::string copied = "extent " + std::to_string(other.id()) + " 5+10000";
  EXPECT_EQ(std::count(observer.lines.begin(), observer.lines.end(), copied), 2);
  observer.lines.clear();
  truncate(file.id(), 16384);
  observer.lines.clear();
  if (fallocate(file.id(), 4096, 4096, FALLOC_FL_COLLAPSE_RANGE).error() == 0) {
    EXPECT_TRUE(observer.has(extent + "4096+16384"));
  }
  store_->observe(nullptr);
}

TEST_P(StoreDataTest, open_says_what_open_says) {
  const Answer file = create(kRootInode, "file"), directory = mkdir(kRootInode, "d");
  const Answer link = symlink(kRootInode, "link", "file"), fifo = mknod(kRootInode, "fifo", S_IFIFO | 0600);
  EXPECT_EQ(open(file.id(), O_RDONLY).error(), 0);
  EXPECT_EQ(open(file.id(), O_WRONLY).error(), 0);
  EXPECT_EQ(open(directory.id(), O_RDWR).error(), EISDIR);
  EXPECT_EQ(open(link.id(), O_RDONLY).error(), ELOOP);
  EXPECT_EQ(open(fifo.id(), O_RDONLY).error(), ENXIO);
  EXPECT_EQ(open(4711, O_RDONLY).error(), ESTALE);
  SHAREFS_ASK(OpenDir, opendir);
  op.set_id(directory.id());
  EXPECT_EQ(ask(r).error(), 0);
  op.set_id(file.id());
  EXPECT_EQ(ask(r).error(), ENOTDIR);
  op.set_id(link.id());
  EXPECT_EQ(ask(r).error(), ENOTDIR);
}

TEST_P(StoreDataTest, a_released_file_can_be_executed_in_the_store) {
  const Answer file = create(kRootInode, "file", 0755);
  write(file.id(), 0, "#!/bin/true\n");
  SHAREFS_ASK(Release, release);
  op.set_id(file.id());
  EXPECT_EQ(ask(r).error(), 0);
  store_->rest();
  EXPECT_EQ(std::system(path("file").c_str()), 0);
}

TEST_P(StoreDataTest, fsync_of_files_and_directories) {
  const Answer directory = mkdir(kRootInode, "d"), file = create(directory.id(), "f");
  EXPECT_EQ(sync(file.id()).error(), 0);
  EXPECT_EQ(sync(directory.id(), true).error(), 0);
  EXPECT_EQ(sync(4711).error(), ESTALE);
  Database database(directory_.path() / "state.db");
  Statement select(database, "SELECT 1 FROM inode WHERE id=?");
  EXPECT_TRUE(select.bind(file.id()).step());
}

TEST_P(StoreDataTest, a_listing_has_every_entry_once_whatever_the_page) {
  const Answer directory = mkdir(kRootInode, "d");
  std::map<std::string, InodeId> expected{{".", directory.id()}, {"..", kRootInode}};
  for (int i = 0; i < 300; ++i) {
    const std::string name = std::string(static_cast<std::size_t>(i % 50), 'n') + std::to_string(i);
    expected[name] = i % 3 == 0 ? mkdir(directory.id(), name).id() : create(directory.id(), name).id();
  }
  for (const std::uint32_t page : {512u, 4096u, 1u << 20})
    for (const bool plus : {false, true}) EXPECT_EQ(list(directory.id(), page, plus), expected) << page;
  EXPECT_EQ(list(directory.id(), 4096, true, true), expected) << "with a new process after every page";
  restart();
  EXPECT_EQ(list(directory.id(), 4096, false), expected) << "ids from cold";
}

TEST_P(StoreDataTest, plus_has_whole_attributes) {
  create(kRootInode, "file", 0640);
  const Answer page = readdir(kRootInode, 1, 0, 4096, true);
  ASSERT_EQ(page.outcome.entries_size(), 3);
  EXPECT_EQ(page.outcome.entries(0).name(), ".");
  EXPECT_EQ(page.outcome.entries(1).name(), "..");
  EXPECT_EQ(page.outcome.entries(1).attr().id(), kRootInode);
  expect_as_stat(page.outcome.entries(2).attr(), path("file"));
  const Answer plain = readdir(kRootInode, 1, 0, 4096, false);
  EXPECT_EQ(plain.outcome.entries(2).attr().mode(), static_cast<std::uint32_t>(S_IFREG));
}

TEST_P(StoreDataTest, tells_what_has_no_xattrs_if_asked) {
  create(kRootInode, "bare");
  create(kRootInode, "tagged");
  ASSERT_EQ(::setxattr(path("tagged").c_str(), "user.tag", "x", 1, 0), 0);
  SHAREFS_ASK(ReadDir, readdir);
  op.set_id(kRootInode);
  op.set_handle(1);
  op.set_max_bytes(4096);
  op.set_plus(true);
  std::map<std::string, bool> bare;
  const Answer plain = ask(r);
  for (const auto& entry : plain.outcome.entries()) bare[entry.name()] = entry.attr().bare();
  EXPECT_FALSE(bare["bare"]) << "it was not asked for";
  op.set_bare(true);
  const Answer asked = ask(r);
  for (const auto& entry : asked.outcome.entries()) bare[entry.name()] = entry.attr().bare();
  EXPECT_TRUE(bare["bare"]);
  EXPECT_FALSE(bare["tagged"]);
}

TEST_P(StoreDataTest, a_listing_goes_on_while_entries_come_and_go) {
  const Answer directory = mkdir(kRootInode, "d");
  std::set<std::string> stay;
  for (int i = 0; i < 200; ++i) {
    create(directory.id(), "f" + std::to_string(i));
    if (i % 2 == 0) stay.insert("f" + std::to_string(i));
  }
  std::set<std::string> seen;
  std::uint64_t offset = 0;
  bool changed = false;
  while (true) {
    const Answer page = readdir(directory.id(), 7, offset, 2048, true);
    if (page.outcome.entries_size() == 0) break;
    for (const auto& entry : page.outcome.entries()) {
      EXPECT_TRUE(seen.insert(entry.name()).second) << entry.name();
      offset = entry.offset();
    }
    if (!changed) {
      for (int i = 1; i < 200; i += 2) unlink(directory.id(), "f" + std::to_string(i));
      for (int i = 0; i < 100; ++i) create(directory.id(), "new" + std::to_string(i));
      changed = true;
    }
  }
  for (const auto& name : stay) EXPECT_TRUE(seen.count(name)) << name;
}

TEST_P(StoreDataTest, a_huge_directory) {
  const Answer directory = mkdir(kRootInode, "d");
  std::size_t count = 0;
  store_->rest();
  for (; count < 30'000; ++count) {
    const std::string name = std::string(100, 'n') + std::to_string(count);
    ASSERT_EQ(::mknod(path("d/" + name).c_str(), S_IFREG | 0600, 0), 0);
  }
  ASSERT_GT(fs::exists(path("d")), 0);
  EXPECT_EQ(list(directory.id(), 1 << 20, false).size(), count + 2);
}

TEST_P(StoreDataTest, listings_of_a_huge_directory_do_not_pile_up) {
  const Answer directory = mkdir(kRootInode, "d");
  store_->rest();
  for (int i = 0; i < 20'000; ++i) {
    const std::string name = std::string(240, 'n') + std::to_string(i);
    ASSERT_EQ(::mknod(path("d/" + name).c_str(), S_IFREG | 0600, 0), 0);
  }
  constexpr std::uint64_t kMore = 30;  // of more than 5 MB each
  for (std::uint64_t handle = 0; handle <= kMore; ++handle) readdir(directory.id(), handle, 0, 1024, false);
  // Of the last twentieth of the names.
  const auto names = [&](std::uint64_t handle) {
    constexpr std::uint64_t kLate = (std::uint64_t{1} << 63) / 20 * 19;
    return readdir(directory.id(), handle, kLate, 16 << 20, false).outcome.entries_size();
  };
  const int before = names(kMore);
  for (int i = 0; i < 100; ++i) create(directory.id(), "new" + std::to_string(i));
  EXPECT_EQ(names(kMore), before) << "the newest is kept";
  EXPECT_EQ(names(kMore / 2), before) << "and some others";
  EXPECT_GT(names(0), before) << "but not this one";
}

}  // namespace
}  // namespace sharefs
