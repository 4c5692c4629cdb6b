// Recalls: how an owner's orders reach every mount, and what a mount does when it gets one.
#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "replication/site_impl.h"

namespace sharefs {

void Site::Impl::recall(const RecallOrder& order, std::function<void(bool)> done) {
  const auto holder = opens.clients().find(order.client);
  if (order.client == client) return obey(order, std::move(done));
  if (order.client == 0) return recall_everywhere(order, done);
  // A client of this site that is not this process has ended with its process.
  if (holder == opens.clients().end() || holder->second == parts.self) return done(false);
  recall_at(holder->second, order, std::move(done));
}

void Site::Impl::recall_at(const SiteName& site, const RecallOrder& order, std::function<void(bool)> done) {
  // The order to be the only mount, if it has not arrived, must not come after the one that takes it back.
  if (order.sole)
    std::erase_if(recalls, [&](const auto& one) {
      return one.second.to == site && one.second.order.client == order.client &&
             one.second.order.sole.value_or(false);
    });
  const auto number = next_number++;
  const auto& sent =
      recalls.emplace(number, SentRecall{.to = site, .order = order, .done = std::move(done)}).first->second;
  send_recall(number, sent);
  // A site that has not been heard for so long believes nothing any more that it was promised here, since
  // nobody has answered a ping of it. (What an earlier owner has promised, all_names, may be believed for
  // longer.)
  if (!order.names.empty() && transport.silence(site) > kPromiseLease)
    std::exchange(recalls[number].done, [](bool) {})(false);
}

// On a slow link a recall may be behind what the site reads for longer than its lease. It has arrived when a
// ping sent after it was answered, and has the whole lease from then on; a site that is not heard drops what
// it shows by itself (lost()).
Reactor::Clock::duration Site::Impl::extension(ClientId holder, Reactor::Clock::duration ago) {
  const auto found = opens.clients().find(holder);
  if (found == opens.clients().end()) return {};
  return kLease - transport.arrived(found->second, ago).value_or(transport.silence(found->second));
}

// Whoever is heard does not drop what it shows by itself.
Reactor::Clock::duration Site::Impl::recovery_extension() {
  Reactor::Clock::duration longest{};
  for (const auto& site : coherence.unheard())
    longest = std::max(
        longest, kPromiseLease - std::min<Reactor::Clock::duration>(kPromiseLease, transport.silence(site)));
  return longest;
}

// Of those that may have a mount which this owner does not know.
void Site::Impl::recall_everywhere(const RecallOrder& order, const std::function<void(bool)>& done) {
  transport.greet_all();  // only the owner is told what a mount holds
  const std::set<SiteName> unheard = coherence.unheard();
  const auto left = std::make_shared<std::size_t>(unheard.size());
  for (const auto& site : unheard)
    recall_at(site, order, [left, done](bool) {
      if (--*left == 0) done(false);
    });
}

void Site::Impl::send_recall(std::uint64_t number, const SentRecall& sent) {
  pb::Envelope envelope;
  auto* wire = envelope.mutable_recall();
  wire->set_number(number);
  wire->set_client(sent.order.client);
  wire->set_id(sent.order.id);
  wire->set_offset(sent.order.offset);
  wire->set_length(sent.order.length);
  wire->set_orphan(sent.order.orphan);
  if (sent.order.sole) wire->set_sole(*sent.order.sole);
  wire->mutable_names()->Add(sent.order.names.begin(), sent.order.names.end());
  wire->set_all_names(sent.order.all_names);
  wire->set_stamp(sent.order.stamp);
  wire->set_lease(sent.order.lease);
  transport.send(sent.to, Lane::requests, envelope);
}

// Orders may be followed twice.
void Site::Impl::send_recalls_again(const SiteName& to) {
  for (const auto& [number, sent] : recalls)
    if (sent.to == to) send_recall(number, sent);
}

// The process that was asked is gone, and its mount with it: it caches nothing.
void Site::Impl::forget_recalls(const SiteName& to) {
  std::vector<std::function<void(bool)>> gone;
  for (const auto& [number, sent] : recalls)
    if (sent.to == to) gone.push_back(sent.done);
  std::erase_if(recalls, [&](const auto& one) { return one.second.to == to; });
  coherence.reassert(0, to, {}, {});
  for (const auto& done : gone) done(false);
}

void Site::Impl::obey(const RecallOrder& order, std::function<void(bool)> done) {
  if (order.all_names) names.forget_all();
  names.forget(order.names, order.stamp);
  if (order.all_names && order.client == 0) {
    // Perhaps another process of the owner, which does not know that this mount was the only one.
    if (sole) end_sole();
    const auto left = sole_until + CoherenceTiming{}.sole_timeout - Reactor::Clock::now();
    if (left > left.zero()) {
      reactor.after(left, [this, order, done = std::move(done), watch = std::weak_ptr(alive)] {
        if (!watch.expired()) obey(order, done);
      });
      return;
    }
  }
  if (order.all_names || !order.names.empty()) {
    if (!front_end) return done(false);
    const auto* ids = order.all_names ? nullptr : &order.names;
    return front_end->promise_broken(ids, names.take_lent(ids), [done = std::move(done)] { done(false); });
  }
  if (order.client != client) return done(false);  // an earlier incarnation of this mount: it caches nothing
  if (order.lease != 0)
    return write_behind.recall(order.id, order.lease, [done = std::move(done)] { done(true); });
  if (order.sole) {
    if (sole && !*order.sole) sole_until = Reactor::Clock::now();
    sole = *order.sole;
    believe_owner();
    if (!front_end) return done(true);
    front_end->set_policy(sole ? kSoleMount : kSharedMount);
    return front_end->promise_broken(nullptr, names.take_lent(nullptr),
                                     [done = std::move(done)] { done(true); });
  }
  if (!front_end) return done(false);
  if (order.orphan) return done(front_end->watch_orphan(order.id));
  front_end->invalidate(order.id, order.offset, order.length, [done = std::move(done)] { done(true); });
}

}  // namespace sharefs
