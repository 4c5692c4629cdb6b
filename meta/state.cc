#include "meta/state.h"

#include <algorithm>
#include <stdexcept>

namespace sharefs {
namespace {

// What must be durable when it returns runs in a transaction of its own; inside one of the caller's it is
// part of that, and durable when the caller commits, which only works if that one is Durability::full itself.
class DurablePart {
 public:
  explicit DurablePart(Database& database) {
    if (sqlite3_get_autocommit(database.handle()) != 0) {
      own_.emplace(database, Durability::full);
      return;
    }
    constexpr int kFull = 2;
    Statement synchronous(database, "PRAGMA synchronous");
    if (!synchronous.step() || synchronous.integer(0) < kFull)
      throw std::logic_error("a durable change inside a transaction that is not Durability::full");
  }
  void commit() {
    if (own_) own_->commit();
  }

 private:
  std::optional<Transaction> own_;
};

constexpr const char* kHandoffColumns =
    "attempt, epoch, source, target, role, phase, started, t0, t1, t2, t3, ended, image_files, image_bytes, "
    "image_bytes_sent, log_entries, log_bytes, rounds, records, pause_ms, result, error, tries";

HandoffRecord read_handoff(const Statement& row) {
  HandoffRecord handoff;
  int column = 0;
  handoff.attempt = row.id(column++);
  handoff.epoch = row.id(column++);
  for (std::string* text : {&handoff.source, &handoff.target, &handoff.role, &handoff.phase})
    *text = row.text(column++);
  for (std::int64_t* time :
       {&handoff.started, &handoff.t0, &handoff.t1, &handoff.t2, &handoff.t3, &handoff.ended})
    *time = row.integer(column++);
  for (std::uint64_t* count : {&handoff.image_files, &handoff.image_bytes, &handoff.image_bytes_sent,
                               &handoff.log_entries, &handoff.log_bytes, &handoff.rounds, &handoff.records})
    *count = row.id(column++);
  handoff.pause_ms = row.real(column++);
  handoff.result = row.text(column++);
  handoff.error = row.text(column++);
  handoff.tries = row.id(column++);
  return handoff;
}

}  // namespace

State::State(Database& database) : database_(database) {}

std::string State::setting(std::string_view key) {
  Statement select(database_, "SELECT value FROM setting WHERE key = ?");
  return select.bind(key).step() ? select.text(0) : std::string();
}

void State::set_setting(std::string_view key, std::string_view value) {
  Statement(database_, "INSERT OR REPLACE INTO setting(key, value) VALUES(?, ?)").bind(key, value).run();
}

Ownership State::ownership() {
  Statement select(database_, "SELECT epoch, owner, burnt FROM ownership");
  if (!select.step()) return {};
  return {select.id(0), select.text(1), select.id(2)};
}

void State::set_ownership(const Ownership& wanted) {
  DurablePart part(database_);
  const Ownership known = ownership();
  if (wanted.epoch < known.epoch ||
      (wanted.epoch == known.epoch && !known.owner.empty() && wanted.owner != known.owner))
    throw std::logic_error("ownership refused: " + wanted.owner + " at epoch " +
                           std::to_string(wanted.epoch) + ", known is " + known.owner + " at epoch " +
                           std::to_string(known.epoch));
  const Epoch burnt = std::max({wanted.burnt, known.burnt, wanted.epoch});
  Statement(database_, "INSERT OR REPLACE INTO ownership(only, epoch, owner, burnt) VALUES(1, ?, ?, ?)")
      .bind(wanted.epoch, wanted.owner, burnt)
      .run();
  part.commit();
}

std::vector<SiteRecord> State::sites() {
  std::vector<SiteRecord> sites;
  Statement select(database_, "SELECT name, endpoint, public_key FROM site WHERE name <> ? ORDER BY name");
  select.bind(setting("site"));
  while (select.step()) sites.push_back({select.text(0), select.text(1), select.text(2)});
  return sites;
}

void State::put_site(const SiteRecord& site) {
  Statement(database_, "INSERT OR REPLACE INTO site(name, endpoint, public_key) VALUES(?, ?, ?)")
      .bind(site.name, site.endpoint, site.public_key)
      .run();
}

void State::remove_site(const SiteName& name, const std::string& public_key) {
  Transaction transaction(database_, Durability::full);
  Statement(database_, "INSERT OR IGNORE INTO removed_site(public_key, name) VALUES(?, ?)")
      .bind(public_key, name)
      .run();
  Statement(database_, "DELETE FROM site WHERE public_key = ?").bind(public_key).run();
  transaction.commit();
}

std::vector<SiteRecord> State::removed_sites() {
  std::vector<SiteRecord> sites;
  Statement select(database_, "SELECT name, public_key FROM removed_site ORDER BY name");
  while (select.step()) sites.push_back({select.text(0), "", select.text(1)});
  return sites;
}

void State::add_invitation(const std::string& public_key, std::int64_t expires) {
  Statement(database_, "INSERT INTO invitation(public_key, expires, used) VALUES(?, ?, 0)")
      .bind(public_key, expires)
      .run();
}

std::vector<std::string> State::invitations(std::int64_t now) {
  std::vector<std::string> keys;
  Statement select(database_, "SELECT public_key FROM invitation WHERE used = 0 AND expires > ?");
  select.bind(now);
  while (select.step()) keys.push_back(select.text(0));
  return keys;
}

bool State::admit_site(const std::string& invitation, std::int64_t now, const SiteRecord& site) {
  Transaction transaction(database_, Durability::full);
  Statement(database_, "UPDATE invitation SET used = 1 WHERE public_key = ? AND used = 0 AND expires > ?")
      .bind(invitation, now)
      .run();
  if (database_.changes() != 1) return false;
  Statement(database_, "DELETE FROM site WHERE public_key = ?").bind(site.public_key).run();
  put_site(site);
  transaction.commit();
  return true;
}

void State::put_handoff(const HandoffRecord& handoff, Durability durability) {
  std::optional<DurablePart> part;
  if (durability == Durability::full) part.emplace(database_);
  Statement(database_, "INSERT OR REPLACE INTO handoff(" + std::string(kHandoffColumns) +
                           ") VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
      .bind(handoff.attempt, handoff.epoch, handoff.source, handoff.target, handoff.role, handoff.phase,
            handoff.started, handoff.t0, handoff.t1, handoff.t2, handoff.t3, handoff.ended,
            handoff.image_files, handoff.image_bytes, handoff.image_bytes_sent, handoff.log_entries,
            handoff.log_bytes, handoff.rounds, handoff.records, handoff.pause_ms, handoff.result,
            handoff.error, handoff.tries)
      .run();
  if (part) part->commit();
}

std::optional<HandoffRecord> State::handoff(std::uint64_t attempt) {
  Statement select(database_, "SELECT " + std::string(kHandoffColumns) + " FROM handoff WHERE attempt = ?");
  if (!select.bind(attempt).step()) return std::nullopt;
  return read_handoff(select);
}

// By the epochs that they have burnt: a clock may have been set back.
std::vector<HandoffRecord> State::handoffs(unsigned newest) {
  std::vector<HandoffRecord> handoffs;
  Statement select(database_,
                   "SELECT " + std::string(kHandoffColumns) + " FROM handoff ORDER BY epoch DESC LIMIT ?");
  select.bind(newest);
  while (select.step()) handoffs.push_back(read_handoff(select));
  return handoffs;
}

void State::put_record(std::uint64_t attempt, const StoredRecord& record, std::uint64_t client,
                       std::uint64_t seq, std::string_view op) {
  if (!insert_record_)
    insert_record_.emplace(
        database_,
        "INSERT INTO record(attempt, number, client, seq, op, request, data, done, outcome, "
        "outcome_data) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING");
  insert_record_
      ->bind(attempt, record.number, client, seq, op, as_bytes(record.request), as_bytes(record.data),
             record.done ? 1 : 0, as_bytes(record.outcome), as_bytes(record.outcome_data))
      .run();
}

void State::finish_record(std::uint64_t attempt, std::uint64_t number, std::string_view outcome,
                          std::string_view data) {
  if (!finish_record_)
    finish_record_.emplace(
        database_,
        "UPDATE record SET done = 1, outcome = ?, outcome_data = ? WHERE attempt = ? AND number = ?");
  finish_record_->bind(as_bytes(outcome), as_bytes(data), attempt, number).run();
}

std::vector<State::StoredRecord> State::records(std::uint64_t attempt) {
  std::vector<StoredRecord> records;
  Statement select(database_,
                   "SELECT number, request, data, done, outcome, outcome_data FROM record WHERE attempt = ? "
                   "ORDER BY number");
  select.bind(attempt);
  while (select.step())
    records.push_back({select.id(0), select.text(1), select.text(2), select.integer(3) != 0, select.text(4),
                       select.text(5)});
  return records;
}

void State::drop_records(std::uint64_t attempt) {
  Statement(database_, "DELETE FROM record WHERE attempt = ?").bind(attempt).run();
}

void State::put_blob(std::string_view key, std::string_view value) {
  if (value.empty()) {
    Statement(database_, "DELETE FROM blob WHERE key = ?").bind(key).run();
  } else {
    Statement(database_, "INSERT OR REPLACE INTO blob(key, value) VALUES(?, ?)")
        .bind(key, as_bytes(value))
        .run();
  }
}

std::string State::blob(std::string_view key) {
  Statement select(database_, "SELECT value FROM blob WHERE key = ?");
  return select.bind(key).step() ? select.text(0) : std::string();
}

}  // namespace sharefs
