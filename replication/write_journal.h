// What a mount has acknowledged and its owner has not performed yet, in a mapped file: it survives kill -9.
// The next process of the site sends it first (WriteBehind::replay).
//
// A ring of entries: a header with the entry's position (which only grows, so nothing left of an earlier turn
// is taken for an entry), sizes and an XXH3 checksum over them and what follows: the serialized pb::Request,
// then the bytes to be written. It has a random key, so no application can write bytes that are taken for an
// entry. An entry does not wrap. The tail, in the file's first page, is the position of the oldest one that
// is not done.
//
// The file is not synced: after a power cut it tells of what was under way some time before, and of nothing
// that must be performed now. So it counts only under the power number that it was written under.
//
// Threads: one.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "meta/executor.h"

namespace sharefs {

class WriteJournal {
 public:
  using Position = std::uint64_t;

  // Looks at what an earlier process has left; the file is made when it is first written to. Throws
  // std::runtime_error.
  WriteJournal(std::filesystem::path file, std::uint64_t power);
  ~WriteJournal();
  WriteJournal(const WriteJournal&) = delete;
  WriteJournal& operator=(const WriteJournal&) = delete;

  // Nothing if there is no room, in the ring or on the disk, or before all that an earlier process left is
  // done.
  std::optional<Position> append(const pb::Request& request, Bytes data);
  void done(Position position);
  // Valid until the entry is done.
  Bytes data(Position position) const;
  bool empty() const { return entries_.empty(); }
  std::size_t size() const;  // that are not done
  // Those that are not done, oldest first.
  void for_each(const std::function<void(Position, const pb::Request&, Bytes)>& visit) const;
  // Makes what is there survive the machine's end.
  void sync();

  static constexpr std::size_t kCapacity = 32 << 20;

 private:
  struct Page;
  struct Header;
  struct Entry {
    Position position = 0;
    bool done = false;
  };
  void map(bool make);
  void find_entries();
  bool is_whole(Position position) const;
  Header& at(Position position) const;

  const std::filesystem::path file_;
  const std::uint64_t power_;
  void* map_ = nullptr;  // nullptr: there is no file yet
  bool failed_ = false;  // and none can be made
  bool fresh_ = false;   // nothing in the ring has a position from next_ on
  Position next_ = 0;
  std::deque<Entry> entries_;
};

}  // namespace sharefs
