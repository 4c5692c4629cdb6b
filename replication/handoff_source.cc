#include "replication/handoff_source.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "fs/stamps.h"
#include "meta/fault.h"
#include "replication/inode_io.h"

namespace sharefs {
namespace {

// A handoff whose pause ran over is tried this often before it fails. One that lost its connection goes on
// from what has arrived, so it is tried as long as the connection comes back; the larger bound is for a
// target that fails each time.
constexpr unsigned kMaxOverruns = 6;
constexpr unsigned kMaxAttempts = 50;
constexpr auto kRetryDelay = std::chrono::milliseconds(300);
constexpr auto kLongestRetryDelay = std::chrono::milliseconds(3000);
constexpr auto kLettingInPoll = std::chrono::milliseconds(20);
// How long a lost connection is waited for before the handoff fails (the data set goes on being served here).
constexpr auto kConnectionPatience = std::chrono::seconds(60);
constexpr auto kTargetPatience = std::chrono::seconds(10);  // of what was handed over and handed on
// The question whose answer allows the commit must not be older than this, and a few round trips, at the
// commit point.
constexpr auto kFreshness = std::chrono::milliseconds(50);

double ms(Reactor::Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

std::uint64_t random_id() {
  std::random_device device;
  return (std::uint64_t{device()} << 31 | device()) & 0x7fffffffffffffff;
}

}  // namespace

HandoffSource::HandoffSource(const SiteParts& parts, Options options, Events events)
    : parts_(parts), options_(std::move(options)), events_(std::move(events)), catch_up_(options_.max_pause) {
  shipper_ = std::make_unique<Workers>(parts_.reactor, 1);
  record_.source = parts_.self;
  record_.target = options_.target;
  record_.role = "source";
}

HandoffSource::~HandoffSource() {
  if (image_) image_->cancel("this site ends");
  parts_.reactor.cancel(pause_timer_);
  parts_.reactor.cancel(retry_timer_);
  shipper_.reset();
}

void HandoffSource::send(const pb::Envelope& envelope, Lane lane, std::vector<zmq::message_t> parts) {
  parts_.transport.send(options_.target, lane, envelope, std::move(parts));
}

void HandoffSource::persist(Durability durability) {
  record_.phase = name(state_);
  update_counters();
  parts_.state.put_handoff(record_, durability);
}

void HandoffSource::update_counters() {
  if (image_) {
    const auto& counters = image_->counters();
    record_.image_files = counters.image_files;
    record_.image_bytes = counters.image_bytes;
    record_.image_bytes_sent = counters.image_bytes_sent;
    record_.log_bytes = counters.log_bytes;
    record_.rounds = counters.rounds;
  }
  if (parts_.log.active()) record_.log_entries = parts_.log.entries();
}

// ---- attempts

void HandoffSource::start() { begin_attempt(); }

void HandoffSource::begin_attempt() {
  waiting_ = false;
  ++attempts_;
  catch_up_ = CatchUp(options_.max_pause);
  give_up_reason_.clear();
  const auto bytes_sent = record_.image_bytes_sent;
  record_ = HandoffRecord{
      .attempt = random_id(), .source = parts_.self, .target = options_.target, .role = "source"};
  record_.image_bytes_sent = bytes_sent;
  record_.started = wall_clock_ns();
  record_.tries = attempts_;
  state_ = SourceState::preparing;

  try_step([this] { ask_target(); });
}

void HandoffSource::ask_target() {
  // Every attempt burns an epoch, durably, before anybody hears of it.
  Ownership ownership = parts_.state.ownership();
  record_.epoch = std::max(ownership.epoch, ownership.burnt) + 1;
  ownership.burnt = record_.epoch;
  parts_.state.set_ownership(ownership);
  persist(Durability::normal);
  spdlog::info("handoff {} to {}: attempt {}, epoch {}", record_.attempt, options_.target, attempts_,
               record_.epoch);

  if (!parts_.transport.connected(options_.target))
    return give_up(fmt::format("{} is not reachable: is its daemon running?", options_.target),
                   attempts_ > 1);
  fault_point("source.prepare");
  auto question = prepare(record_.attempt, record_.epoch, options_.needed);
  const auto lost = parts_.power.lost();
  question.mutable_prepare()->set_power(parts_.power.number());
  question.mutable_prepare()->set_lost_from(lost.from);
  question.mutable_prepare()->set_lost_to(lost.to);
  send(question);
}

pb::Envelope HandoffSource::prepare(std::uint64_t attempt, Epoch epoch, const TreeSize& needed) {
  pb::Envelope envelope;
  auto* prepare = envelope.mutable_prepare();
  prepare->set_attempt(attempt);
  prepare->set_epoch(epoch);
  prepare->set_version(kProtocolVersion);
  prepare->set_bytes_needed(needed.bytes);
  prepare->set_files_needed(needed.files);
  prepare->set_privileged(needed.devices || needed.owners.size() > TreeSize::kMaxOwners ||
                          needed.groups.size() > TreeSize::kMaxOwners);
  prepare->mutable_owners()->Add(needed.owners.begin(), needed.owners.end());
  prepare->mutable_groups()->Add(needed.groups.begin(), needed.groups.end());
  return envelope;
}

void HandoffSource::handle(SourceEvent event) {
  const auto to = next(state_, event);
  if (!to) return;
  state_ = *to;
  try_step([this] { enter(state_); });
}

// What fails before the commit (a full disk under the state folder) ends the handoff, and nothing else.
void HandoffSource::try_step(const std::function<void()>& step) {
  try {
    step();
  } catch (const std::exception& error) {
    if (!may_give_up(state_)) end_to_begin_anew(error);
    give_up(error.what(), false);
  }
}

bool HandoffSource::try_to_persist() {
  try {
    persist(Durability::normal);
    return true;
  } catch (const std::exception& error) {
    spdlog::warn("the end of handoff {} is not in its history: {}", record_.attempt, error.what());
    return false;
  }
}

void HandoffSource::enter(SourceState state) {
  switch (state) {
    case SourceState::preparing:
    case SourceState::imaging:
      break;  // start_image() goes on with what the target says
    case SourceState::catching_up:
      fault_point("source.image_complete");
      persist(Durability::normal);
      next_round();
      break;
    case SourceState::closing:
      close_gate();
      break;
    case SourceState::finishing:
      ship_rest();
      break;
    case SourceState::committing:
      prepare_commit();
      break;
    case SourceState::committed:
      hand_over();
      break;
    case SourceState::done:
      finished();
      break;
    case SourceState::rolled_back:
      roll_back();
      break;
  }
}

void HandoffSource::start_image(const pb::Prepared& prepared) {
  if (!prepared.error().empty()) return give_up(prepared.error(), false);
  if (next(state_, SourceEvent::prepared) != SourceState::imaging) return;
  record_.t0 = wall_clock_ns();
  cut_ = parts_.log.start();
  entries_at_cut_ = 0;
  handle(SourceEvent::prepared);
  persist(Durability::normal);
  fault_point("source.t0");
  image_ = std::make_shared<ImageSource>(
      ImageSource::Options{.attempt = record_.attempt,
                           .target = options_.target,
                           .database = parts_.database_file,
                           .rate = options_.rate,
                           .credit = prepared.credit(),
                           .holds_image = prepared.holds_image(),
                           .performed = [&gate = parts_.gate] { return gate.performed(); }},
      parts_.inodes, parts_.store, parts_.transport, parts_.reactor);
  ship([](ImageSource& image) { image.send_image(); }, [this] { handle(SourceEvent::image_complete); });
}

// Runs `work` on the shipping thread, then `done` here — unless the attempt is over by then.
void HandoffSource::ship(std::function<void(ImageSource&)> work, std::function<void()> done) {
  auto error = std::make_shared<std::string>();
  shipper_->submit(
      [image = image_, work = std::move(work), error] {
        try {
          work(*image);
        } catch (const std::exception& failure) {
          *error = failure.what();
        }
      },
      [this, alive = std::weak_ptr(alive_), image = image_, done = std::move(done), error] {
        if (alive.expired() || image != image_ || !may_give_up(state_)) return;
        if (!error->empty()) return give_up(*error, false);
        try_step(done);
      });
}

std::vector<InodeId> HandoffSource::open_inodes() const {
  std::vector<InodeId> ids;
  for (const auto& handle : parts_.opens.all()) ids.push_back(handle.id);
  return ids;
}

// ---- catch-up rounds

void HandoffSource::next_round() {
  if (state_ != SourceState::catching_up) return;
  // What was acknowledged ahead must not become a record, which nobody's look would see.
  parts_.leases.hold(true);
  if (parts_.coherence.letting_in() || !parts_.leases.none()) {
    // The closed gate would wait for that mount, and applications for the gate.
    parts_.reactor.after(kLettingInPoll, [this, attempt = record_.attempt, alive = std::weak_ptr(alive_)] {
      if (!alive.expired() && attempt == record_.attempt) try_step([this] { next_round(); });
    });
    return;
  }
  const auto through = parts_.log.flush();
  const auto cut = std::min(ctime_floor(), parts_.store.oldest_change() - 1);
  const auto entries = parts_.log.entries() - entries_at_cut_;
  entries_at_cut_ = parts_.log.entries();
  const auto began = Clock::now();
  ship([after = cut_, through, cut,
        open = open_inodes()](ImageSource& image) { image.ship_round(after, through, cut, open, false); },
       [this, through, entries, began, bytes = image_->counters().log_bytes.load()] {
         cut_ = through;
         round_done({.number = image_->counters().rounds,
                     .entries = entries,
                     .bytes = image_->counters().log_bytes - bytes,
                     .took = Clock::now() - began});
       });
}

void HandoffSource::round_done(const CatchUp::Round& round) {
  if (state_ != SourceState::catching_up) return;
  fault_point("source.round");
  // The cost of a durable commit here is part of the pause: measured by making one.
  const auto began = Clock::now();
  persist(Durability::full);
  own_sync_ = Clock::now() - began;
  const bool slowed = catch_up_.writers_rate() > 0;
  const auto verdict = catch_up_.judge(round, rest(), costs(), options_.target);
  using Next = CatchUp::Verdict::Next;
  if (verdict.next == Next::give_up) return give_up(verdict.why, false);
  if (verdict.next == Next::close_gate && !parts_.coherence.letting_in() && parts_.leases.none())
    return handle(SourceEvent::rest_is_small);
  if (verdict.writers_rate > 0) {
    if (!slowed) spdlog::info("handoff {}: applications are slowed down", record_.attempt);
    // None of their requests waits longer than it would in the pause.
    parts_.pace.limit(verdict.writers_rate, options_.max_pause);
  }
  next_round();
}

CatchUp::Rest HandoffSource::rest() const {
  return {.entries = parts_.log.entries() - entries_at_cut_, .bytes = parts_.log.unshipped_bytes()};
}

CatchUp::Costs HandoffSource::costs() const {
  return {.round_trip = parts_.transport.round_trip(options_.target),
          .target_sync = image_ ? image_->target_sync() : std::chrono::nanoseconds(0),
          .own_sync = own_sync_,
          .search = image_ ? image_->search() : std::chrono::nanoseconds(0)};
}

// ---- the pause

void HandoffSource::close_gate() {
  record_.t1 = wall_clock_ns();
  closed_at_ = Clock::now();
  pause_timer_ = parts_.reactor.after(options_.max_pause, [this] {
    pause_timer_ = 0;
    pause_ran_over();
  });
  live_sent_ = false;
  parts_.store.hurry(true);
  parts_.gate.close(record_.attempt, [this, attempt = record_.attempt] {
    if (attempt == record_.attempt) handle(SourceEvent::drained);
  });
  parts_.pace.unlimited();  // what waits there is held from now on
}

void HandoffSource::pause_ran_over() {
  ++overruns_;
  give_up(overruns_ < kMaxOverruns
              ? fmt::format("the pause ran over {} ms", options_.max_pause.count())
              : fmt::format("the pause ran over {} ms in {} attempts: use a longer --max-pause",
                            options_.max_pause.count(), overruns_),
          true);
}

void HandoffSource::ship_rest() {
  fault_point("source.t1");
  still_since_ = Clock::now();
  const auto through = parts_.log.flush();
  ship([after = cut_, through, open = open_inodes()](
           ImageSource& image) { image.ship_round(after, through, ctime_floor(), open, true); },
       [this] {
         if (state_ != SourceState::finishing) return;
         pb::Envelope envelope;
         auto* final = envelope.mutable_final_end();
         final->set_attempt(record_.attempt);
         final->set_batches(image_->batches());
         *final->mutable_live() = take_live_state(parts_);
         // A site that is silent, and so is said to rely on none, may be heard again before the commit point.
         parts_.promises.pause(true);
         live_sent_ = true;
         send(envelope, Lane::bulk);
         fault_point("source.final_sent");
       });
}

// Three things run at once: the target confirms that it is still there, the records become durable, queries
// drain.
void HandoffSource::prepare_commit() {
  record_.t2 = wall_clock_ns();
  fault_point("source.log_applied");
  queries_drained_ = false;
  ask_confirmation();
  // What is in the store belongs to the data set also for a process that comes after a power cut: the commit
  // makes durable what has been written so far.
  parts_.inodes.flush();
  parts_.gate.make_durable();
  parts_.gate.block_queries([this, attempt = record_.attempt] {
    if (attempt != record_.attempt || state_ != SourceState::committing) return;
    queries_drained_ = true;
    commit_when_ready();
  });
}

void HandoffSource::ask_confirmation() {
  confirmed_ = false;
  asked_at_ = Clock::now();
  pb::Envelope envelope;
  envelope.mutable_confirm()->set_attempt(record_.attempt);
  envelope.mutable_confirm()->set_number(++confirmation_);
  send(envelope);
}

void HandoffSource::commit_when_ready() {
  if (state_ == SourceState::committing && confirmed_ && queries_drained_) try_step([this] { commit(); });
}

void HandoffSource::commit() {
  parts_.gate.make_durable();  // what arrived while queries drained
  fault_point("source.before_commit");
  // A message that arrived before the timer was looked at does not outrun it (P2).
  if (Clock::now() - closed_at_ > options_.max_pause) return pause_ran_over();
  // After the commit point callers can only wait for the target: so it must have been heard of just now, not
  // merely before its silence could be noticed (this process may have been stopped meanwhile).
  if (Clock::now() - asked_at_ > kFreshness + 4 * parts_.transport.round_trip(options_.target))
    return ask_confirmation();
  // The commit point: from here this site never performs another mutation at the old epoch, whatever happens.
  // The phase goes first: a handoff that says «committed» under an old owner is read as rolled back by a
  // restarted process.
  record_.phase = name(SourceState::committed);
  parts_.state.put_handoff(record_, Durability::normal);
  try {
    parts_.state.set_ownership({.epoch = record_.epoch, .owner = options_.target, .burnt = record_.epoch});
  } catch (const std::exception& error) {  // it may be on the disk, or not
    end_to_begin_anew(error);
  }
  parts_.reactor.cancel(pause_timer_);
  pause_timer_ = 0;
  fault_point("source.after_commit");
  handle(SourceEvent::ownership_given);
}

// ---- after the commit point

void HandoffSource::hand_over() {
  update_counters();
  std::vector<Gate::Record> asked_again, records;
  const auto clients = parts_.opens.clients();
  std::vector<std::pair<std::uint64_t, std::uint64_t>> cancelled;
  for (auto& record : parts_.gate.surrender()) {
    if (record.request.has_cancel())
      cancelled.emplace_back(record.request.client(), record.request.cancel().seq());
    (GivenRecords::is_asked_again(record.request) ? asked_again : records).push_back(std::move(record));
  }
  give(std::move(records));
  events_.ownership_given(options_.target, record_.epoch);
  for (const auto& [client, seq] : cancelled) parts_.peer.cancelled(client, seq);
  for (auto& record : asked_again) {
    // Those of other sites are asked again by their own Peers, which learn of the new owner.
    const auto client = clients.find(record.request.client());
    if (client != clients.end() ? client->second == parts_.self
                                : record.request.attach().site() == parts_.self)
      parts_.peer.execute_again(record.request, as_bytes(record.data), std::move(record.reply));
  }
  parts_.log.stop();
}

void HandoffSource::give(std::vector<Gate::Record> records) {
  record_.records = records.size();
  given_ = std::make_unique<GivenRecords>(parts_, record_, std::move(records));
  given_->send();
}

void HandoffSource::resume(const HandoffRecord& committed) {
  record_ = committed;
  state_ = SourceState::committed;
  std::vector<Gate::Record> records;
  for (auto& stored : parts_.state.records(record_.attempt)) {
    Gate::Record record;
    if (!record.request.ParseFromString(stored.request))
      throw std::runtime_error("state.db: a record of the last handoff cannot be read");
    if (GivenRecords::is_asked_again(record.request)) continue;
    record.data = std::move(stored.data);
    records.push_back(std::move(record));
  }
  give(std::move(records));
}

// Durable before the target forgets the outcomes: an old owner that lost its power asks for them again
// otherwise. If it fails (a full disk), nothing has happened: the target is asked again.
void HandoffSource::taken_over(std::int64_t when) {
  if (!given_ || !given_->all_answered()) return;
  auto record = record_;
  record.phase = name(SourceState::done);
  record.t3 = when;
  if (record.t1 && record.t3) record.pause_ms = static_cast<double>(record.t3 - record.t1) / 1e6;
  record.result = "done";
  Transaction transaction(parts_.state.database(), Durability::full);
  parts_.state.put_handoff(record, Durability::normal);
  parts_.state.drop_records(record.attempt);
  transaction.commit();
  record_ = std::move(record);
  handle(SourceEvent::taken_over);
}

void HandoffSource::finished() {
  given_.reset();
  pb::Envelope envelope;
  envelope.mutable_abandon()->set_attempt(record_.attempt);  // the outcomes of the records have arrived
  send(envelope);
  conclude("done", "");
}

// ---- before the commit point: back to where we were

void HandoffSource::give_up(std::string reason, bool retry) {
  if (!may_give_up(state_)) return;
  give_up_reason_ = std::move(reason);
  give_up_retry_ = retry;
  handle(SourceEvent::give_up);
}

void HandoffSource::roll_back() {
  parts_.reactor.cancel(pause_timer_);
  pause_timer_ = 0;
  update_counters();
  if (image_) image_->cancel(give_up_reason_);
  image_.reset();
  parts_.pace.unlimited();
  if (parts_.gate.closed()) {
    // The rest told true ctimes. What changed again in the same tick would have them, too, and the next
    // attempt would take what the target has for the same (before Linux 6.13).
    std::this_thread::sleep_until(still_since_ + kStampTick);
    parts_.promises.pause(false);
    parts_.gate.open();
  }
  parts_.leases.hold(false);
  parts_.log.stop();
  pb::Envelope envelope;
  envelope.mutable_abandon()->set_attempt(record_.attempt);
  envelope.mutable_abandon()->set_reason(give_up_reason_);
  send(envelope);
  spdlog::info("handoff {} given up: {}", record_.attempt, give_up_reason_);

  if (!give_up_retry_ || overruns_ >= kMaxOverruns || attempts_ >= kMaxAttempts)
    return conclude(give_up_reason_ == kAborted ? "aborted" : "failed", give_up_reason_);
  record_.result = "failed";
  record_.error = give_up_reason_;
  record_.ended = wall_clock_ns();
  try_to_persist();
  waiting_ = true;
  if (parts_.transport.connected(options_.target)) {
    retry_timer_ = parts_.reactor.after(
        std::min<Clock::duration>(kRetryDelay * attempts_, kLongestRetryDelay), [this] { begin_attempt(); });
  } else {
    retry_timer_ = parts_.reactor.after(kConnectionPatience, [this] {
      conclude("failed", fmt::format("{} has not been reachable for {} s", options_.target,
                                     std::chrono::seconds(kConnectionPatience).count()));
    });
  }
}

void HandoffSource::conclude(std::string result, std::string error) {
  if (ended_) return;
  ended_ = true;
  record_.result = std::move(result);
  record_.error = std::move(error);
  record_.ended = wall_clock_ns();
  waiting_ = false;
  noted_ = try_to_persist();
  spdlog::info("handoff {} to {}: {} {}", record_.attempt, options_.target, record_.result, record_.error);
  events_.ended();
}

bool HandoffSource::abort(std::string& why_not) {
  if (waiting_) {
    parts_.reactor.cancel(retry_timer_);
    conclude("aborted", kAborted);
    return true;
  }
  if (!may_give_up(state_)) {
    why_not = fmt::format("the handoff to {} has passed its commit point", options_.target);
    return false;
  }
  give_up(kAborted, false);
  return true;
}

// ---- feeds

void HandoffSource::message(const Message& message) {
  const auto mine = [this](const auto& body) { return body.attempt() == record_.attempt && !waiting_; };
  const auto& head = message.head;
  switch (head.body_case()) {
    case pb::Envelope::kPrepared:
      if (mine(head.prepared()) && state_ == SourceState::preparing)
        try_step([&] { start_image(head.prepared()); });
      break;
    case pb::Envelope::kCredit:
      if (mine(head.credit()) && image_) image_->credit(head.credit());
      break;
    case pb::Envelope::kNeed:
      if (mine(head.need()) && image_) image_->need(head.need());
      break;
    case pb::Envelope::kImageComplete:
      if (mine(head.image_complete()) && image_) image_->image_complete(head.image_complete());
      break;
    case pb::Envelope::kRoundApplied:
      if (mine(head.round_applied()) && image_) image_->round_applied(head.round_applied());
      break;
    case pb::Envelope::kLogApplied:
      // Only an answer to what was sent: the final message of this very attempt.
      if (!mine(head.log_applied()) || !live_sent_) break;
      if (state_ != SourceState::committing) {
        handle(SourceEvent::log_applied);
      } else if (head.log_applied().number() == confirmation_) {
        confirmed_ = true;
        commit_when_ready();
      }
      break;
    case pb::Envelope::kRefused:
      if (mine(head.refused())) give_up(head.refused().error(), false);
      break;
    case pb::Envelope::kRecordDone:
      if (mine(head.record_done()) && given_) given_->done(head.record_done(), message);
      break;
    case pb::Envelope::kTakenOver:
      if (mine(head.taken_over()))
        taken_over(wall_clock_ns() - static_cast<std::int64_t>(head.taken_over().for_ns()));
      break;
    default:
      break;
  }
}

void HandoffSource::connected(bool interrupted) {
  if (state_ == SourceState::committed) {
    if (interrupted && given_) given_->send();
  } else if (waiting_) {
    parts_.reactor.cancel(retry_timer_);
    retry_timer_ = parts_.reactor.after(kRetryDelay, [this] { begin_attempt(); });
  } else if (interrupted) {
    // Broken and made again, or restarted, too quickly for the silence to be noticed: what was on its way is
    // lost.
    give_up(fmt::format("the connection to {} was interrupted", options_.target), true);
  }
}

void HandoffSource::owned_since(Epoch epoch, ClientId mount) {
  if (!given_ || epoch <= record_.epoch) return;
  parts_.reactor.cancel(retry_timer_);
  retry_timer_ = parts_.reactor.after(kTargetPatience, [this, epoch, mount] {
    // It knows the outcomes for certain; the owner, if it was restarted since, does not know all.
    if (parts_.transport.connected(options_.target)) return owned_since(epoch, mount);
    given_->ask_again(mount);
    try {
      taken_over(0);
    } catch (const std::exception& error) {  // a full disk
      spdlog::warn("that handoff {} is done is not noted: {}", record_.attempt, error.what());
      owned_since(epoch, mount);
    }
  });
}

void HandoffSource::lost() {
  if (!waiting_) give_up(fmt::format("the connection to {} was lost", options_.target), true);
}

nlohmann::json HandoffSource::progress() const {
  auto json = to_json(record_);
  json["phase"] = waiting_ ? "waiting" : name(state_);
  if (!ended_) json["result"] = "";  // of the whole, not of an attempt that is tried again
  if (image_) {
    const auto& counters = image_->counters();
    const double rate = image_->bytes_per_second();
    const auto total = std::max<std::uint64_t>(options_.needed.data, counters.image_bytes);
    // In the end all that was counted, files that changed meanwhile are not.
    const auto passed = state_ == SourceState::imaging
                            ? std::min<std::uint64_t>(counters.image_bytes_passed, counters.image_bytes)
                            : counters.image_bytes.load();
    json["files"] = counters.image_files.load();
    json["files_total"] = std::max<std::uint64_t>(options_.needed.files, counters.image_files);
    json["bytes_total"] = total;
    json["image_files"] = counters.image_files.load();
    json["image_bytes"] = passed;
    json["image_bytes_sent"] = counters.image_bytes_sent.load();
    json["log_entries"] = parts_.log.entries();
    json["log_bytes"] = counters.log_bytes.load();
    json["rounds"] = counters.rounds.load();
    json["rate"] = rate;
    json["writers_rate"] = catch_up_.writers_rate();
    json["eta_s"] = rate > 0 ? static_cast<double>(total - std::min(total, passed)) / rate : 0;
    json["log_left_bytes"] = parts_.log.unshipped_bytes();
    json["predicted_pause_ms"] = catch_up_.predicted_ms(rest(), costs());
  }
  json["held"] = parts_.gate.held();
  json["total_ms"] = ms(Clock::now() - started_at_);
  return json;
}

}  // namespace sharefs
