// The operator's commands, as JSON (contract: cli/README.md).
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <filesystem>

#include "replication/json_line.h"
#include "replication/site_impl.h"

namespace sharefs {
namespace {

// Measuring a large tree before a handoff takes its time.
constexpr auto kAnswerPatience = std::chrono::seconds(60);
constexpr auto kStatusPatience = std::chrono::seconds(2);
// It may just have been started again, here or there.
constexpr auto kConnectionPoll = std::chrono::milliseconds(100);
constexpr unsigned kConnectionPolls = 20;
constexpr auto kRecoveryPoll = std::chrono::milliseconds(20);
constexpr std::uint32_t kVerifyPage = 500;
// From site to site, after ownership that has moved meanwhile.
constexpr unsigned kMostHops = 3;

nlohmann::json failure(const std::string& why) { return {{"error", why}}; }

nlohmann::json no_such_site(State& state, const SiteName& site) {
  return failure(
      fmt::format("there is no site {}: see \"sharefs status {}\"", site, state.setting("data_set")));
}

}  // namespace

void Site::Impl::command(const nlohmann::json& request, JsonReply reply) {
  if (!request.is_object() || !request.contains("command")) return reply(failure("malformed command"));
  const std::string name = request.value("command", "");
  if (name == "status") {
    if (is_owner() || ownership.owner.empty() || !transport.connected(ownership.owner))
      return reply(status_json());
    // The handoff's progress is known to the owner.
    return ask_owner({{"command", "handoff"}}, [this, reply = std::move(reply)](nlohmann::json answer) {
      auto status = status_json();
      // Of a handoff that this site gave away, this site measured more.
      const auto& mine = status["handoff"];
      const bool own = mine.is_object() && answer["handoff"].is_object() && mine["role"] == "source" &&
                       mine["attempt"] == answer["handoff"]["attempt"];
      if (!own && answer.contains("handoff")) status["handoff"] = answer["handoff"];
      if (const auto& running = status["handoff"];
          running.is_object() && running.value("result", "-").empty())
        status["phase"] = running["phase"];
      reply(status);
    });
  }
  if (name == "handoff") return reply({{"handoff", handoff_json()}});
  if (name == "reload_invitations") {
    load_invitations();
    return reply(nlohmann::json::object());
  }
  if (name == "verify") return verify(request, std::move(reply));
  if ((name == "migrate" || name == "remove") && gate.refuses_changes()) return reply(failure(contested));
  if (name == "migrate" || name == "abort") {
    // After the commit point the former owner still ends the handoff: it says why it cannot be aborted.
    if (!is_owner() && !source) return ask_owner(request, std::move(reply));
    if (name == "migrate") return migrate(request, std::move(reply));
    if (!source && !beginning) return reply(failure("there is no handoff to abort"));
    if (!source) {
      beginning.reset();
      return reply({{"result", "aborted"}});
    }
    std::string why;
    return reply(source->abort(why) ? nlohmann::json{{"result", "aborted"}} : failure(why));
  }
  if (name == "remove") return is_owner() ? remove(request, reply) : ask_owner(request, std::move(reply));
  reply(failure(fmt::format("unknown command «{}»", name)));
}

// What may be otherwise in a moment: the command is performed again then, or hears why it cannot be when that
// has not helped.
void Site::Impl::try_again(nlohmann::json request, const JsonReply& reply, const std::string& why) {
  const unsigned polls = request.value("polls", 0U);
  if (polls >= kConnectionPolls) return reply(failure(why));
  request["polls"] = polls + 1;
  reactor.after(kConnectionPoll, [this, request, reply, watch = std::weak_ptr(alive)] {
    if (watch.expired()) return;
    try {
      command(request, reply);
    } catch (const std::exception& error) {
      reply(failure(error.what()));
    }
  });
}

void Site::Impl::wait_for(const SiteName& site, const nlohmann::json& request, const JsonReply& reply) {
  try_again(request, reply, why_not_connected(site));
}

void Site::Impl::ask_owner(const nlohmann::json& request, JsonReply reply) {
  const unsigned hops = request.value("hops", 0U);
  if (hops >= kMostHops)
    return reply(failure(fmt::format(
        "nobody owns {}: {} takes {} for the owner, which does not. Was a state put back from a backup? The "
        "site that \"sharefs status\" names at the latest epoch has the files: make a data set of them anew, "
        "as when the owner is lost",
        state.setting("data_set"), parts.self, ownership.owner)));
  if (!transport.connected(ownership.owner)) return wait_for(ownership.owner, request, reply);
  const auto number = next_number++;
  commands.emplace(number, Command{.asked = ownership.owner, .reply = std::move(reply)});
  auto forwarded = request;
  forwarded.erase("polls");
  forwarded["hops"] = hops + 1;
  pb::Envelope envelope;
  envelope.mutable_command()->set_number(number);
  envelope.mutable_command()->set_text(to_line(forwarded));
  transport.send(ownership.owner, Lane::requests, envelope);
  const std::string name = request.value("command", "");
  // Before a handoff the owner looks at the whole tree, however long that takes.
  if (name != "migrate")
    await_reply(number, ownership.owner, name == "handoff" ? kStatusPatience : kAnswerPatience);
}

// Numbers can be guessed: only who was asked is believed.
void Site::Impl::answer_command(std::uint64_t number, const SiteName& from, nlohmann::json answer) {
  const auto found = commands.find(number);
  if (found == commands.end() || found->second.asked != from) return;
  const JsonReply reply = std::move(found->second.reply);
  commands.erase(found);
  reply(answer.is_object() ? std::move(answer) : failure(fmt::format("{} answers nonsense", from)));
}

// Messages to it or from it are lost.
void Site::Impl::end_commands(const SiteName& asked) {
  std::vector<JsonReply> replies;
  for (const auto& [number, command] : commands)
    if (command.asked == asked) replies.push_back(command.reply);
  std::erase_if(commands, [&](const auto& one) { return one.second.asked == asked; });
  for (const auto& reply : replies)
    reply(
        failure(fmt::format("the connection to {} was lost: see \"sharefs status {}\", what was asked of it "
                            "may be done all the same",
                            asked, state.setting("data_set"))));
}

void Site::Impl::await_reply(std::uint64_t number, const SiteName& from, Reactor::Clock::duration patience) {
  reactor.after(patience, [this, number, from] {
    auto node = commands.extract(number);
    if (!node.empty()) node.mapped().reply(failure(fmt::format("{} does not answer", from)));
  });
}

nlohmann::json Site::Impl::handoff_json() {
  if (source) return source->progress();
  if (!unnoted.is_null()) return unnoted;
  const auto last = state.handoffs(1);
  return last.empty() ? nlohmann::json() : to_json(last.front());
}

nlohmann::json Site::Impl::status_json() {
  nlohmann::json sites = nlohmann::json::array();
  for (const auto& site : state.sites()) {
    const bool up = transport.connected(site.name);
    nlohmann::json one{{"site", site.name}, {"endpoint", site.endpoint}, {"connected", up}};
    if (up)
      one["round_trip_ms"] =
          std::chrono::duration<double, std::milli>(transport.round_trip(site.name)).count();
    else {
      one["refused"] = transport.trouble(site.name) == Transport::Trouble::refused;
      one["one_way"] = transport.trouble(site.name) == Transport::Trouble::one_way;
    }
    sites.push_back(one);
  }
  nlohmann::json history = nlohmann::json::array();
  for (const auto& handoff : state.handoffs(5)) history.push_back(to_json(handoff));
  return {
      {"name", state.setting("data_set")},
      {"site", parts.self},
      {"role", is_owner() ? "owner" : "remote"},
      {"owner", ownership.owner},
      {"epoch", ownership.epoch},
      {"phase", source ? source->progress()["phase"] : nlohmann::json("idle")},
      {"mountpoint", front_end ? options.mountpoint->string() : ""},
      {"wanted_mountpoint", options.mountpoint && !front_end ? options.mountpoint->string() : ""},
      {"store", state.setting("store")},
      {"in_place", tree.settled()},
      {"endpoint", endpoint},
      {"contested", is_owner() ? contested : ""},
      {"running", true},
      {"clients", opens.clients().size()},
      {"unanswered", peer.unanswered()},
      {"longest_wait_ms",
       front_end ? std::chrono::duration<double, std::milli>(front_end->take_longest_wait()).count() : 0.0},
      {"sites", sites},
      {"handoff", handoff_json()},
      {"history", history}};
}

// ---- remove

// For a machine that does not come back. The owner decides; other sites learn it from whoever knows.
void Site::Impl::remove(const nlohmann::json& request, const JsonReply& reply) {
  const SiteName site = request.value("site", "");
  if (site == parts.self)
    return reply(failure(fmt::format("{} is the owner: hand the data set to another site first", site)));
  const auto sites = state.sites();
  const auto found =
      std::find_if(sites.begin(), sites.end(), [&](const auto& one) { return one.name == site; });
  if (found == sites.end()) return reply(no_such_site(state, site));
  if (source || (target && target->state() != TargetState::serving))
    return reply(failure(fmt::format("a handoff is running: wait for its end, or \"sharefs abort {}\"",
                                     state.setting("data_set"))));
  const auto& mounts = opens.clients();
  if (transport.connected(site) &&
      std::any_of(mounts.begin(), mounts.end(), [&](const auto& one) { return one.second == site; }))
    return reply(failure(fmt::format("{} has it mounted: \"sharefs umount {}\" there first", site,
                                     state.setting("data_set"))));
  state.remove_site(site, found->public_key);
  reply({{"result", "removed"}});  // to itself, perhaps: before its connection goes
  drop_site(site);
  transport.greet_all();
}

// ---- migrate

void Site::Impl::migrate(const nlohmann::json& request, JsonReply reply) {
  const SiteName to = request.value("to", "");
  const auto sites = state.sites();
  if (source || beginning)
    return reply(failure(fmt::format("a handoff to {} is running: wait for it, or \"sharefs abort {}\"",
                                     source ? source->target() : *beginning, state.setting("data_set"))));
  if (to == parts.self) return reply(failure(fmt::format("{} is the owner already", to)));
  if (std::none_of(sites.begin(), sites.end(), [&](const auto& site) { return site.name == to; }))
    return reply(no_such_site(state, to));
  if (target && target->state() == TargetState::performing)
    return reply(failure(fmt::format("{} is just taking over: try again", parts.self)));
  if (!transport.connected(to)) return wait_for(to, request, reply);
  HandoffSource::Options wanted{
      .target = to,
      .max_pause = std::chrono::milliseconds(request.value("max_pause_ms", std::int64_t{100})),
      .rate = request.value("rate", std::uint64_t{0})};
  if (wanted.max_pause.count() <= 0) return reply(failure("--max-pause must be positive"));
  const double least = 3 * std::chrono::duration<double, std::milli>(transport.round_trip(to)).count();
  if (least > static_cast<double>(wanted.max_pause.count()))  // the first answers may have come late
    return try_again(
        request, reply,
        fmt::format("the link to {} needs a pause of at least {:.1f} ms: use --max-pause {:.0f}ms", to, least,
                    2 * least));
  const auto size = std::make_shared<TreeSize>();
  const bool only_asked = request.value("dry_run", false);
  const auto asked = only_asked ? nullptr : std::make_shared<const SiteName>(to);
  if (!only_asked) beginning = asked;
  workers->submit([size, root = tree.root()] { *size = measure(root); },
                  [this, size, wanted, asked, reply = std::move(reply)]() mutable {
                    wanted.needed = std::move(*size);
                    if (asked) return measured(wanted, asked, reply);
                    if (!wanted.needed.trouble.empty()) return reply(failure(wanted.needed.trouble));
                    dry_run(wanted, std::move(reply));
                  });
}

void Site::Impl::measured(const HandoffSource::Options& wanted, const std::shared_ptr<const SiteName>& asked,
                          const JsonReply& reply) {
  if (beginning != asked)
    return reply({{"result", "aborted"}, {"from", parts.self}, {"to", wanted.target}, {"error", kAborted}});
  // Just restarted: what other sites hold is part of what is handed over.
  if (wanted.needed.trouble.empty() && coherence.recovering()) {
    reactor.after(kRecoveryPoll, [this, wanted, asked, reply, watch = std::weak_ptr(alive)] {
      if (!watch.expired()) measured(wanted, asked, reply);
    });
    return;
  }
  beginning.reset();
  if (!wanted.needed.trouble.empty()) return reply(failure(wanted.needed.trouble));
  try {
    tree.finish();
  } catch (const std::exception& error) {
    return reply(failure(error.what()));
  }
  source = std::make_unique<HandoffSource>(parts, wanted, source_events());
  source->start();
  reply({{"attempt", source->attempt()}, {"epoch", handoff_json()["epoch"]}});
}

// Asks the target what it would say to the handoff, and tells what can be known before.
void Site::Impl::dry_run(const HandoffSource::Options& wanted, JsonReply reply) {
  // The other site's disk is taken to be like this one's.
  const auto began = Reactor::Clock::now();
  try {
    state.set_ownership(ownership);
  } catch (const std::exception& error) {  // a full disk
    return reply(failure(fmt::format("{}: {}", parts.self, error.what())));
  }
  const std::chrono::duration<double, std::milli> sync = Reactor::Clock::now() - began;
  const std::chrono::duration<double, std::milli> round_trip = transport.round_trip(wanted.target);
  const nlohmann::json found{{"dry_run", true},
                             {"from", parts.self},
                             {"to", wanted.target},
                             {"files", wanted.needed.files},
                             {"bytes", wanted.needed.bytes},
                             {"round_trip_ms", round_trip.count()},
                             {"smallest_pause_ms", (3 * round_trip + 2 * sync).count()},
                             {"epoch", ownership.epoch}};
  const auto number = next_number++;
  commands.emplace(number, Command{.asked = wanted.target,
                                   .reply = [found, reply = std::move(reply)](nlohmann::json answer) {
                                     if (!answer.contains("error")) answer.update(found);
                                     reply(std::move(answer));
                                   }});
  // As the handoff itself would (ask_target): what its attempts have burnt is known to the database.
  const Ownership known = state.ownership();
  auto envelope = HandoffSource::prepare(number, std::max(known.epoch, known.burnt) + 1, wanted.needed);
  envelope.mutable_prepare()->set_dry_run(true);
  transport.send(wanted.target, Lane::requests, envelope);
  await_reply(number, wanted.target, kAnswerPatience);
}

// ---- verify: digests of both copies, page by page, compared here

void Site::Impl::verify(const nlohmann::json& request, JsonReply reply) {
  if (verification) return reply(failure("a verification is running"));
  SiteName with = request.value("with", "");
  if (with.empty() && !is_owner()) with = ownership.owner;
  if (with.empty())
    for (const auto& handoff : state.handoffs(1))
      with = handoff.source == parts.self ? handoff.target : handoff.source;
  if (with.empty())
    return reply(failure("no other site holds a copy yet: migrate first, or say --with SITE"));
  if (with == parts.self)
    return reply(failure(fmt::format("{} is this site: compare it with another one", with)));
  const auto sites = state.sites();
  if (std::none_of(sites.begin(), sites.end(), [&](const auto& site) { return site.name == with; }))
    return reply(no_such_site(state, with));
  if (!is_owner() && with != ownership.owner)
    return reply(
        failure(fmt::format("one of the two copies must be the owner's: use --with {}", ownership.owner)));
  if (!transport.connected(with)) return wait_for(with, request, reply);
  if (const auto why_not = prepare_verify(); !why_not.empty()) return reply(failure(why_not));
  verification = std::make_unique<Verification>();
  verification->with = with;
  verification->other_is_owner = with == ownership.owner;
  verification->number = next_number++;
  verification->epoch = ownership.epoch;
  verification->reply = std::move(reply);
  verify_next();
}

void Site::Impl::verify_next() {
  auto& now = *verification;
  const bool here_wanted = now.other_is_owner ? now.comparison.other_wanted() : now.comparison.owner_wanted();
  const bool there_wanted =
      now.other_is_owner ? now.comparison.owner_wanted() : now.comparison.other_wanted();
  pb::VerifyAsk ask;
  ask.set_count(kVerifyPage);
  if (there_wanted && !now.asked_there) {
    now.asked_there = next_number++;
    ask.set_number(*now.asked_there);
    ask.set_after(now.other_is_owner ? now.comparison.owner_next() : now.comparison.other_next());
    pb::Envelope envelope;
    *envelope.mutable_verify_ask() = ask;
    transport.send(now.with, Lane::requests, envelope);
  }
  if (here_wanted && !now.asked_here) {
    now.asked_here = next_number++;
    ask.set_number(*now.asked_here);
    ask.set_after(now.other_is_owner ? now.comparison.other_next() : now.comparison.owner_next());
    const auto page = std::make_shared<pb::VerifyReply>();
    workers->submit(
        [this, ask, page] {
          try {
            if (ask.after() == 0) identify_all(inodes, ending);
            *page = digest_inodes(inodes, store, parts.database_file, ask, ending);
          } catch (const std::exception& failure) {
            page->set_error(failure.what());
          }
          page->set_number(ask.number());
        },
        [this, page] {
          page_read(*page);
          if (verification && verification->asked_here == page->number()) verify_page(true, *page);
        });
  }
}

// Why this site's store is no copy, or empty.
std::string Site::Impl::no_copy() {
  if (is_owner()) return "";
  const auto last = state.handoffs(1);
  if (last.empty()) return fmt::format("{} holds no copy yet: it is made by handing over to it", parts.self);
  if (last.front().role == "target" && last.front().result != "done")
    return fmt::format("{} holds no complete copy: the last handoff to it did not come to its end",
                       parts.self);
  return "";
}

// A handoff may have begun to change this copy, or made it the owner's, while the page was read.
void Site::Impl::page_read(pb::VerifyReply& page) {
  if (page.error().empty()) page.set_error(no_copy());
  page.set_epoch(ownership.epoch);
}

// Why this site's store cannot be compared, or empty.
std::string Site::Impl::prepare_verify() {
  if (auto why_not = no_copy(); !why_not.empty()) return why_not;
  try {
    tree.finish();
    inodes.flush();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void Site::Impl::verify_ends(nlohmann::json result) {
  const JsonReply reply = std::move(verification->reply);
  verification.reset();
  reply(std::move(result));
}

void Site::Impl::verify_lost(const SiteName& site) {
  if (!verification || verification->with != site) return;
  reactor.after(kAnswerPatience, [this, site, number = verification->number] {
    if (verification && verification->number == number && !transport.connected(site))
      verify_ends(failure(fmt::format("the connection to {} was lost: verify again when it is back", site)));
  });
}

// The page that was asked for over the connection before may never come. If it does, nobody waits for its
// number.
void Site::Impl::verify_goes_on(const SiteName& site) {
  if (!verification || verification->with != site || !verification->asked_there) return;
  verification->asked_there.reset();
  verify_next();
}

void Site::Impl::verify_page(bool here, const pb::VerifyReply& page) {
  auto& now = *verification;
  (here ? now.asked_here : now.asked_there).reset();
  if (!page.error().empty()) return verify_ends(failure(page.error()));
  if (page.epoch() != now.epoch)
    return verify_ends(failure("ownership has moved meanwhile: verify again when the handoff has ended"));
  if (here != now.other_is_owner)
    now.comparison.owner_page(page);
  else
    now.comparison.other_page(page);
  if (!now.comparison.done()) return verify_next();
  const auto& result = now.comparison.result();
  verify_ends({{"with", now.with},
               {"compared", result.compared},
               {"changed_since", result.changed_since},
               {"differences", result.differences}});
}

}  // namespace sharefs
