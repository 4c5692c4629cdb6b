#include "replication/handoff_target.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <vector>

#include "meta/fault.h"
#include "replication/holdings.h"
#include "replication/inode_io.h"
#include "replication/json_line.h"

namespace sharefs {
namespace {

// The source's word on why it gave up, which a person reads.
constexpr std::size_t kLongestReason = 500;

constexpr auto kRecordRetry = std::chrono::seconds(1);

// What must be known to go on after a restart in `prepared` or `performing`.
std::string live_key(std::uint64_t attempt) { return fmt::format("handoff.{}.live", attempt); }
std::string total_key(std::uint64_t attempt) { return fmt::format("handoff.{}.records", attempt); }

// What the source had lost when an image of its was last received as a whole.
std::string received_key(const SiteName& source) { return "received_at_power." + source; }
std::string losses_of(const pb::Prepare& prepare) {
  return fmt::format("{} {} {}", prepare.power(), prepare.lost_from(), prepare.lost_to());
}

// What an ordinary user cannot make of it, and how it is found; empty: nothing.
std::string only_roots(const pb::Prepare& prepare) {
  if (prepare.privileged()) return "devices, or files of very many owners";
  std::vector<gid_t> groups(static_cast<std::size_t>(std::max(::getgroups(0, nullptr), 0)));
  groups.resize(
      static_cast<std::size_t>(std::max(::getgroups(static_cast<int>(groups.size()), groups.data()), 0)));
  groups.push_back(::getegid());
  for (const uid_t owner : prepare.owners())
    if (owner != ::geteuid()) return fmt::format("files of user {0} (find -uid {0})", owner);
  for (const gid_t group : prepare.groups())
    if (std::find(groups.begin(), groups.end(), group) == groups.end())
      return fmt::format("files of group {0} (find -gid {0})", group);
  return {};
}

std::set<InodeId> orphans_of(const pb::LiveState& live) {
  std::set<InodeId> ids;
  for (const auto& orphan : live.orphans()) ids.insert(orphan.id());
  return ids;
}

}  // namespace

void HandoffTarget::forget(State& state, std::uint64_t attempt) {
  state.drop_records(attempt);
  state.put_blob(live_key(attempt), "");
  state.put_blob(total_key(attempt), "");
}

std::string HandoffTarget::refusal(const SiteParts& parts, const pb::Prepare& prepare) {
  const Ownership now = parts.state.ownership();
  if (now.owner == parts.self) return fmt::format("{} is the owner already", parts.self);
  if (prepare.version() != kProtocolVersion)
    return fmt::format("{} runs another version of sharefs (protocol {}, here {}): upgrade first", parts.self,
                       kProtocolVersion, prepare.version());
  if (prepare.epoch() <= now.epoch || prepare.epoch() <= now.burnt)
    return fmt::format("epoch {} is not newer than {} known to {}", prepare.epoch(),
                       std::max(now.epoch, now.burnt), parts.self);
  if (const std::string what = ::geteuid() != 0 ? only_roots(prepare) : ""; !what.empty())
    return fmt::format("the data set holds {}, and {} does not run as root", what, parts.self);
  return {};
}

std::string HandoffTarget::lack_of_space(const SiteParts& parts, const pb::Prepare& prepare,
                                         const TreeSize& held) {
  struct statvfs fs {};
  if (::statvfs(parts.store_directory.c_str(), &fs) != 0)
    return fmt::format("the store {} of {} cannot be read: {}", parts.state.setting("store"), parts.self,
                       std::strerror(errno));
  if ((fs.f_flag & ST_RDONLY) != 0)
    return fmt::format("{} cannot write to {}: its file system is read-only", parts.self,
                       parts.state.setting("store"));
  const std::uint64_t room = std::uint64_t{fs.f_bavail} * fs.f_frsize + held.bytes;
  if (prepare.bytes_needed() > room)
    return fmt::format("{} has not enough space in {}: needs {} MiB, has {} MiB", parts.self,
                       parts.state.setting("store"), prepare.bytes_needed() >> 20, room >> 20);
  if (fs.f_files != 0 && prepare.files_needed() > fs.f_favail + held.files)
    return fmt::format("{} has not enough inodes in {}: needs {}, has {}", parts.self,
                       parts.state.setting("store"), prepare.files_needed(), fs.f_favail + held.files);
  return {};
}

HandoffTarget::HandoffTarget(const SiteParts& parts, SiteName source, const pb::Prepare& prepare,
                             bool holds_image, Events events)
    : parts_(parts),
      source_(std::move(source)),
      source_losses_(losses_of(prepare)),
      source_lost_{prepare.lost_from(), prepare.lost_to()},
      events_(std::move(events)) {
  record_.attempt = prepare.attempt();
  record_.epoch = prepare.epoch();
  record_.source = source_;
  record_.target = parts_.self;
  record_.role = "target";
  record_.started = record_.t0 = wall_clock_ns();
  const auto failed_syncs = note_failed_syncs(parts_);
  const auto losses = fmt::format("{} {} {}", failed_syncs, source_, source_losses_);
  if (parts_.received.under != losses)
    parts_.received = {.under = losses, .inodes = std::make_shared<SentSet>()};
  image_ = std::make_unique<ImageTarget>(
      ImageTarget::Options{.attempt = prepare.attempt(),
                           .source = source_,
                           .private_area = parts_.store_directory / kPrivateArea,
                           .doubtful = parts_.power.doubtful(),
                           .lost = parts_.state.setting(received_key(source_)) == source_losses_
                                       ? Power::Interval{}
                                       : source_lost_,
                           .failed_syncs = failed_syncs,
                           .received = parts_.received.inodes},
      parts_.inodes, parts_.disk, parts_.reactor, [this](const pb::Envelope& envelope) { send(envelope); },
      [this](const std::string& reason) { fail(reason); });
  persist(Durability::normal);
  pb::Envelope reply;
  auto* prepared = reply.mutable_prepared();
  prepared->set_attempt(record_.attempt);
  prepared->set_holds_image(holds_image);
  prepared->set_credit(ImageTarget::kCredit);
  send(reply);
}

HandoffTarget::HandoffTarget(const SiteParts& parts, const HandoffRecord& stored, Events events)
    : parts_(parts), source_(stored.source), events_(std::move(events)), record_(stored) {
  if (!live_.ParseFromString(parts_.state.blob(live_key(record_.attempt))))
    throw std::runtime_error("state.db: the live state of the prepared handoff cannot be read");
  image_ = std::make_unique<ImageTarget>(
      ImageTarget::Options{.attempt = record_.attempt,
                           .source = source_,
                           .private_area = parts_.store_directory / kPrivateArea,
                           .doubtful = {},
                           .lost = {},
                           .failed_syncs = 0},
      parts_.inodes, parts_.disk, parts_.reactor, [this](const pb::Envelope& envelope) { send(envelope); },
      [this](const std::string& reason) { fail(reason); });
  state_ = record_.phase == name(TargetState::performing) ? TargetState::performing : TargetState::prepared;
  if (state_ == TargetState::performing) {
    records_total_ = std::stoull("0" + parts_.state.blob(total_key(record_.attempt)));
    make_performer();
    // The source sends again only what it has no outcome of.
    const auto begun = parts_.state.records(record_.attempt);
    for (const auto& stored_record : begun)
      if (stored_record.done && stored_record.number == next_) ++next_;
    // The process may have ended before. Once a record has begun this has been done, and must not be done
    // again: what records leave without a name is not part of the image.
    if (begun.empty()) image_->finish(orphans_of(live_));
    restore_live_state(parts_, live_);
    for (const auto& one : begun)
      if (one.number < next_) was_performed(one);
    parts_.coherence.recovered();  // the live state says what sites hold
    parts_.gate.hold_changes();
  }
}

HandoffTarget::~HandoffTarget() { parts_.reactor.cancel(retry_timer_); }

// By an earlier process. The live state is that of t2, before it.
void HandoffTarget::was_performed(const State::StoredRecord& record) {
  pb::Request request;
  pb::Outcome outcome;
  if (!request.ParseFromString(record.request) || !outcome.ParseFromString(record.outcome))
    throw std::runtime_error("state.db: a record that was performed cannot be read");
  hold(request, outcome, parts_.opens, parts_.locks);
  parts_.leases.note_change(request);
  parts_.server.note(request, outcome, as_bytes(record.outcome_data));
}

void HandoffTarget::send(const pb::Envelope& envelope, std::vector<zmq::message_t> parts) {
  parts_.transport.send(source_, Lane::requests, envelope, std::move(parts));
}

void HandoffTarget::persist(Durability durability) {
  record_.phase = name(state_);
  parts_.state.put_handoff(record_, durability);
}

bool HandoffTarget::handle(TargetEvent event) {
  const auto to = next(state_, event);
  if (!to) return false;
  state_ = *to;
  return true;
}

bool HandoffTarget::concerns(const SiteName& from, const pb::Envelope& head) const {
  if (from != source_ || state_ == TargetState::serving || state_ == TargetState::abandoned) return false;
  switch (head.body_case()) {
    case pb::Envelope::kBatch:
      return head.batch().attempt() == record_.attempt;
    case pb::Envelope::kManifest:
      return head.manifest().attempt() == record_.attempt;
    case pb::Envelope::kImageEnd:
      return head.image_end().attempt() == record_.attempt;
    case pb::Envelope::kRoundEnd:
      return head.round_end().attempt() == record_.attempt;
    case pb::Envelope::kFinalEnd:
      return head.final_end().attempt() == record_.attempt;
    case pb::Envelope::kConfirm:
      return head.confirm().attempt() == record_.attempt;
    case pb::Envelope::kCommit:
      return head.commit().attempt() == record_.attempt;
    case pb::Envelope::kRecord:
      return head.record().attempt() == record_.attempt;
    case pb::Envelope::kAbandon:
      return head.abandon().attempt() == record_.attempt;
    case pb::Envelope::kVerdict:
      return head.verdict().attempt() == record_.attempt;
    default:
      return false;
  }
}

void HandoffTarget::message(Message message) {
  const bool receiving = state_ == TargetState::receiving;
  switch (message.head.body_case()) {
    case pb::Envelope::kBatch:
      if (receiving) image_->batch(std::move(message));
      break;
    case pb::Envelope::kManifest:
      if (receiving) image_->manifest(message.head.manifest());
      break;
    case pb::Envelope::kImageEnd:
      if (receiving) image_->image_end();
      break;
    case pb::Envelope::kRoundEnd:
      if (receiving) image_->round_end(message.head.round_end().round());
      break;
    case pb::Envelope::kFinalEnd:
      final_end(message.head.final_end());
      break;
    case pb::Envelope::kConfirm:
      if (state_ == TargetState::prepared) say_log_applied(message.head.confirm().number());
      break;
    case pb::Envelope::kCommit:
      if (!message.parts.empty()) note_figures(message.parts[0].to_string_view());
      commit(message.head.commit());
      break;
    case pb::Envelope::kRecord:
      record(std::move(message));
      break;
    case pb::Envelope::kAbandon:
      abandon(message.head.abandon().reason().substr(0, kLongestReason));
      break;
    case pb::Envelope::kVerdict:
      // «Committed» is followed by the commit itself; anything else means that it will never come.
      if (!message.head.verdict().committed()) abandon("the source never committed the attempt");
      break;
    default:
      break;
  }
}

void HandoffTarget::final_end(const pb::FinalEnd& message) {
  if (!handle(TargetEvent::final_end)) return;
  record_.t1 = wall_clock_ns();
  live_ = message.live();
  fault_point("target.final_end");
  image_->final_end(message.batches(), [this, now = ctime_floor()] { everything_applied(now); });
}

// What was stamped before `synced` is on the disk.
void HandoffTarget::everything_applied(std::int64_t synced) {
  if (state_ != TargetState::finishing) return;
  try {
    parts_.power.synced(synced);
    find_orphans();
    become_prepared();
  } catch (const std::exception& error) {  // a full disk under the state folder
    return fail(error.what());
  }
  say_log_applied(0);
}

// An open file without a name here is no orphan at the source if it has a hard link outside of that store.
void HandoffTarget::find_orphans() {
  const std::set<InodeId> known = orphans_of(live_);
  std::map<InodeId, std::set<ClientId>> found;
  for (const auto& handle : live_.handles())
    if (!known.contains(handle.id()) && image_->is_parked(handle.id()))
      found[handle.id()].insert(handle.client());
  for (const auto& [id, clients] : found) {
    auto* orphan = live_.add_orphans();
    orphan->set_id(id);
    orphan->mutable_clients()->Add(clients.begin(), clients.end());
  }
}

void HandoffTarget::become_prepared() {
  parts_.state.put_blob(live_key(record_.attempt), live_.SerializeAsString());
  parts_.power.inherit(source_lost_);
  auto record = record_;
  record.phase = name(TargetState::prepared);
  record.t2 = wall_clock_ns();
  fault_point("target.before_prepared");
  parts_.state.put_handoff(record, Durability::full);
  fault_point("target.prepared");
  record_ = std::move(record);
  handle(TargetEvent::durable);
}

void HandoffTarget::say_log_applied(std::uint64_t number) {
  pb::Envelope envelope;
  envelope.mutable_log_applied()->set_attempt(record_.attempt);
  envelope.mutable_log_applied()->set_number(number);
  send(envelope);
}

// What only the source could measure.
void HandoffTarget::note_figures(std::string_view json) {
  const auto figures = parse_line(json);
  if (!figures.is_object()) return;
  record_.t0 = figures.value("t0", record_.t0);
  record_.t1 = figures.value("t1", record_.t1);
  record_.image_files = figures.value("image_files", record_.image_files);
  record_.image_bytes = figures.value("image_bytes", record_.image_bytes);
  record_.image_bytes_sent = figures.value("image_bytes_sent", record_.image_bytes_sent);
  record_.log_entries = figures.value("log_entries", record_.log_entries);
  record_.log_bytes = figures.value("log_bytes", record_.log_bytes);
  record_.rounds = figures.value("rounds", record_.rounds);
}

void HandoffTarget::commit(const pb::Commit& message) {
  if (state_ == TargetState::performing) return perform();
  const auto performing = next(state_, TargetEvent::commit);
  if (!performing) return;
  if (message.epoch() != record_.epoch)
    return spdlog::error("handoff {}: commit names epoch {}, prepared for {}", record_.attempt,
                         message.epoch(), record_.epoch);
  // One durable step: from here this site is the owner, whatever happens. If it fails (a full disk), nothing
  // has happened: the source sends the commit again.
  auto record = record_;
  record.records = message.records();
  record.phase = name(*performing);
  Transaction transaction(parts_.state.database(), Durability::full);
  parts_.state.put_blob(total_key(record.attempt), std::to_string(record.records));
  parts_.state.set_setting(kMountsSetting, kMountsUnknown);
  if (!source_losses_.empty()) parts_.state.set_setting(received_key(source_), source_losses_);
  parts_.state.set_setting(kTakenFromSetting, live_.power() == 0 ? "" : source_);
  parts_.state.set_setting(kTakenAtPowerSetting, std::to_string(live_.power()));
  parts_.state.put_handoff(record, Durability::normal);
  parts_.state.set_ownership({.epoch = record.epoch, .owner = parts_.self, .burnt = record.epoch});
  if (fault_point("target.commit")) throw std::runtime_error("fault point target.commit");
  transaction.commit();
  fault_point("target.owner");
  record_ = std::move(record);
  parts_.received = {};
  records_total_ = record_.records;
  state_ = *performing;
  try {
    take_over();
  } catch (const std::exception& error) {
    end_to_begin_anew(error);
  }
  perform();
}

void HandoffTarget::take_over() {
  parts_.gate.hold_changes();
  image_->finish(orphans_of(live_));
  events_.ownership_taken(record_.epoch);
  restore_live_state(parts_, live_);
  // What this site's mount has opened already, or keeps pages locked for, counts for the records.
  parts_.peer.for_each_unanswered([this](const pb::Request& request) { parts_.coherence.held(request); });
  parts_.peer.resubmit_urgent_to(*parts_.server.once(parts_.gate));
  make_performer();
}

void HandoffTarget::make_performer() {
  once_ = parts_.server.once(parts_.coherence);
  performer_ = std::make_unique<RecordPerformer>(parts_.state, *once_, record_.attempt);
}

void HandoffTarget::record(Message message) {
  const auto& body = message.head.record();
  const bool expected = state_ == TargetState::prepared || state_ == TargetState::performing;
  if (!expected || body.number() == 0 || message.parts.size() != 1) return;
  if (body.number() < next_) {
    // Asked again after a broken connection: the outcome is known and given again.
    performer_->perform(
        body.number(), body.request(), as_bytes(message.parts[0].to_string_view()),
        [this, number = body.number()](const pb::Outcome& outcome, Bytes data) {
          answer(number, outcome, data);
        },
        [](const std::exception&) {});
    return;
  }
  const auto [arrived, added] =
      arrived_.try_emplace(body.number(), Arrived{body.request(), message.parts[0].to_string()});
  if (added) parts_.coherence.held(body.request());
  if (state_ == TargetState::performing) perform();
}

// What fails (a full disk under the state folder) is tried again in a moment.
void HandoffTarget::perform() {
  try {
    perform_next();
  } catch (const std::exception& error) {
    perform_later(error);
  }
}

void HandoffTarget::perform_later(const std::exception& why) {
  spdlog::error("handoff {} cannot go on yet: {}", record_.attempt, why.what());
  performing_ = false;
  parts_.reactor.cancel(retry_timer_);
  retry_timer_ = parts_.reactor.after(kRecordRetry, [this] {
    retry_timer_ = 0;
    perform();
  });
}

void HandoffTarget::perform_next() {
  if (performing_ || state_ != TargetState::performing) return;
  // Not before all are here: what the last one says of its kernel counts for the first one (Coherence::held).
  if (arrived_.size() + next_ - 1 < records_total_) return;
  const auto found = arrived_.find(next_);
  if (found == arrived_.end()) {
    if (performed()) all_performed();
    return;
  }
  performing_ = true;
  const auto number = next_;
  fault_point("target.record");
  parts_.leases.note_change(found->second.request);
  performer_->perform(
      number, found->second.request, as_bytes(found->second.data),
      [this, number](const pb::Outcome& outcome, Bytes data) { performed(number, outcome, data); },
      [this](const std::exception& error) { perform_later(error); });
}

bool HandoffTarget::performed() const { return next_ > records_total_; }

void HandoffTarget::performed(std::uint64_t number, const pb::Outcome& outcome, Bytes data) {
  const auto node = arrived_.extract(number);
  parts_.server.note(node.mapped().request, outcome, data);
  answer(number, outcome, data);
  performing_ = false;
  ++next_;
  // Not from within the reply of the store: the next record would nest in it.
  parts_.reactor.post([this, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) perform();
  });
}

void HandoffTarget::answer(std::uint64_t number, const pb::Outcome& outcome, Bytes data) {
  pb::Envelope envelope;
  auto* done = envelope.mutable_record_done();
  done->set_attempt(record_.attempt);
  done->set_number(number);
  *done->mutable_outcome() = outcome;
  std::vector<zmq::message_t> parts;
  parts.emplace_back(data.data(), data.size());
  send(envelope, std::move(parts));
}

void HandoffTarget::all_performed() {
  fault_point("target.performed");
  // Noted first: a state that only this process knows would keep it from trying again.
  auto record = record_;
  record.phase = name(TargetState::serving);
  record.t3 = record.ended = wall_clock_ns();
  record.result = "done";
  record.pause_ms = static_cast<double>(record.t3 - record.t1) / 1e6;
  parts_.state.put_handoff(record, Durability::normal);
  record_ = std::move(record);
  handle(TargetEvent::performed);
  try {
    events_.serving();
  } catch (const std::exception& error) {
    end_to_begin_anew(error);
  }
  say_taken_over();
}

void HandoffTarget::say_taken_over() {
  try {
    persist(Durability::full);  // before the source forgets the records
  } catch (const std::exception& error) {
    // The source asks again (Site::Impl::completed_already).
    return spdlog::error("handoff {} is not durably over yet: {}", record_.attempt, error.what());
  }
  fault_point("target.taken_over");
  pb::Envelope envelope;
  auto* taken_over = envelope.mutable_taken_over();
  taken_over->set_attempt(record_.attempt);
  taken_over->set_epoch(record_.epoch);
  taken_over->set_for_ns(static_cast<std::uint64_t>(wall_clock_ns() - record_.t3));
  send(envelope);
}

void HandoffTarget::connected(const SiteName& site, bool another_process) {
  if (site != source_) return;
  if (another_process && (state_ == TargetState::receiving || state_ == TargetState::finishing))
    return abandon("the source was restarted");
  if (state_ == TargetState::serving || state_ == TargetState::abandoned) return;
  // A verdict, or that the attempt is over, may have been lost.
  pb::Envelope envelope;
  envelope.mutable_inquire()->set_attempt(record_.attempt);
  envelope.mutable_inquire()->set_epoch(record_.epoch);
  send(envelope);
}

void HandoffTarget::fail(const std::string& reason) {
  if (state_ != TargetState::receiving && state_ != TargetState::finishing) return;
  pb::Envelope envelope;
  envelope.mutable_refused()->set_attempt(record_.attempt);
  envelope.mutable_refused()->set_error(fmt::format("{}: {}", parts_.self, reason));
  send(envelope);
  abandon(reason);
}

void HandoffTarget::abandon(const std::string& reason) {
  if (!handle(TargetEvent::abandon)) return;
  record_.result = "aborted";
  record_.error = reason;
  record_.ended = wall_clock_ns();
  try {
    note_failed_syncs(parts_);
    forget(parts_.state, record_.attempt);
    persist(Durability::normal);
  } catch (const std::exception& failure) {
    spdlog::warn("the end of handoff {} is not in its history: {}", record_.attempt, failure.what());
  }
  spdlog::info("handoff {} from {} abandoned: {}", record_.attempt, source_, reason);
  events_.abandoned();
}

}  // namespace sharefs
