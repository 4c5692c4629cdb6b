#include "cli/units.h"

#include <gtest/gtest.h>

namespace sharefs {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(Units, DurationsNeedANumberAndAUnit) {
  EXPECT_EQ(parse_duration("100ms", "x"), milliseconds(100));
  EXPECT_EQ(parse_duration("1s", "x"), seconds(1));
  EXPECT_EQ(parse_duration("1.5s", "x"), milliseconds(1500));
  EXPECT_EQ(parse_duration("2 m", "x"), seconds(120));
  EXPECT_EQ(parse_duration("250us", "x"), std::chrono::microseconds(250));
  for (const char* wrong : {"", "100", "ms", "-1s", "1e3s", "1 s s", "inf s", "nan", "99999999999s", "1S"}) {
    EXPECT_THROW(parse_duration(wrong, "--max-pause"), UsageError) << wrong;
  }
}

TEST(Units, RatesAreBytesPerSecondInPowersOf1000Or1024) {
  EXPECT_EQ(parse_rate("200MiB/s", "x"), 200u << 20);
  EXPECT_EQ(parse_rate("1GB/s", "x"), 1'000'000'000u);
  EXPECT_EQ(parse_rate("64k", "x"), 64'000u);
  EXPECT_EQ(parse_rate("1.5KiB", "x"), 1536u);
  EXPECT_EQ(parse_rate("4096B", "x"), 4096u);
  for (const char* wrong : {"", "fast", "0B", "-5MB", "10X", "10MiBps", "200", "0.1B", "9999999999999TB"}) {
    EXPECT_THROW(parse_rate(wrong, "--rate"), UsageError) << wrong;
  }
}

TEST(Units, AreWrittenForPeople) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1825361101), "1.70 GiB");
  EXPECT_EQ(format_bytes(20u << 20), "20.0 MiB");
  EXPECT_EQ(format_count(7), "7");
  EXPECT_EQ(format_count(123), "123");
  EXPECT_EQ(format_count(34000), "34,000");
  EXPECT_EQ(format_count(1234567), "1,234,567");
  EXPECT_EQ(format_seconds(8.14), "8.1 s");
  EXPECT_EQ(format_seconds(200), "3 min 20 s");
  EXPECT_EQ(format_milliseconds(11.84), "11.8 ms");
  EXPECT_EQ(format_milliseconds(2500), "2.50 s");
  EXPECT_EQ(format_time(0), "-");
  EXPECT_EQ(format_time(1'700'000'000'123'456'789).substr(19), ".123456");
}

}  // namespace
}  // namespace sharefs
