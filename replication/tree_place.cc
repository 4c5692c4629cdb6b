#include "replication/tree_place.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "replication/inode_io.h"

namespace sharefs {
namespace {

// Entries of the root moved between two rounds of events: about 0.2 ms.
constexpr unsigned kStep = 32;
constexpr Reactor::Clock::duration kPause = std::chrono::milliseconds(1);
constexpr Reactor::Clock::duration kRetry = std::chrono::seconds(1);
// Setting: where the tree lies, if it is in one place.
constexpr std::string_view kTreeSetting = "tree";

UniqueFd open_directory(const std::filesystem::path& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw_errno("cannot open " + path.string());
  return fd;
}

bool holds_entries(const std::filesystem::path& directory) {
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().filename() != kPrivateArea) return true;
  return false;
}

bool is_root(const pb::Attr& attr) { return attr.id() == kRootInode; }

bool tells_root(const pb::Outcome& outcome) {
  return is_root(outcome.attr()) || std::any_of(outcome.changed().begin(), outcome.changed().end(), is_root);
}

void add_links(pb::Outcome& outcome, std::uint32_t links) {
  const auto add = [links](pb::Attr& attr) {
    if (is_root(attr)) attr.set_nlink(attr.nlink() + links);
  };
  if (outcome.has_attr()) add(*outcome.mutable_attr());
  for (auto& attr : *outcome.mutable_changed()) add(attr);
}

TreePlace::Direction opposite(TreePlace::Direction direction) {
  return direction == TreePlace::Direction::up ? TreePlace::Direction::down : TreePlace::Direction::up;
}

// Also if that cannot be found out.
bool has_begun(const std::filesystem::path& store) {
  try {
    return Relocation::under_way(store);
  } catch (const std::exception&) {
    return true;
  }
}

// Of the place that it leads to, as noted.
std::string_view name(TreePlace::Direction direction) {
  return direction == TreePlace::Direction::up ? "store" : "private area";
}

}  // namespace

TreePlace::TreePlace(Store& store, InodeTable& inodes, State& state, Power& power,
                     std::filesystem::path directory, Reactor& reactor, std::function<bool()> walked)
    : store_(store),
      inodes_(inodes),
      state_(state),
      power_(power),
      directory_(std::move(directory)),
      reactor_(reactor),
      walked_(std::move(walked)) {}

TreePlace::~TreePlace() { reactor_.cancel(timer_); }

void TreePlace::execute(const pb::Request& request, Bytes data, Reply reply) {
  try {
    if (parted_ && may_be_behind(request)) begin();
    if (relocation_) relocation_->before(request);
  } catch (const std::system_error& error) {  // a full disk
    return reply_errno(reply, error.code().value());
  } catch (const std::exception& error) {  // a name in both places
    spdlog::error("{}", error.what());
    return reply_errno(reply, EIO);
  }
  if (!relocation_) return store_.execute(request, data, std::move(reply));
  store_.execute(request, data, [this, reply = std::move(reply)](const pb::Outcome& outcome, Bytes bytes) {
    if (!relocation_ || !tells_root(outcome)) return reply(outcome, bytes);
    pb::Outcome whole = outcome;
    add_links(whole, relocation_->links_behind());
    reply(whole, bytes);
  });
}

// Whether it names something in the root that is not to be seen there.
bool TreePlace::may_be_behind(const pb::Request& request) const {
  bool behind = false;
  Relocation::visit_root(
      request, [&](const std::string& name) { behind |= !stat_name(inodes_.root(), name); },
      [&] { behind = true; });
  return behind;
}

// To which the direction leads.
std::filesystem::path TreePlace::place(Direction direction) const {
  return direction == Direction::up ? directory_ : directory_ / kPrivateArea / "tree";
}

std::filesystem::path TreePlace::root() const {
  return way_ == Way::due && direction_ == Direction::up && !parted_ ? place(Direction::down) : directory_;
}

void TreePlace::end() {
  reactor_.cancel(timer_);
  timer_ = 0;
  relocation_.reset();
  parted_ = false;
  way_ = Way::settled;
}

// Whether the whole tree lies where `direction` leads to. What was noted counts where there are no entries:
// a power cut may have kept the moving of some, and not the note.
bool TreePlace::lies_in_place(Direction direction) {
  if (Relocation::under_way(directory_) || holds_entries(place(opposite(direction)))) return false;
  if (holds_entries(place(direction))) return true;
  const std::string noted = state_.setting(kTreeSetting);
  return noted.empty() || noted == name(direction);
}

bool TreePlace::in_place(State& state) {
  const bool owner = state.ownership().owner == state.setting("site");
  return state.setting(kTreeSetting) != name(owner ? Direction::down : Direction::up);
}

void TreePlace::note(Direction direction) {
  if (state_.setting(kTreeSetting) != name(direction)) state_.set_setting(kTreeSetting, name(direction));
}

void TreePlace::resume(Direction direction) {
  direction_ = direction;
  if (!lies_in_place(direction)) return try_to_begin();
  inodes_.set_root(open_directory(place(direction)));
  store_.drop_descriptors();
  note(direction);
}

void TreePlace::move(Direction direction) {
  const bool never_left = way_ == Way::due && direction_ == Direction::up && direction == Direction::down;
  end();
  direction_ = direction;
  if (!never_left) return try_to_begin();
  ::chmod(directory_.c_str(), S_IRWXU);
  store_.drop_descriptors();
}

// A little at a time from now on. Throws if it cannot be begun.
void TreePlace::begin() {
  relocation_ = std::make_unique<Relocation>(
      inodes_, directory_, direction_, [this] { note(direction_); }, [this] { return power_.doubtful(); });
  way_ = Way::moving;
  parted_ = false;
  store_.drop_descriptors();
  step();
}

void TreePlace::try_to_begin() {
  const bool up = direction_ == Direction::up;
  const bool first = way_ != Way::due;
  try {
    begin();
  } catch (const std::exception& error) {
    const bool parted_now = up && !parted_ && has_begun(directory_);
    if (parted_now)
      spdlog::error(
          "a part of the files cannot be moved from .sharefs/tree into this store yet, nor be seen: {}",
          error.what());
    else if (first)
      spdlog::error("{} yet: {}",
                    up ? "the files cannot be moved from .sharefs/tree into this store"
                       : "this store cannot be put away as an old image",
                    error.what());
    parted_ |= parted_now;
    if (up && (first || parted_now))
      inodes_.set_root(open_directory(place(parted_ ? Direction::up : Direction::down)));
    if (first || parted_now) store_.drop_descriptors();
    way_ = Way::due;
    try_later();
  }
}

void TreePlace::try_later() {
  reactor_.cancel(timer_);
  timer_ = reactor_.after(kRetry, [this] {
    timer_ = 0;
    if (walked_()) return try_later();
    try_to_begin();
  });
}

void TreePlace::step() {
  reactor_.cancel(timer_);
  timer_ = 0;
  auto pause = kPause;
  try {
    // Without file handles an inode is reached by its path, of which the root is the beginning.
    if (!relocation_->step(inodes_.uses_handles() ? kStep : UINT_MAX)) return end();
  } catch (const std::exception& error) {
    spdlog::error("{}: tried again in a moment", error.what());
    pause = kRetry;
  }
  timer_ = reactor_.after(pause, [this] { step(); });
}

void TreePlace::finish() {
  if (way_ == Way::due && direction_ == Direction::up && !parted_) try_to_begin();
  if (way_ == Way::due && (direction_ == Direction::down || parted_)) begin();
  if (way_ != Way::moving) return;
  relocation_->all();
  end();
}

}  // namespace sharefs
