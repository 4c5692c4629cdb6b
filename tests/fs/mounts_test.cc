#include "fs/mounts.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

TEST(Mounts, ProcIsMountedAndNotOfFuse) {
  const auto mounts = read_mounts();
  const auto proc =
      std::find_if(mounts.begin(), mounts.end(), [](const auto& m) { return m.mountpoint == "/proc"; });
  ASSERT_NE(proc, mounts.end());
  EXPECT_EQ(proc->type, "proc");
  EXPECT_FALSE(fuse_mount_at("/proc"));
  EXPECT_FALSE(is_dead_mount("/proc"));
  EXPECT_EQ(mount_at("/proc")->type, "proc");
  EXPECT_FALSE(mount_at("/proc/self"));
}

TEST(Mounts, WithinMeansBelowOrTheSameByWholeNames) {
  EXPECT_TRUE(is_within("/srv/data", "/srv/data"));
  EXPECT_TRUE(is_within("/srv/data/x/y", "/srv/data"));
  EXPECT_TRUE(is_within("/srv", "/"));
  EXPECT_FALSE(is_within("/srv/database", "/srv/data"));
  EXPECT_FALSE(is_within("/srv", "/srv/data"));
}

TEST(Mounts, AMountpointIsNamedWithoutLinksAndTrailingSlashes) {
  const TemporaryDirectory scratch;
  const auto folder = std::filesystem::canonical(scratch.path());
  const auto real = folder / "real";
  std::filesystem::create_directory(real);
  std::filesystem::create_directory_symlink(real, folder / "link");
  EXPECT_EQ(resolve_mountpoint(folder / "link"), real);
  EXPECT_EQ(resolve_mountpoint(real.string() + "/"), real);
  EXPECT_EQ(resolve_mountpoint(folder / "link/../real"), real);
  EXPECT_EQ(resolve_mountpoint(folder / "missing"), folder / "missing");
}

TEST(Mounts, UnmountingWhatIsNotMountedIsAnError) {
  const TemporaryDirectory scratch;
  EXPECT_NE(unmount(scratch.path(), Unmount::busy_fails), "");
  EXPECT_NE(unmount(scratch.path(), Unmount::lazy), "");
}

}  // namespace
}  // namespace sharefs
