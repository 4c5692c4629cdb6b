// workload MODE --dir DIR ...: applications for the system tests. See workload.h and tests/README.md.
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {
namespace {

struct Mode {
  const char* name;
  void (*run)(const Options&, Report&);
};

constexpr Mode kModes[] = {
    {"writer", run_writer},
    {"verify-writer", verify_writer},
    {"paced", run_paced},
    {"fsync-writer", run_fsync_writer},
    {"verify-fsync-writer", verify_fsync_writer},
    {"appender", run_appender},
    {"verify-appender", verify_appender},
    {"prepare-renamer", prepare_renamer},
    {"renamer", run_renamer},
    {"verify-renamer", verify_renamer},
    {"creator", run_creator},
    {"directory-stream", run_directory_stream},
    {"removed-directory", run_removed_directory},
    {"open-unlinked", run_open_unlinked},
    {"stat-holder", run_stat_holder},
    {"counter", run_counter},
    {"mmap-reader", run_mmap_reader},
    {"lock-holder", run_lock_holder},
    {"lock-waiter", run_lock_waiter},
    {"lock-counter", run_lock_counter},
};

unsigned number(const char* text) { return static_cast<unsigned>(std::strtoul(text, nullptr, 10)); }

Options parse(int argc, char** argv) {
  Options options;
  options.mode = argv[1];
  const std::map<std::string, std::function<void(const char*)>> valued = {
      {"--dir", [&](const char* v) { options.dirs.emplace_back(v); }},
      {"--file", [&](const char* v) { options.file = v; }},
      {"--id", [&](const char* v) { options.id = v; }},
      {"--board", [&](const char* v) { options.board = v; }},
      {"--expect", [&](const char* v) { options.expect = v; }},
      {"--seconds", [&](const char* v) { options.seconds = std::strtod(v, nullptr); }},
      {"--rate", [&](const char* v) { options.rate = number(v); }},
      {"--files", [&](const char* v) { options.files = number(v); }},
      {"--block", [&](const char* v) { options.block = number(v); }},
      {"--blocks", [&](const char* v) { options.blocks = number(v); }},
      {"--sync-every", [&](const char* v) { options.sync_every = number(v); }},
      {"--seed", [&](const char* v) { options.seed = std::strtoull(v, nullptr, 10); }},
      {"--count", [&](const char* v) { options.counts.emplace_back(v); }},
  };
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--posix") == 0) {
      options.posix = true;
    } else if (std::strcmp(argv[i], "--until-gone") == 0) {
      options.until_gone = true;
    } else if (std::strcmp(argv[i], "--rewrite") == 0) {
      options.rewrite = true;
    } else if (auto found = valued.find(argv[i]); found != valued.end() && i + 1 < argc) {
      found->second(argv[++i]);
    } else {
      throw std::invalid_argument(std::string("unknown or incomplete option ") + argv[i]);
    }
  }
  return options;
}

int run(int argc, char** argv) {
  for (const Mode& mode : kModes) {
    if (argc < 2 || std::strcmp(argv[1], mode.name) != 0) continue;
    Options options = parse(argc, argv);
    Report report(options);
    try {
      mode.run(options, report);
    } catch (const Gone&) {
      report.put("gone", 1);
    } catch (const std::exception& error) {
      report.fail(error.what());
    }
    std::printf("%s\n", report.json().c_str());
    return report.failed() ? 1 : 0;
  }
  std::fprintf(stderr, "usage: workload MODE --dir DIR [options]; modes:");
  for (const Mode& mode : kModes) std::fprintf(stderr, " %s", mode.name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace
}  // namespace sharefs::workload

int main(int argc, char** argv) {
  try {
    return sharefs::workload::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "workload: %s\n", error.what());
    return 2;
  }
}
