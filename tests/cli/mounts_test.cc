#include "cli/mounts.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cli/scratch.h"

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
}

TEST(Mounts, WithinMeansBelowOrTheSameByWholeNames) {
  EXPECT_TRUE(is_within("/srv/data", "/srv/data"));
  EXPECT_TRUE(is_within("/srv/data/x/y", "/srv/data"));
  EXPECT_TRUE(is_within("/srv", "/"));
  EXPECT_FALSE(is_within("/srv/database", "/srv/data"));
  EXPECT_FALSE(is_within("/srv", "/srv/data"));
}

TEST(Mounts, AMountpointIsNamedWithoutLinksAndTrailingSlashes) {
  const Scratch scratch;
  const auto real = scratch.directory("real");
  std::filesystem::create_directory_symlink(real, scratch / "link");
  EXPECT_EQ(resolve_mountpoint(scratch / "link"), real);
  EXPECT_EQ(resolve_mountpoint(real.string() + "/"), real);
  EXPECT_EQ(resolve_mountpoint(scratch / "link/../real"), real);
  EXPECT_EQ(resolve_mountpoint(scratch / "missing"), scratch / "missing");
}

TEST(Mounts, UnmountingWhatIsNotMountedIsAnError) {
  const Scratch scratch;
  EXPECT_NE(unmount(scratch.folder(), Unmount::busy_fails), "");
  EXPECT_NE(unmount(scratch.folder(), Unmount::lazy), "");
}

}  // namespace
}  // namespace sharefs
