// How a command fails: with one line that says what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace sharefs {

// main() prints `text` and exits with 1.
[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

}  // namespace sharefs
