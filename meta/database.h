// A connection to the SQLite database of one site and data set, and its schema.
//
// The file is `state.db` in the data set's folder of SHAREFS_HOME; WAL mode, synchronous=NORMAL. What must
// survive a power cut when a call returns is committed with Durability::full. Each thread that works on the
// database opens a connection of its own; write transactions are short (at most a few hundred rows).
#pragma once

#include <sqlite3.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "meta/types.h"

namespace sharefs {

// A failed SQLite call: what(), in one line, says which statement and why.
struct DatabaseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Durability { normal, full };

class Database;

// A prepared statement, reusable: bind in order, step until false, read columns. Resets itself when the next
// binding starts.
class Statement {
 public:
  Statement(Database& database, std::string_view sql);
  Statement(Statement&&) noexcept = default;
  Statement& operator=(Statement&&) noexcept = default;

  // Binds all parameters in order: integers, text (std::string_view bound as text), bytes (Bytes bound as
  // BLOB), std::nullopt as NULL.
  template <class... Args>
  Statement& bind(const Args&... args) {
    reset();
    int index = 0;
    (bind_one(++index, args), ...);
    return *this;
  }
  bool step();  // true: a row is there
  void run() {
    while (step()) {
    }
    reset();
  }  // for statements without rows
  std::int64_t integer(int column) const;
  std::uint64_t id(int column) const { return static_cast<std::uint64_t>(integer(column)); }
  double real(int column) const;
  std::string text(int column) const;
  std::string_view blob(int column) const;  // valid until the next step
  bool is_null(int column) const;
  void reset();

 private:
  void bind_one(int index, std::int64_t value);
  void bind_one(int index, std::uint64_t value) { bind_one(index, static_cast<std::int64_t>(value)); }
  void bind_one(int index, int value) { bind_one(index, static_cast<std::int64_t>(value)); }
  void bind_one(int index, unsigned value) { bind_one(index, static_cast<std::int64_t>(value)); }
  void bind_one(int index, double value);
  void bind_one(int index, std::string_view text);
  void bind_one(int index, const std::string& text) { bind_one(index, std::string_view(text)); }
  void bind_one(int index, const char* text) { bind_one(index, std::string_view(text)); }
  void bind_one(int index, Bytes blob);
  void bind_one(int index, std::nullopt_t);

  struct Finalize {
    void operator()(sqlite3_stmt* statement) const;
  };
  Database* database_;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
};

class Database {
 public:
  // Opens or creates the file (mode 0600) and brings its schema up to date; refuses one of a newer version.
  explicit Database(const std::filesystem::path& file);
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  void execute(const char* sql);
  // For the connection of a thread that must not wait for a disk: its commits leave copying the WAL into the
  // file, and the syncs that takes, to the connections of other threads, until the WAL has grown to 64 MiB.
  void defer_checkpoints();
  // Makes every earlier commit survive a power cut, as a commit of Durability::full would, but without
  // holding the lock that other connections need to commit.
  void sync_commits();
  // Whether statements wait for other connections that are changing the database (as they do at first), or
  // fail.
  void wait_for_others(bool wait);
  int changes() const { return sqlite3_changes(handle_); }  // rows that the last statement changed
  sqlite3* handle() const { return handle_; }
  const std::filesystem::path& file() const { return file_; }

 private:
  friend class Transaction;
  void use_write_ahead_log();
  void mend_log();

  std::filesystem::path file_;
  sqlite3* handle_ = nullptr;
};

// BEGIN IMMEDIATE until commit(); rolled back when it goes out of scope uncommitted. Not nested: one per
// connection. Durability::full makes this commit, and with it every earlier one, survive a power cut.
class Transaction {
 public:
  explicit Transaction(Database& database, Durability durability = Durability::normal);
  ~Transaction();
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  void commit();

 private:
  void end();
  Database& database_;
  Durability durability_;
  bool open_ = true;
};

}  // namespace sharefs
