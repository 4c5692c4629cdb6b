// Encrypted, authenticated messages between the sites of one data set, over ZeroMQ.
//
// Every site binds one ROUTER (its listen endpoint) and connects two DEALERs to each other site: lane
// `requests` for what callers wait for, lane `bulk` for the image and the log, so that a megabyte of image
// never stands before a request. A message from A to B always travels on A's DEALER to B's ROUTER; answers go
// the same way back, on B's own DEALER. CURVE authenticates both ends; a ZAP handler admits the registered
// keys and one-use invitation keys (for Join only), and the sender's name is what its key is registered for.
//
// Threads: reactor thread only. ZeroMQ's own I/O threads encrypt and send.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "meta/reactor.h"
#include "meta/types.h"
#include "replication/wire.pb.h"

namespace sharefs {

// What this site speaks. Thousands are the major part: sites of different major parts refuse each other.
constexpr std::uint32_t kProtocolVersion = 2000;
constexpr std::uint32_t protocol_major(std::uint32_t version) { return version / 1000; }

// A frame larger than this ends the connection that it came on.
constexpr std::size_t kMaxFrame = std::size_t{256} << 20;
// Opaque frames after the envelope; a message with more is dropped.
constexpr std::size_t kMaxParts = 8;
// Of the bytes of a request or an outcome.
constexpr std::size_t kPartBytes = std::size_t{128} << 10;
// Of one data set, this one included: each costs a process two connections, or some ten descriptors.
constexpr std::size_t kMostSites = 50;
// Keys that are remembered for never being accepted again; beyond that only those of sites that are known.
constexpr std::size_t kMostRemoved = 1000;

struct Message {
  pb::Envelope head;
  std::vector<zmq::message_t> parts;
};

enum class Lane { requests, bulk };

// What has happened to a connection since it was last told of: nothing; the site could not be believed for a
// while, since it was not heard or did not answer in time, but every message arrives; a connection broke or
// was made again, or a process ended, so messages of either direction may be lost.
enum class Gap { none, doubt, broken };

struct CurveKeys {
  std::string public_key;  // Z85
  std::string secret_key;
};
CurveKeys make_curve_keys();

// The bytes, copied once, as a part to send.
zmq::message_t copy_to_message(Bytes bytes);
// The same in pieces if they are many, so that one is encrypted while another is on its way and a third
// decrypted; and how they are put together again: in `buffer` if they are several. Nothing for no bytes.
std::vector<zmq::message_t> copy_to_parts(Bytes bytes);
Bytes join_parts(const std::vector<zmq::message_t>& parts, std::string& buffer);
// The envelope as a frame: for what is sent more than once (zmq::message_t::copy shares the bytes).
zmq::message_t serialize(const pb::Envelope& head);

class Transport {
 public:
  struct Options {
    SiteName site;
    std::string listen;  // tcp://HOST:PORT; empty: no other site can be reached
    CurveKeys keys;
  };
  using Handler = std::function<void(const SiteName& from, Message message)>;
  // Since construction.
  struct Counters {
    std::uint64_t received = 0;       // messages of other sites that were understood
    std::uint64_t malformed = 0;      // dropped: not an envelope, wrong frames, not allowed from this sender
    std::uint64_t refused = 0;        // handshakes with a key that is not registered
    std::uint64_t undeliverable = 0;  // sent while there was no connection
  };

  // Binds. Throws std::runtime_error with one clear line. Not destroyed from within a callback of its own.
  Transport(Options options, Reactor& reactor);
  ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  // Registers another site: its key is accepted, its endpoint connected to. Known sites are updated; this
  // site itself is ignored. Throws std::runtime_error (and changes nothing) for a bad name, endpoint or key,
  // or another site's key.
  void add_site(const SiteName& site, const std::string& endpoint, const std::string& public_key);
  // Its key is not accepted any more, and nothing is sent to it but what has been queued.
  void remove_site(const SiteName& site);
  // Admits one Join from the holder of this key; removed by the caller once used.
  void admit_invitation(const std::string& public_key);
  void remove_invitation(const std::string& public_key);

  // Queues the message; never blocks. Without a connection it is dropped: who needs an answer asks again when
  // `connected` is called for the site.
  void send(const SiteName& to, Lane lane, const pb::Envelope& head, std::vector<zmq::message_t> parts = {});
  void send(const SiteName& to, Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts = {});
  // The same on the requests lane for what nobody waits for: it may wait up to kLaziness, to travel behind
  // the next message to that site. Each message that is sent by itself wakes the threads between two sites,
  // which then have the core of whoever performs the request that somebody waits for.
  void send_soon(const SiteName& to, zmq::message_t head);
  // Answers a Join, on the connection it came from (an invited site cannot be connected to yet).
  void reply_to_join(const std::string& route, const pb::Envelope& head);

  // Called for each message whose body is of this kind. One handler per kind. What a handler throws is
  // logged, and the message dropped.
  void subscribe(pb::Envelope::BodyCase kind, Handler handler);
  using JoinHandler =
      std::function<void(const std::string& route, const std::string& public_key, const pb::Join&)>;
  void on_join(JoinHandler handler);

  // `connected`: both directions work and the peer's Hello has arrived. It is called again when a Hello
  // brings news, and after a gap. After Gap::broken, of which both ends are told, whatever was unanswered is
  // asked again; after Gap::doubt it must not be, or a link that is too slow for what is asked gets ever
  // more. `lost`: nothing heard within kLiveness, not even a part of a message.
  void on_connection(std::function<void(const SiteName&, const pb::Hello&, Gap)> connected,
                     std::function<void(const SiteName&)> lost);
  // What this site says first on every connection; made anew each time. Version and incarnation are filled in
  // if unset, the connection always.
  void set_hello(std::function<pb::Hello()> hello);
  // Says it again to every connected site: it has news.
  void greet_all();
  // Whether it is this site, or registered.
  bool knows(const SiteName& site) const;

  bool connected(const SiteName& site) const;
  // Of a site that is not connected: nothing comes of connecting to it; it refuses this site's key; it is
  // reached, and does not reach this site, or refuses its Hello.
  enum class Trouble { unreachable, refused, one_way };
  Trouble trouble(const SiteName& site) const;
  // Why this site refuses the other one's Hello, or empty.
  std::string objection(const SiteName& site) const;
  // Whether both directions work, and a question that was asked less than `within` ago has been answered.
  // Never true of a time at which this machine slept.
  Reactor::Clock::duration trusted_for(const SiteName& site, Reactor::Clock::duration within) const;
  // For how long it is known that what was sent `ago` ago has arrived (Liveness::arrived); nothing: it is not
  // known.
  std::optional<Reactor::Clock::duration> arrived(const SiteName& site, Reactor::Clock::duration ago) const;
  Reactor::Clock::duration silence(const SiteName& site) const;     // since it was last heard
  Reactor::Clock::duration round_trip(const SiteName& site) const;  // shortest of the last few; zero: unknown
  std::string endpoint() const;                                     // with the port that was bound
  const SiteName& site() const;
  const Counters& counters() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Throws std::runtime_error if a site cannot have this name.
void check_name(const SiteName& name);
// Throws std::runtime_error if this is not tcp://HOST:PORT.
void check_endpoint(const std::string& endpoint);
// Throws std::runtime_error with one clear line if this machine cannot listen there now: not an address of
// its own, or a port that is in use.
void check_can_listen(const std::string& endpoint);

// How long a message that nobody waits for may wait for company.
constexpr auto kLaziness = std::chrono::milliseconds(1);
constexpr auto kPingInterval = std::chrono::milliseconds(250);
constexpr auto kLiveness = std::chrono::milliseconds(1500);
static_assert(kLiveness > 4 * kPingInterval);

// The invited site's end of a Join, before it has a Transport: asks the site at `endpoint` and waits for its
// answer. Throws std::runtime_error with one clear line: unreachable, refused (token used, expired), another
// version, or the error that the reply names.
pb::JoinReply join_by_invitation(const std::string& endpoint, const std::string& server_public_key,
                                 const CurveKeys& invitation, const pb::Join& join,
                                 std::chrono::milliseconds timeout);

}  // namespace sharefs
