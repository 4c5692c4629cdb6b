#include "cli/units.h"

#include <spdlog/fmt/fmt.h>

#include <charconv>
#include <cmath>
#include <ctime>
#include <optional>

namespace sharefs {
namespace {

// The number at the start of `text`, which then is what follows it.
std::optional<double> take_number(std::string_view& text) {
  double value = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed);
  if (error != std::errc() || !std::isfinite(value) || value < 0) return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  while (text.starts_with(' ')) text.remove_prefix(1);
  return value;
}

std::optional<double> seconds_per(std::string_view unit) {
  if (unit == "ns") return 1e-9;
  if (unit == "us") return 1e-6;
  if (unit == "ms") return 1e-3;
  if (unit == "s") return 1.0;
  if (unit == "m" || unit == "min") return 60.0;
  if (unit == "h") return 3600.0;
  return std::nullopt;
}

std::optional<double> bytes_per(std::string_view unit) {
  if (unit.ends_with("/s")) unit.remove_suffix(2);
  if (unit.ends_with('B')) unit.remove_suffix(1);
  if (unit.empty()) return 1.0;
  const bool binary = unit.size() == 2 && unit[1] == 'i';
  if (unit.size() != 1 && !binary) return std::nullopt;
  const double base = binary ? 1024.0 : 1000.0;
  switch (unit[0]) {
    case 'k':
    case 'K':
      return base;
    case 'M':
      return base * base;
    case 'G':
      return base * base * base;
    case 'T':
      return base * base * base * base;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::chrono::nanoseconds parse_duration(std::string_view text, std::string_view what) {
  std::string_view rest = text;
  const auto value = take_number(rest);
  const auto unit = value ? seconds_per(rest) : std::nullopt;
  constexpr double kLongest = 1e8;  // seconds: three years, and far from overflow
  if (!unit || *value * *unit > kLongest) {
    throw UsageError(
        fmt::format("{}: \"{}\" is not a duration; write it like 100ms, 1.5s or 2m", what, text));
  }
  return std::chrono::nanoseconds(static_cast<std::int64_t>(std::llround(*value * *unit * 1e9)));
}

std::uint64_t parse_rate(std::string_view text, std::string_view what) {
  std::string_view rest = text;
  const auto value = take_number(rest);
  const auto unit = value && !rest.empty() ? bytes_per(rest) : std::nullopt;
  constexpr double kHighest = 1e15;
  if (!unit || *value * *unit > kHighest || *value * *unit < 1) {
    throw UsageError(fmt::format("{}: \"{}\" is not a rate; write it like 200MiB/s or 1GB/s", what, text));
  }
  return static_cast<std::uint64_t>(*value * *unit);
}

std::string format_bytes(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return fmt::format("{} B", bytes);
  return value < 10 ? fmt::format("{:.2f} {}", value, kUnits[unit])
                    : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string format_count(std::uint64_t count) {
  std::string digits = std::to_string(count);
  for (std::size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, 1, ',');
  return digits;
}

std::string format_seconds(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<std::uint64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

std::string format_milliseconds(double milliseconds) {
  return milliseconds < 1000 ? fmt::format("{:.1f} ms", milliseconds)
                             : fmt::format("{:.2f} s", milliseconds / 1000);
}

std::string format_time(std::int64_t ns_since_1970) {
  if (ns_since_1970 == 0) return "-";
  const auto seconds = static_cast<std::time_t>(ns_since_1970 / 1'000'000'000);
  std::tm parts{};
  localtime_r(&seconds, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  return fmt::format("{}.{:06}", text, ns_since_1970 % 1'000'000'000 / 1000);
}

}  // namespace sharefs
