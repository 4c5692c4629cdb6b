#include "replication/site.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "fs/mounts.h"
#include "fs/private_area.h"
#include "meta/fault.h"
#include "replication/inode_io.h"
#include "replication/site_impl.h"

namespace sharefs {
namespace {

// As many requests may wait for the disk before others wait for them: an fsync must not delay a cold read.
constexpr unsigned kWorkers = 16;
// Leaves room for sockets and SQLite below `ulimit -n 1024`.
constexpr unsigned kDescriptorLimit = 400;
static_assert(kDescriptorLimit + 10 * kMostSites < 1000);
constexpr auto kAttachPatience = std::chrono::seconds(15);
constexpr auto kDetachPatience = std::chrono::seconds(2);
// Requests of the site itself, not of its kernel: bit 63 marks resent FUSE requests, bit 62 the front end's
// own.
constexpr std::uint64_t kOwnSeqBit = std::uint64_t{1} << 61;

std::uint64_t random_id() {
  std::random_device device;
  return ((std::uint64_t{device()} << 31) ^ device()) & 0x7fffffffffffffff;
}

// Greater than every earlier one of this site (see RequestServer), whatever its clock says; unlike those of
// others, by its random part.
ClientId new_client(State& state) {
  constexpr unsigned kRandomBits = 12;
  const std::string last = state.setting(kLastClientSetting);
  const auto now = static_cast<ClientId>(wall_clock_ns() / 1'000);
  const ClientId client =
      std::max<ClientId>(now << kRandomBits, last.empty() ? ClientId{0} : std::stoull(last) + 1) +
      random_id() % (1U << kRandomBits);
  state.set_setting(kLastClientSetting, std::to_string(client));
  return client;
}

UniqueFd open_directory(const std::filesystem::path& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd)
    throw std::runtime_error(
        fmt::format("cannot open the store {}: {}", path.string(), std::strerror(errno)));
  return fd;
}

// As the rest of the store it goes on where it was, when a mount covers it.
UniqueFd open_store(const std::filesystem::path& path) {
  const SetAside dead(path);
  return open_directory(path);
}

bool sync_store(DiskSync& disk, std::uint64_t known_failures) {
  try {
    disk.sync(known_failures);
    return true;
  } catch (const std::exception& error) {
    spdlog::error(error.what());
    return false;
  }
}

UniqueFd lock_area(const UniqueFd& store, const std::string& path) {
  UniqueFd area = open_private_area(store.get());
  if (area && !lock_private_area(area.get()))
    throw std::runtime_error(
        fmt::format("{} is the store of a running daemon, which has another state folder", path));
  // Who has tidied up a store that was not mounted may have taken empty directories away.
  // Without them nothing could be removed, on a disk without inodes.
  for (const char* part : {"tree", "parked", "orphans"})
    if (area && ::mkdirat(area.get(), part, 0700) != 0 && errno != EEXIST)
      throw std::runtime_error(
          fmt::format("cannot make {}/{}/{}: {}", path, kPrivateArea, part, std::strerror(errno)));
  return area;
}

std::string required(State& state, std::string_view key) {
  auto value = state.setting(key);
  if (value.empty())
    throw std::runtime_error(fmt::format("state.db lacks «{}»: run sharefs init or join first", key));
  return value;
}

}  // namespace

Site::Site(Options options, Reactor& reactor, std::function<void()> ended)
    : impl_(std::make_unique<Impl>(std::move(options), reactor, std::move(ended))) {}
Site::~Site() = default;
void Site::start(const std::function<void(std::string)>& ready) { impl_->start(ready); }
void Site::stop(const std::function<void()>& stopped) { impl_->stop(stopped); }
void Site::command(const nlohmann::json& request, std::function<void(nlohmann::json)> reply) {
  impl_->command(request, std::move(reply));
}

Site::Impl::Impl(Options given, Reactor& the_reactor, std::function<void()> on_ended)
    : options(std::move(given)),
      reactor(the_reactor),
      ended(std::move(on_ended)),
      database(options.folder / "state.db"),
      state(database),
      client(new_client(state)),
      power(state),
      store_fd(open_store(required(state, "store"))),
      area_fd(lock_area(store_fd, required(state, "store"))),
      store_path(fmt::format("/proc/self/fd/{}/.", store_fd.get())),
      workers(std::make_unique<Workers>(reactor, kWorkers)),
      inodes(options.folder / "state.db", options.folder / "inodes.journal", open_directory(store_path)),
      log(database, reactor),
      store(Store::Options{.directory = store_path,
                           .data_set = required(state, "data_set_id"),
                           .descriptor_limit = kDescriptorLimit},
            inodes, opens, locks, *workers),
      tree(store, inodes, state, power, store_path, reactor, [this] { return source || verification; }),
      once(tree, options.folder / "once.slots", power.number()),
      promises(once, log, opens, client, reactor,
               [this](const RecallOrder& order, std::function<void(bool)> done) {
                 recall(order, std::move(done));
               }),
      coherence(promises, opens, locks, reactor,
                [this](const RecallOrder& order, std::function<void(bool)> done) {
                  recall(order, std::move(done));
                },
                {.extension = [this](ClientId holder, auto ago) { return extension(holder, ago); }}),
      gate(coherence, database),
      pace(gate, reactor),
      leases(pace, promises, opens, promises, reactor,
             {.file = options.folder / "write.leases",
              .recall = [this](const RecallOrder& order,
                               std::function<void(bool)> done) { recall(order, std::move(done)); },
              .timing = {.extension = [this](ClientId holder, auto ago) { return extension(holder, ago); }},
              .room = [this] { return has_room(); },
              .recovering = [this] { return coherence.recovering(); },
              .letting_in = [this] { return coherence.letting_in(); },
              .silent = [this](const SiteName& site) { return transport.silence(site) >= kLease; },
              .performed =
                  [this](const pb::Request& request) { return once.knows(request.client(), request.seq()); },
              .returned = [this](ClientId mount) { server.ahead_answered(mount); },
              .own = client}),
      transport({.site = required(state, "site"),
                 .listen = state.setting("listen"),
                 .keys = {.public_key = required(state, "public_key"),
                          .secret_key = required(state, "secret_key")}},
                reactor),
      peer({.timeout = options.timeout}, transport, reactor),
      server(transport, leases),
      holdings(router, [this] { return !is_owner(); }),
      unsynced(holdings, [this]() -> const SiteName& { return ownership.owner; }),
      write_behind(unsynced,
                   {.journal = options.folder / "writes.journal",
                    .power = power.number(),
                    .unwritten = options.folder / "unwritten",
                    .trusted_for =
                        [this] {
                          // Whoever asks to be told that the owner is away waits for it with each write.
                          return is_owner() || options.timeout || options.write_through
                                     ? Reactor::Clock::duration::zero()
                                     : transport.trusted_for(ownership.owner, kPromiseTrust);
                        },
                    .round_trip = [this] { return transport.round_trip(ownership.owner); },
                    .performed = [this](InodeId id, std::uint64_t stamp) { names.performed(id, stamp); },
                    .drop_pages =
                        [this](InodeId id) {
                          if (front_end) front_end->invalidate(id, 0, 0, [] {});
                        },
                    .handles = [this](InodeId id) { return handles_of(id); }}),
      names(write_behind,
            [this] {
              return is_owner() ? kPromiseTrust : transport.trusted_for(ownership.owner, kPromiseTrust);
            }),
      parts{.self = required(state, "site"),
            .store_directory = store_path,
            .database_file = options.folder / "state.db",
            .reactor = reactor,
            .state = state,
            .power = power,
            .received = received,
            .disk = disk,
            .transport = transport,
            .inodes = inodes,
            .store = store,
            .once = once,
            .log = log,
            .opens = opens,
            .locks = locks,
            .promises = promises,
            .coherence = coherence,
            .gate = gate,
            .pace = pace,
            .leases = leases,
            .peer = peer,
            .server = server,
            .router = router} {
  data_set_id = std::stoull(required(state, "data_set_id"));
  if (area_fd) learn_stamps(area_fd.get());
  store.observe(&promises);
  store.on_put_aside([this](const pb::Request& request) -> Store::TakeUp {
    once.put_aside(request, true);
    return [this, within = promises.put_aside()](const pb::Request& again,
                                                 const std::function<void()>& attempt) {
      once.put_aside(again, false);
      within(attempt);
    };
  });
  gate.set_hooks(
      {.held = [this](const pb::Request& request) { coherence.held(request); },
       .dropped = [this](const pb::Request& request) { coherence.dropped(request); },
       .awaited = [this](const pb::Request& writeback) { return coherence.awaits(writeback); },
       // What the windows know never reaches a new owner's gate: RequestServer keeps it back until then.
       .answered = {},
       .opened =
           [this] {
             coherence.none_held();
             store.hurry(false);
             expire_ended();
           }});
  server.on_takeover([this](const pb::Request& request) { coherence.held(request); });
  // No automatic checkpoint, with its syncs, on this thread: it could fall into the pause.
  database.defer_checkpoints();
  ownership = state.ownership();
  subscribe();
  for (const auto& site : state.sites()) {
    try {
      transport.add_site(site.name, site.endpoint, site.public_key);
    } catch (const std::runtime_error& error) {
      spdlog::error("{} is left out: {}", site.name, error.what());
    }
  }
  peer.remember([this](ClientId mount) { return holdings.requests(mount); });
  peer.on_stray_promise([this] { names.forget_all(); });
  names.on_forget_all([this] {
    if (front_end) front_end->promise_broken(nullptr, {}, [] {});
  });
  promises.on_recovered([this] { coherence.recovered(); });
  promises.on_lease([this] { return recovery_extension(); });
  for (const auto& site : state.sites()) watch_absence(site.name);
  peer.on_moved([this](const SiteName& owner, Epoch epoch) { learn(owner, epoch); });
  once.exempt(client);
  if (is_owner())
    serve_as_owner(false);
  else {
    gate.hold_everything();
    gate.surrender();
    follow(ownership.owner, ownership.epoch, false);
  }
  continue_handoff();
  if (is_owner()) recall_contest();
  if (is_owner() && !target) delete_leftovers();
}

Site::Impl::~Impl() {
  alive.reset();
  front_end.reset();
  source.reset();
  target.reset();
  leftovers.reset();
  ending = true;
  workers.reset();  // what they are at needs the other parts
  store.observe(nullptr);
  try {
    std::set<SiteName> sites = coherence.unheard();
    for (const auto& [mount, site] : opens.clients())
      if (site != parts.self) sites.insert(site);
    const std::int64_t now = ctime_floor();
    const bool synced = sync_store(disk, note_failed_syncs(parts));
    note_failed_syncs(parts);
    inodes.flush();
    Transaction transaction(database, Durability::full);
    if (is_owner()) state.set_setting(kMountsSetting, fmt::format("{}", fmt::join(sites, " ")));
    if (synced) {
      power.synced(now);
      power.ends_synced();
    }
    transaction.commit();
  } catch (const std::exception& error) {
    spdlog::warn("all sites will be asked at the next start: {}", error.what());
  }
}

// The other sites that may have a mount which an earlier process of this owner has told something.
std::set<SiteName> Site::Impl::sites_with_mounts() {
  std::set<SiteName> sites;
  const std::string last = state.setting(kMountsSetting);
  if (last == kMountsUnknown) {
    for (const auto& site : state.sites()) sites.insert(site.name);
  } else {
    std::istringstream words(last);
    for (SiteName site; words >> site;) sites.insert(site);
  }
  return sites;
}

// ---- roles

void Site::Impl::serve_as_owner(bool moving) {
  power.trust();
  inodes.set_epoch(ownership.epoch);
  believe_owner();
  // A restarted owner does not know what it has promised. One that has just taken over is told whom the other
  // one has promised something (restore_live_state).
  std::vector<ClientId> holders;
  if (!moving) {
    coherence.recover(store.orphans(), sites_with_mounts());
    if (!coherence.unheard().empty()) holders.push_back(0);
    state.set_setting(kMountsSetting, kMountsUnknown);
    state.set_ownership(ownership);  // makes durable what was set before
  }
  promises.begin(ownership.epoch, holders);
  if (!moving && holders.empty()) coherence.recovered();
  if (moving)
    tree.move(TreePlace::Direction::up);
  else
    tree.resume(TreePlace::Direction::up);
  once.settle();
  router.route_to(leases);
  server.serve();
}

void Site::Impl::follow(const SiteName& owner, Epoch epoch, bool moving) {
  if (!moving) refuse_strangers();
  believe_owner();
  peer.set_owner(owner, epoch);
  router.route_to(peer);
  gate.pass_to(peer);
  server.redirect(owner, epoch);
  // Last, since it may fail.
  if (moving)
    tree.move(TreePlace::Direction::down);
  else
    tree.resume(TreePlace::Direction::down);
}

// What lies in the store of a site that is not the owner, outside the private area, was put there by somebody
// else, unless it is what an interrupted handoff has not moved yet: that has an id.
// One line, or empty.
std::string Site::Impl::stranger() {
  for (const auto& entry : std::filesystem::directory_iterator(parts.store_directory)) {
    if (entry.path().filename() == kPrivateArea) continue;
    struct statx found {};
    const unsigned wanted = STATX_BASIC_STATS | STATX_BTIME;
    if (::statx(AT_FDCWD, entry.path().c_str(), AT_SYMLINK_NOFOLLOW, wanted, &found) != 0) continue;
    if (inodes.find(found)) continue;
    return fmt::format(
        "{}/{} is not part of the data set: {} is the owner, and what is put into this store directly would "
        "be lost. Move it away",
        state.setting("store"), entry.path().filename().string(), ownership.owner);
  }
  return {};
}

void Site::Impl::refuse_strangers() {
  if (const auto why = stranger(); !why.empty()) throw std::runtime_error(why);
}

// What the last handoff left when the process ended.
void Site::Impl::continue_handoff() {
  for (auto& last : state.handoffs(1)) {
    if (!last.result.empty()) return;
    const bool was_source = last.role == "source";
    if (was_source && ownership.owner == last.target && ownership.epoch == last.epoch) {
      source = std::make_unique<HandoffSource>(parts, HandoffSource::Options{.target = last.target},
                                               source_events());
      source->resume(last);
    } else if (!was_source &&
               (last.phase == name(TargetState::prepared) || last.phase == name(TargetState::performing))) {
      target = std::make_unique<HandoffTarget>(parts, last, target_events());
    } else {
      HandoffTarget::forget(state, last.attempt);
      // A later owner took over from one that had taken over.
      const bool done =
          was_source && last.phase == name(SourceState::committed) && ownership.epoch > last.epoch;
      last.result = done ? "done" : "failed";
      if (!done) last.error = fmt::format("{} was restarted during the handoff", parts.self);
      last.ended = wall_clock_ns();
      state.put_handoff(last, Durability::normal);
    }
  }
}

// What an earlier process, that took over, had not deleted yet of the old image: it would keep its room for
// as long as this site is the owner.
void Site::Impl::delete_leftovers() {
  const auto area = parts.store_directory / kPrivateArea;
  std::error_code none;
  if (std::filesystem::is_empty(area / "parked", none) || none) return;
  const auto failed = [](const std::string& why) {
    spdlog::warn("an old image is not all deleted: {}", why);
  };
  try {
    leftovers = std::make_unique<ImageTarget>(
        ImageTarget::Options{.attempt = 0, .source = {}, .private_area = area, .doubtful = {}, .lost = {}},
        inodes, disk, reactor, [](const pb::Envelope&) {}, failed);
    const auto orphans = store.orphans();
    leftovers->finish({orphans.begin(), orphans.end()}, [this] { leftovers.reset(); });
  } catch (const std::exception& error) {
    failed(error.what());
  }
}

HandoffSource::Events Site::Impl::source_events() {
  return {.ownership_given = [this](const SiteName& owner, Epoch epoch) { give_ownership(owner, epoch); },
          .ended =
              [this] {
                reactor.post([this, watch = std::weak_ptr(alive)] {
                  if (watch.expired()) return;
                  unnoted = source && !source->noted() ? source->progress() : nlohmann::json();
                  source.reset();
                });
              }};
}

HandoffTarget::Events Site::Impl::target_events() {
  // By then another attempt may have taken its place.
  const auto drop = [this] {
    reactor.post([this, watch = std::weak_ptr(alive)] {
      if (!watch.expired() && target && target->state() == TargetState::abandoned) target.reset();
    });
  };
  return {.ownership_taken = [this](Epoch epoch) { take_ownership(epoch); },
          .serving =
              [this] {
                once.exempt(client);
                expire_ended();
                expire(parts.self, client);
                // What this mount asked the owner before comes before what it has asked since.
                peer.for_each_unanswered([this](const pb::Request& asked) { leases.note_change(asked); });
                gate.open([this](Executor& passing) { peer.resubmit_to(*server.once(passing)); });
                holdings.clear();
                server.serve();
                transport.greet_all();
              },
          .abandoned = drop};
}

void Site::Impl::take_ownership(Epoch epoch) {
  spdlog::info("this site is the owner now, epoch {}", epoch);
  unsynced.durable(ownership.owner);  // here, at t2
  ownership = state.ownership();
  once.exempt(0);
  serve_as_owner(true);
}

void Site::Impl::give_ownership(const SiteName& owner, Epoch epoch) {
  spdlog::info("{} is the owner now, epoch {}", owner, epoch);
  ownership = state.ownership();
  leftovers.reset();
  recalls.clear();  // the new owner asks anew
  unsynced.durable(parts.self);
  peer.set_owner(owner, epoch);
  holdings.take(client, opens, locks);
  drop_live_state(parts);
  follow(owner, epoch, true);
  transport.greet_all();
  sync_old_image();
}

// The new owner has it all on its disk; as an old image this store is worth what is on this one's. What
// cannot be noted now (a full disk under the state folder) will be by the next attempt, or when the process
// ends.
void Site::Impl::sync_old_image() {
  const auto quietly = [](const auto& note) {
    try {
      note();
    } catch (const std::exception& error) {
      spdlog::warn("it is not noted what is on the disk: {}", error.what());
    }
  };
  quietly([&] {
    const auto synced = std::make_shared<bool>(false);
    const auto known = note_failed_syncs(parts);
    workers->submit([this, synced, known] { *synced = sync_store(disk, known); },
                    [this, synced, quietly, now = ctime_floor()] {
                      quietly([&] {
                        note_failed_syncs(parts);
                        if (*synced) power.synced(now);
                      });
                    });
  });
}

// A site is said to own at a later epoch, and this one, which would have given ownership up itself, has
// forgotten that it did: it has to stop. For good, since whoever knows better may be away when the next
// process starts. Also if it is the same one, which was given it back: what it knows of inodes is from
// before, and it would issue their ids once more.
void Site::Impl::contest(const SiteName& owner, Epoch epoch) {
  const bool another = owner != parts.self;
  const std::string why = fmt::format(
      "{} is said to own at epoch {}, and this site, which owns at {}, does not know of it: was its state "
      "put back from a backup? It refuses changes from now on: unmount, {}",
      owner, epoch, ownership.epoch,
      another ? "save what is wanted of its store, and join anew"
              : "delete the state folder and .sharefs in the store, and init anew; the others join anew");
  if (why == contested) return;
  contested = why;
  spdlog::error(contested);
  gate.refuse_changes();
  beginning.reset();
  if (std::string passed; source) source->abort(passed);
  if (another) server.redirect(owner, epoch);
  try {
    state.set_setting(kContestedSetting, fmt::format("{} {}", epoch, owner));
  } catch (const std::exception& error) {  // a full disk
    spdlog::warn("that {} owns is not noted: {}", owner, error.what());
  }
}

// What an earlier process has heard.
void Site::Impl::recall_contest() {
  std::istringstream words(state.setting(kContestedSetting));
  Epoch epoch = 0;
  if (SiteName owner; words >> epoch >> owner) contest(owner, epoch);
}

// Another site says who owns at which epoch. Believed when it is newer than what this site knows — unless
// this site is the owner.
void Site::Impl::learn(const SiteName& owner, Epoch epoch) {
  if (epoch <= ownership.epoch || !transport.knows(owner)) return;
  if (is_owner()) return contest(owner, epoch);
  if (owner == parts.self) return;  // only a commit makes this site the owner
  ownership.owner = owner;
  ownership.epoch = epoch;
  ownership.burnt = std::max(ownership.burnt, epoch);
  believe_owner();
  peer.set_owner(owner, epoch);
  server.redirect(owner, epoch);
  // It cannot recall what this mount shows.
  if (!transport.connected(owner)) show_nothing_old();
  if (target && target->epoch() <= epoch)
    target->abandon(fmt::format("{} owns at epoch {}: it cannot be committed any more", owner, epoch));
  if (source) source->owned_since(epoch, client);
  // Last, since it may fail (a full disk): another process would hear of it again.
  try {
    state.set_ownership(ownership);
  } catch (const std::exception& error) {
    spdlog::warn("that {} owns now is not noted: {}", owner, error.what());
  }
}

// The site's processes but this one have ended.
void Site::Impl::expire(const SiteName& site, ClientId except) {
  leases.expire(site, except);
  coherence.expire_site(site, except);
  server.expire(site, except);
}

// Of whose new processes this one has heard, but not as an owner whose gate was open: what is handed over
// must not change meanwhile. Clients of a site only grow.
void Site::Impl::expire_ended() {
  std::map<SiteName, ClientId> ended;
  for (const auto& [mount, site] : opens.clients()) {
    const auto heard = incarnations.find(site);
    if (heard != incarnations.end() && mount < heard->second) ended.insert(*heard);
  }
  for (const auto& [site, present] : ended) expire(site, present);
}

// Whoever may be believed now, this mount need not be the only one any more.
void Site::Impl::end_sole() {
  if (sole) sole_until = Reactor::Clock::now();
  sole = false;
  believe_owner();
  if (front_end) front_end->set_policy(kSharedMount);
}

// A site that is away for longer than others wait for it does not keep what is deleted.
void Site::Impl::watch_absence(const SiteName& site) {
  reactor.cancel(absences[site]);
  absences[site] = reactor.after(kLease, [this, site, watch = std::weak_ptr(alive)] {
    if (watch.expired() || transport.connected(site)) return;
    coherence.away(site);
    std::vector<std::function<void(bool)>> unasked;
    for (const auto& [number, sent] : recalls)
      if (sent.to == site && sent.order.orphan) unasked.push_back(sent.done);
    std::erase_if(recalls, [&](const auto& one) { return one.second.to == site && one.second.order.orphan; });
    for (const auto& done : unasked) done(false);
  });
}

// The owner cannot be reached, and will soon not wait any longer for this mount to follow its recalls
// (kLease): from now on whoever looks waits for the owner, too.
void Site::Impl::show_nothing_old() {
  names.forget_all();
  if (!front_end) return;
  std::set<InodeId> open;
  for (const auto& handle : holdings.opens().all())
    if (handle.client == client && !handle.directory) open.insert(handle.id);
  front_end->invalidate_all({open.begin(), open.end()});
}

// From what the names and attributes are believed to come. The only mount is promised nothing: its kernel
// keeps them by itself.
void Site::Impl::believe_owner() {
  names.believe(sole ? 0 : ownership.epoch, !is_owner());
  write_behind.distrust();
}

std::vector<std::uint64_t> Site::Impl::handles_of(InodeId id) const {
  std::vector<std::uint64_t> handles;
  for (const auto& open : holdings.opens().all())
    if (open.client == client && open.id == id && !open.directory) handles.push_back(open.handle);
  return handles;
}

// For what mounts acknowledge before it is performed, and cannot take back.
bool Site::Impl::has_room() const {
  constexpr std::uint64_t kRoom = 10 * WriteBehind::kMostBytes;
  struct statvfs space {};
  return ::fstatvfs(store_fd.get(), &space) == 0 && space.f_bavail * space.f_frsize > kRoom;
}

// ---- the mount

pb::Request Site::Impl::own_request() {
  pb::Request request;
  request.set_client(client);
  request.set_seq(kOwnSeqBit | ++own_seq);
  return request;
}

void Site::Impl::attach(std::function<void(int)> on_attached) {
  pb::Request request = own_request();
  request.mutable_attach()->set_site(parts.self);
  router.execute(request, {}, [on_attached = std::move(on_attached)](const pb::Outcome& outcome, Bytes) {
    on_attached(static_cast<int>(outcome.error()));
  });
}

// For an operator.
std::string Site::Impl::why_not_connected(const SiteName& site) {
  const std::string who = (site == ownership.owner ? "the owner " : "") + site;
  const std::string name = state.setting("data_set");
  std::string where;
  for (const auto& known : state.sites())
    if (known.name == site && !known.endpoint.empty()) where = " at " + known.endpoint;
  if (const auto objection = transport.objection(site); !objection.empty())
    return fmt::format("{} is reached{}, but {}", who, where, objection);
  switch (transport.trouble(site)) {
    case Transport::Trouble::refused:
      return fmt::format(
          "{} does not accept the key of this site: it was removed there, or the state of {} was restored "
          "from before it joined; delete {} and join again",
          who, site, options.folder.string());
    case Transport::Trouble::one_way:
      return fmt::format(
          "{} is reached{}, but does not reach this site at {}: does that lead here, and does a firewall let "
          "it through? \"sharefs invite {} --listen tcp://HOST:PORT\" gives this site another address",
          who, where, endpoint, name);
    case Transport::Trouble::unreachable:
      break;
  }
  return fmt::format(
      "{} cannot be reached{}: is its daemon running (\"sharefs mount {} MOUNTPOINT\" or "
      "\"sharefs serve {}\" there), does this machine know that host, and does a firewall let it through?{}",
      who, where, name, name,
      site == ownership.owner ? " README.md says what to do when the owner is lost for good" : "");
}

void Site::Impl::start(const std::function<void(std::string)>& ready) {
  // Not before: whoever invites from now on can tell this process.
  load_invitations();
  if (!options.mountpoint) {
    state.set_setting("mountpoint", "");
    write_behind.replay([this] { nothing_unsent(); });
    return ready("");
  }
  const auto answered = std::make_shared<bool>(false);
  const auto timer = reactor.after(kAttachPatience, [this, answered, ready] {
    if (*answered) return;
    const std::string why =
        transport.connected(ownership.owner)
            ? fmt::format("the owner {} is connected, but has not let this mount in yet", ownership.owner)
            : why_not_connected(ownership.owner);
    if (options.patient) return spdlog::warn("waiting: {}", why);
    *answered = true;
    ready(why);
  });
  // Before this mount is known, whose predecessor's are not admitted any more then.
  write_behind.replay([this, answered, ready, timer] {
    nothing_unsent();
    mount(answered, ready, timer);
  });
}

void Site::Impl::nothing_unsent() {
  try {
    if (!state.setting(kUnsentSetting).empty()) state.set_setting(kUnsentSetting, "");
  } catch (const std::exception& error) {  // a full disk
    spdlog::warn("that all writes have been sent is not noted: {}", error.what());
  }
}

void Site::Impl::mount(const std::shared_ptr<bool>& answered, const std::function<void(std::string)>& ready,
                       Reactor::TimerId timer) {
  attach([this, answered, ready, timer](int error) {
    if (*answered) return;
    *answered = true;
    reactor.cancel(timer);
    if (error)
      return ready(
          error == ETIMEDOUT
              ? fmt::format("the owner {} does not answer within --timeout: is its daemon running?",
                            ownership.owner)
              : fmt::format("the owner {} refuses this mount: {}", ownership.owner, std::strerror(error)));
    attached = true;
    try {
      front_end = std::make_unique<FrontEnd>(
          FrontEnd::Options{
              .mountpoint = *options.mountpoint,
              .data_set = state.setting("data_set"),
              .mount_options = options.mount_options,
              .opens_at_once = [this](InodeId id,
                                      std::uint32_t type) { return !is_owner() && names.is_there(id, type); },
              .keeps_pages = [this](InodeId id) { return names.keeps_pages(id); },
              .must_flush = [this](InodeId id,
                                   std::uint64_t handle) { return write_behind.must_flush(id, handle); },
              .lend_attributes = [this](const pb::Attr& attr, bool held) { return names.lend(attr, held); },
              .let_go = [this](InodeId id) { names.let_go(id); }},
          reactor, names, client, ended);
      front_end->set_policy(sole ? kSoleMount : kSharedMount);
      state.set_setting("mountpoint", options.mountpoint->string());
    } catch (const std::exception& failure) {
      return ready(failure.what());
    }
    ready("");
  });
}

void Site::Impl::stop(const std::function<void()>& stopped) {
  const bool mounted = front_end != nullptr;
  front_end.reset();
  write_behind.sync();
  const auto left = write_behind.unsent();
  // Whoever leaves sharefs finds the owner's store complete.
  try {
    tree.finish();
  } catch (const std::exception& error) {
    spdlog::error("the files are not all in place: {}", error.what());
  }
  try {
    if (mounted) state.set_setting("mountpoint", "");
    state.set_setting(kUnsentSetting, left != 0 ? std::to_string(left) : "");
  } catch (const std::exception& error) {  // a full disk keeps nobody from leaving
    spdlog::error("{}", error.what());
  }
  // A Detach says that nothing is left.
  if (!attached || left != 0) return stopped();
  attached = false;
  const auto once = std::make_shared<bool>(false);
  const auto finish = [once, stopped] {
    if (!std::exchange(*once, true)) stopped();
  };
  reactor.after(kDetachPatience, finish);
  pb::Request request = own_request();
  request.mutable_detach();
  router.execute(request, {}, [finish](const pb::Outcome&, Bytes) { finish(); });
}

}  // namespace sharefs
