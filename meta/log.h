// The log of a process: lines on standard error with a time stamp. What each level is for:
//   error  something was lost or refused that should not have been;  warn  went wrong, was made good
//   info   what an operator wants to see of a normal day;  debug, trace  for developers; trace is one line
//   per request
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace sharefs {

// `who` stands in every line (the site or the command). The level is that of SHAREFS_LOG: trace, debug, info
// (default), warn, error or off. Called once, before other threads run.
void init_logging(const std::string& who);

// log::info("{} of {}", done, all), and the same for the other levels. Any thread.
namespace log {
using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::trace;
using spdlog::warn;
}  // namespace log

}  // namespace sharefs
