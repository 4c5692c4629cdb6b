#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "fs/live_state.h"

namespace sharefs {
namespace {

using Clients = std::vector<ClientId>;

Clients sorted(Clients clients) {
  std::sort(clients.begin(), clients.end());
  return clients;
}

TEST(OpenTable, OpenersAreTheOthers) {
  OpenTable table;
  table.open({1, 10, 5, O_RDONLY, false});
  table.open({1, 11, 5, O_RDWR, false});
  table.open({2, 10, 5, O_RDONLY, false});
  table.open({3, 10, 5, O_WRONLY, false});
  EXPECT_EQ(sorted(table.openers(5, 1, false)), (Clients{2, 3}));
  EXPECT_EQ(sorted(table.openers(5, 2, false)), (Clients{1, 3}));
  EXPECT_EQ(table.openers(5, 2, true), (Clients{1})) << "a write-only descriptor cannot be mapped";
  EXPECT_TRUE(table.openers(6, 1, false).empty());
  EXPECT_TRUE(table.close(1, 11));
  EXPECT_TRUE(table.openers(5, 2, true).empty());
  EXPECT_EQ(sorted(table.openers(5, 2, false)), (Clients{1, 3})) << "client 1 still reads it";
}

TEST(OpenTable, ClosingForgetsTheLastHandleOnly) {
  OpenTable table;
  table.open({1, 10, 5, 0, false});
  table.open({1, 11, 5, 0, false});
  EXPECT_TRUE(table.close(1, 10));
  EXPECT_FALSE(table.close(1, 10));
  EXPECT_TRUE(table.is_open(5));
  ASSERT_NE(table.find(1, 11), nullptr);
  EXPECT_EQ(table.find(1, 11)->id, 5U);
  EXPECT_TRUE(table.close(1, 11));
  EXPECT_FALSE(table.is_open(5));
  EXPECT_EQ(table.find(1, 11), nullptr);
}

TEST(OpenTable, AHandleThatIsOpenedAgainIsReplaced) {
  OpenTable table;
  table.open({1, 10, 5, O_RDWR, false});
  table.open({1, 10, 6, O_RDONLY, false});
  EXPECT_FALSE(table.is_open(5));
  EXPECT_TRUE(table.is_open(6));
  EXPECT_EQ(table.all().size(), 1U);
}

TEST(OpenTable, DetachReturnsWhatTheClientHadOpen) {
  OpenTable table;
  table.attach(1, "one");
  table.attach(2, "two");
  table.open({1, 10, 5, 0, false});
  table.open({1, 11, 6, 0, true});
  table.open({2, 10, 5, 0, false});
  EXPECT_EQ(table.detach(1).size(), 2U);
  EXPECT_EQ(table.clients().size(), 1U);
  EXPECT_FALSE(table.is_open(6));
  EXPECT_EQ(table.openers(5, 1, false), (Clients{2}));
  table.clear();
  EXPECT_TRUE(table.clients().empty());
  EXPECT_FALSE(table.is_open(5));
}

// Random opens and closes against a plain list of handles.
TEST(OpenTable, AgreesWithAListOfHandles) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  OpenTable table;
  std::map<std::pair<ClientId, std::uint64_t>, OpenHandle> model;
  for (int step = 0; step < 20000; ++step) {
    const ClientId client = 1 + random() % 4;
    const std::uint64_t handle = random() % 12;
    if (random() % 200 == 0) {
      EXPECT_EQ(table.detach(client).size(),
                std::erase_if(model, [&](const auto& entry) { return entry.first.first == client; }));
    } else if (random() % 2 == 0) {
      const std::uint32_t flags = random() % 2 == 0 ? O_RDWR : O_RDONLY;
      const OpenHandle opened{client, handle, 1 + random() % 3, flags, false};
      table.open(opened);
      model[{client, handle}] = opened;
    } else {
      ASSERT_EQ(table.close(client, handle), model.erase({client, handle}) == 1);
    }
    const InodeId id = 1 + random() % 3;
    std::set<ClientId> all, writers;
    bool open = false;
    for (const auto& [key, value] : model) {
      if (value.id != id) continue;
      open = true;
      if (key.first == client) continue;
      all.insert(key.first);
      if ((value.flags & O_ACCMODE) == O_RDWR) writers.insert(key.first);
    }
    ASSERT_EQ(table.is_open(id), open);
    ASSERT_EQ(sorted(table.openers(id, client, false)), Clients(all.begin(), all.end()));
    ASSERT_EQ(sorted(table.openers(id, client, true)), Clients(writers.begin(), writers.end()));
  }
}

}  // namespace
}  // namespace sharefs
