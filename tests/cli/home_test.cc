#include "cli/home.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/setup.h"
#include "tests/cli/scratch.h"

namespace sharefs {
namespace {

TEST(Home, NamesAreOneToSixtyFourHarmlessCharacters) {
  for (const char* good : {"a", "projects", "A-1_b.c", ".hidden"}) EXPECT_TRUE(valid_name(good)) << good;
  EXPECT_TRUE(valid_name(std::string(64, 'x')));
  EXPECT_FALSE(valid_name(std::string(65, 'x')));
  for (const char* bad : {"", ".", "..", "a b", "a/b", "ä", "a\n"}) EXPECT_FALSE(valid_name(bad)) << bad;
}

TEST(Home, ListsWhatWasInitialisedAndNothingElse) {
  const Scratch scratch;
  const Home home(scratch / "home");
  EXPECT_TRUE(home.data_sets().empty());
  init_data_set(home, {"b", scratch.directory("b"), "alpha", ""});
  init_data_set(home, {"a", scratch.directory("a"), "alpha", ""});
  scratch.directory("home/half");
  scratch.file("home/file");
  EXPECT_EQ(home.data_sets(), (std::vector<std::string>{"a", "b"}));
  EXPECT_NE(error_of([&] { home.require("half"); }).find("no data set \"half\""), std::string::npos);
  EXPECT_NE(error_of([&] { home.require("../b"); }), "");
}

TEST(DaemonLock, OneProcessHasItUntilItEndsHoweverItEnds) {
  const Scratch scratch;
  const DataSetPaths paths{scratch.folder()};
  EXPECT_EQ(DaemonLock::holder(paths), 0);
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    const auto lock = DaemonLock::try_take(paths);
    [[maybe_unused]] const auto written = write(ready[1], lock ? "y" : "n", 1);
    pause();
    _exit(0);
  }
  char answer = 0;
  ASSERT_EQ(read(ready[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  EXPECT_EQ(DaemonLock::holder(paths), child);
  EXPECT_FALSE(DaemonLock::try_take(paths));
  EXPECT_FALSE(DaemonLock::wait_released(paths, std::chrono::milliseconds(20)));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(DaemonLock::wait_released(paths, std::chrono::seconds(5)));
  EXPECT_TRUE(DaemonLock::try_take(paths));
  EXPECT_EQ(DaemonLock::holder(paths), 0);
  close(ready[0]);
  close(ready[1]);
}

}  // namespace
}  // namespace sharefs
