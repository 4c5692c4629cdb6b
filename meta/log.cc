#include "meta/log.h"

#include <spdlog/sinks/stdout_sinks.h>

#include <cstdlib>
#include <memory>
#include <string_view>

namespace sharefs {

void init_logging(const std::string& who) {
  auto logger = std::make_shared<spdlog::logger>(who, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %n[%P] %l: %v");
  const char* variable = std::getenv("SHAREFS_LOG");
  const std::string_view wanted = variable == nullptr || *variable == '\0' ? "info" : variable;
  const auto level = spdlog::level::from_str(std::string(wanted));
  const bool unknown =
      level == spdlog::level::off && wanted != "off";  // from_str says off for whatever it does not know
  logger->set_level(unknown ? spdlog::level::info : level);
  spdlog::set_default_logger(std::move(logger));
  if (unknown) log::warn("SHAREFS_LOG={} is no level: use trace, debug, info, warn, error or off", wanted);
}

}  // namespace sharefs
