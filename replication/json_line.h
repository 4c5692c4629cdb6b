// JSON as it is sent, kept and printed.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace sharefs {

// In one line. Messages may hold names of files, which may be no text: such bytes are replaced.
inline std::string to_line(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// What another site, or a client of the control socket, has sent; discarded if it is no JSON. What is nested
// too deeply is left out: copying and writing it goes down by calls, and would use up the stack.
inline nlohmann::json parse_line(std::string_view text) {
  constexpr int kDeepest = 32;
  const auto keep = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    return depth < kDeepest;
  };
  return nlohmann::json::parse(text, keep, false);
}

}  // namespace sharefs
