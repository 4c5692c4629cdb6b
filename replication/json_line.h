// JSON as it is sent, kept and printed.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace sharefs {

// In one line. Messages may hold names of files, which may be no text: such bytes are replaced.
inline std::string to_line(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace sharefs
