// Writers that are slowed down: in order, at the rate, none for longer than promised.
#include "fs/pace.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <deque>
#include <vector>

#include "tests/fs/fake_executor.h"

namespace sharefs {
namespace {

using namespace std::chrono_literals;
using test::Answer;
using test::FakeExecutor;
using test::request_of;
using test::write_of;

class PaceTest : public ::testing::Test {
 protected:
  void write(std::uint64_t seq, std::size_t bytes, bool writeback = false) {
    const std::string data(bytes, 'x');
    pace_.execute(write_of(1, seq, 5, 0, static_cast<std::uint32_t>(bytes), writeback), as_bytes(data),
                  answers_.emplace_back().reply());
  }
  void pass_time(Reactor::Clock::duration time) {
    reactor_.after(time, [this] { reactor_.stop(); });
    reactor_.run();
  }

  Reactor reactor_;
  FakeExecutor gate_;
  Pace pace_{gate_, reactor_};
  std::deque<Answer> answers_;
};

TEST_F(PaceTest, WithoutALimitNothingWaits) {
  for (std::uint64_t seq = 1; seq <= 5; ++seq) write(seq, 100'000);
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 2, 3, 4, 5}));
}

TEST_F(PaceTest, ChangesPassAtTheRateAndInOrderAllElseAtOnce) {
  pace_.limit(1'000'000, 10s);
  for (std::uint64_t seq = 1; seq <= 3; ++seq) write(seq, 50'000);  // 50 ms each
  auto look = request_of(1, 7);
  look.mutable_getattr()->set_id(5);
  Answer looked, synced;
  pace_.execute(look, {}, looked.reply());
  auto sync = request_of(1, 8);
  sync.mutable_sync()->set_id(5);
  pace_.execute(sync, {}, synced.reply());
  write(9, 4096, true);
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 7, 8, 9}));
  pass_time(70ms);
  EXPECT_LE(gate_.seqs().size(), 5U);
  pass_time(200ms);
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 7, 8, 9, 2, 3}));
  EXPECT_EQ(gate_.calls[5].data.size(), 50'000U);
  for (const auto& answer : answers_) EXPECT_TRUE(answer.given());
}

TEST_F(PaceTest, NobodyWaitsLongerThanPromised) {
  pace_.limit(1000, 30ms);
  for (std::uint64_t seq = 1; seq <= 3; ++seq) write(seq, 100'000);
  EXPECT_EQ(gate_.seqs().size(), 1U);
  pass_time(200ms);
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 2, 3}));
}

TEST_F(PaceTest, WhatAKilledCallerWaitedForIsNotPerformed) {
  pace_.limit(1000, 10s);
  for (std::uint64_t seq = 1; seq <= 3; ++seq) write(seq, 100'000);
  for (const std::uint64_t seq : {2, 1}) {
    auto cancel = request_of(1, 10 + seq);
    cancel.mutable_cancel()->set_seq(seq);
    pace_.execute(cancel, {}, answers_.emplace_back().reply());
  }
  EXPECT_EQ(answers_[1].error(), EINTR);
  EXPECT_TRUE(answers_[3].given());
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 11})) << "the other one is not here any more";
  pace_.unlimited();
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 11, 3}));
}

TEST_F(PaceTest, WhatWaitsPassesInOrderWhenTheLimitGoes) {
  pace_.limit(1000, 10s);
  for (std::uint64_t seq = 1; seq <= 3; ++seq) write(seq, 100'000);
  pace_.unlimited();
  EXPECT_EQ(gate_.seqs(), (std::vector<std::uint64_t>{1, 2, 3}));
  write(4, 100'000);
  EXPECT_EQ(gate_.seqs().back(), 4U);
}

}  // namespace
}  // namespace sharefs
