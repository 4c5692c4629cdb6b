#include "fs/identity_rows.h"

#include <cstring>

namespace sharefs {
namespace {

constexpr const char* kTailKey = "inode_journal_tail";
constexpr const char* kImportKey = "inode_imports";
constexpr std::uint64_t kFirstCounter = 2;  // 1 is the root
constexpr std::size_t kBlobHeader = 1 + sizeof(std::uint32_t);

std::string encode_handle(const Identity& identity) {
  std::string blob(kBlobHeader, '\0');
  blob[0] = static_cast<char>(identity.type >> 12);
  std::memcpy(blob.data() + 1, &identity.handle.type, sizeof identity.handle.type);
  return blob + identity.handle.bytes;
}

void decode_handle(std::string_view blob, Identity& identity) {
  if (blob.size() < kBlobHeader) return;
  identity.type = static_cast<std::uint32_t>(static_cast<unsigned char>(blob[0])) << 12;
  std::memcpy(&identity.handle.type, blob.data() + 1, sizeof identity.handle.type);
  identity.handle.bytes = blob.substr(kBlobHeader);
}

std::optional<Identity> read_row(Statement& statement) {
  if (!statement.step()) {
    statement.reset();
    return std::nullopt;
  }
  Identity identity;
  identity.id = statement.id(0);
  identity.ino = statement.id(1);
  identity.born = statement.integer(2);
  decode_handle(statement.blob(3), identity);
  identity.parent = statement.id(4);
  identity.name = statement.blob(5);
  identity.imported = !statement.is_null(6);
  identity.imported_ctime = statement.integer(6);
  identity.backing_ctime = statement.integer(7);
  identity.orphan = statement.integer(8) != 0;
  statement.reset();  // ends the read transaction
  return identity;
}

}  // namespace

IdentityRows::IdentityRows(const std::filesystem::path& file)
    : database_(file),
      by_id_(database_,
             "SELECT id, ino, born, handle, parent, name, imported_ctime, backing_ctime, orphan FROM inode "
             "WHERE id=?"),
      by_ino_(database_,
              "SELECT id, ino, born, handle, parent, name, imported_ctime, backing_ctime, orphan FROM inode "
              "WHERE ino=?"),
      put_(database_,
           "INSERT INTO inode(id, ino, born, handle, parent, name, imported_ctime, backing_ctime, orphan) "
           "VALUES(?,?,?,?,?,?,?,?,?) ON CONFLICT(id) DO UPDATE SET ino=excluded.ino, born=excluded.born, "
           "handle=excluded.handle, parent=excluded.parent, name=excluded.name, "
           "imported_ctime=excluded.imported_ctime, "
           "backing_ctime=excluded.backing_ctime, orphan=excluded.orphan"),
      remove_(database_, "DELETE FROM inode WHERE id=?"),
      remove_others_(database_, "DELETE FROM inode WHERE ino=? AND id<>?"),
      put_blob_(database_, "INSERT OR REPLACE INTO blob(key, value) VALUES(?, ?)") {}

std::optional<Identity> IdentityRows::by_id(InodeId id) { return read_row(by_id_.bind(id)); }
std::optional<Identity> IdentityRows::by_ino(std::uint64_t ino) { return read_row(by_ino_.bind(ino)); }

void IdentityRows::put(const Identity& identity) {
  remove_others_.bind(identity.ino, identity.id).run();
  const std::string handle = encode_handle(identity);
  const Bytes handle_bytes = as_bytes(handle), name = as_bytes(identity.name);
  const int orphan = identity.orphan ? 1 : 0;
  if (identity.imported) {
    put_.bind(identity.id, identity.ino, identity.born, handle_bytes, identity.parent, name,
              identity.imported_ctime, identity.backing_ctime, orphan);
  } else {
    put_.bind(identity.id, identity.ino, identity.born, handle_bytes, identity.parent, name, std::nullopt,
              std::nullopt, orphan);
  }
  put_.run();
}

void IdentityRows::remove(InodeId id) { remove_.bind(id).run(); }

void IdentityRows::set_journal_tail(std::uint64_t position) {
  put_blob_.bind(kTailKey, as_bytes({reinterpret_cast<const char*>(&position), sizeof position})).run();
}

std::uint64_t IdentityRows::journal_tail() {
  Statement select(database_, "SELECT value FROM blob WHERE key=?");
  std::uint64_t position = 0;
  if (select.bind(kTailKey).step() && select.blob(0).size() == sizeof position)
    std::memcpy(&position, select.blob(0).data(), sizeof position);
  return position;
}

bool IdentityRows::any_import() {
  Statement select(database_, "SELECT 1 FROM blob WHERE key=?");
  return select.bind(kImportKey).step();
}

void IdentityRows::note_import() { put_blob_.bind(kImportKey, as_bytes("1")).run(); }

std::uint64_t IdentityRows::reserve_block(Epoch epoch, std::uint64_t count) {
  Transaction transaction(database_, Durability::full);
  Statement select(database_, "SELECT next FROM id_block WHERE epoch=?");
  const std::uint64_t first = select.bind(epoch).step() ? select.id(0) : kFirstCounter;
  select.reset();
  Statement(database_, "INSERT OR REPLACE INTO id_block(epoch, next) VALUES(?, ?)")
      .bind(epoch, first + count)
      .run();
  transaction.commit();
  return first;
}

}  // namespace sharefs
