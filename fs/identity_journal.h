// The mapped journal: identities that were told to a kernel and are not in SQLite yet.
//
// A ring of fixed slots in a MAP_SHARED file: what is stored there survives kill -9, since the pages belong
// to the kernel. (A power cut may take it; InodeTable::sync() is for that.) Every record carries its position
// and a checksum, so replay finds the end by itself and never takes a torn or an old record for a new one.
//
// Format (host byte order: the file never leaves its machine)
//   page 0   Header { magic, slots, tail }: the position of the first record not known to be in SQLite
//   then     `slots` slots of 128 bytes. A record starts with a RecordHeader (72 bytes) in the slot
//            `position % slots`, then come the bytes of the handle and of the name, running on into the
//            next slots as needed.
//   position counts slots from the beginning of time, so it never repeats.
//
// Threads: append() under the InodeTable's mutex; read() of records below a head taken under it needs no
// lock, because their slots are not reused before release() of the same thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "fs/identity.h"

namespace sharefs {

class IdentityJournal {
 public:
  using Visit = std::function<void(const Identity&)>;

  // Opens or creates the file and waits a little for another process that still holds it. A file of another
  // format is started anew. `tail_in_database`: how far the records are in SQLite, by its own account.
  IdentityJournal(const std::filesystem::path& file, std::uint32_t slots, std::uint64_t tail_in_database);
  ~IdentityJournal();
  IdentityJournal(const IdentityJournal&) = delete;
  IdentityJournal& operator=(const IdentityJournal&) = delete;

  // Visits the valid records from the tail on and moves the head behind the last one. Once, before append().
  void replay(const Visit& visit);

  // False: the ring is full, nothing was written.
  bool append(const Identity& identity);
  std::uint64_t head() const { return head_; }
  std::uint64_t tail() const { return tail_; }
  std::uint64_t used() const { return head_ - tail_; }
  std::uint32_t slots() const { return slots_; }

  // Visits the records at `from` up to at most `to`, `limit` of them, and returns where it stopped.
  std::uint64_t read(std::uint64_t from, std::uint64_t to, unsigned limit, const Visit& visit) const;

  // Leaves out positions; all records are in SQLite. Returns the new head. A power cut may have taken a
  // record and left those behind it: they must never come to stand behind what is appended in its place.
  std::uint64_t begin_anew();

  // The records below `position` are in SQLite: their slots may be used again.
  void release(std::uint64_t position);

 private:
  struct Header;
  struct RecordHeader;
  std::uint64_t parse(std::uint64_t position, Identity& identity) const;
  void copy_in(std::uint64_t position, std::size_t offset, const void* bytes, std::size_t size);
  void copy_out(std::uint64_t position, std::size_t offset, void* bytes, std::size_t size) const;

  // constant after construction
  int fd_ = -1;
  std::uint32_t slots_ = 0;
  std::size_t length_ = 0;
  char* map_ = nullptr;
  Header* header_ = nullptr;
  // under the InodeTable's mutex
  std::uint64_t head_ = 0;
  std::uint64_t tail_ = 0;
};

}  // namespace sharefs
