// What a site does with the messages of other sites.
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "replication/json_line.h"
#include "replication/link.h"
#include "replication/site_impl.h"

namespace sharefs {
namespace {

constexpr unsigned kForgottenAtOnce = 10;  // of the newest handoffs
constexpr auto kGatePoll = std::chrono::milliseconds(20);
constexpr auto kDoubtInterval = std::chrono::minutes(10);  // between two log lines about what one site says

// Why no site can be called so, or have this key; or empty.
std::string malformed(const pb::Site& site) {
  try {
    check_name(site.name());
    check_key(site.public_key());
    return {};
  } catch (const std::runtime_error& why) {
    return fmt::format("there is one that cannot be one: {}", why.what());
  }
}

}  // namespace

void Site::Impl::subscribe() {
  using E = pb::Envelope;
  transport.set_hello([this] { return hello(); });
  transport.on_connection(
      [this](const SiteName& site, const pb::Hello& said, Gap gap) { connected(site, said, gap); },
      [this](const SiteName& site) { lost(site); });
  transport.on_join([this](const std::string& route, const std::string& key, const pb::Join& said) {
    join(route, key, said);
  });
  transport.subscribe(
      E::kAsk, [this](const SiteName& from, Message message) { server.ask(from, std::move(message)); });
  for (auto kind : {E::kAnswer, E::kMoved})
    transport.subscribe(kind,
                        [this](const SiteName& from, const Message& message) { peer.answer(from, message); });
  transport.subscribe(E::kPrepared, [this](const SiteName& from, const Message& message) {
    const auto& prepared = message.head.prepared();
    if (source && source->target() == from && source->attempt() == prepared.attempt())
      return source->message(message);
    nlohmann::json found{{"holds_image", prepared.holds_image()}, {"space", prepared.space()}};
    if (!prepared.error().empty()) found = {{"error", prepared.error()}};
    answer_command(prepared.attempt(), from, std::move(found));  // of a dry run
  });
  for (auto kind : {E::kCredit, E::kNeed, E::kImageComplete, E::kRoundApplied, E::kLogApplied, E::kRefused,
                    E::kRecordDone, E::kTakenOver})
    transport.subscribe(kind, [this](const SiteName& from, const Message& message) {
      if (source && source->target() == from) source->message(message);
    });
  for (auto kind : {E::kBatch, E::kManifest, E::kImageEnd, E::kRoundEnd, E::kFinalEnd, E::kCommit, E::kRecord,
                    E::kAbandon, E::kVerdict, E::kConfirm})
    transport.subscribe(kind, [this](const SiteName& from, Message message) {
      if (target && target->concerns(from, message.head))
        target->message(std::move(message));
      else
        completed_already(from, message.head);
    });
  transport.subscribe(E::kPrepare, [this](const SiteName& from, const Message& message) {
    prepare(from, message.head.prepare());
  });
  transport.subscribe(E::kInquire, [this](const SiteName& from, const Message& message) {
    inquire(from, message.head.inquire());
  });
  transport.subscribe(E::kRecall, [this](const SiteName& from, const Message& message) {
    const auto& order = message.head.recall();
    RecallOrder mine{.client = order.client(),
                     .id = order.id(),
                     .offset = order.offset(),
                     .length = order.length(),
                     .orphan = order.orphan(),
                     .sole = order.has_sole() ? std::optional(order.sole()) : std::nullopt,
                     .names = {order.names().begin(), order.names().end()},
                     .all_names = order.all_names(),
                     .stamp = order.stamp(),
                     .lease = order.lease()};
    // A former owner's word on who is the only mount comes too late.
    if (mine.sole && from != ownership.owner) mine.sole = false;
    const bool another_process = mine.client == 0 && mine.all_names;
    obey(mine, [this, from, number = order.number(), another_process](bool referenced) {
      pb::Envelope envelope;
      envelope.mutable_recall_done()->set_number(number);
      envelope.mutable_recall_done()->set_referenced(referenced);
      if (another_process && attached && from == ownership.owner)
        holdings.tell(client, *envelope.mutable_recall_done());
      transport.send(from, Lane::requests, envelope);
    });
  });
  transport.subscribe(E::kRecallDone, [this](const SiteName& from, const Message& message) {
    recall_done(from, message.head.recall_done());
  });
  transport.subscribe(E::kCommand, [this](const SiteName& from, const Message& message) {
    const auto asked = parse_line(message.head.command().text());
    command(asked, [this, from, number = message.head.command().number()](const nlohmann::json& answer) {
      pb::Envelope envelope;
      envelope.mutable_command_reply()->set_number(number);
      envelope.mutable_command_reply()->set_text(to_line(answer));
      transport.send(from, Lane::requests, envelope);
    });
  });
  transport.subscribe(E::kCommandReply, [this](const SiteName& from, const Message& message) {
    const auto& reply = message.head.command_reply();
    answer_command(reply.number(), from, parse_line(reply.text()));
  });
  transport.subscribe(E::kVerifyAsk, [this](const SiteName& from, const Message& message) {
    const auto reply = std::make_shared<pb::VerifyReply>();
    reply->set_error(prepare_verify());
    workers->submit(
        [this, ask = message.head.verify_ask(), reply] {
          try {
            if (reply->error().empty() && ask.after() == 0) identify_all(inodes, ending);
            if (reply->error().empty())
              *reply = digest_inodes(inodes, store, parts.database_file, ask, ending);
          } catch (const std::exception& failure) {
            reply->set_error(failure.what());
          }
          reply->set_number(ask.number());
        },
        [this, from, reply] {
          page_read(*reply);
          pb::Envelope envelope;
          envelope.mutable_verify_reply()->Swap(reply.get());
          transport.send(from, Lane::bulk, envelope);
        });
  });
  transport.subscribe(E::kVerifyReply, [this](const SiteName& from, const Message& message) {
    if (verification && verification->with == from &&
        verification->asked_there == message.head.verify_reply().number())
      verify_page(false, message.head.verify_reply());
  });
}

pb::Hello Site::Impl::hello() const {
  pb::Hello hello;
  hello.set_data_set(data_set_id);
  hello.set_endpoint(endpoint);
  hello.set_version(kProtocolVersion);
  hello.set_incarnation(client);
  hello.set_power(power.number());
  hello.set_epoch(ownership.epoch);
  hello.set_owner(ownership.owner);
  if (is_owner()) {
    auto& settings = const_cast<State&>(state);
    hello.set_taken_from(settings.setting(kTakenFromSetting));
    hello.set_taken_at_power(std::stoull("0" + settings.setting(kTakenAtPowerSetting)));
  }
  for (const auto& site : const_cast<State&>(state).sites()) {
    auto* known = hello.add_sites();
    known->set_name(site.name);
    known->set_endpoint(site.endpoint);
    known->set_public_key(site.public_key);
  }
  for (const auto& site : const_cast<State&>(state).removed_sites()) {
    auto* removed = hello.add_removed();
    removed->set_name(site.name);
    removed->set_public_key(site.public_key);
  }
  return hello;
}

// Sites come with the news of any site, and go with those of any: what was removed once stays removed, since
// its key is remembered. A machine that was removed may have left its name to another one, whose key tells
// them apart. Who names and removes sites in turn comes to an end with the keys that are remembered.
void Site::Impl::merge_sites(const SiteName& from, const pb::Hello& said) {
  std::string doubt;
  std::set<std::string> removed;
  for (const auto& site : state.removed_sites()) removed.insert(site.public_key);
  const auto before = state.sites();
  for (const auto& site : said.removed()) {
    const auto& key = site.public_key();
    const auto known =
        std::find_if(before.begin(), before.end(), [&](const auto& one) { return one.public_key == key; });
    if (removed.contains(key) || (known != before.end() && known->name == from)) continue;
    std::string why;
    if (key == state.setting("public_key"))
      why = "this site was removed from the data set";
    else if (known != before.end() && known->name == ownership.owner)
      why = fmt::format("the owner, {}, was removed", ownership.owner);
    else if (known == before.end() && removed.size() >= kMostRemoved)
      why = fmt::format("more than {} were removed that are not known here", kMostRemoved);
    else if (known == before.end())
      why = malformed(site);
    if (!why.empty()) {
      doubt = why;
      continue;
    }
    state.remove_site(known == before.end() ? site.name() : known->name, key);
    removed.insert(key);
    if (known != before.end()) drop_site(known->name);
  }
  std::set<SiteName> known{parts.self};
  for (const auto& site : state.sites()) {
    known.insert(site.name);
    // Transport connects to it there.
    if (site.name == from && !said.endpoint().empty() && site.endpoint != said.endpoint())
      state.put_site({.name = from, .endpoint = said.endpoint(), .public_key = site.public_key});
  }
  for (const auto& site : said.sites()) {
    if (known.contains(site.name()) || removed.contains(site.public_key())) continue;
    if (known.size() >= kMostSites || removed.size() >= kMostRemoved) {
      doubt = fmt::format("there are others beside the {} known here, and {} that were removed", known.size(),
                          removed.size());
      break;
    }
    try {
      transport.add_site(site.name(), site.endpoint(), site.public_key());
      known.insert(site.name());
      state.put_site({.name = site.name(), .endpoint = site.endpoint(), .public_key = site.public_key()});
    } catch (const std::runtime_error& wrong) {
      doubt = wrong.what();
    }
  }
  if (doubt.empty()) return;
  // It may say so with every message.
  const auto now = Reactor::Clock::now();
  const auto [logged, first] = doubted.try_emplace(from, now);
  if (!first && now - logged->second < kDoubtInterval) return;
  logged->second = now;
  spdlog::warn("what {} says of other sites is not believed: {}", from, doubt);
}

// What the site had open or locked goes with it.
void Site::Impl::drop_site(const SiteName& site) {
  spdlog::info("{} is not part of the data set any more", site);
  transport.remove_site(site);
  expire(site, 0);
  forget_recalls(site);
  leases.forget(site);
  if (verification && verification->with == site)
    verify_ends({{"error", fmt::format("{} is not part of the data set any more", site)}});
  forget_handoffs_from(site);
  if (source && source->target() == site) source->lost();
  incarnations.erase(site);
  powers.erase(site);
  doubted.erase(site);
  if (const auto absence = absences.extract(site)) reactor.cancel(absence.mapped());
}

void Site::Impl::connected(const SiteName& site, const pb::Hello& said, Gap gap) {
  if (said.data_set() != data_set_id) return;
  try {
    merge_sites(site, said);
  } catch (const std::exception& error) {  // a full disk; said again with the next Hello
    spdlog::warn("what {} says of other sites is not noted: {}", site, error.what());
  }
  learn(said.owner(), said.epoch());
  if (gap == Gap::broken && site == latest_source) latest_attempt = 0;  // it gives up what was interrupted

  auto& last = incarnations[site];
  const bool another_process = last != 0 && last != said.incarnation();
  last = said.incarnation();
  // What its earlier processes had open or locked is gone, also those that only an owner before has heard.
  if (is_owner() && !gate.closed()) expire(site, last);
  if (another_process) forget_recalls(site);

  note_power(site, said);

  if (gap != Gap::none) {
    if (site == ownership.owner) {
      // It has not waited for this mount to forget.
      names.forget_all();
      write_behind.distrust();
      // It may have let another mount in meanwhile. If not, it says so again.
      if (sole) {
        end_sole();
        if (attached) attach([](int) {});
      }
    }
    peer.connected(site, gap == Gap::broken);
  }
  if (gap == Gap::broken) {
    send_recalls_again(site);
    verify_goes_on(site);
    end_commands(site);
  }
  coherence.back(site);
  if (source && source->target() == site) source->connected(gap == Gap::broken);
  if (target) target->connected(site, another_process);
}

// What this mount has changed and not synced at a site that has lost its power, the owner or a former one, is
// lost. A former owner that has not lost it was no owner any more when it said so: it has handed everything
// over.
void Site::Impl::note_power(const SiteName& site, const pb::Hello& said) {
  const bool up_to_date = said.epoch() == ownership.epoch;
  // The owner tells it of the site that it took over from: an fsync may ask before that one is heard.
  if (up_to_date && site == ownership.owner && said.taken_at_power() != 0) {
    const SiteName& former = said.taken_from();
    if (const auto known = powers.find(former); known != powers.end()) {
      if (known->second == said.taken_at_power())
        unsynced.durable(former);
      else
        unsynced.lost(former);
    }
  }
  auto& last = powers[site];
  if (last != 0 && last != said.power())
    unsynced.lost(site);
  else if (up_to_date && site != ownership.owner)
    unsynced.durable(site);
  last = said.power();
}

void Site::Impl::recall_done(const SiteName& from, const pb::RecallDone& answer) {
  const auto found = recalls.find(answer.number());
  if (found == recalls.end() || found->second.to != from) return;
  if (found->second.order.client == 0) {
    // What is handed over must not change while that is under way; and what is held by then may be other than
    // what this answer says, since requests are performed first that the gate holds.
    if (gate.closed() && is_owner()) {
      // Records wait for what was promised to be forgotten, and the gate for them. What sites hold they know
      // from the live state.
      if (!coherence.recovering()) std::exchange(found->second.done, [](bool) {})(answer.referenced());
      reactor.after(kGatePoll, [this, number = answer.number(), watch = std::weak_ptr(alive)] {
        if (watch.expired()) return;
        if (const auto sent = recalls.find(number); sent != recalls.end()) send_recall(number, sent->second);
      });
      return;
    }
    std::vector<OpenHandle> handles;
    for (const auto& handle : answer.handles())
      handles.push_back({.handle = handle.handle(),
                         .id = handle.id(),
                         .flags = handle.flags(),
                         .directory = handle.directory()});
    std::vector<LockTable::Lock> held;
    for (const auto& lock : answer.locks())
      held.push_back({.owner = lock.owner(), .id = lock.id(), .range = lock.range(), .flock = lock.flock()});
    if (answer.client() != 0 && !server.admit(from, answer.client())) return;  // of a process that has ended
    coherence.reassert(answer.client(), from, handles, held);
    for (const auto& handle : handles) leases.opened(answer.client(), handle.id);
  }
  auto done = std::move(found->second.done);
  recalls.erase(found);
  done(answer.referenced());
}

void Site::Impl::lost(const SiteName& site) {
  spdlog::info("{} is not reachable", site);
  watch_absence(site);
  if (site == ownership.owner) {
    show_nothing_old();
    write_behind.distrust();
    // What the kernel keeps by itself runs out while a site is found silent, and nothing is added: so nobody
    // need wait with a signal that kills (FuseServer::give_up).
    if (front_end) front_end->set_policy(kSharedMount);
  }
  if (source && source->target() == site) source->lost();
  verify_lost(site);
  end_commands(site);
}

void Site::Impl::load_invitations() {
  for (const auto& key : state.invitations(wall_clock_ns() / 1'000'000'000)) transport.admit_invitation(key);
}

void Site::Impl::join(const std::string& route, const std::string& public_key, const pb::Join& join) {
  pb::Envelope envelope;
  auto* reply = envelope.mutable_join_reply();
  const auto refuse = [&](const std::string& why) {
    reply->set_error(why);
    transport.reply_to_join(route, envelope);
  };
  const SiteRecord site{
      .name = join.site().name(), .endpoint = join.site().endpoint(), .public_key = join.site().public_key()};
  if (join.data_set() != data_set_id) return refuse("the token is of another data set");
  if (join.version() != kProtocolVersion)
    return refuse(fmt::format("{} runs another version of sharefs: upgrade first", parts.self));
  if (site.name.empty() || site.public_key.size() != 40) return refuse("malformed request to join");
  const auto gone = state.removed_sites();
  if (std::any_of(gone.begin(), gone.end(),
                  [&](const auto& one) { return one.public_key == site.public_key; }))
    return refuse(
        fmt::format("{} was removed from the data set: delete its state folder, so that it gets "
                    "another key, and join again",
                    site.name));
  auto others = state.sites();
  // A join whose answer got lost is made again, with the same key and another token, perhaps another name.
  const auto same_key = std::find_if(others.begin(), others.end(),
                                     [&](const auto& one) { return one.public_key == site.public_key; });
  const auto earlier = same_key == others.end() ? std::nullopt : std::optional(*same_key);
  if (earlier && transport.connected(earlier->name))
    return refuse(fmt::format("{} has this key, and is connected", earlier->name));
  if (earlier) others.erase(same_key);
  others.push_back({.name = parts.self, .endpoint = endpoint, .public_key = state.setting("public_key")});
  if (others.size() >= kMostSites)
    return refuse(
        fmt::format("there are {} sites already, and no data set has more: take one out with \"sharefs "
                    "remove {} --site SITE\"",
                    others.size(), state.setting("data_set")));
  for (const auto& other : others) {
    if (other.name == site.name)
      return refuse(
          site.name == ownership.owner
              ? fmt::format("there is a site named {} already, the owner: choose another with --site",
                            site.name)
              : fmt::format("there is a site named {} already: choose another with --site, or, if its "
                            "machine is gone, take it out with \"sharefs remove {} --site {}\" there",
                            site.name, state.setting("data_set"), site.name));
    if (other.endpoint == site.endpoint)
      return refuse(fmt::format("{} has the address {} already: choose another with --listen", other.name,
                                site.endpoint));
  }
  const auto now = wall_clock_ns() / 1'000'000'000;
  const auto valid = state.invitations(now);
  if (std::find(valid.begin(), valid.end(), public_key) == valid.end())
    return refuse(
        fmt::format("the token was used before, or has expired: ask for a new one with \"sharefs invite {}\"",
                    state.setting("data_set")));
  // Nobody is noted that this site could not talk to, now and when it is started again.
  try {
    if (earlier && earlier->name != site.name) transport.remove_site(earlier->name);
    transport.add_site(site.name, site.endpoint, site.public_key);
  } catch (const std::runtime_error& malformed) {
    return refuse(malformed.what());
  }
  try {
    state.admit_site(public_key, now, site);
  } catch (const std::exception& error) {
    transport.remove_site(site.name);
    return refuse(fmt::format("{} cannot keep the site: {}", parts.self, error.what()));
  }
  transport.remove_invitation(public_key);
  for (const auto& other : others) {
    auto* known = reply->add_sites();
    known->set_name(other.name);
    known->set_endpoint(other.endpoint);
    known->set_public_key(other.public_key);
  }
  reply->set_epoch(ownership.epoch);
  reply->set_owner(ownership.owner);
  transport.reply_to_join(route, envelope);
  spdlog::info("{} has joined at {}", site.name, site.endpoint);
  transport.greet_all();
}

void Site::Impl::forget_handoffs_from(const SiteName& site) {
  for (const auto& old : state.handoffs(kForgottenAtOnce))
    if (old.role == "target" && old.source == site && old.result == "done")
      HandoffTarget::forget(state, old.attempt);
}

// Why this site cannot take the data set over, room aside; or empty.
std::string Site::Impl::objection(const SiteName& from, const pb::Prepare& prepare) const {
  if (auto why = HandoffTarget::refusal(parts, prepare); !why.empty()) return why;
  if (from != ownership.owner)
    return fmt::format("{} is not the owner as far as {} knows ({} is)", from, parts.self, ownership.owner);
  if (source) return fmt::format("{} has not ended its own handoff yet", parts.self);
  return {};
}

bool Site::Impl::holds_image() const {
  const auto area = parts.store_directory / kPrivateArea;
  for (const char* part : {"tree", "parked", "orphans"})
    if (!std::filesystem::is_empty(area / part)) return true;
  return false;
}

// What an old image holds is counted only where it matters, since counting takes a while.
void Site::Impl::prepare(const SiteName& from, const pb::Prepare& prepare) {
  const auto why = objection(from, prepare);
  if (!prepare.dry_run() && why.empty()) {
    latest_attempt = prepare.attempt();
    latest_source = from;
  }
  if (!why.empty() || HandoffTarget::lack_of_space(parts, prepare, {}).empty())
    return judged(from, prepare, why);
  const auto held = std::make_shared<TreeSize>();
  workers->submit([held, area = parts.store_directory / kPrivateArea] { *held = measure(area); },
                  [this, held, from, prepare] {
                    auto why_not = objection(from, prepare);
                    if (!prepare.dry_run() && latest_attempt != prepare.attempt())
                      why_not = fmt::format("{} was interrupted: try again", parts.self);
                    if (why_not.empty()) why_not = HandoffTarget::lack_of_space(parts, prepare, *held);
                    judged(from, prepare, why_not);
                  });
}

void Site::Impl::judged(const SiteName& from, const pb::Prepare& prepare, std::string why_not) {
  pb::Envelope envelope;
  auto* prepared = envelope.mutable_prepared();
  try {
    if (why_not.empty() && prepare.dry_run() && !tree.moving()) why_not = stranger();
    if (why_not.empty() && prepare.dry_run()) {
      // What was received under another state folder is sent again: its identities are gone with that.
      prepared->set_holds_image(holds_image() && !state.handoffs(1).empty());
      prepared->set_space(std::filesystem::space(parts.store_directory).available);
    } else if (why_not.empty()) {
      return become_target(from, prepare);
    }
  } catch (const std::exception& error) {
    why_not = fmt::format("{}: {}", parts.self, error.what());
  }
  prepared->set_attempt(prepare.attempt());
  prepared->set_error(why_not);
  transport.send(from, Lane::requests, envelope);
}

void Site::Impl::become_target(const SiteName& from, const pb::Prepare& prepare) {
  // It became the owner again since it gave ownership away: it knows the outcomes of that handoff.
  forget_handoffs_from(from);
  unnoted = nullptr;
  if (target) target->abandon("a newer attempt replaced it");
  target.reset();
  tree.finish();
  refuse_strangers();
  Ownership burnt = ownership;
  burnt.burnt = prepare.epoch();
  state.set_ownership(burnt);
  ownership = burnt;
  target = std::make_unique<HandoffTarget>(parts, from, prepare, holds_image(), target_events());
}

// A prepared target asks what became of its attempt. Before the commit point (or after a roll-back) ownership
// is still here at an older epoch, and never can the attempt be committed any more: it was abandoned when its
// source forgot it.
void Site::Impl::inquire(const SiteName& from, const pb::Inquire& inquire) {
  if (source && source->attempt() == inquire.attempt() && !source->committed())
    return;  // undecided: it will be told
  pb::Envelope envelope;
  auto* verdict = envelope.mutable_verdict();
  verdict->set_attempt(inquire.attempt());
  verdict->set_committed(ownership.owner == from && ownership.epoch >= inquire.epoch());
  verdict->set_epoch(ownership.epoch);
  verdict->set_owner(ownership.owner);
  transport.send(from, Lane::requests, envelope);
}

// The source of a handoff that has long been completed here has not heard so, or has heard it now (Abandon).
void Site::Impl::completed_already(const SiteName& from, const pb::Envelope& head) {
  const auto attempt = head.has_record()    ? head.record().attempt()
                       : head.has_abandon() ? head.abandon().attempt()
                                            : head.commit().attempt();
  if (head.has_abandon() && attempt == latest_attempt) latest_attempt = 0;
  const auto handoff = state.handoff(attempt);
  if (!handoff || handoff->role != "target" || handoff->source != from || handoff->result != "done") return;
  if (head.has_abandon()) return HandoffTarget::forget(state, attempt);
  pb::Envelope envelope;
  std::vector<zmq::message_t> data;
  if (head.has_commit()) {
    state.put_handoff(*handoff, Durability::full);  // before the source forgets the records
    envelope.mutable_taken_over()->set_attempt(attempt);
    envelope.mutable_taken_over()->set_epoch(handoff->epoch);
  } else {
    auto* done = envelope.mutable_record_done();
    done->set_attempt(attempt);
    done->set_number(head.record().number());
    const auto bytes =
        RecordPerformer::outcome(state, attempt, head.record().number(), *done->mutable_outcome());
    if (!bytes) return;
    data.push_back(copy_to_message(as_bytes(*bytes)));
  }
  transport.send(from, Lane::requests, envelope, std::move(data));
}

}  // namespace sharefs
