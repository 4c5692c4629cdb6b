#include "replication/image_source.h"

#include <sys/statvfs.h>

#include <optional>

#include "meta/fault.h"
#include "replication/batch_sender.h"
#include "replication/cell_shipper.h"
#include "replication/round.h"
#include "replication/sent_set.h"
#include "replication/ship_link.h"
#include "replication/tree_walk.h"

namespace sharefs {

struct ImageSource::Impl {
  Impl(Options given, InodeTable& inode_table, Store& store, Send send, Reactor& reactor)
      : options(std::move(given)),
        inodes(inode_table),
        link(options, std::move(send), reactor),
        sender(options.attempt, link),
        shipper(inodes, store, sender, counters),
        walk(options, inodes, link, sender, shipper, sent) {}

  // constant after construction
  const Options options;
  InodeTable& inodes;
  // thread-safe
  ShipCounters counters;
  ShipLink link;
  std::atomic<std::chrono::nanoseconds> search{};
  // shipping thread
  BatchSender sender;
  SentSet sent;
  CellShipper shipper;
  TreeWalk walk;
  std::optional<Database> database;
};

ImageSource::ImageSource(Options options, InodeTable& inodes, Store& store, Send send, Reactor& reactor)
    : impl_(std::make_unique<Impl>(std::move(options), inodes, store, std::move(send), reactor)) {
  struct statvfs space {};
  if (fstatvfs(inodes.root(), &space) == 0) impl_->counters.estimated_files = space.f_files - space.f_ffree;
}

ImageSource::~ImageSource() = default;

void ImageSource::send_image() {
  impl_->walk.image();
  impl_->sender.flush();
  impl_->shipper.image_ended();
  if (fault_point("image.source.end")) throw std::runtime_error("fault point image.source.end");
  pb::Envelope head;
  head.mutable_image_end()->set_attempt(impl_->options.attempt);
  impl_->link.send(std::move(head), {});
  impl_->link.wait_image_complete();
  impl_->counters.estimated_files = impl_->counters.image_files.load();
}

void ImageSource::ship_round(std::uint64_t after, std::uint64_t through, std::int64_t cut,
                             const std::vector<InodeId>& open, bool final_round) {
  if (fault_point("round.source")) throw std::runtime_error("fault point round.source");
  if (!impl_->database) impl_->database.emplace(impl_->options.database);
  Round changed(impl_->inodes, impl_->sender, impl_->shipper, impl_->sent, impl_->walk);
  const auto entries = read_changes(*impl_->database, after, through,
                                    [&changed](const Change& change) { changed.note(change); });
  for (const InodeId id : open) changed.note_open(id);
  if (final_round) {
    impl_->shipper.tree_is_still();
  } else {
    impl_->shipper.tree_may_change();
  }
  const std::uint64_t bytes_before = impl_->sender.bytes();
  changed.ship(cut);
  impl_->search = impl_->walk.take_search();
  ShipCounters& counters = impl_->counters;
  counters.log_entries += entries;
  counters.log_bytes += impl_->sender.bytes() - bytes_before;
  const std::uint32_t round = ++counters.rounds;
  if (final_round) return;
  pb::Envelope head;
  head.mutable_round_end()->set_attempt(impl_->options.attempt);
  head.mutable_round_end()->set_round(round);
  impl_->link.send(std::move(head), {});
  impl_->link.wait_round_applied(round);
}

void ImageSource::credit(const pb::Credit& credit) { impl_->link.credit(credit.bytes()); }
void ImageSource::need(const pb::Need& need) { impl_->link.need(need); }
void ImageSource::image_complete(const pb::ImageComplete& message) {
  impl_->link.image_complete(message.sync_ns());
}
void ImageSource::round_applied(const pb::RoundApplied& message) {
  impl_->link.round_applied(message.round(), message.sync_ns());
}
void ImageSource::cancel(const std::string& reason) { impl_->link.cancel(reason); }

const ShipCounters& ImageSource::counters() const { return impl_->counters; }
std::uint64_t ImageSource::batches() const { return impl_->sender.batches(); }
std::chrono::nanoseconds ImageSource::target_sync() const { return impl_->link.target_sync(); }
std::chrono::nanoseconds ImageSource::search() const { return impl_->search; }
double ImageSource::bytes_per_second() const { return impl_->link.bytes_per_second(); }

}  // namespace sharefs
