#include "cli/progress.h"

#include <spdlog/fmt/fmt.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cli/units.h"

namespace sharefs {
namespace {

constexpr auto kPlainInterval = std::chrono::seconds(2);
constexpr unsigned kBarWidth = 20;
constexpr unsigned kUsualWidth = 80;

unsigned terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUsualWidth;
}

double share_done(const nlohmann::json& handoff) {
  const double bytes = number_of(handoff, "bytes_total");
  const double files = number_of(handoff, "files_total");
  const double done = bytes > 0   ? number_of(handoff, "image_bytes") / bytes
                      : files > 0 ? number_of(handoff, "files") / files
                                  : 0;
  return std::clamp(done, 0.0, 1.0);
}

// "15,820/34,000 files", or without the total while it is not known.
std::string of_total(const std::string& done, std::uint64_t total, const std::string& total_text) {
  return total == 0 ? done : done + "/" + total_text;
}

struct Detail {
  int importance;  // what a narrow terminal shows: the more important
  std::string text;
};

// The source does; a target only knows the phase.
bool counts(const nlohmann::json& handoff) { return handoff.contains("files"); }

std::vector<Detail> details(const nlohmann::json& handoff) {
  // Between two tries nothing moves: what the last one ended with is what somebody may have to see to.
  if (text_of(handoff, "phase") == "waiting") return {{1, text_of(handoff, "error")}};
  const auto files_total = count_of(handoff, "files_total");
  const auto bytes_total = count_of(handoff, "bytes_total");
  std::vector<Detail> all;
  if (counts(handoff)) {
    all.push_back(
        {4, of_total(format_count(count_of(handoff, "files")), files_total, format_count(files_total)) +
                " files"});
    all.push_back({3, of_total(format_bytes(count_of(handoff, "image_bytes")), bytes_total,
                               format_bytes(bytes_total))});
  }
  if (const auto rate = count_of(handoff, "rate"); rate > 0) all.push_back({2, format_bytes(rate) + "/s"});
  if (const double eta = number_of(handoff, "eta_s"); eta > 0)
    all.push_back({6, "ETA " + format_seconds(eta)});
  if (const auto left = count_of(handoff, "log_left_bytes"); left > 0 || count_of(handoff, "log_entries") > 0)
    all.push_back({1, "log left " + format_bytes(left)});
  if (const double pause = number_of(handoff, "predicted_pause_ms"); pause > 0)
    all.push_back({7, "pause would be " + format_milliseconds(pause)});
  if (const auto rate = count_of(handoff, "writers_rate"); rate > 0)
    all.push_back({5, "writers slowed to " + format_bytes(rate) + "/s"});
  if (const auto attempts = count_of(handoff, "attempts"); attempts > 1)
    all.push_back({8, fmt::format("try {}", attempts)});
  return all;
}

std::string joined(const std::vector<Detail>& all) {
  std::string text;
  for (const Detail& one : all) text += (text.empty() ? "" : "  ") + one.text;
  return text;
}

std::string timeline_row(const char* name, const nlohmann::json& handoff, const char* what) {
  const auto at = static_cast<std::int64_t>(count_of(handoff, name));
  const auto t0 = static_cast<std::int64_t>(count_of(handoff, "t0"));
  if (at == 0) return fmt::format("  {}  {:<26}  {}\n", name, "-", what);
  return fmt::format("  {}  {}  +{:.6f} s  {}\n", name, format_time(at), static_cast<double>(at - t0) * 1e-9,
                     what);
}

}  // namespace

double number_of(const nlohmann::json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || found == object.end() || !found->is_number()) return 0;
  const double value = found->get<double>();
  return std::isfinite(value) ? value : 0;
}

std::uint64_t count_of(const nlohmann::json& object, const char* key) {
  if (!object.is_object()) return 0;
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number()) return 0;
  if (found->is_number_unsigned()) return found->get<std::uint64_t>();
  if (found->is_number_integer())
    return static_cast<std::uint64_t>(std::max<std::int64_t>(0, found->get<std::int64_t>()));
  return static_cast<std::uint64_t>(std::clamp(number_of(object, key), 0.0, 9e18));
}

std::string text_of(const nlohmann::json& object, const char* key) {
  if (!object.is_object()) return "";
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

bool is_connected(const nlohmann::json& status, const std::string& to) {
  for (const auto& site : status.value("sites", nlohmann::json::array()))
    if (text_of(site, "site") == to) return site.value("connected", false);
  return false;
}

std::string progress_line(const nlohmann::json& handoff, unsigned width) {
  if (!counts(handoff)) return plain_line(handoff).substr(0, std::max(width, 2u) - 1);
  const double done = share_done(handoff);
  const auto filled = static_cast<std::size_t>(std::lround(done * kBarWidth));
  const std::string phase = text_of(handoff, "phase");
  const std::string share = fmt::format("{:3.0f} %", std::floor(done * 100));
  std::vector<Detail> shown = details(handoff);
  std::string line = fmt::format("{} [{}{}] {}  {}", phase, std::string(filled, '#'),
                                 std::string(kBarWidth - filled, '-'), share, joined(shown));
  // What the words say matters more than the bar, where there is no room for both.
  while (line.size() >= width && !shown.empty()) {
    line = fmt::format("{} {}  {}", phase, share, joined(shown));
    if (line.size() >= width)
      shown.erase(std::min_element(shown.begin(), shown.end(), [](const Detail& a, const Detail& b) {
        return a.importance < b.importance;
      }));
  }
  if (width > 1 && line.size() >= width) line.resize(width - 1);
  return line;
}

std::string plain_line(const nlohmann::json& handoff) {
  const std::string more = joined(details(handoff));
  return text_of(handoff, "phase") + (more.empty() ? "" : ": ") + more;
}

std::string handoff_summary(const nlohmann::json& handoff) {
  const std::string result = text_of(handoff, "result");
  std::string text = result == "done" ? fmt::format("{} is the owner now, at epoch {} (before: {})\n",
                                                    text_of(handoff, "to"), count_of(handoff, "epoch"),
                                                    text_of(handoff, "from"))
                                      : fmt::format("handoff from {} to {}: {}\n", text_of(handoff, "from"),
                                                    text_of(handoff, "to"), result);
  if (result != "done" && count_of(handoff, "t0") == 0) return text;  // refused: nothing had begun
  text += fmt::format(
      "  image  {} files, {}, of which sent {}\n", format_count(count_of(handoff, "image_files")),
      format_bytes(count_of(handoff, "image_bytes")), format_bytes(count_of(handoff, "image_bytes_sent")));
  text += fmt::format("  log    {} entries, {}, in {} rounds; {} records held\n",
                      format_count(count_of(handoff, "log_entries")),
                      format_bytes(count_of(handoff, "log_bytes")), count_of(handoff, "rounds"),
                      format_count(count_of(handoff, "records")));
  text += timeline_row("t0", handoff, "image starts");
  text += timeline_row("t1", handoff, "gate closes");
  text += timeline_row("t2", handoff, "log applied");
  text += timeline_row("t3", handoff, "new owner serves");
  text += fmt::format("  pause  {} (t1 to t3); total {}",
                      result == "done" ? format_milliseconds(number_of(handoff, "pause_ms")) : "-",
                      format_seconds(number_of(handoff, "total_ms") / 1000));
  if (const auto attempts = count_of(handoff, "attempts"); attempts > 1)
    text += fmt::format("; {} tries", attempts);
  return text + "\n";
}

nlohmann::json handoff_result(const nlohmann::json& handoff) {
  nlohmann::json result;
  for (const char* key : {"result", "from", "to", "error"}) result[key] = text_of(handoff, key);
  for (const char* key : {"attempt", "epoch", "image_files", "image_bytes", "image_bytes_sent", "log_entries",
                          "log_bytes", "rounds", "records", "attempts", "t0", "t1", "t2", "t3"}) {
    result[key] = count_of(handoff, key);
  }
  for (const char* key : {"pause_ms", "total_ms"}) result[key] = number_of(handoff, key);
  return result;
}

void ProgressDisplay::show(const nlohmann::json& handoff) {
  if (terminal_) {
    std::fprintf(stderr, "\r%s\033[K", progress_line(handoff, terminal_width()).c_str());
    std::fflush(stderr);
    shown_ = true;
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  const std::string phase = text_of(handoff, "phase");
  const auto attempts = count_of(handoff, "attempts");
  if (phase == phase_ && attempts == attempts_ && now - last_ < kPlainInterval) return;
  const std::string line = plain_line(handoff);
  if (line == line_) return;  // it waits
  phase_ = phase;
  attempts_ = attempts;
  last_ = now;
  line_ = line;
  std::fprintf(stderr, "%s\n", line.c_str());
}

void ProgressDisplay::clear() {
  if (shown_) std::fprintf(stderr, "\r\033[K");
  shown_ = false;
}

}  // namespace sharefs
