// Appenders: many processes on several mounts append records to one file; none may be lost, torn or doubled.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {

void run_appender(const Options& options, Report& report) {
  const std::uint64_t writer = hash_of(options.id);
  File file = open_file(report, options.file, O_WRONLY | O_CREAT | O_APPEND);
  std::vector<char> record(options.block);
  std::uint64_t written = 0;
  try {
    while (!report.stopped()) {
      report.pace();
      fill_block(record, writer, 0, 0, written + 1);
      ssize_t done = report.run("append", [&] { return write(file.fd(), record.data(), record.size()); });
      if (done == static_cast<ssize_t>(record.size())) {
        ++written;
      } else if (done >= 0) {
        report.fail("an append was cut to " + std::to_string(done) + " bytes");
      } else {
        break;
      }
    }
  } catch (const Gone&) {
    report.put("in_doubt", written + 1);
    report.put("records", written);
    throw;
  }
  report.put("records", written);
}

namespace {

// Per appender: how many records it was told are written, and the last that was found. It appends one after
// the other, so its records stand in order.
struct Found {
  std::string id;
  std::uint64_t acknowledged = 0;
  bool doubt = false;  // one more may be there
  std::uint64_t last = 0;
};

std::map<std::uint64_t, Found> expected(const Options& options) {
  std::map<std::uint64_t, Found> out;
  for (const std::string& count : options.counts) {
    const auto equals = count.find('=');
    Found found;
    found.id = count.substr(0, equals);
    found.doubt = count.back() == '?';
    found.acknowledged = std::stoull(count.substr(equals + 1));
    out[hash_of(found.id)] = found;
  }
  return out;
}

}  // namespace

// --count ID=N for each appender; ID=N? if a record after the N-th may be there too.
void verify_appender(const Options& options, Report& report) {
  auto appenders = expected(options);
  File file = open_file(report, options.file, O_RDONLY);
  std::vector<char> record(options.block);
  for (std::uint64_t position = 0;; ++position) {
    const auto at = static_cast<off_t>(position * options.block);
    ssize_t got = report.run("pread", [&] { return pread(file.fd(), record.data(), record.size(), at); });
    if (got == 0) break;
    const std::string where = "record at " + std::to_string(at);
    if (got != static_cast<ssize_t>(record.size())) return report.fail(where + " is torn");
    std::uint64_t writer = 0;
    std::memcpy(&writer, record.data() + 8, sizeof writer);
    const std::int64_t seq = block_seq(record, writer, 0, 0);
    auto found = appenders.find(writer);
    if (seq <= 0 || found == appenders.end()) return report.fail(where + " is not what any appender wrote");
    Found& appender = found->second;
    const auto number = static_cast<std::uint64_t>(seq);
    if (number > appender.acknowledged + (appender.doubt ? 1 : 0))
      return report.fail(where + ": " + appender.id + " never wrote number " + std::to_string(seq));
    if (number != appender.last + 1)
      return report.fail(where + ": " + appender.id + " has number " + std::to_string(seq) + " after " +
                         std::to_string(appender.last));
    appender.last = number;
  }
  for (const auto& [writer, appender] : appenders)
    if (appender.last < appender.acknowledged)
      report.fail(appender.id + ": only " + std::to_string(appender.last) + " records of " +
                  std::to_string(appender.acknowledged));
}

}  // namespace sharefs::workload
