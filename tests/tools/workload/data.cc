// Modes that write data: each writer knows what every block of its files must hold.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <optional>

#include "tests/tools/workload/workload.h"

namespace sharefs::workload {
namespace {

// What a block holds: the write that was acknowledged last, or one that was tried after it and is in doubt.
struct Cell {
  std::uint64_t acknowledged = 0;
  std::uint64_t tried = 0;
};

struct Written {
  std::string name;
  std::vector<Cell> cells;
};

std::string file_name(const Options& options, unsigned number) {
  return "w-" + options.id + "-" + std::to_string(number);
}

void save(const Options& options, const std::vector<Written>& files) {
  if (options.expect.empty()) return;
  std::ofstream out(options.expect);
  out << options.block << ' ' << files.size() << '\n';
  for (const Written& file : files) {
    out << file.name << ' ' << file.cells.size() << '\n';
    for (const Cell& cell : file.cells) out << cell.acknowledged << ' ' << cell.tried << '\n';
  }
}

void check(Report& report, const Written& file, unsigned number, std::uint64_t writer, int fd,
           unsigned block) {
  std::vector<char> data(block);
  for (std::size_t i = 0; i < file.cells.size(); ++i) {
    std::fill(data.begin(), data.end(), '\0');
    ssize_t got =
        report.run("pread", [&] { return pread(fd, data.data(), block, static_cast<off_t>(i * block)); });
    if (got < 0) return;
    const std::int64_t seq = block_seq(data, writer, number, i);
    const Cell& cell = file.cells[i];
    const auto found = static_cast<std::uint64_t>(seq);
    if (seq < 0 || (found != cell.acknowledged && found != cell.tried))
      report.fail(file.name + " block " + std::to_string(i) + ": holds write " + std::to_string(seq) +
                  ", not " + std::to_string(cell.acknowledged));
  }
}

// One step of the writer on one file: mostly a block, sometimes a punched hole or a shrink and regrowth.
class WriterFile {
 public:
  WriterFile(Report& report, const Options& options, unsigned number)
      : report_(report),
        options_(options),
        number_(number),
        writer_(hash_of(options.id)),
        file_(open_file(report, options.dirs.at(0) + "/" + file_name(options, number),
                        O_RDWR | O_CREAT | O_TRUNC)),
        data_(options.block) {
    written.name = file_name(options, number);
    written.cells.resize(options.blocks);
  }

  void step(std::mt19937_64& random) {
    const auto index = static_cast<std::size_t>(random() % options_.blocks);
    switch (random() % 64) {
      case 0:
        return punch(index);
      case 1:
        return shrink_and_grow(index);
      default:
        return write(index);
    }
  }
  void verify() { check(report_, written, number_, writer_, file_.fd(), options_.block); }

  Written written;

 private:
  off_t at(std::size_t index) const { return static_cast<off_t>(index) * options_.block; }

  void write(std::size_t index) {
    Cell& cell = written.cells[index];
    cell.tried = ++seq_;
    fill_block(data_, writer_, number_, index, cell.tried);
    ssize_t done =
        report_.run("pwrite", [&] { return pwrite(file_.fd(), data_.data(), data_.size(), at(index)); });
    if (done != static_cast<ssize_t>(data_.size())) return;
    if (options_.sync_every != 0 && seq_ % options_.sync_every == 0)
      report_.run("fsync", [&] { return fsync(file_.fd()); });
    cell.acknowledged = cell.tried;
  }

  void punch(std::size_t index) {
    written.cells[index].tried = 0;
    if (report_.run("fallocate", [&] {
          return fallocate(file_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at(index), options_.block);
        }) == 0)
      written.cells[index].acknowledged = 0;
  }

  void shrink_and_grow(std::size_t index) {
    for (std::size_t i = index; i < written.cells.size(); ++i) written.cells[i].tried = 0;
    const bool done = report_.run("ftruncate", [&] {
      return ftruncate(file_.fd(), at(index));
    }) == 0 && report_.run("ftruncate", [&] { return ftruncate(file_.fd(), at(options_.blocks)); }) == 0;
    for (std::size_t i = index; done && i < written.cells.size(); ++i) written.cells[i].acknowledged = 0;
  }

  Report& report_;
  const Options& options_;
  unsigned number_;
  std::uint64_t writer_;
  File file_;
  std::vector<char> data_;
  std::uint64_t seq_ = 0;
};

}  // namespace

void run_writer(const Options& options, Report& report) {
  std::vector<WriterFile> files;
  auto save_all = [&] {
    std::vector<Written> all;
    all.reserve(files.size());
    for (const WriterFile& file : files) all.push_back(file.written);
    save(options, all);
  };
  std::mt19937_64 random(options.seed);
  try {
    for (unsigned i = 0; i < options.files; ++i) files.emplace_back(report, options, i);
    while (!report.stopped()) {
      report.pace();
      files[random() % files.size()].step(random);
    }
    for (WriterFile& file : files) file.verify();
  } catch (const Gone&) {
    save_all();
    throw;
  }
  save_all();
}

void verify_writer(const Options& options, Report& report) {
  std::ifstream in(options.expect);
  unsigned block = 0;
  std::size_t files = 0;
  if (!(in >> block >> files)) throw std::runtime_error("cannot read " + options.expect);
  for (std::size_t number = 0; number < files; ++number) {
    Written file;
    std::size_t cells = 0;
    in >> file.name >> cells;
    file.cells.resize(cells);
    for (Cell& cell : file.cells) in >> cell.acknowledged >> cell.tried;
    if (!in) throw std::runtime_error("incomplete: " + options.expect);
    File opened = open_file(report, options.dirs.at(0) + "/" + file.name, O_RDONLY);
    check(report, file, static_cast<unsigned>(number), hash_of(options.id), opened.fd(), block);
  }
}

void run_paced(const Options& options, Report& report) {
  const std::uint64_t writer = hash_of(options.id);
  std::vector<File> files;
  for (unsigned i = 0; i < options.files; ++i)
    files.push_back(open_file(report, options.dirs.at(0) + "/" + file_name(options, i), O_RDWR | O_CREAT));
  std::vector<char> data(options.block);
  std::mt19937_64 random(options.seed);
  for (std::uint64_t seq = 1; !report.stopped(); ++seq) {
    const auto number = random() % files.size();
    const auto index = random() % options.blocks;
    fill_block(data, writer, number, index, seq);
    report.pace();
    report.run("pwrite", [&] {
      return pwrite(files[number].fd(), data.data(), data.size(), static_cast<off_t>(index * options.block));
    });
  }
}

// Appends a number and syncs it; slot 0 of the board tells how many were synced. With --rewrite what was not
// synced may be lost: then a sync fails, or the file is gone if it was never synced, and that is written
// again.
void run_fsync_writer(const Options& options, Report& report) {
  Board& told = board(options);
  std::optional<File> file;
  const auto create = [&] {
    file.emplace(open_file(report, options.dirs.at(0) + "/fsync-" + options.id, O_RDWR | O_CREAT | O_TRUNC));
  };
  create();
  for (std::uint64_t seq = 0; !report.stopped(); ++seq) {
    report.pace();
    bool lost = false;
    const auto unless_lost = [&](ssize_t result) {
      lost = result < 0 && options.rewrite && (errno == EIO || (errno == ESTALE && told.slots[0] == 0));
      return lost ? ssize_t{0} : result;
    };
    const auto at = static_cast<off_t>(seq * sizeof seq);
    const bool written = report.run("pwrite", [&] {
      return unless_lost(pwrite(file->fd(), &seq, sizeof seq, at));
    }) == sizeof seq;
    if (written && report.run("fsync", [&] { return unless_lost(fsync(file->fd())); }) == 0 && !lost)
      told.slots[0] = seq + 1;
    if (!lost) continue;
    if (errno == ESTALE) create();
    seq = told.slots[0] - 1;
  }
}

void verify_fsync_writer(const Options& options, Report& report) {
  const std::uint64_t acknowledged = board(options).slots[0];
  report.put("acknowledged", acknowledged);
  if (acknowledged == 0) return;  // it may not even have made its file
  File file = open_file(report, options.dirs.at(0) + "/fsync-" + options.id, O_RDONLY);
  for (std::uint64_t seq = 0; seq < acknowledged; ++seq) {
    std::uint64_t found = ~seq;
    const auto at = static_cast<off_t>(seq * sizeof seq);
    ssize_t got = report.run("pread", [&] { return pread(file.fd(), &found, sizeof found, at); });
    if (got != sizeof found || found != seq)
      return report.fail("synced number " + std::to_string(seq) + " of " + std::to_string(acknowledged) +
                         " is lost");
  }
}

}  // namespace sharefs::workload
