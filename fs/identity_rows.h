// The identities in SQLite: table inode, and how far the journal has been written there.
//
// A row is (id, ino, born, handle, parent, name, imported_ctime, backing_ctime, orphan). At most one row
// names a backing ino. `handle` is a BLOB: one byte file type (S_IFMT >> 12), 4 bytes handle type, the handle
// (may be empty).
//
// Threads: one object per thread, each with a connection of its own.
#pragma once

#include <filesystem>
#include <optional>

#include "fs/identity.h"
#include "meta/database.h"

namespace sharefs {

class IdentityRows {
 public:
  explicit IdentityRows(const std::filesystem::path& file);

  std::optional<Identity> by_id(InodeId id);
  std::optional<Identity> by_ino(std::uint64_t ino);

  // Within a transaction of the caller. put() also removes any other row of the same backing ino.
  void put(const Identity& identity);
  void remove(InodeId id);
  void set_journal_tail(std::uint64_t position);
  std::uint64_t journal_tail();
  // Whether any inode was ever imported here: if not, nobody needs to look for overrides.
  bool any_import();
  void note_import();

  // Takes the ids [result, result + count) of this epoch away for good: durable when it returns.
  std::uint64_t reserve_block(Epoch epoch, std::uint64_t count);

  Database& database() { return database_; }

 private:
  Database database_;
  Statement by_id_, by_ino_, put_, remove_, remove_others_, put_blob_;
};

}  // namespace sharefs
