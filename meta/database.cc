#include "meta/database.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>

#include "meta/caller.h"

namespace sharefs {
namespace {

constexpr int kSchemaVersion = 3;
constexpr int kBusyTimeoutMs = 10'000;
constexpr int kDeferredCheckpointPages = 64 * 1024 * 1024 / 4096;  // pages are of SQLite's default size

// Of any connection of this process: a sync of the write-ahead log has failed; see Database::mend_log. Of the
// processes before it is not known.
constexpr unsigned kBeforeThisProcess = 1;
std::atomic<unsigned> failed_log_syncs{kBeforeThisProcess}, mended_log_syncs{0};

// See meta/README.md for what each table means. Names of files are BLOBs: they are bytes, not text.
constexpr const char* kSchema = R"sql(
CREATE TABLE setting(key TEXT PRIMARY KEY, value BLOB);
CREATE TABLE site(name TEXT PRIMARY KEY, endpoint TEXT, public_key TEXT);
CREATE TABLE removed_site(public_key TEXT PRIMARY KEY, name TEXT);
CREATE TABLE invitation(public_key TEXT PRIMARY KEY, expires INTEGER, used INTEGER);
CREATE TABLE ownership(only INTEGER PRIMARY KEY CHECK(only=1), epoch INTEGER, owner TEXT, burnt INTEGER);
CREATE TABLE handoff(attempt INTEGER PRIMARY KEY, epoch INTEGER, source TEXT, target TEXT, role TEXT, phase TEXT,
  started INTEGER, t0 INTEGER, t1 INTEGER, t2 INTEGER, t3 INTEGER, ended INTEGER,
  image_files INTEGER, image_bytes INTEGER, image_bytes_sent INTEGER,
  log_entries INTEGER, log_bytes INTEGER, rounds INTEGER, records INTEGER,
  pause_ms REAL, result TEXT, error TEXT, tries INTEGER);
CREATE TABLE change_log(seq INTEGER PRIMARY KEY, kind TEXT, inode INTEGER, name BLOB, offset INTEGER, length INTEGER,
  at INTEGER);
CREATE TABLE record(attempt INTEGER, number INTEGER, client INTEGER, seq INTEGER, op TEXT, request BLOB, data BLOB,
  done INTEGER, outcome BLOB, outcome_data BLOB, PRIMARY KEY(attempt, number)) WITHOUT ROWID;
CREATE TABLE inode(id INTEGER PRIMARY KEY, ino INTEGER, born INTEGER, handle BLOB, parent INTEGER, name BLOB,
  imported_ctime INTEGER, backing_ctime INTEGER, orphan INTEGER);
CREATE INDEX inode_by_ino ON inode(ino);
CREATE TABLE id_block(epoch INTEGER PRIMARY KEY, next INTEGER);
CREATE TABLE blob(key TEXT PRIMARY KEY, value BLOB);
PRAGMA user_version = 3;
)sql";

constexpr const char* kFromVersion1 = R"sql(
ALTER TABLE handoff ADD COLUMN tries INTEGER;
)sql";
constexpr const char* kFromVersion2 = R"sql(
CREATE TABLE removed_site(public_key TEXT PRIMARY KEY, name TEXT);
PRAGMA user_version = 3;
)sql";

// Calls until it is not SQLITE_BUSY: for what SQLite refuses at once, whatever its busy timeout.
template <typename Call>
int patiently(Call call, int timeout_ms = kBusyTimeoutMs) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  for (;;) {
    const int result = call();
    if (result != SQLITE_BUSY || std::chrono::steady_clock::now() >= deadline) return result;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// One line, whatever the statement looks like.
[[noreturn]] void fail(sqlite3* handle, const std::filesystem::path& file, std::string_view what) {
  const int error = sqlite3_errcode(handle) == SQLITE_IOERR ? sqlite3_system_errno(handle) : 0;
  std::string line = file.string() + ": " + sqlite3_errmsg(handle) +
                     (error != 0 ? " (" + std::generic_category().message(error) + ")" : "") +
                     ", in: " + std::string(what.substr(0, 200));
  std::replace(line.begin(), line.end(), '\n', ' ');
  throw DatabaseError(line);
}

const sqlite3_io_methods* of_sqlite = nullptr;

// SQLite makes room for the memory that connections share by writing the last byte of each 4 KiB of its file.
// Where blocks are smaller the rest of these are holes, and on a full disk a store there is SIGBUS.
int map_without_holes(sqlite3_file* file, int region, int size, int extend, void volatile** mapped) {
  const int result = of_sqlite->xShmMap(file, region, size, extend, mapped);
  if (result != SQLITE_OK || *mapped == nullptr) return result;
  const bool no_room =
      ::madvise(const_cast<void*>(*mapped), static_cast<std::size_t>(size), MADV_POPULATE_WRITE) != 0 &&
      errno == EFAULT;
  if (!no_room) return SQLITE_OK;
  *mapped = nullptr;
  return SQLITE_FULL;
}

void map_without_holes(sqlite3* handle) {
  sqlite3_file* file = nullptr;
  if (sqlite3_file_control(handle, "main", SQLITE_FCNTL_FILE_POINTER, &file) != SQLITE_OK ||
      file->pMethods == nullptr)
    return;
  static const sqlite3_io_methods methods = [file] {
    of_sqlite = file->pMethods;
    sqlite3_io_methods changed = *of_sqlite;
    changed.xShmMap = map_without_holes;
    return changed;
  }();
  if (file->pMethods == of_sqlite) file->pMethods = &methods;
}

void check_bind(int result, const Database& database, sqlite3_stmt* statement) {
  if (result != SQLITE_OK) fail(database.handle(), database.file(), sqlite3_sql(statement));
}

int user_version(Database& database) {
  Statement statement(database, "PRAGMA user_version");
  statement.step();
  return static_cast<int>(statement.integer(0));
}

void bring_schema_up_to_date(Database& database) {
  Transaction transaction(database, Durability::full);
  const int version = user_version(database);  // another process may have been faster
  if (version == 0) database.execute(kSchema);
  if (version == 1) database.execute(kFromVersion1);
  if (version == 1 || version == 2) database.execute(kFromVersion2);
  transaction.commit();
}

}  // namespace

void Statement::Finalize::operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }

Statement::Statement(Database& database, std::string_view sql) : database_(&database) {
  sqlite3_stmt* statement = nullptr;
  const int result =
      sqlite3_prepare_v2(database.handle(), sql.data(), static_cast<int>(sql.size()), &statement, nullptr);
  statement_.reset(statement);
  if (result != SQLITE_OK) fail(database.handle(), database.file(), sql);
}

bool Statement::step() {
  if (sqlite3_stmt_readonly(statement_.get()) == 0) become_self();
  const int result = sqlite3_step(statement_.get());
  if (result == SQLITE_ROW) return true;
  if (result == SQLITE_DONE) return false;
  try {
    fail(database_->handle(), database_->file(), sqlite3_sql(statement_.get()));
  } catch (...) {
    reset();  // after the message was made: a failed statement must not keep its transaction open
    throw;
  }
}

std::int64_t Statement::integer(int column) const { return sqlite3_column_int64(statement_.get(), column); }

double Statement::real(int column) const { return sqlite3_column_double(statement_.get(), column); }

std::string Statement::text(int column) const { return std::string(blob(column)); }

std::string_view Statement::blob(int column) const {
  const void* bytes = sqlite3_column_blob(statement_.get(), column);  // before the size: it may convert
  const int size = sqlite3_column_bytes(statement_.get(), column);
  if (bytes == nullptr) return {};
  return {static_cast<const char*>(bytes), static_cast<std::size_t>(size)};
}

bool Statement::is_null(int column) const {
  return sqlite3_column_type(statement_.get(), column) == SQLITE_NULL;
}

void Statement::reset() { sqlite3_reset(statement_.get()); }

void Statement::bind_one(int index, std::int64_t value) {
  check_bind(sqlite3_bind_int64(statement_.get(), index, value), *database_, statement_.get());
}

void Statement::bind_one(int index, double value) {
  check_bind(sqlite3_bind_double(statement_.get(), index, value), *database_, statement_.get());
}

// A null pointer would bind NULL, so empty texts and blobs are given an address. The bytes are copied: what
// is bound is often a temporary.
void Statement::bind_one(int index, std::string_view text) {
  const char* bytes = text.empty() ? "" : text.data();
  check_bind(sqlite3_bind_text64(statement_.get(), index, bytes, text.size(), SQLITE_TRANSIENT, SQLITE_UTF8),
             *database_, statement_.get());
}

void Statement::bind_one(int index, Bytes blob) {
  const void* bytes = blob.empty() ? static_cast<const void*>("") : blob.data();
  check_bind(sqlite3_bind_blob64(statement_.get(), index, bytes, blob.size(), SQLITE_TRANSIENT), *database_,
             statement_.get());
}

void Statement::bind_one(int index, std::nullopt_t) {
  check_bind(sqlite3_bind_null(statement_.get(), index), *database_, statement_.get());
}

Database::Database(const std::filesystem::path& file) : file_(file) {
  // The file holds a secret key. It is made by mknod and never opened here: closing a descriptor of it would
  // drop the locks that other connections of this process hold.
  if (::mknod(file.c_str(), S_IFREG | 0600, 0) != 0 && errno != EEXIST)
    throw DatabaseError(file.string() + ": cannot be created: " + std::generic_category().message(errno));
  if (::chmod(file.c_str(), 0600) != 0)
    throw DatabaseError(file.string() +
                        ": cannot be made private: " + std::generic_category().message(errno));
  try {
    constexpr int kFlags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_FULLMUTEX;
    if (sqlite3_open_v2(file.c_str(), &handle_, kFlags, nullptr) != SQLITE_OK) fail(handle_, file_, "open");
    map_without_holes(handle_);
    wait_for_others(true);
    const int version = user_version(*this);
    if (version > kSchemaVersion)
      throw DatabaseError(file.string() + ": written by a newer sharefs (version " + std::to_string(version) +
                          " of the schema, known here: " + std::to_string(kSchemaVersion) +
                          "); use the newer program");
    use_write_ahead_log();
    execute("PRAGMA synchronous=NORMAL");
    if (version < kSchemaVersion) bring_schema_up_to_date(*this);
  } catch (...) {
    sqlite3_close_v2(handle_);
    throw;
  }
}

// Two connections that find a new file read it both before one of them can change it: SQLite, which would
// have them wait for each other, refuses one at once.
void Database::use_write_ahead_log() {
  const int result = patiently(
      [this] { return sqlite3_exec(handle_, "PRAGMA journal_mode=WAL", nullptr, nullptr, nullptr); });
  if (result != SQLITE_OK) fail(handle_, file_, "PRAGMA journal_mode=WAL");
}

// What is no longer in the log is safe, too: SQLite syncs the database before it uses the log again from its
// start.
void Database::sync_commits() {
  mend_log();
  sqlite3_file* log = nullptr;
  if (sqlite3_file_control(handle_, "main", SQLITE_FCNTL_JOURNAL_POINTER, &log) != SQLITE_OK ||
      log == nullptr || log->pMethods == nullptr)
    return;
  if (log->pMethods->xSync(log, SQLITE_SYNC_NORMAL) != SQLITE_OK) {
    ++failed_log_syncs;
    throw DatabaseError(file_.string() + ": cannot be synced");
  }
}

// A sync that has failed leaves pages that count as written and are not; the next one would succeed, and
// after a power cut the log would end there. So all of it goes into the database first, and it begins anew.
void Database::mend_log() {
  const unsigned failed = failed_log_syncs;
  if (failed == mended_log_syncs) return;
  // Most probably nothing was lost before this process: it waits for nobody who reads, and a full disk does
  // not keep it from starting.
  const bool known = failed != kBeforeThisProcess;
  wait_for_others(known);
  const auto checkpoint = [this] {
    return sqlite3_wal_checkpoint_v2(handle_, nullptr, SQLITE_CHECKPOINT_TRUNCATE, nullptr, nullptr);
  };
  // Beside the checkpoint of another connection it is refused at once.
  const int result = patiently(checkpoint, known ? kBusyTimeoutMs : 0);
  wait_for_others(true);
  if (result == SQLITE_OK) {
    mended_log_syncs = failed;
    return;
  }
  const bool lost = sqlite3_extended_errcode(handle_) == SQLITE_IOERR_FSYNC;
  if (lost) ++failed_log_syncs;
  if (lost || known) fail(handle_, file_, "checkpoint");
}

// _v2: statements that live longer than their Database finish the closing.
Database::~Database() { sqlite3_close_v2(handle_); }

void Database::execute(const char* sql) {
  if (sqlite3_exec(handle_, sql, nullptr, nullptr, nullptr) != SQLITE_OK) fail(handle_, file_, sql);
}

void Database::wait_for_others(bool wait) { sqlite3_busy_timeout(handle_, wait ? kBusyTimeoutMs : 0); }

void Database::defer_checkpoints() { sqlite3_wal_autocheckpoint(handle_, kDeferredCheckpointPages); }

// SQLite takes no change of `synchronous` inside a transaction, so it is set around it.
Transaction::Transaction(Database& database, Durability durability)
    : database_(database), durability_(durability) {
  become_self();
  if (durability_ == Durability::full) {
    database_.mend_log();
    database_.execute("PRAGMA synchronous=FULL");
  }
  try {
    database_.execute("BEGIN IMMEDIATE");
  } catch (...) {
    end();
    throw;
  }
}

Transaction::~Transaction() {
  if (!open_) return;
  // Fails only if SQLite has rolled back by itself already.
  sqlite3_exec(database_.handle(), "ROLLBACK", nullptr, nullptr, nullptr);
  end();
}

void Transaction::commit() {
  become_self();
  try {
    database_.execute("COMMIT");
  } catch (...) {  // the transaction is still open, and the destructor rolls it back
    if (sqlite3_extended_errcode(database_.handle()) == SQLITE_IOERR_FSYNC) ++failed_log_syncs;
    throw;
  }
  end();
}

void Transaction::end() {
  open_ = false;
  if (durability_ == Durability::full)
    sqlite3_exec(database_.handle(), "PRAGMA synchronous=NORMAL", nullptr, nullptr, nullptr);
}

}  // namespace sharefs
