// The inside of Site, shared by the files that implement it: site.cc (parts and roles), site_links.cc
// (messages of other sites), site_commands.cc (the operator's commands).
#pragma once

#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <random>
#include <set>
#include <system_error>

#include "fs/front_end.h"
#include "fs/name_cache.h"
#include "fs/once.h"
#include "replication/handoff_source.h"
#include "replication/handoff_target.h"
#include "replication/holdings.h"
#include "replication/site.h"
#include "replication/site_parts.h"
#include "replication/tree_place.h"
#include "replication/unsynced.h"
#include "replication/verify.h"
#include "replication/write_behind.h"

namespace sharefs {

// One comparison of this site's copy with another's (`verify`).
struct Verification {
  SiteName with;
  bool other_is_owner = false;
  DigestComparison comparison;
  std::uint64_t number = 0;
  Epoch epoch = 0;  // of the ownership when it began: no page of another one is compared
  std::optional<std::uint64_t> asked_here, asked_there;  // numbers of the pages that are awaited
  std::function<void(nlohmann::json)> reply;
};

// A recall that another site has not answered.
struct SentRecall {
  SiteName to;
  RecallOrder order;
  std::function<void(bool referenced)> done;
};

struct Site::Impl {
  Impl(Options options, Reactor& reactor, std::function<void()> ended);
  ~Impl();

  // site.cc
  std::string why_not_connected(const SiteName& site);
  void start(const std::function<void(std::string)>& ready);
  void mount(const std::shared_ptr<bool>& answered, const std::function<void(std::string)>& ready,
             Reactor::TimerId timer);
  void stop(const std::function<void()>& stopped);
  bool is_owner() const { return ownership.owner == parts.self; }
  // `moving`: ownership has just changed, so the tree must move; otherwise the process begins.
  void serve_as_owner(bool moving);
  void follow(const SiteName& owner, Epoch epoch, bool moving);
  std::string stranger();
  void refuse_strangers();
  void continue_handoff();
  void delete_leftovers();
  HandoffSource::Events source_events();
  HandoffTarget::Events target_events();
  void take_ownership(Epoch epoch);
  void give_ownership(const SiteName& owner, Epoch epoch);
  void sync_old_image();
  void attach(std::function<void(int)> attached);
  pb::Request own_request();
  void recall(const RecallOrder& order, std::function<void(bool)> done);
  void recall_at(const SiteName& site, const RecallOrder& order, std::function<void(bool)> done);
  Reactor::Clock::duration extension(ClientId holder, Reactor::Clock::duration ago);
  Reactor::Clock::duration recovery_extension();
  void recall_everywhere(const RecallOrder& order, const std::function<void(bool)>& done);
  void send_recall(std::uint64_t number, const SentRecall& sent);
  void send_recalls_again(const SiteName& to);
  void forget_recalls(const SiteName& to);
  void expire(const SiteName& site, ClientId except);
  void expire_ended();
  void show_nothing_old();
  void obey(const RecallOrder& order, std::function<void(bool)> done);
  void learn(const SiteName& owner, Epoch epoch);
  void contest(const SiteName& owner, Epoch epoch);
  void recall_contest();
  void believe_owner();
  void end_sole();
  void nothing_unsent();
  bool has_room() const;
  std::vector<std::uint64_t> handles_of(InodeId id) const;
  std::set<SiteName> sites_with_mounts();
  void watch_absence(const SiteName& site);

  // site_links.cc
  void subscribe();
  pb::Hello hello() const;
  void connected(const SiteName& site, const pb::Hello& hello, Gap gap);
  void note_power(const SiteName& site, const pb::Hello& said);
  void merge_sites(const SiteName& from, const pb::Hello& said);
  void drop_site(const SiteName& site);
  void forget_handoffs_from(const SiteName& site);
  void lost(const SiteName& site);
  void recall_done(const SiteName& from, const pb::RecallDone& done);
  void join(const std::string& route, const std::string& public_key, const pb::Join& join);
  void prepare(const SiteName& from, const pb::Prepare& prepare);
  std::string objection(const SiteName& from, const pb::Prepare& prepare) const;
  void judged(const SiteName& from, const pb::Prepare& prepare, std::string why_not);
  void become_target(const SiteName& from, const pb::Prepare& prepare);
  bool holds_image() const;
  void inquire(const SiteName& from, const pb::Inquire& inquire);
  void completed_already(const SiteName& from, const pb::Envelope& head);
  void load_invitations();

  // site_commands.cc
  using JsonReply = std::function<void(nlohmann::json)>;
  void command(const nlohmann::json& request, JsonReply reply);
  void try_again(nlohmann::json request, const JsonReply& reply, const std::string& why);
  void wait_for(const SiteName& site, const nlohmann::json& request, const JsonReply& reply);
  void ask_owner(const nlohmann::json& request, JsonReply reply);
  void migrate(const nlohmann::json& request, JsonReply reply);
  void measured(const HandoffSource::Options& options, const std::shared_ptr<const SiteName>& asked,
                const JsonReply& reply);
  void dry_run(const HandoffSource::Options& options, JsonReply reply);
  void remove(const nlohmann::json& request, const JsonReply& reply);
  void answer_command(std::uint64_t number, const SiteName& from, nlohmann::json answer);
  void end_commands(const SiteName& asked);
  void await_reply(std::uint64_t number, const SiteName& from, Reactor::Clock::duration patience);
  nlohmann::json handoff_json();
  nlohmann::json status_json();
  void verify(const nlohmann::json& request, JsonReply reply);
  void verify_next();
  std::string prepare_verify();
  std::string no_copy();
  void page_read(pb::VerifyReply& page);
  void verify_ends(nlohmann::json result);
  void verify_lost(const SiteName& site);
  void verify_goes_on(const SiteName& site);
  void verify_page(bool here, const pb::VerifyReply& page);

  // constant after construction
  Options options;
  Reactor& reactor;
  std::function<void()> ended;
  std::uint64_t data_set_id;

  // the parts, lower ones first
  Database database;
  State state;
  const std::string endpoint = state.setting("endpoint");  // where this process can be reached
  const ClientId client;  // this process, as the owner knows it; also its incarnation for other sites
  Power power;
  Received received;
  // The store, opened before anything is mounted over it: its path would lead back into our own mount.
  UniqueFd store_fd;
  DiskSync disk{store_fd.get()};
  UniqueFd area_fd;                  // locked
  std::filesystem::path store_path;  // leads through store_fd
  std::atomic<bool> ending{false};   // any thread
  std::unique_ptr<Workers> workers;
  InodeTable inodes;
  OpenTable opens;
  LockTable locks;
  ChangeLog log;
  Store store;
  TreePlace tree;
  Once once;
  Promises promises;
  Coherence coherence;
  Gate gate;
  Pace pace;
  WriteLeases leases;
  Transport transport;
  Peer peer;
  RequestServer server;
  Router router;
  Holdings holdings;
  Unsynced unsynced;
  WriteBehind write_behind;
  NameCache names;
  SiteParts parts;
  std::unique_ptr<FrontEnd> front_end;

  // reactor thread
  Ownership ownership;
  std::string contested;  // who else is said to own, at a later epoch; empty: nobody
  std::unique_ptr<HandoffSource> source;
  std::shared_ptr<const SiteName> beginning;  // to whom, while the tree is measured
  nlohmann::json unnoted;  // the last handoff from here, if its end could not be noted; otherwise null
  std::unique_ptr<HandoffTarget> target;
  std::unique_ptr<ImageTarget> leftovers;  // of an earlier process, being deleted
  std::unique_ptr<Verification> verification;
  bool sole = false;  // told by the owner: this is the only mount
  // The last time that it was. For a while yet its kernel may answer by itself.
  Reactor::Clock::time_point sole_until = {};
  bool attached = false;
  std::uint64_t own_seq = 0;
  std::uint64_t latest_attempt = 0;  // that another site has asked this one to take part in; 0: it is over
  SiteName latest_source;            // that site
  // Of recalls, commands and verifications sent. No later process uses one again: whoever was asked by this
  // one may answer late.
  std::uint64_t next_number = client;
  std::map<std::uint64_t, SentRecall> recalls;
  struct Command {
    SiteName asked;
    JsonReply reply;
  };
  std::map<std::uint64_t, Command> commands;
  std::map<SiteName, ClientId> incarnations;      // the present processes of other sites, as last heard
  std::map<SiteName, std::uint64_t> powers;       // Hello.power of other sites, as last heard
  std::map<SiteName, Reactor::TimerId> absences;  // of watch_absence
  std::map<SiteName, Reactor::Clock::time_point> doubted;  // when it was last logged that one is not believed
  std::shared_ptr<int> alive = std::make_shared<int>();
};

}  // namespace sharefs
