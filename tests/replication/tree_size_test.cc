// What a target must be able to hold.

#include "replication/tree_size.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "fs/inode_table.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

TEST(TreeSizeTest, CountsWhatIsBelowButThePrivateAreaOfTheTop) {
  const TemporaryDirectory directory;
  for (const char* folder : {".sharefs/tree", "a/.sharefs"})
    std::filesystem::create_directories(directory.path() / folder);
  for (const char* file : {".sharefs/tree/no", "a/.sharefs/yes", "a/yes", "yes"})
    std::ofstream(directory.path() / file) << std::string(1000, 'x');
  std::filesystem::create_symlink("/", directory.path() / "link");
  const TreeSize size = measure(directory.path());
  EXPECT_EQ(size.files, 6U);
  EXPECT_EQ(size.data, 3000U);
  EXPECT_EQ(size.trouble, "");
  EXPECT_EQ(measure(directory.path() / "missing").files, 0U);
}

TEST(TreeSizeTest, AFileCountsOnceHoweverManyNamesItHas) {
  const TemporaryDirectory directory;
  for (int i = 0; i < 3; ++i) {
    const auto name = directory.path() / ("file" + std::to_string(i));
    std::ofstream(name) << std::string(10'000, 'x');
    for (int link = 1; link < 7; ++link)
      std::filesystem::create_hard_link(name, name.string() + "-" + std::to_string(link));
  }
  const TemporaryDirectory beside;
  std::filesystem::create_hard_link(directory.path() / "file0", beside.path() / "another name");
  const TreeSize size = measure(directory.path());
  EXPECT_EQ(size.files, 3U);
  EXPECT_EQ(size.data, 30'000U);
  EXPECT_EQ(measure(beside.path()).data, 10'000U) << "its other names are elsewhere";
}

TEST(TreeSizeTest, DepthCostsNoDescriptors) {
  constexpr unsigned kDepth = 300, kFew = 40;
  const TemporaryDirectory directory;
  std::filesystem::path path = directory.path();
  for (unsigned depth = 0; depth < kDepth; ++depth) {
    path /= "d";
    std::filesystem::create_directory(path);
    std::ofstream(path / "file") << "x";
  }
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const UniqueFd next(::open("/", O_PATH | O_CLOEXEC));
  const struct rlimit few { .rlim_cur = static_cast<rlim_t>(next.get()) + kFew, .rlim_max = before.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  const auto files = measure(directory.path()).files;
  ::setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_EQ(files, 2 * kDepth);
}

}  // namespace
}  // namespace sharefs
