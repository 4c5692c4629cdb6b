// Durations, sizes and rates as operators write and read them: 100ms, 1.5s, 200MiB/s.
#pragma once

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace sharefs {

// The command line was wrong (exit code 2), as opposed to something that could not be done (exit code 1).
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "100ms", "1.5s", "2m", "250us"; a unit is needed. `what` names the option in the UsageError.
std::chrono::nanoseconds parse_duration(std::string_view text, std::string_view what);

// Bytes per second: "200MiB/s", "1.5GB/s", "64k"; a unit is needed, "/s" may be left out. k, M, G are powers
// of 1000 unless followed by i.
std::uint64_t parse_rate(std::string_view text, std::string_view what);

std::string format_bytes(std::uint64_t bytes);         // "1.70 GiB"
std::string format_count(std::uint64_t count);         // "34,000"
std::string format_seconds(double seconds);            // "8.1 s", "3 min 20 s"
std::string format_milliseconds(double milliseconds);  // "11.8 ms", "2.50 s"
std::string format_time(std::int64_t ns_since_1970);   // "2024-05-01 12:00:01.123456", local time; "-" for 0

}  // namespace sharefs
