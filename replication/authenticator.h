// Decides who may talk to this site: the ZAP handler of one ZeroMQ context (RFC 27).
//
// ZeroMQ asks on inproc://zeromq.zap.01 for each CURVE handshake. An admitted connection's messages carry the
// key, in Z85, as their property "User-Id"; who that is gets looked up for each message, so a key that is no
// longer registered is out at once.
//
// Threads: reactor thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <zmq.hpp>

#include "meta/reactor.h"
#include "replication/link.h"

namespace sharefs {

class Authenticator {
 public:
  // `admits` says whether a key may connect. Made before the first socket of the context binds.
  Authenticator(zmq::context_t& context, Reactor& reactor,
                std::function<bool(const std::string& key)> admits);

  // The key is registered now: should it ever be refused again, that is logged again.
  void forget_refusal(const std::string& key) { refused_keys_.erase(key); }
  std::uint64_t refused() const { return refused_; }

 private:
  void serve();
  bool serve_one();
  bool judge(const std::vector<zmq::message_t>& request, std::string& key);

  std::function<bool(const std::string& key)> admits_;
  std::unordered_set<std::string> refused_keys_;  // logged already
  std::uint64_t refused_ = 0;
  WatchedSocket socket_;
};

}  // namespace sharefs
