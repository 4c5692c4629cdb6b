#include "replication/power.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "replication/inode_io.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

TEST(PowerTest, WhatThePreviousOwnerHadLostIsHandedOn) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  State state(database);
  Power power(state);
  EXPECT_EQ(power.lost().to, 0) << "nothing was lost here";
  power.inherit({});
  EXPECT_EQ(power.lost().to, 0);
  power.inherit({.from = 50, .to = 60});
  power.inherit({.from = 55, .to = 58});
  EXPECT_EQ(power.lost().from, 50);
  EXPECT_EQ(power.lost().to, 60);
  power.inherit({.from = 20, .to = 30});
  EXPECT_EQ(power.lost().from, 20);
  EXPECT_EQ(power.lost().to, 60);
}

// Many machines have no clock that goes on without power.
TEST(PowerTest, WhatWasStampedBeforeAPowerCutIsDoubtfulThoughTheClockIsBehind) {
  using namespace std::chrono_literals;
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  State state(database);
  const std::chrono::nanoseconds now = std::chrono::system_clock::now().time_since_epoch();
  for (const std::chrono::nanoseconds behind :
       {std::chrono::nanoseconds(-2h), std::chrono::nanoseconds(1h), std::chrono::nanoseconds(24h * 365)}) {
    const std::int64_t synced = (now + behind).count(),
                       written = std::max(now, now + behind).count() + std::chrono::nanoseconds(1h).count();
    state.set_setting("power", "1");
    state.set_setting("boot", "another");
    state.set_setting("synced_before", std::to_string(synced));
    Power power(state);
    // What was stamped after a clock was set back is not known.
    EXPECT_EQ(power.doubtful().contains(synced - 1), behind.count() > 0);
    EXPECT_TRUE(power.doubtful().contains(written));
    EXPECT_TRUE(power.lost().contains(written));
    power.trust();
    state.set_setting("lost_ctimes", "");
  }
}

TEST(PowerTest, ASyncCountsAfterTheClockWasSetBack) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  State state(database);
  Power power(state);
  power.trust();
  const std::int64_t before = ctime_floor();
  std::this_thread::sleep_for(2 * kStampTick);
  power.synced(before + std::chrono::nanoseconds(std::chrono::hours(1)).count());
  const std::int64_t synced = ctime_floor();
  power.synced(synced);
  power.sync_failed();
  EXPECT_FALSE(power.doubtful().contains(before));
  EXPECT_TRUE(power.doubtful().contains(synced));
}

TEST(PowerTest, WhatASyncMayHaveLostIsDoubtful) {
  const TemporaryDirectory directory;
  Database database(directory.path() / "state.db");
  State state(database);
  Power power(state);
  power.trust();
  const std::filesystem::path store = directory.path() / "store";
  const auto stamped = [&] {
    std::filesystem::create_directory(store);
    const UniqueFd fd(::open(store.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    std::filesystem::remove(store);
    return timestamp_ns(stat_inode(fd.get()).stx_ctime);
  };
  const std::int64_t before = stamped();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  power.synced(ctime_floor());
  for (int i = 0; i < 20; ++i) {
    const std::int64_t last = stamped();
    power.sync_failed();
    EXPECT_TRUE(power.doubtful().contains(last)) << "what was stamped just now";
  }
  EXPECT_FALSE(power.doubtful().contains(before)) << "what a sync has written";
  EXPECT_EQ(power.lost().to, 0) << "a store that is no authority has lost nothing";
}

}  // namespace
}  // namespace sharefs
