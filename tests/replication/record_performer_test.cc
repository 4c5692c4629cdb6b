// Records on the new owner: performed once, and what came of them told as often as it is asked.
#include "replication/record_performer.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "tests/fs/fake_executor.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {
namespace {

using test::Answer;
using test::FakeExecutor;
using test::request_of;

constexpr std::uint64_t kAttempt = 7;

class RecordPerformerTest : public ::testing::Test {
 protected:
  pb::Outcome perform(std::uint64_t number, const pb::Request& request) {
    Answer answer;
    RecordPerformer(state_, store_, kAttempt)
        .perform(number, request, {}, answer.reply(),
                 [](const std::exception& error) { ADD_FAILURE() << error.what(); });
    EXPECT_TRUE(answer.given());
    return answer.outcome;
  }

  TemporaryDirectory directory_;
  Database database_{directory_.path() / "state.db"};
  State state_{database_};
  FakeExecutor store_;
};

TEST_F(RecordPerformerTest, ARecordIsPerformedOnceAndAnsweredAgain) {
  auto request = request_of(1, 2);
  request.mutable_rmdir()->set_parent(1);
  request.mutable_rmdir()->set_name("d");
  store_.result = [](const pb::Request&) {
    pb::Outcome outcome;
    outcome.set_error(ENOTEMPTY);
    return outcome;
  };
  EXPECT_EQ(perform(1, request).error(), static_cast<unsigned>(ENOTEMPTY));
  EXPECT_EQ(perform(1, request).error(), static_cast<unsigned>(ENOTEMPTY)) << "by another process";
  EXPECT_EQ(store_.calls.size(), 1U);
}

TEST_F(RecordPerformerTest, WhatNoSiteMayAskIsRefusedToAHostileSource) {
  EXPECT_EQ(perform(1, request_of(1, 2)).error(), static_cast<unsigned>(EINVAL)) << "it asks nothing";
  auto request = request_of(1, 3);
  request.mutable_mkdir()->set_parent(1);
  request.mutable_mkdir()->set_name(std::string("..\0", 3));
  EXPECT_EQ(perform(2, request).error(), static_cast<unsigned>(EINVAL)) << "another name in a system call";
  EXPECT_EQ(perform(2, request).error(), static_cast<unsigned>(EINVAL)) << "told again";
  EXPECT_EQ(store_.calls.size(), 0U);
}

TEST_F(RecordPerformerTest, WhatCannotBeNotedFailsHoweverLateItIsAnswered) {
  RecordPerformer performer(state_, store_, kAttempt);
  auto request = request_of(1, 2);
  request.mutable_sync()->set_id(5);
  store_.late = true;
  Answer answer;
  std::string why;
  const auto failed = [&](const std::exception& error) { why = error.what(); };
  performer.perform(1, request, {}, answer.reply(), failed);
  Statement(database_, "ALTER TABLE record RENAME TO away").run();  // as good as a full disk
  EXPECT_NO_THROW(store_.answer(0));
  EXPECT_FALSE(answer.given());
  EXPECT_NE(why, "");
  Statement(database_, "ALTER TABLE away RENAME TO record").run();
  performer.perform(1, request, {}, answer.reply(), failed);
  store_.answer(1);
  EXPECT_TRUE(answer.given());
}

}  // namespace
}  // namespace sharefs
