#include "fs/front_end.h"

#include <utility>

#include "fs/fuse_server.h"

namespace sharefs {

struct FrontEnd::Impl {
  FuseServer server;
};

FrontEnd::FrontEnd(const Options& options, Reactor& reactor, Executor& executor, std::uint64_t client,
                   std::function<void()> unmounted)
    : impl_(new Impl{FuseServer(options, reactor, executor, client, std::move(unmounted))}) {}

FrontEnd::~FrontEnd() = default;

std::uint64_t FrontEnd::client() const { return impl_->server.client(); }

void FrontEnd::set_policy(CachePolicy policy) { impl_->server.set_policy(policy); }

void FrontEnd::invalidate(InodeId id, std::uint64_t offset, std::uint64_t length,
                          std::function<void()> done) {
  impl_->server.invalidate(id, offset, length, std::move(done));
}

void FrontEnd::invalidate_all(std::vector<InodeId> ids) { impl_->server.invalidate_all(std::move(ids)); }

void FrontEnd::promise_broken(const std::vector<InodeId>* ids, const std::vector<InodeId>& lent,
                              std::function<void()> done) {
  impl_->server.promise_broken(ids, lent, std::move(done));
}

bool FrontEnd::watch_orphan(InodeId id) { return impl_->server.watch_orphan(id); }

std::chrono::nanoseconds FrontEnd::take_longest_wait() { return impl_->server.take_longest_wait(); }

}  // namespace sharefs
