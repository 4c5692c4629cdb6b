#include "replication/round.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <optional>

namespace sharefs {

namespace {

// Changed ranges this close to each other are shipped as one.
constexpr std::uint64_t kMergeGap = 4096;
// Files have no bytes from here on; an entry that runs "to the end" ends here.

}  // namespace

void Round::ship(std::int64_t cut) {
  for (auto& [id, ranges] : extents_) ranges.merge();
  touched_.merge(shipper_.take_too_fresh());
  touched_.merge(walk_.take_missed());
  read_cells();
  reach_all();
  find_new();
  send_detached();
  send_new();
  send_names();
  send_data();
  send_states(cut);
  for (const InodeId id : freed_) {
    sender_.add_freed(id);
    sender_.checkpoint();
  }
  sender_.flush();
}

void Round::note(const Change& change) {
  switch (change.kind) {
    case Change::Kind::entry:
      names_[change.id].insert(change.name);
      touched_.insert(change.id);
      break;
    case Change::Kind::attributes:
      touched_.insert(change.id);
      break;
    case Change::Kind::extent: {
      touched_.insert(change.id);
      const std::uint64_t begin = std::min(change.offset, kMaxFileSize);
      extents_[change.id].add({begin, begin + std::min(change.length, kMaxFileSize - begin)});
      break;
    }
    case Change::Kind::freed:
      freed_.insert(change.id);
      break;
  }
}

// A file that is written over and over has many entries and few ranges.
void Round::Ranges::add(Range range) {
  all.push_back(range);
  if (all.size() < merge_at) return;
  merge();
  merge_at = std::max(merge_at, 2 * all.size());
}

void Round::Ranges::merge() {
  std::sort(all.begin(), all.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::size_t merged = 0;
  for (const Range& range : all) {
    if (merged > 0 && range.begin <= all[merged - 1].end + kMergeGap) {
      all[merged - 1].end = std::max(all[merged - 1].end, range.end);
    } else {
      all[merged++] = range;
    }
  }
  all.resize(merged);
}

void Round::read_cells() {
  for (auto& [parent, names] : names_) {
    const UniqueFd directory = inodes_.open(parent, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (!directory && errno != ESTALE && errno != ENOENT) {
      throw_errno("cannot open directory " + std::to_string(parent));
    }
    for (const auto& name : names) {
      Cell cell{.parent = parent, .name = name};
      if (auto opened = directory ? open_name(directory.get(), name, DT_UNKNOWN) : std::nullopt) {
        cell.id = identify_opened(inodes_, parent, name, directory.get(), *opened).value_or(0);
        cell.mode = opened->backing.stx_mode;
        if (cell.id != 0) touched_.insert(cell.id);
      }
      cells_.push_back(std::move(cell));
    }
  }
  names_.clear();
}

// Without file handles many inodes may have lost the names by which they were reached since the last round,
// but not their others, of which the log says nothing.
void Round::reach_all() {
  if (inodes_.uses_handles()) return;
  std::set<std::uint64_t> inos;
  for (const InodeId id : touched_) {
    if (inodes_.open(id, O_PATH | O_NOFOLLOW | O_CLOEXEC) || errno != ESTALE) continue;
    if (const auto ino = inodes_.out_of_reach(id)) inos.insert(*ino);
  }
  if (!inos.empty()) walk_.find(inos);
}

void Round::find_new() {
  for (const InodeId id : touched_) {
    if (!sent_.contains(id)) new_.insert(id);
  }
}

void Round::send_detached() {
  const bool directory_moves = std::any_of(cells_.begin(), cells_.end(), [&](const Cell& cell) {
    return cell.id != 0 && S_ISDIR(cell.mode) && sent_.contains(cell.id);
  });
  for (const Cell& cell : cells_) {
    if (cell.id == 0 || directory_moves) shipper_.entry({cell.parent, cell.name}, 0, 0);
  }
}

void Round::send_new() {
  for (Cell& cell : cells_) {
    if (cell.id == 0 || sent_.contains(cell.id)) continue;
    const EntryName entry{cell.parent, cell.name};
    walk_.send(cell.id, &entry);
    cell.settled = sent_.contains(cell.id);
  }
  // Without a name in this round: orphans, and what gets its name in a later one.
  for (const InodeId id : new_) {
    if (!sent_.contains(id)) walk_.send(id, nullptr);
  }
}

void Round::send_names() {
  for (const Cell& cell : cells_) {
    if (cell.id != 0 && !cell.settled) shipper_.entry({cell.parent, cell.name}, cell.id, cell.mode);
  }
}

void Round::send_data() {
  for (const auto& [id, ranges] : extents_) {
    if (new_.contains(id)) continue;
    const auto opened = walk_.open(id);
    if (!opened || !is_regular(opened->backing)) continue;
    for (const Range& range : ranges.all) shipper_.extent(id, *opened, range.begin, range.end);
  }
}

void Round::send_states(std::int64_t cut) {
  std::vector<InodeId> directories;
  for (const InodeId id : touched_) {
    auto opened = walk_.open(id);
    if (!opened) continue;
    if (is_directory(opened->backing)) {
      directories.push_back(id);
    } else if (!new_.contains(id)) {
      shipper_.state(id, *opened, cut);
      sender_.checkpoint();
    }
  }
  for (const InodeId id : directories) {
    if (auto opened = walk_.open(id)) shipper_.state(id, *opened, cut);
    sender_.checkpoint();
  }
}

}  // namespace sharefs
