// Faults are read from the environment once per process, so every test looks from a forked child.
#include "meta/fault.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <stdexcept>

namespace sharefs {
namespace {

// Runs `body` in a child with these faults; returns what waitpid says of it first.
int in_child(const char* faults, const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv("SHAREFS_FAULTS", faults, 1);
    int code = 99;
    try {
      code = body();
    } catch (...) {
      code = 98;
    }
    ::_exit(code);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, WUNTRACED), child);
  if (WIFSTOPPED(status)) {
    int ignored = 0;
    ::kill(child, SIGKILL);
    ::waitpid(child, &ignored, 0);
  }
  return status;
}

int exit_code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }

TEST(Fault, a_point_that_is_not_named_does_nothing) {
  const auto passes = [] { return fault_point("a") ? 1 : 0; };
  EXPECT_EQ(exit_code(in_child("", passes)), 0);
  EXPECT_EQ(exit_code(in_child("b=error,aa=kill", passes)), 0);
}

TEST(Fault, kill_ends_the_process) {
  const int status = in_child("x=error,a=kill", [] { return fault_point("a") ? 1 : 0; });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST(Fault, at_n_fires_at_the_nth_passage_only) {
  const int status = in_child("a=kill@3", [] {
    fault_point("a");
    fault_point("other");
    fault_point("a");
    fault_point("a");
    return 2;
  });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(exit_code(in_child("a=kill@3", [] { return fault_point("a") || fault_point("a") ? 1 : 0; })), 0);
  EXPECT_EQ(exit_code(in_child("a=error@2,a=error@4",
                               [] {
                                 int bits = 0;
                                 for (int i = 0; i < 5; ++i) bits |= (fault_point("a") ? 1 : 0) << i;
                                 return bits;
                               })),
            0b01010);
}

TEST(Fault, error_lets_the_caller_fail_every_time) {
  EXPECT_EQ(exit_code(in_child("a=error", [] { return fault_point("a") && fault_point("a") ? 7 : 0; })), 7);
}

TEST(Fault, stop_stops_the_process) {
  EXPECT_TRUE(WIFSTOPPED(in_child("a=stop", [] { return fault_point("a") ? 1 : 0; })));
}

TEST(Fault, sleep_delays_by_as_much_as_asked) {
  EXPECT_EQ(exit_code(in_child("a=sleep:50",
                               [] {
                                 const auto before = std::chrono::steady_clock::now();
                                 if (fault_point("a")) return 1;
                                 const auto slept = std::chrono::steady_clock::now() - before;
                                 return slept >= std::chrono::milliseconds(50) ? 0 : 2;
                               })),
            0);
}

TEST(Fault, a_mistake_in_the_variable_is_never_silent) {
  for (const char* wrong :
       {"a", "=kill", "a=", "a=explode", "a=kill@", "a=kill@0", "a=kill@x", "a=sleep:", "a=kill,,b=kill"})
    EXPECT_EQ(exit_code(in_child(wrong,
                                 [] {
                                   try {
                                     fault_point("other");
                                   } catch (const std::runtime_error&) {
                                     return 5;
                                   }
                                   return 0;
                                 })),
              5)
        << wrong;
}

}  // namespace
}  // namespace sharefs
