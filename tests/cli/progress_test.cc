#include "cli/progress.h"

#include <gtest/gtest.h>

namespace sharefs {
namespace {

using nlohmann::json;

json example() {
  return {{"attempt", 7u},
          {"result", "done"},
          {"phase", "image"},
          {"from", "alpha"},
          {"to", "beta"},
          {"epoch", 3},
          {"files_total", 34000},
          {"files", 15820},
          {"bytes_total", 2 << 20},
          {"image_bytes", 1 << 20},
          {"image_files", 34000},
          {"rate", 220200960},
          {"eta_s", 4.0},
          {"log_left_bytes", 4096},
          {"log_entries", 12},
          {"predicted_pause_ms", 12.3},
          {"pause_ms", 11.8},
          {"total_ms", 8200.0},
          {"t0", 1700000000000000000},
          {"t3", 1700000001500000000}};
}

TEST(Progress, TheLineSaysHowFarAndHowLong) {
  const std::string line = progress_line(example(), 200);
  for (const char* part : {"image [##########----------]", "50 %", "15,820/34,000 files", "1.00 MiB/2.00 MiB",
                           "210.0 MiB/s", "ETA 4.0 s", "log left 4.00 KiB", "pause would be 12.3 ms"}) {
    EXPECT_NE(line.find(part), std::string::npos) << part << " in " << line;
  }
}

TEST(Progress, WhileItWaitsTheLineSaysForWhat) {
  json waiting = example();
  waiting["phase"] = "waiting";
  waiting["error"] = "the connection to beta was lost";
  EXPECT_EQ(plain_line(waiting), "waiting: the connection to beta was lost");
  EXPECT_NE(progress_line(waiting, 80).find("the connection to beta was lost"), std::string::npos);
}

TEST(Progress, TheTargetDoesNotCount) {
  const json receiving = {{"phase", "receiving"}, {"image_files", 0}, {"image_bytes", 0}};
  EXPECT_EQ(plain_line(receiving), "receiving");
  EXPECT_EQ(progress_line(receiving, 80), "receiving");
}

TEST(Progress, TheLineFitsIntoTheTerminal) {
  for (const unsigned width : {20u, 80u, 120u}) EXPECT_LT(progress_line(example(), width).size(), width);
  const std::string narrow = progress_line(example(), 80);
  EXPECT_EQ(narrow.find('['), std::string::npos);
  for (const char* part : {"50 %", "15,820/34,000 files", "ETA 4.0 s", "pause would be 12.3 ms"})
    EXPECT_NE(narrow.find(part), std::string::npos) << part << " in " << narrow;
}

TEST(Progress, KeysThatAreMissingOrOddCountAsNothing) {
  EXPECT_EQ(count_of(json::object(), "files"), 0u);
  EXPECT_EQ(count_of({{"files", -3}}, "files"), 0u);
  EXPECT_EQ(count_of({{"files", "many"}}, "files"), 0u);
  EXPECT_EQ(count_of({{"files", 2.7}}, "files"), 2u);
  EXPECT_EQ(count_of({{"attempt", 0xffffffffffffffffu}}, "attempt"), 0xffffffffffffffffu);
  EXPECT_EQ(text_of({{"error", nullptr}}, "error"), "");
  EXPECT_EQ(text_of(nullptr, "error"), "");
  EXPECT_EQ(progress_line(nullptr, 80), "");
  EXPECT_NE(progress_line({{"files", "many"}}, 80), "");
  EXPECT_NE(handoff_summary(json::object()), "");
}

TEST(Progress, TheResultHasTheKeysThatScriptsDependOn) {
  const json result = handoff_result(example());
  for (const char* key :
       {"result", "from", "to", "epoch", "image_files", "image_bytes", "image_bytes_sent", "log_entries",
        "log_bytes", "rounds", "records", "pause_ms", "total_ms", "error", "t0", "t1", "t2", "t3"}) {
    EXPECT_TRUE(result.contains(key)) << key;
  }
  EXPECT_EQ(result["result"], "done");
  EXPECT_EQ(result["image_files"], 34000);
  EXPECT_TRUE(handoff_result(json::object()).contains("pause_ms"));
}

TEST(Progress, WhatHadNotBegunHasNoTimeline) {
  const json refused = {{"result", "failed"}, {"from", "alpha"}, {"to", "beta"}};
  EXPECT_EQ(handoff_summary(refused), "handoff from alpha to beta: failed\n");
  json aborted = refused;
  aborted["t0"] = 1700000000000000000;
  EXPECT_NE(handoff_summary(aborted).find("image starts"), std::string::npos);
  EXPECT_NE(handoff_summary(aborted).find("pause  - "), std::string::npos);
}

TEST(Progress, TheSummaryShowsTheTimeline) {
  const std::string text = handoff_summary(example());
  EXPECT_NE(text.find("beta is the owner now, at epoch 3 (before: alpha)"), std::string::npos);
  EXPECT_NE(text.find("+1.500000 s  new owner serves"), std::string::npos);
  EXPECT_NE(text.find("pause  11.8 ms"), std::string::npos);
}

}  // namespace
}  // namespace sharefs
