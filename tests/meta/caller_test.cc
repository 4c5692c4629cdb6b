// Who a thread is to the file system.
#include "meta/caller.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "scratch.h"

namespace sharefs {
namespace {

TEST(Caller, a_thread_that_was_made_in_anothers_name_can_be_the_process_again) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root acts for others";
  const Scratch scratch;
  const auto path = scratch / "file";
  std::thread([&path] {
    become_caller(1234, 1234);
    std::thread([&path] {
      become_caller(::geteuid(), ::getegid());
      std::ofstream(path) << "mine";
    }).join();
  }).join();
  struct stat found {};
  ASSERT_EQ(::stat(path.c_str(), &found), 0);
  EXPECT_EQ(found.st_uid, ::geteuid());
}

}  // namespace
}  // namespace sharefs
