// The Store: names, attributes and orphans, compared with what the same system calls do on the bare
// directory.
#include <linux/fs.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <thread>

#include "tests/fs/store_fixture.h"

namespace sharefs {
namespace {

namespace fs = std::filesystem;

class StoreTest : public StoreFixture {
 protected:
  // When it is answered, the (only) worker has done what it was given before.
  Answer fsync_barrier(InodeId id) {
    SHAREFS_ASK(Sync, sync);
    op.set_id(id);
    op.set_directory(true);
    return ask(r);
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, StoreTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "handles" : "parent_and_name"; });

TEST_P(StoreTest, what_is_made_is_there_with_the_attributes_that_stat_says) {
  const Answer file = create(kRootInode, "file", 0640);
  ASSERT_EQ(file.error(), 0);
  expect_as_stat(file.outcome.attr(), path("file"));
  const Answer directory = mkdir(kRootInode, "directory", 0751);
  ASSERT_EQ(directory.error(), 0);
  expect_as_stat(directory.outcome.attr(), path("directory"));
  const Answer link = symlink(kRootInode, "link", "file");
  ASSERT_EQ(link.error(), 0);
  expect_as_stat(link.outcome.attr(), path("link"));
  const Answer fifo = mknod(directory.id(), "fifo", S_IFIFO | 0600);
  ASSERT_EQ(fifo.error(), 0);
  expect_as_stat(fifo.outcome.attr(), path("directory/fifo"));
  for (const auto& made : {file, directory, link, fifo}) {
    EXPECT_EQ(getattr(made.id()).id(), made.id());
  }
  EXPECT_EQ(lookup(kRootInode, "file").id(), file.id());
  EXPECT_EQ(lookup(directory.id(), "fifo").id(), fifo.id());
  EXPECT_EQ(lookup(kRootInode, "nothing").error(), ENOENT);
  EXPECT_EQ(lookup(file.id(), "x").error(), ENOTDIR);
  EXPECT_EQ(create(file.id(), "x").error(), ENOTDIR);
  EXPECT_EQ(getattr(987654).error(), ESTALE);
  EXPECT_EQ(create(987654, "x").error(), ESTALE);
  EXPECT_EQ(mkdir(kRootInode, "file").error(), EEXIST);
  EXPECT_EQ(symlink(kRootInode, "file", "x").error(), EEXIST);
  EXPECT_EQ(mknod(kRootInode, "file", S_IFREG | 0600).error(), EEXIST);
}

TEST_P(StoreTest, devices_are_made_and_never_opened) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs privilege";
  const Answer device = mknod(kRootInode, "null", S_IFCHR | 0600, makedev(1, 3));
  ASSERT_EQ(device.error(), 0);
  expect_as_stat(device.outcome.attr(), path("null"));
  EXPECT_EQ(open(device.id(), O_RDONLY).error(), ENXIO);
  EXPECT_EQ(write(device.id(), 0, "x").error(), ENXIO);
}

TEST_P(StoreTest, names_that_are_none_are_refused) {
  for (const std::string& name : {std::string("."), std::string(".."), std::string(), std::string("a/b"),
                                  std::string("/"), std::string("a\0b", 3)}) {
    EXPECT_EQ(create(kRootInode, name).error(), EINVAL) << name;
    EXPECT_EQ(mkdir(kRootInode, name).error(), EINVAL) << name;
    EXPECT_EQ(unlink(kRootInode, name).error(), EINVAL) << name;
    EXPECT_EQ(rmdir(kRootInode, name).error(), EINVAL) << name;
    EXPECT_EQ(rename(kRootInode, "x", kRootInode, name).error(), EINVAL) << name;
  }
  EXPECT_EQ(create(kRootInode, std::string(256, 'x')).error(), ENAMETOOLONG);
  EXPECT_EQ(create(kRootInode, std::string(255, 'x')).error(), 0);
}

TEST_P(StoreTest, the_private_area_does_not_exist_for_users) {
  create(kRootInode, "a");
  unlink(kRootInode, "a");  // makes the private area
  ASSERT_TRUE(fs::exists(path(".sharefs")));
  const std::string name(kPrivateArea);
  EXPECT_EQ(lookup(kRootInode, name).error(), ENOENT);
  EXPECT_EQ(rmdir(kRootInode, name).error(), ENOENT);
  EXPECT_EQ(rename(kRootInode, name, kRootInode, "b").error(), ENOENT);
  EXPECT_EQ(mkdir(kRootInode, name).error(), EPERM);
  create(kRootInode, "b");
  EXPECT_EQ(rename(kRootInode, "b", kRootInode, name).error(), EPERM);
  EXPECT_EQ(getattr(kRootInode).outcome.attr().nlink(), 2u) << "and is not counted";
  const Answer list = readdir(kRootInode, 1, 0, 1 << 16, true);
  for (const auto& entry : list.outcome.entries()) EXPECT_NE(entry.name(), name);
  const Answer below = mkdir(kRootInode, "d");
  EXPECT_EQ(mkdir(below.id(), name).error(), 0) << "only in the root";
}

TEST_P(StoreTest, names_are_bytes) {
  const std::string name = "\xff\xfe\n\x01 name";
  const Answer made = create(kRootInode, name);
  ASSERT_EQ(made.error(), 0);
  EXPECT_TRUE(fs::exists(path(name)));
  EXPECT_EQ(lookup(kRootInode, name).id(), made.id());
  const Answer list = readdir(kRootInode, 1, 0, 1 << 16, true);
  ASSERT_EQ(list.outcome.entries_size(), 3);
  EXPECT_EQ(list.outcome.entries(2).name(), name);
  EXPECT_EQ(list.outcome.entries(2).attr().id(), made.id());
}

TEST_P(StoreTest, new_files_belong_to_the_caller) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs privilege";
  uid = 1234;
  gid = 5678;
  const Answer file = create(kRootInode, "file", 0666, O_RDWR, 027);
  ASSERT_EQ(file.error(), 0);
  EXPECT_EQ(file.outcome.attr().uid(), 1234u);
  EXPECT_EQ(file.outcome.attr().gid(), 5678u);
  EXPECT_EQ(file.outcome.attr().mode() & 07777, 0640u);
  uid = gid = 0;
  const Answer directory = mkdir(kRootInode, "directory", 0755);
  ASSERT_EQ(::chown(path("directory").c_str(), 0, 4321), 0);
  ASSERT_EQ(chmod(directory.id(), 02777).error(), 0);
  uid = 99;
  gid = 100;
  const Answer inside = create(directory.id(), "file");
  EXPECT_EQ(inside.outcome.attr().uid(), 99u);
  EXPECT_EQ(inside.outcome.attr().gid(), 4321u) << "of the setgid directory";
  const Answer below = mkdir(directory.id(), "below");
  EXPECT_EQ(below.outcome.attr().mode() & S_ISGID, static_cast<std::uint32_t>(S_ISGID));
  EXPECT_EQ(create(kRootInode, "in a directory of root").error(), 0)
      << "the kernel has checked, not the store";
  store_->rest();
  struct stat status {};
  std::ofstream(path("own")) << "x";
  ASSERT_EQ(::stat(path("own").c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 0u);
}

TEST_P(StoreTest, create_of_an_existing_file_opens_it_unless_exclusive) {
  const Answer made = create(kRootInode, "file", 0644, O_RDWR);
  write(made.id(), 0, "content");
  EXPECT_EQ(create(kRootInode, "file", 0644, O_RDWR | O_EXCL).error(), EEXIST);
  const Answer again = create(kRootInode, "file", 0600, O_RDWR);
  EXPECT_EQ(again.error(), 0);
  EXPECT_EQ(again.id(), made.id());
  EXPECT_EQ(again.outcome.attr().size(), 7u);
  EXPECT_EQ(create(kRootInode, "file", 0600, O_RDWR | O_TRUNC).outcome.attr().size(), 0u);
  mkdir(kRootInode, "directory");
  EXPECT_EQ(create(kRootInode, "directory").error(), ESTALE) << "the kernel looks again";
  if (::geteuid() != 0) return;
  uid = gid = 1000;
  EXPECT_EQ(create(kRootInode, "file", 0600, O_RDWR).error(), ESTALE) << "not plainly allowed";
  EXPECT_EQ(create(kRootInode, "file", 0600, O_RDONLY).error(), 0);
}

// An ordinary open finds out what a create may not guess.
TEST_P(StoreTest, create_of_an_existing_file_grants_nothing_that_open_would_not) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs privilege";
  const Answer file = create(kRootInode, "file");
  write(file.id(), 0, "content");
  ASSERT_EQ(::chown(path("file").c_str(), 1000, 1000), 0);
  const auto as = [&](std::uint32_t user, std::uint32_t mode, std::uint32_t flags) {
    EXPECT_EQ(::chmod(path("file").c_str(), mode), 0);
    uid = gid = user;
    return create(kRootInode, "file", 0644, flags).error();
  };
  EXPECT_EQ(as(1000, 0400, O_RDWR), ESTALE) << "the owner may not";
  EXPECT_EQ(as(1000, 0200, O_RDWR), ESTALE);
  EXPECT_EQ(as(1000, 0400, O_RDONLY), 0);
  EXPECT_EQ(as(1000, 0200, O_WRONLY), 0);
  EXPECT_EQ(as(1000, 0400, O_RDONLY | O_TRUNC), ESTALE) << "truncating is writing";
  EXPECT_EQ(as(2000, 0604, O_RDONLY), ESTALE) << "the group may not, and who knows who is in it";
  EXPECT_EQ(as(2000, 0640, O_RDONLY), ESTALE);
  EXPECT_EQ(as(2000, 0644, O_RDONLY), 0);
  EXPECT_EQ(as(2000, 0644, O_WRONLY), ESTALE);
  EXPECT_EQ(as(0, 0, O_RDWR), 0);
  EXPECT_EQ(content("file"), "content");
  EXPECT_EQ(as(2000, 06777, O_WRONLY | O_TRUNC), 0);
  EXPECT_EQ(content("file"), "");
  EXPECT_EQ(getattr(file.id()).outcome.attr().mode() & 07777, 0777u) << "written by somebody else";

  // Version 2: the owner and others may read and write, user 2000 only read, the mask allows everything.
  const std::uint16_t acl[] = {2, 0,      1,      6,  0xffff, 0xffff, 2,      4,  2000, 0,      4,
                               6, 0xffff, 0xffff, 16, 7,      0xffff, 0xffff, 32, 6,    0xffff, 0xffff};
  if (::setxattr(path("file").c_str(), "system.posix_acl_access", acl, sizeof acl, 0) != 0)
    GTEST_SKIP() << "no ACLs here";
  EXPECT_EQ(create(kRootInode, "file", 0644, O_RDWR).error(), ESTALE);
  uid = gid = 1000;
  EXPECT_EQ(create(kRootInode, "file", 0644, O_RDWR).error(), 0) << "of the owner it says what the mode says";
}

TEST_P(StoreTest, hard_links_are_one_inode) {
  const Answer file = create(kRootInode, "a");
  const Answer second = link(file.id(), kRootInode, "b");
  ASSERT_EQ(second.error(), 0);
  EXPECT_EQ(second.id(), file.id());
  EXPECT_EQ(second.outcome.attr().nlink(), 2u);
  EXPECT_EQ(lookup(kRootInode, "b").id(), file.id());
  EXPECT_EQ(link(file.id(), kRootInode, "b").error(), EEXIST);
  const Answer directory = mkdir(kRootInode, "d");
  EXPECT_EQ(link(directory.id(), kRootInode, "c").error(), EPERM);
  const Answer removed = unlink(kRootInode, "a");
  EXPECT_EQ(removed.error(), 0);
  EXPECT_EQ(removed.outcome.orphaned_size(), 0) << "it has another name";
  EXPECT_EQ(lookup(kRootInode, "b").outcome.attr().nlink(), 1u);
  EXPECT_EQ(getattr(file.id()).error(), 0);
  const Answer soft = symlink(kRootInode, "s", "nowhere");
  EXPECT_EQ(link(soft.id(), kRootInode, "s2").outcome.attr().nlink(), 2u) << "of the link itself";
}

TEST_P(StoreTest, an_open_file_is_reached_whichever_of_its_names_goes) {
  const Answer file = create(kRootInode, "a");
  write(file.id(), 0, "content");
  const OpenHandle handle{.client = 1, .handle = 99, .id = file.id(), .flags = O_RDWR};
  opens_.open(handle);
  const auto reached = [&] {
    store_->drop_descriptors();
    return getattr(file.id()).error() == 0 && write(file.id(), 0, "c").error() == 0 &&
           read(file.id(), 0, 100).data == "content";
  };
  link(file.id(), kRootInode, "b");
  unlink(kRootInode, "b");
  EXPECT_TRUE(reached()) << "the first name is left";
  link(file.id(), kRootInode, "c");
  unlink(kRootInode, "a");
  EXPECT_TRUE(reached()) << "the second name is left";
  link(file.id(), kRootInode, "d");
  unlink(kRootInode, "c");
  EXPECT_TRUE(reached()) << "after a link that could be noted";
  link(file.id(), kRootInode, "e");
  create(kRootInode, "other");
  EXPECT_EQ(rename(kRootInode, "other", kRootInode, "d").error(), 0);
  EXPECT_TRUE(reached()) << "one name was renamed over";
  EXPECT_EQ(lookup(kRootInode, "e").id(), file.id());
  link(file.id(), kRootInode, "f");
  unlink(kRootInode, "e");
  SHAREFS_ASK(Release, release);
  op.set_id(file.id());
  opens_.close(1, 99);
  EXPECT_EQ(ask(r).error(), 0);
  EXPECT_TRUE(reached()) << "closed: a handoff has to read it";
  EXPECT_EQ(lookup(kRootInode, "f").id(), file.id());
  EXPECT_TRUE(reached()) << "closed, and looked up";
  EXPECT_EQ(unlink(kRootInode, "f").outcome.orphaned_size(), 1);
  EXPECT_TRUE(reached()) << "without a name";
}

// An image looks at names while they go.
TEST_P(StoreTest, who_sees_a_name_that_goes_takes_no_inode_out_of_reach) {
  const Answer file = create(kRootInode, "x"), other = create(kRootInode, "other");
  std::atomic<bool> over{false};
  std::thread image([&] {
    const UniqueFd root(::open(tree().c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    while (!over) {
      Backing backing{};
      if (::statx(root.get(), "y", AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &backing) == 0)
        inodes_->identify(kRootInode, "y", root.get(), backing);
    }
  });
  int lost = 0;
  for (int i = 0; i < 10'000; ++i) {
    if (link(file.id(), kRootInode, "y").error() != 0) ++lost;
    lookup(kRootInode, "x");
    if (i % 2 == 0) {
      unlink(kRootInode, "y");
    } else {
      link(other.id(), kRootInode, "z");
      rename(kRootInode, "z", kRootInode, "y");
    }
    if (!inodes_->open(file.id(), O_PATH)) ++lost;
    unlink(kRootInode, "y");
    lookup(kRootInode, "x");
    lookup(kRootInode, "other");
  }
  over = true;
  image.join();
  EXPECT_EQ(lost, 0);
}

TEST_P(StoreTest, an_unlinked_file_lives_until_it_is_forgotten) {
  const Answer file = create(kRootInode, "file");
  write(file.id(), 0, "still here");
  const Answer removed = unlink(kRootInode, "file");
  ASSERT_EQ(removed.error(), 0);
  ASSERT_EQ(removed.outcome.orphaned_size(), 1);
  EXPECT_EQ(removed.outcome.orphaned(0), file.id());
  EXPECT_EQ(lookup(kRootInode, "file").error(), ENOENT);
  EXPECT_EQ(getattr(file.id()).outcome.attr().nlink(), 0u);
  EXPECT_EQ(link(file.id(), kRootInode, "back").error(), ENOENT);
  EXPECT_EQ(create(kRootInode, "file").error(), 0) << "the name is free";
  restart();
  EXPECT_EQ(read(file.id(), 0, 100).data, "still here");
  EXPECT_EQ(write(file.id(), 0, "S").error(), 0);
  EXPECT_EQ(store_->orphans(), std::vector<InodeId>{file.id()});
  EXPECT_EQ(forget(file.id()).error(), 0);
  EXPECT_EQ(read(file.id(), 0, 100).error(), ESTALE);
  restart();
  EXPECT_TRUE(fs::is_empty(path(".sharefs/orphans")));
  EXPECT_EQ(forget(lookup(kRootInode, "file").id()).error(), 0);
  EXPECT_EQ(lookup(kRootInode, "file").error(), 0) << "only orphans are ever forgotten";
}

TEST_P(StoreTest, large_orphans_are_deleted_too) {
  const Answer file = create(kRootInode, "file");
  ASSERT_EQ(fallocate(file.id(), 0, 32 << 20, 0).error(), 0);
  unlink(kRootInode, "file");
  EXPECT_EQ(forget(file.id()).error(), 0);
  EXPECT_EQ(getattr(file.id()).error(), ESTALE);
  EXPECT_EQ(fsync_barrier(kRootInode).error(), 0);
  EXPECT_TRUE(fs::is_empty(path(".sharefs/orphans"))) << "at once";
}

TEST_P(StoreTest, a_removed_directory_lives_until_it_is_forgotten) {
  const Answer directory = mkdir(kRootInode, "d");
  const Answer file = create(directory.id(), "file");
  EXPECT_EQ(rmdir(kRootInode, "d").error(), ENOTEMPTY);
  EXPECT_EQ(unlink(kRootInode, "d").error(), EISDIR);
  EXPECT_EQ(rmdir(directory.id(), "file").error(), ENOTDIR);
  unlink(directory.id(), "file");
  const Answer removed = rmdir(kRootInode, "d");
  ASSERT_EQ(removed.error(), 0);
  ASSERT_EQ(removed.outcome.orphaned_size(), 1);
  EXPECT_EQ(getattr(directory.id()).outcome.attr().nlink(), 0u);
  EXPECT_EQ(create(directory.id(), "x").error(), ENOENT);
  EXPECT_EQ(mkdir(directory.id(), "x").error(), ENOENT);
  EXPECT_EQ(lookup(directory.id(), "x").error(), ENOENT);
  EXPECT_EQ(lookup(directory.id(), "..").error(), ENOENT) << "the private area is not shown";
  EXPECT_EQ(readdir(directory.id(), 1, 0, 4096, false).error(), ENOENT);
  EXPECT_EQ(getattr(kRootInode).outcome.attr().nlink(), 2u);
  EXPECT_EQ(forget(directory.id()).error(), 0);
  EXPECT_EQ(getattr(directory.id()).error(), ESTALE);
  EXPECT_EQ(forget(file.id()).error(), 0);
  restart();
  EXPECT_TRUE(fs::is_empty(path(".sharefs/orphans")));
}

TEST_P(StoreTest, rename_moves_and_replaces) {
  const Answer a = create(kRootInode, "a"), b = create(kRootInode, "b");
  const Answer d = mkdir(kRootInode, "d"), e = mkdir(d.id(), "e");
  const Answer over = rename(kRootInode, "a", kRootInode, "b");
  ASSERT_EQ(over.error(), 0);
  ASSERT_EQ(over.outcome.orphaned_size(), 1);
  EXPECT_EQ(over.outcome.orphaned(0), b.id());
  EXPECT_EQ(lookup(kRootInode, "b").id(), a.id());
  EXPECT_EQ(lookup(kRootInode, "b").outcome.attr().nlink(), 1u);
  EXPECT_EQ(getattr(b.id()).outcome.attr().nlink(), 0u);
  EXPECT_EQ(lookup(kRootInode, "a").error(), ENOENT);
  EXPECT_EQ(rename(kRootInode, "b", d.id(), "c").error(), 0);
  EXPECT_EQ(lookup(d.id(), "c").id(), a.id());
  EXPECT_EQ(getattr(a.id()).error(), 0);

  EXPECT_EQ(rename(kRootInode, "none", kRootInode, "x").error(), ENOENT);
  EXPECT_EQ(rename(d.id(), "c", d.id(), "e").error(), EISDIR);
  EXPECT_EQ(rename(d.id(), "e", d.id(), "c").error(), ENOTDIR);
  EXPECT_EQ(rename(kRootInode, "d", d.id(), "e").error(), EINVAL) << "into itself";
  EXPECT_EQ(lookup(d.id(), "e").id(), e.id()) << "and nothing was lost";
  EXPECT_EQ(rename(kRootInode, "d", e.id(), "new").error(), EINVAL);
  EXPECT_EQ(rename(kRootInode, "d", kRootInode, "x", RENAME_WHITEOUT).error(), EINVAL);

  const Answer full = mkdir(kRootInode, "full"), empty = mkdir(kRootInode, "empty");
  const Answer inside = create(full.id(), "f");
  EXPECT_EQ(rename(kRootInode, "empty", kRootInode, "full").error(), ENOTEMPTY);
  const Answer replaced = rename(kRootInode, "full", kRootInode, "empty");
  ASSERT_EQ(replaced.error(), 0);
  EXPECT_EQ(replaced.outcome.orphaned(0), empty.id());
  EXPECT_EQ(lookup(kRootInode, "empty").id(), full.id());
  EXPECT_EQ(lookup(full.id(), "f").id(), inside.id());
}

TEST_P(StoreTest, rename_flags) {
  const Answer a = create(kRootInode, "a"), d = mkdir(kRootInode, "d");
  EXPECT_EQ(rename(kRootInode, "a", kRootInode, "d", RENAME_NOREPLACE).error(), EEXIST);
  EXPECT_EQ(rename(kRootInode, "a", kRootInode, "x", RENAME_EXCHANGE).error(), ENOENT);
  EXPECT_EQ(rename(kRootInode, "a", kRootInode, "d", RENAME_EXCHANGE).error(), 0);
  EXPECT_EQ(lookup(kRootInode, "a").id(), d.id());
  EXPECT_EQ(lookup(kRootInode, "d").id(), a.id());
  EXPECT_EQ(getattr(a.id()).error(), 0);
  EXPECT_EQ(getattr(d.id()).error(), 0);
  EXPECT_EQ(rename(kRootInode, "d", kRootInode, "y", RENAME_NOREPLACE).error(), 0);
  EXPECT_EQ(rename(kRootInode, "y", kRootInode, "a", RENAME_EXCHANGE | RENAME_NOREPLACE).error(), EINVAL);
}

TEST_P(StoreTest, rename_between_two_names_of_one_inode_does_nothing) {
  const Answer a = create(kRootInode, "a");
  link(a.id(), kRootInode, "b");
  const Answer result = rename(kRootInode, "a", kRootInode, "b");
  EXPECT_EQ(result.error(), 0);
  EXPECT_EQ(result.outcome.orphaned_size(), 0);
  EXPECT_EQ(lookup(kRootInode, "a").outcome.attr().nlink(), 2u);
}

// Which matters to ordinary users: root may do everything.
TEST_P(StoreTest, a_directory_that_may_not_be_read_or_written_is_removed_and_replaced) {
  mkdir(kRootInode, "new");
  for (const std::uint32_t mode : {0555u, 0u}) {
    const Answer directory = mkdir(kRootInode, "d", mode);
    EXPECT_EQ(rmdir(kRootInode, "d").error(), 0) << mode;
    EXPECT_EQ(getattr(directory.id()).outcome.attr().mode(), S_IFDIR | mode);
    mkdir(kRootInode, "d", mode);
    EXPECT_EQ(rename(kRootInode, "new", kRootInode, "d").error(), 0) << mode;
    EXPECT_EQ(rename(kRootInode, "d", kRootInode, "new").error(), 0);
  }
  const Answer full = mkdir(kRootInode, "full");
  create(full.id(), "file");
  chmod(full.id(), 0);
  EXPECT_EQ(rmdir(kRootInode, "full").error(), ENOTEMPTY);
  chmod(full.id(), 0700);
}

TEST_P(StoreTest, a_removal_cut_short_is_put_right_by_the_next_process) {
  const Answer kept = create(kRootInode, "kept"), gone = create(kRootInode, "gone");
  unlink(kRootInode, "x");
  create(kRootInode, "x");
  unlink(kRootInode, "x");  // the private area exists now
  char name[32];
  std::snprintf(name, sizeof name, "%llx", static_cast<unsigned long long>(kept.id()));
  fs::create_hard_link(path("kept"), path(".sharefs/orphans") / name);
  std::snprintf(name, sizeof name, "%llx", static_cast<unsigned long long>(gone.id()));
  fs::rename(path("gone"), path(".sharefs/orphans") / name);
  std::ofstream(path(".sharefs/orphans/123456")) << "erased from the table, about to be deleted";
  restart();
  EXPECT_FALSE(fs::exists(path(".sharefs/orphans/123456")));
  EXPECT_EQ(lookup(kRootInode, "kept").outcome.attr().nlink(), 1u);
  EXPECT_EQ(getattr(gone.id()).outcome.attr().nlink(), 0u);
  EXPECT_EQ(forget(gone.id()).error(), 0);
  EXPECT_EQ(getattr(gone.id()).error(), ESTALE);
}

// The identities of a state folder may be on its disk when the file system of the store has lost the
// removals.
TEST_P(StoreTest, what_a_power_cut_has_given_its_name_back_is_no_orphan) {
  const Answer directory = mkdir(kRootInode, "d"), file = create(kRootInode, "file");
  rmdir(kRootInode, "d");
  unlink(kRootInode, "file");
  stop();
  for (const auto& [name, id] : {std::pair("d", directory.id()), {"file", file.id()}}) {
    char orphan[32];
    std::snprintf(orphan, sizeof orphan, "%llx", static_cast<unsigned long long>(id));
    fs::rename(path(".sharefs/orphans") / orphan, path(name));
  }
  start();
  EXPECT_EQ(lookup(kRootInode, "file").outcome.attr().nlink(), 1u);
  EXPECT_EQ(link(lookup(kRootInode, "file").id(), kRootInode, "second").error(), 0);
  const Answer listed = readdir(kRootInode, 1, 2, 4096, true);
  for (const auto& entry : listed.outcome.entries()) EXPECT_NE(entry.attr().nlink(), 0u) << entry.name();
  EXPECT_EQ(create(lookup(kRootInode, "d").id(), "x").error(), 0);
}

TEST_P(StoreTest, setattr_sets_what_it_names) {
  const Answer file = create(kRootInode, "file", 0600);
  EXPECT_EQ(chmod(file.id(), 0751).outcome.attr().mode() & 07777, 0751u);
  {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(file.id());
    op.set_atime(1'500'000'000'123'456'789);
    op.set_mtime(-1);
    const Answer answer = ask(r);
    ASSERT_EQ(answer.error(), 0);
    EXPECT_EQ(answer.outcome.attr().atime(), 1'500'000'000'123'456'789);
    EXPECT_EQ(answer.outcome.attr().mtime(), -1);
    expect_as_stat(answer.outcome.attr(), path("file"));
  }
  {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(file.id());
    op.set_mtime_now(true);
    const Answer answer = ask(r);
    EXPECT_EQ(answer.outcome.attr().atime(), 1'500'000'000'123'456'789);
    EXPECT_GT(answer.outcome.attr().mtime(), 1'600'000'000'000'000'000);
  }
  const Answer link = symlink(kRootInode, "link", "file");
  EXPECT_EQ(chmod(link.id(), 0600).error(), EOPNOTSUPP);
  restart();  // by O_PATH descriptors from here on
  EXPECT_EQ(chmod(file.id(), 0640).outcome.attr().mode() & 07777, 0640u);
  {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(link.id());
    op.set_mtime(42);
    EXPECT_EQ(ask(r).outcome.attr().mtime(), 42);
    EXPECT_NE(getattr(file.id()).outcome.attr().mtime(), 42) << "of the link, not of its target";
  }
  EXPECT_EQ(truncate(file.id(), 1 << 20).outcome.attr().size(), 1u << 20);
  expect_as_stat(getattr(file.id()).outcome.attr(), path("file"));
}

TEST_P(StoreTest, times_that_nanoseconds_do_not_know_stay_far_away) {
  const Answer file = create(kRootInode, "file");
  constexpr std::int64_t kYear2400 = 13'569'465'600;
  const timespec times[] = {{kYear2400, 123}, {kYear2400, 456}};
  ASSERT_EQ(::utimensat(AT_FDCWD, path("file").c_str(), times, 0), 0);
  struct stat status {};
  ASSERT_EQ(::stat(path("file").c_str(), &status), 0);
  if (status.st_mtim.tv_sec != kYear2400) GTEST_SKIP() << "the file system does not know them either";
  const Answer seen = getattr(file.id());
  constexpr std::int64_t kYear2262 = 9'214'646'400'000'000'000;
  EXPECT_GT(seen.outcome.attr().atime(), kYear2262);
  EXPECT_GT(seen.outcome.attr().mtime(), kYear2262);
  statx_timestamp stamp{};
  stamp.tv_sec = std::numeric_limits<std::int64_t>::min();
  EXPECT_LT(timestamp_ns(stamp), -9'000'000'000'000'000'000);
  EXPECT_GT(timestamp_ns(stamp), std::numeric_limits<std::int64_t>::min()) << "which means something else";
}

TEST_P(StoreTest, chown_and_the_setuid_bits) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs privilege";
  const Answer file = create(kRootInode, "file", 0755);
  chmod(file.id(), 06755);
  EXPECT_EQ(write(file.id(), 0, "x").error(), 0);
  EXPECT_EQ(getattr(file.id()).outcome.attr().mode() & 07777, 06755u);
  write(file.id(), 0, "x", false, true);
  EXPECT_EQ(getattr(file.id()).outcome.attr().mode() & 07777, 0755u);
  chmod(file.id(), 06745);
  write(file.id(), 0, "x", false, true);
  EXPECT_EQ(getattr(file.id()).outcome.attr().mode() & 07777, 02745u)
      << "without group execution it is no privilege of the group";
  uid = gid = 1000;
  write(file.id(), 0, "x", false, true);
  EXPECT_EQ(getattr(file.id()).outcome.attr().mode() & 07777, 0745u) << "but for others it is";
  chmod(file.id(), 02745);
  SHAREFS_ASK(SetAttr, setattr);
  op.set_id(file.id());
  op.set_size(0);
  op.set_kill_suidgid(true);
  EXPECT_EQ(ask(r).outcome.attr().mode() & 07777, 0745u);
  chmod(file.id(), 02745);
  ASSERT_EQ(::chown(path("file").c_str(), 1000, 1000), 0);
  op.clear_size();
  op.set_gid(100);
  EXPECT_EQ(ask(r).outcome.attr().mode() & 07777, 02745u) << "given away by a member of its group";
  r.set_uid(0);
  r.set_gid(0);
  op.set_gid(200);
  EXPECT_EQ(ask(r).outcome.attr().mode() & 07777, 02745u) << "root may keep it";
  op.Clear();
  op.set_id(file.id());
  op.set_uid(77);
  op.set_gid(88);
  op.set_mode(04711);
  const Answer answer = ask(r);
  EXPECT_EQ(answer.outcome.attr().uid(), 77u);
  EXPECT_EQ(answer.outcome.attr().gid(), 88u);
  EXPECT_EQ(answer.outcome.attr().mode() & 07777, 04711u) << "the mode comes after the owner";
}

TEST_P(StoreTest, readlink) {
  const std::string target(1000, 't');
  const Answer link = symlink(kRootInode, "link", target);
  SHAREFS_ASK(ReadLink, readlink);
  op.set_id(link.id());
  EXPECT_EQ(ask(r).data, target);
  op.set_id(create(kRootInode, "file").id());
  EXPECT_EQ(ask(r).error(), EINVAL);
}

TEST_P(StoreTest, extended_attributes) {
  const Answer file = create(kRootInode, "file");
  const auto set = [&](InodeId id, const std::string& name, const std::string& value, std::uint32_t flags) {
    SHAREFS_ASK(SetXattr, setxattr);
    op.set_id(id);
    op.set_name(name);
    op.set_flags(flags);
    return ask(r, value).error();
  };
  const auto get = [&](InodeId id, const std::string& name) {
    SHAREFS_ASK(GetXattr, getxattr);
    op.set_id(id);
    op.set_name(name);
    return ask(r);
  };
  if (set(file.id(), "user.a", "value", 0) == EOPNOTSUPP) GTEST_SKIP() << "no user xattrs here";
  for (const bool cold : {false, true}) {
    if (cold) restart();
    EXPECT_EQ(get(file.id(), "user.a").data, "value");
    EXPECT_EQ(get(file.id(), "user.b").error(), ENODATA);
    EXPECT_EQ(set(file.id(), "user.a", "x", XATTR_CREATE), EEXIST);
    EXPECT_EQ(set(file.id(), "user.b", "x", XATTR_REPLACE), ENODATA);
    SHAREFS_ASK(ListXattr, listxattr);
    op.set_id(file.id());
    EXPECT_EQ(ask(r).data, std::string("user.a\0", 7));
  }
  const Answer link = symlink(kRootInode, "link", "file");
  EXPECT_EQ(set(link.id(), "user.a", "x", 0), EPERM) << "not of its target";
  SHAREFS_ASK(RemoveXattr, removexattr);
  op.set_id(file.id());
  op.set_name("user.a");
  EXPECT_EQ(ask(r).error(), 0);
  EXPECT_EQ(ask(r).error(), ENODATA);
}

TEST_P(StoreTest, statfs) {
  SHAREFS_ASK(StatFs, statfs);
  (void)op;
  struct statvfs status {};
  ASSERT_EQ(::statvfs(tree().c_str(), &status), 0);
  const Answer answer = ask(r);
  EXPECT_EQ(answer.outcome.statfs().blocks(), status.f_blocks);
  EXPECT_EQ(answer.outcome.statfs().name_max(), status.f_namemax);
}

TEST_P(StoreTest, an_imported_ctime_is_shown_until_the_first_change) {
  const Answer file = create(kRootInode, "file"), other = create(kRootInode, "other");
  for (const auto& made : {file, other}) {
    const UniqueFd fd = inodes_->open(made.id(), O_PATH);
    Backing backing{};
    ASSERT_EQ(::statx(fd.get(), "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &backing), 0);
    inodes_->import_ctime(made.id(), 1000, backing);
  }
  EXPECT_EQ(getattr(file.id()).outcome.attr().ctime(), 1000);
  EXPECT_EQ(mkdir(kRootInode, "file").error(), EEXIST);
  restart();
  EXPECT_EQ(getattr(file.id()).outcome.attr().ctime(), 1000);
  write(file.id(), 0, "x");
  EXPECT_GT(getattr(file.id()).outcome.attr().ctime(), 1000);
  link(other.id(), kRootInode, "second");
  EXPECT_GT(getattr(other.id()).outcome.attr().ctime(), 1000);
}

// What the process may open, for the life of this object.
class FewDescriptors {
 public:
  FewDescriptors() {
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    const rlimit few{.rlim_cur = 256, .rlim_max = before_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  }
  ~FewDescriptors() { EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before_), 0); }
  FewDescriptors(const FewDescriptors&) = delete;
  FewDescriptors& operator=(const FewDescriptors&) = delete;

 private:
  rlimit before_{};
};

TEST_P(StoreTest, more_inodes_than_descriptors) {
  const FewDescriptors few;
  restart();
  std::vector<InodeId> ids;
  for (int i = 0; i < 1500; ++i) {
    const Answer made = create(kRootInode, std::to_string(i));
    ASSERT_EQ(made.error(), 0) << i;
    ids.push_back(made.id());
  }
  for (std::size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(write(ids[i], 0, std::to_string(i)).error(), 0) << i;
  for (std::size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(read(ids[i], 0, 100).data, std::to_string(i));
}

TEST_P(StoreTest, workers_are_given_more_inodes_than_there_are_descriptors) {
  const FewDescriptors few;
  restart();
  const InodeId from = mkdir(kRootInode, "from").id(), to = mkdir(kRootInode, "to").id();
  create(from, "moves");
  std::vector<InodeId> ids;
  for (int i = 0; i < 400; ++i) {
    ids.push_back(create(kRootInode, std::to_string(i)).id());
    write(ids.back(), 0, "data");
  }
  const std::vector<std::function<void(pb::Request&, std::size_t)>> kinds{
      [&](pb::Request& sync, std::size_t i) { sync.mutable_sync()->set_id(ids[i]); },
      [&](pb::Request& allocate, std::size_t i) {
        allocate.mutable_fallocate()->set_id(ids[i]);
        allocate.mutable_fallocate()->set_length(10);
      },
      [&](pb::Request& copy, std::size_t i) {
        copy.mutable_copy_file_range()->set_id_in(ids[i]);
        copy.mutable_copy_file_range()->set_id_out(ids[399 - i]);
        copy.mutable_copy_file_range()->set_offset_out(4);
        copy.mutable_copy_file_range()->set_length(2);
      },
  };
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    restart();  // nothing is open
    unsigned left = 0;
    std::map<std::uint32_t, unsigned> errors;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      pb::Request asked = request();
      kinds[kind](asked, i);
      ++left;
      store_->execute(asked, {}, [&](const pb::Outcome& outcome, Bytes) {
        ++errors[outcome.error()];
        if (--left == 0) reactor_.stop();
      });
    }
    EXPECT_EQ(rename(from, "moves", to, "moved").error(), 0);
    EXPECT_EQ(link(ids[0], from, "second" + std::to_string(kind)).error(), 0);
    rename(to, "moved", from, "moves");
    if (left != 0) reactor_.run();
    EXPECT_EQ(errors, (std::map<std::uint32_t, unsigned>{{0, 400}})) << kind;
  }
  for (const InodeId id : ids) {
    EXPECT_EQ(read(id, 0, 100).data, std::string("datada\0\0\0\0", 10));
  }
}

TEST_P(StoreTest, a_deep_tree_needs_no_paths) {
  InodeId at = kRootInode;
  std::vector<InodeId> chain;
  for (int depth = 0; depth < 40; ++depth) {
    const Answer made = mkdir(at, std::string(200, 'd'));
    ASSERT_EQ(made.error(), 0);
    at = made.id();
    chain.push_back(at);
  }
  const Answer file = create(at, "file");
  write(file.id(), 0, "deep");
  restart();
  EXPECT_EQ(read(file.id(), 0, 10).data, "deep") << "from cold";
  EXPECT_EQ(lookup(chain.back(), "..").id(), chain[chain.size() - 2]);
}

TEST_P(StoreTest, what_is_above_the_store_is_not_shown) {
  EXPECT_EQ(lookup(kRootInode, "..").id(), kRootInode);
  const Answer directory = mkdir(kRootInode, "d");
  const Answer below = mkdir(directory.id(), "below");
  fs::rename(path("d"), path("../moved_out"));
  EXPECT_NE(lookup(directory.id(), "..").error(), 0u);
  const Answer list = readdir(directory.id(), 1, 0, 1 << 16, false);
  for (const auto& entry : list.outcome.entries()) {
    EXPECT_NE(entry.name(), "..");
  }
}

TEST_P(StoreTest, what_is_mounted_in_the_store_is_not_of_the_data_set) {
  if (::geteuid() != 0) GTEST_SKIP() << "mounts";
  const Answer directory = mkdir(kRootInode, "d"), file = create(kRootInode, "f");
  fs::create_directory(path("../outside"));
  std::ofstream(path("../outside/precious")) << "precious";
  ASSERT_EQ(::mount(path("../outside").c_str(), path("d").c_str(), nullptr, MS_BIND, nullptr), 0);
  ASSERT_EQ(::mount(path("../outside/precious").c_str(), path("f").c_str(), nullptr, MS_BIND, nullptr), 0);
  restart();
  for (const char* name : {"d", "f"}) EXPECT_EQ(lookup(kRootInode, name).error(), EXDEV) << name;
  EXPECT_EQ(unlink(kRootInode, "f").error(), EBUSY);
  const Answer listed = readdir(kRootInode, 1, 0, 1 << 16, true);
  for (const auto& entry : listed.outcome.entries())
    EXPECT_TRUE(entry.name().starts_with(".")) << entry.name();
  EXPECT_EQ(lookup(directory.id(), "precious").error(), GetParam() ? ENOENT : ESTALE);
  for (const char* name : {"d", "f"}) ::umount2(path(name).c_str(), MNT_DETACH);
  EXPECT_EQ(lookup(kRootInode, "d").id(), directory.id());
  EXPECT_EQ(lookup(kRootInode, "f").id(), file.id());
}

TEST_P(StoreTest, a_left_over_orphan_is_not_taken_for_who_is_replaced) {
  const Answer victim = create(kRootInode, "victim");
  write(victim.id(), 0, "read by somebody");
  create(kRootInode, "new");
  create(kRootInode, "x");
  unlink(kRootInode, "x");  // the private area exists now
  char name[32];
  std::snprintf(name, sizeof name, "%llx", static_cast<unsigned long long>(victim.id()));
  std::ofstream(path(".sharefs/orphans") / name) << "of somebody else, from before a power cut";
  ASSERT_EQ(rename(kRootInode, "new", kRootInode, "victim").error(), 0);
  restart();
  EXPECT_EQ(read(victim.id(), 0, 100).data, "read by somebody");
}

TEST_P(StoreTest, changes_are_noted_before_they_are_made) {
  const Answer d = mkdir(kRootInode, "d"), f = create(kRootInode, "f");
  const auto attributes = [](InodeId id) { return "attributes " + std::to_string(id); };
  RecordingObserver observer;
  store_->observe(&observer);
  observer.on_change = [&] { EXPECT_FALSE(fs::exists(path("d/new"))); };
  const Answer made = create(d.id(), "new");
  EXPECT_TRUE(observer.has("entry " + std::to_string(d.id()) + " new"));
  EXPECT_TRUE(observer.has(attributes(d.id())));
  observer.on_change = [&] { EXPECT_TRUE(fs::exists(path("d/new"))); };
  observer.lines.clear();
  EXPECT_EQ(rename(d.id(), "new", kRootInode, "f").error(), 0);
  for (const std::string& line :
       {"entry " + std::to_string(d.id()) + " new", std::string("entry 1 f"), attributes(made.id()),
        attributes(f.id()), attributes(d.id()), attributes(kRootInode)})
    EXPECT_TRUE(observer.has(line)) << line;
  observer.on_change = nullptr;
  observer.lines.clear();
  forget(f.id());
  EXPECT_TRUE(observer.has("freed " + std::to_string(f.id())));
  observer.lines.clear();
  chmod(made.id(), 0600);
  EXPECT_EQ(observer.lines, std::vector<std::string>{attributes(made.id())});
  observer.on_change = [] { throw std::runtime_error("the log is full"); };
  EXPECT_EQ(unlink(kRootInode, "f").error(), EIO);
  EXPECT_EQ(lookup(kRootInode, "f").error(), 0) << "nothing was done";
  store_->observe(nullptr);
}

TEST_P(StoreTest, a_reply_may_ask_again) {
  const Answer a = create(kRootInode, "a"), b = create(kRootInode, "b");
  write(a.id(), 0, "of a");
  write(b.id(), 0, "of b");
  pb::Request first = request(), second = request();
  first.mutable_read()->set_id(a.id());
  first.mutable_read()->set_size(10);
  second.mutable_read()->set_id(b.id());
  second.mutable_read()->set_size(10);
  std::string inner, outer;
  store_->execute(first, {}, [&](const pb::Outcome&, Bytes bytes) {
    store_->execute(second, {}, [&](const pb::Outcome&, Bytes others) { inner = as_text(others); });
    outer = as_text(bytes);
  });
  EXPECT_EQ(inner, "of b");
  EXPECT_EQ(outer, "of a");
}

TEST_P(StoreTest, what_is_not_about_files_is_not_for_the_store) {
  pb::Request r = request();
  EXPECT_EQ(ask(r).error(), ENOSYS);
  r.mutable_attach();
  EXPECT_EQ(ask(r).error(), ENOSYS);
  r.mutable_setlock();
  EXPECT_EQ(ask(r).error(), ENOSYS);
}

}  // namespace
}  // namespace sharefs
