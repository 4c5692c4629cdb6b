#include "replication/power.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace sharefs
