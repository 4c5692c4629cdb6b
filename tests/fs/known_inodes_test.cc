// The kernel's lookup counts against a std::map, and what they cost.
#include "fs/known_inodes.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace sharefs {
namespace {

TEST(KnownInodesTest, counts_like_a_map_under_random_lookups_and_forgets) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  KnownInodes known;
  std::map<InodeId, std::uint64_t> model;
  for (int step = 0; step < 300'000; ++step) {
    // Many at first, then few, so that the table grows and shrinks.
    const InodeId id = 1 + random() % (step < 150'000 ? 40'000 : 2'000);
    const bool adds = random() % 100 < (step < 150'000 ? 80 : 20);
    if (adds) {
      const std::uint64_t times = 1 + random() % 3;
      known.add(id, times);
      model[id] += times;
    } else if (const auto found = model.find(id); found != model.end()) {
      const std::uint64_t times = random() % 2 == 0 ? found->second : 1;
      found->second -= times;
      ASSERT_EQ(known.remove(id, times), found->second == 0);
      if (found->second == 0) model.erase(found);
    } else {
      ASSERT_FALSE(known.contains(id));
      ASSERT_TRUE(known.remove(id, 1));
    }
    ASSERT_EQ(known.size(), model.size());
  }
  for (const auto& [id, count] : model) {
    ASSERT_TRUE(known.contains(id));
    if (count > 1) {
      ASSERT_FALSE(known.remove(id, count - 1));
    }
    ASSERT_TRUE(known.remove(id, 1));
  }
  EXPECT_EQ(known.size(), 0U);
}

TEST(KnownInodesTest, pages_may_be_cached_until_the_inode_is_forgotten) {
  KnownInodes known;
  known.note_cached(1, false);
  EXPECT_FALSE(known.may_be_cached(1)) << "the kernel does not know it";
  known.add(1, 2);
  known.note_cached(1, false);
  known.remove(1, 1);
  EXPECT_TRUE(known.may_be_cached(1));
  EXPECT_FALSE(known.may_be_cached(2));
  known.remove(1, 1);
  known.add(1);
  EXPECT_FALSE(known.may_be_cached(1));
}

TEST(KnownInodesTest, an_inode_costs_at_most_32_bytes) {
  KnownInodes known;
  constexpr std::size_t kMost = 500'000;
  for (InodeId id = 1; id <= kMost; ++id) {
    known.add(id + (id % 3 << 40));
    if (id >= 50'000 && id % 5'000 == 0) {
      ASSERT_LE(known.bytes(), id * 32) << id;
    }
  }
  for (InodeId id = 1; id <= kMost; ++id) known.remove(id + (id % 3 << 40), 1);
  EXPECT_EQ(known.size(), 0U);
  EXPECT_LT(known.bytes(), 100'000U);
}

TEST(KnownInodesTest, remembers_the_period_in_which_an_inode_was_opened_until_the_kernel_forgets_it) {
  KnownInodes known;
  EXPECT_FALSE(known.opened(7, 1)) << "the kernel does not know it";
  known.add(7);
  EXPECT_FALSE(known.opened(7, 1));
  EXPECT_TRUE(known.opened(7, 1));
  EXPECT_FALSE(known.opened(7, 2));
  known.remove(7, 1);
  known.add(7);
  EXPECT_FALSE(known.opened(7, 2));
}

}  // namespace
}  // namespace sharefs
