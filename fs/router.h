// Sends each request to whoever performs it now: this site's gate when it is the owner, the Peer otherwise.
#pragma once

#include <utility>

#include "meta/executor.h"

namespace sharefs {

class Router final : public Executor {
 public:
  // Where requests go from now on. Not owned. Reactor thread.
  void route_to(Executor& executor) { target_ = &executor; }
  void execute(const pb::Request& request, Bytes data, Reply reply) override {
    target_->execute(request, data, std::move(reply));
  }

 private:
  Executor* target_ = nullptr;
};

}  // namespace sharefs
