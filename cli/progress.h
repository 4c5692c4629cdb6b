// What an operator sees of a handoff: the live line, the plain lines of a script, the summary, the JSON
// object.
//
// Input is the `handoff` object of the daemon's status (cli/README.md). Keys that are missing count as 0 or
// "".
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>

namespace sharefs {

// Forgiving access: 0 or "" for a key that is missing or of another type.
double number_of(const nlohmann::json& object, const char* key);
std::uint64_t count_of(const nlohmann::json& object, const char* key);
std::string text_of(const nlohmann::json& object, const char* key);

// Of a status: has this site a connection to that one?
bool is_connected(const nlohmann::json& status, const std::string& to);

// One line without a newline. `width`: of the terminal.
std::string progress_line(const nlohmann::json& handoff, unsigned width);
// The same in words, for logs and pipes.
std::string plain_line(const nlohmann::json& handoff);
// Several lines: what was sent, t0..t3, the pause. One line if nothing had begun.
std::string handoff_summary(const nlohmann::json& handoff);
// With exactly the keys that scripts depend on.
nlohmann::json handoff_result(const nlohmann::json& handoff);

// Shows a running handoff on standard error: one line redrawn on a terminal, otherwise a line at each change
// of phase and every two seconds, if it says something new.
class ProgressDisplay {
 public:
  explicit ProgressDisplay(bool terminal) : terminal_(terminal) {}
  ~ProgressDisplay() { clear(); }
  void show(const nlohmann::json& handoff);
  void clear();  // takes the live line away, so that other text can follow

 private:
  const bool terminal_;
  bool shown_ = false;
  std::string phase_, line_;
  std::uint64_t attempts_ = 0;
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace sharefs
