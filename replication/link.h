// The connection to one other site: two DEALER sockets, and what is known of whether the site lives.
//
// Invariants
//  - Nothing is sent before both lanes are connected, so that the Hello is the first message on the requests
//  lane.
//  - A message that cannot be sent at once is dropped (ZMQ_IMMEDIATE): nothing stale waits for a
//  reconnection.
//
// Threads: reactor thread only.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "meta/reactor.h"
#include "replication/transport.h"

namespace sharefs {

// Receives one frame without waiting; false: none there.
bool receive_frame(zmq::socket_t& socket, zmq::message_t& frame);
// Sends one frame without waiting; false: it could not be queued.
bool send_frame(zmq::socket_t& socket, zmq::message_t& frame, bool more);

// Ends the events of a socket: before whoever reads them goes, or ZeroMQ's thread would wait for the reader
// for ever.
void stop_monitor(zmq::socket_t& socket);

// What every socket of a site has in common: bounds, no lingering.
void set_common_options(zmq::socket_t& socket, const std::string& endpoint);
// Throws std::runtime_error unless the key is a Z85 CURVE key.
void check_key(const std::string& key);

// A socket whose descriptor the reactor watches. ZeroMQ's descriptor tells of commands, not of messages:
// `ready` must receive until there is nothing left, and whoever sends on a socket that is also read looks at
// it again afterwards.
class WatchedSocket {
 public:
  WatchedSocket(zmq::socket_t socket, Reactor& reactor, Reactor::Task ready);
  ~WatchedSocket();
  WatchedSocket(const WatchedSocket&) = delete;
  WatchedSocket& operator=(const WatchedSocket&) = delete;
  zmq::socket_t& operator*() { return socket_; }
  zmq::socket_t* operator->() { return &socket_; }

 private:
  zmq::socket_t socket_;
  Reactor& reactor_;
  int fd_;
};

// Whether both directions work, told from pongs and silence. Times are given by the caller.
class Liveness {
 public:
  using Clock = Reactor::Clock;

  void heard(Clock::time_point now) { last_heard_ = now; }
  // The connection, or the process behind it, may be another one: only a pong to a ping sent from now on
  // proves it.
  void doubt(Clock::time_point now);
  // A pong to a ping sent at `sent`. True if that is the proof that was missing.
  bool pong(Clock::time_point sent, Clock::time_point now);
  // True if a site that was proven is silent, or unproven again, for longer than kLiveness; told once.
  bool expired(Clock::time_point now);
  // This process itself did not run for that long: nobody else is to blame.
  void forgive(Clock::duration pause);

  bool proven() const { return proven_; }
  Clock::time_point asked() const { return asked_; }  // when the latest ping that was answered was sent
  // For how long it is known that what was sent at `then` has arrived; nothing: it is not known. What has
  // been known for longer than kRemembered is known for that long.
  std::optional<Clock::duration> arrived(Clock::time_point then, Clock::time_point now) const;
  static constexpr std::chrono::seconds kRemembered{10};
  Clock::duration silence(Clock::time_point now) const { return now - last_heard_; }
  // The shortest of the last few: one that waited in a queue, or out a broken connection, says nothing of the
  // link.
  Clock::duration round_trip() const;

 private:
  bool proven_ = false;
  bool announced_ = false;
  Clock::time_point last_heard_{};
  Clock::time_point asked_{};
  struct Answered {
    Clock::time_point sent, came;
  };
  std::deque<Answered> answered_;  // pings, in the order in which they were sent
  Clock::time_point proof_from_{};
  Clock::time_point doubted_{};
  std::array<Clock::duration, 8> samples_{};
  std::size_t sampled_ = 0;  // how many so far
};

// The connections that come from one site, as the kernel counts their bytes: on a slow link a message takes
// longer to arrive than a site may be silent, and ZeroMQ tells of it when it is whole.
class Inflow {
 public:
  // A message has come from `route`, whose connection is that of this frame.
  void came(const zmq::message_t& route, zmq::message_t& frame);
  // Whether more has arrived since the last time than what ZeroMQ's own threads send without being told to.
  bool flows();

 private:
  struct Connection {
    std::string route;
    int fd = -1;
    std::uint64_t cookie = 0;  // the descriptor may have become another socket's
    std::uint64_t bytes = 0;
  };
  std::array<Connection, 2> connections_;  // one for each lane
  std::size_t oldest_ = 0;
};

class Link {
 public:
  // `changed` is called when the link has come up or gone down.
  Link(SiteName site, zmq::context_t& context, Reactor& reactor, const CurveKeys& keys,
       std::function<void(Link&)> changed);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // Connects, or connects anew when either differs from before. An empty endpoint: only listens to the site.
  void connect_to(const std::string& endpoint, const std::string& public_key);
  // An address that has changed is told by who has it, in the last Hello, before there is a connection to it.
  // Not as fast as it can be told: it may be any host's.
  void follow(Reactor::Clock::time_point now);
  // Called now and then: connects anew where ZeroMQ would not, or not soon.
  void maintain(Reactor::Clock::time_point now);
  void widen(Gap by) { gap = std::max(gap, by); }
  // Both lanes are connected and authenticated.
  bool up() const { return lanes_[0].ready && lanes_[1].ready; }
  bool up_for(Reactor::Clock::duration time) const {
    return up() && Reactor::Clock::now() - changed_at_ >= time;
  }
  // The last handshake failed because the site does not accept this one's key.
  bool refused() const { return refused_; }
  bool send(Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts);
  // A message of the requests lane that may wait a moment, to travel behind the next one.
  void send_soon(zmq::message_t head);
  // A site never sends on our DEALERs; what comes all the same is dropped, so that it cannot pile up.
  void discard_incoming();

  const SiteName& site() const { return site_; }
  const std::string& public_key() const { return public_key_; }

  Liveness liveness;
  Inflow inflow;
  std::optional<pb::Hello> hello;               // the last one that was acceptable
  std::string objection;                        // to the last one, if it was not
  std::uint64_t connections = 0;                // how often both lanes came up
  Gap gap = Gap::broken;                        // that nobody has been told of
  Reactor::Clock::time_point refusal_logged{};  // when a Hello was last refused aloud

 private:
  struct LaneState {
    std::unique_ptr<WatchedSocket> dealer;
    std::unique_ptr<WatchedSocket> monitor;
    bool ready = false;
  };
  void reconnect();
  void open_lane(std::size_t lane);
  void close_lane(std::size_t lane);
  void read_monitor(std::size_t lane);
  void event(std::size_t lane, unsigned event, unsigned value);
  bool send_now(Lane lane, zmq::message_t head, std::vector<zmq::message_t> parts);
  void send_delayed();

  // constant after construction
  SiteName site_;
  zmq::context_t& context_;
  Reactor& reactor_;
  const CurveKeys& keys_;
  std::function<void(Link&)> changed_;
  // reactor thread
  std::string endpoint_;
  std::string public_key_;
  std::array<LaneState, 2> lanes_;
  std::vector<zmq::message_t> delayed_;
  Reactor::TimerId delay_ = 0;
  Reactor::Clock::time_point changed_at_{};  // when the connections were asked for, came up or went down
  Reactor::Clock::time_point followed_{};    // when another address was last connected to
  bool handshake_failed_ = false;
  bool refused_ = false;
  bool turned_away_ = false;     // told so on a connection from before; the next handshake is refused
  bool failure_logged_ = false;  // since the last handshake that succeeded
};

}  // namespace sharefs
