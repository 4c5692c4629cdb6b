// How a command fails: with one line that says what to do.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sharefs {

// main() prints `text` and exits with 1.
[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

// For a terminal, in one line: names of files may hold anything, and whoever may make one chooses it.
inline std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c == 0x7f; }, '?');
  return text;
}

}  // namespace sharefs
