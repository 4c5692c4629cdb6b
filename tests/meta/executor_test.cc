#include "meta/executor.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace sharefs {
namespace {

TEST(Executor, reply_errno_answers_once_with_nothing_but_the_errno) {
  int calls = 0;
  reply_errno(
      [&](const pb::Outcome& outcome, Bytes data) {
        ++calls;
        EXPECT_EQ(outcome.error(), static_cast<std::uint32_t>(ENOENT));
        EXPECT_FALSE(outcome.has_attr());
        EXPECT_TRUE(data.empty());
      },
      ENOENT);
  EXPECT_EQ(calls, 1);
}

TEST(Executor, every_operation_of_the_vocabulary_has_the_class_that_its_number_says) {
  const auto* ops = pb::Request::descriptor()->FindOneofByName("op");
  ASSERT_NE(ops, nullptr);
  for (int i = 0; i < ops->field_count(); ++i) {
    const int number = ops->field(i)->number();
    const auto wanted = number >= 64 ? OpClass::mutation : number >= 40 ? OpClass::live : OpClass::query;
    EXPECT_EQ(op_class(static_cast<pb::Request::OpCase>(number)), wanted) << ops->field(i)->name();
  }
}

}  // namespace
}  // namespace sharefs
