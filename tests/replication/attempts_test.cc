// Many attempts of an image against one target, one after the other: the tree changes in and between them,
// most are cut off somewhere, processes end and begin again on both sides, owners change their places. After
// each one that comes to its end both trees are equal in all that can be seen of them.
//
// SHAREFS_ATTEMPTS_SEEDS=N runs N seeds, from SHAREFS_ATTEMPTS_SEED on.

#include <grp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <random>
#include <utility>

#include "replication/verify.h"
#include "tests/replication/image_sites.h"
#include "tests/replication/mutator.h"

namespace sharefs {
namespace {

constexpr const char* kCutOff = "cut off by the test";

unsigned environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : otherwise;
}

std::set<std::string> names_in(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

// An owner, the other one that it sends to, and a third one whose image is older, and what becomes of them:
// all of it is a matter of the seed, but for the order in which threads run.
class Story {
 public:
  Story(RunningReactor& reactor, std::filesystem::path folder, unsigned seed, bool handles)
      : reactor_(reactor), folder_(std::move(folder)), random_(seed), handles_(handles) {
    populate();
    for (const unsigned number : {0u, 1u, 2u}) begin_process(number);
    mutator_ = std::make_unique<Mutator>(*reactor_, *owner_->store, seed);
    operations(300);
  }
  ~Story() {
    end_attempt();
    reactor_.run([this] {
      for (Site& site : sites_) site.reset();
    });
  }

  void go_on(unsigned chapters) {
    for (unsigned chapter = 0; chapter < chapters && !testing::Test::HasFailure(); ++chapter) {
      SCOPED_TRACE("chapter " + std::to_string(chapter));
      if (one_in(4)) exchange(1, 2);
      if (one_in(3)) restart(0);
      if (one_in(3)) restart(1);
      if (!one_in(4)) operations(below(200));
      if (attempt(one_in(3)) && !one_in(3)) change_places();
    }
  }

 private:
  using Site = std::unique_ptr<Copy>;

  unsigned below(unsigned limit) { return static_cast<unsigned>(random_() % limit); }
  bool one_in(unsigned count) { return below(count) == 0; }

  // Seen by nobody yet. Few seeds have so many names in one directory that its listing comes in parts.
  void populate() {
    const auto store = folder_ / "0" / "store";
    for (unsigned i = 0; i < 60; ++i) {
      const auto directory = store / std::string(1, static_cast<char>('a' + i % 7)) / "old";
      std::filesystem::create_directories(directory);
      std::ofstream(directory / ("file" + std::to_string(i))) << std::string(std::size_t{i} * 997, 'o');
      if (i % 9 == 0)
        std::filesystem::create_hard_link(directory / ("file" + std::to_string(i)),
                                          store / ("linked" + std::to_string(i)));
    }
    if (!one_in(8)) return;
    for (unsigned i = 0; i < 3000; ++i) std::ofstream(store / "a" / ("many-" + std::to_string(i)));
  }

  void begin_process(unsigned number) {
    if (homes_.size() <= number) homes_.push_back(folder_ / std::to_string(number));
    reactor_.run([&] {
      sites_[number] =
          std::make_unique<Copy>(*reactor_, homes_[number], number == 0, handles_, epoch_ + number);
    });
  }
  void restart(unsigned number) {
    end_attempt();
    reactor_.run([&] { sites_[number].reset(); });
    begin_process(number);
    if (number != 0) return;
    mutator_->use(*owner_->store);
    reactor_.run([&] { mutator_->open_again(owner_->opens); });
  }
  void exchange(unsigned one, unsigned two) {
    end_attempt();
    std::swap(sites_[one], sites_[two]);
    std::swap(homes_[one], homes_[two]);
    std::swap(arrived_[one], arrived_[two]);
    settled_ = false;
  }

  void operations(unsigned count) {
    reactor_.run([&] {
      for (unsigned i = 0; i < count; ++i) mutator_->perform();
    });
    come_to_rest();
  }
  void come_to_rest() {
    for (bool idle = false; !idle; std::this_thread::sleep_for(std::chrono::microseconds(100)))
      reactor_.run([&] {
        mutator_->stop();
        idle = mutator_->idle();
      });
  }

  // Returns whether it came to its end.
  bool attempt(bool quiet) {
    end_attempt();
    come_to_rest();
    const bool holds = std::exchange(arrived_[1], true);
    attempt_ = std::make_unique<Attempt>(reactor_, *owner_, *other_, holds, ++epoch_);
    const std::uint64_t after_messages = one_in(2) ? 1 + below(one_in(2) ? 8 : 40) : ~std::uint64_t{0};
    const unsigned way = below(3);
    messages_ = 0;
    attempt_->on_message = [this, attempt = attempt_.get(), quiet, after_messages, way](const pb::Envelope&) {
      if (ending_) return true;
      if (!quiet && !still_)
        for (unsigned i = 0; i < 5; ++i) mutator_->perform();
      if (++messages_ < after_messages) return true;
      if (way == 0) attempt->end_target();
      attempt->source().cancel(kCutOff);
      cut_off_ = true;
      return false;
    };
    still_ = ending_ = cut_off_ = false;
    try {
      if (!quiet) reactor_.run([this] { mutator_->start(2000); });
      attempt_->image();
      if (quiet && settled_ && handles_) expect_little_was_sent();
      for (unsigned rounds = below(4); rounds > 0; --rounds) {
        if (!quiet && one_in(2)) operations(below(40));
        attempt_->open = mutator_->open();
        attempt_->round();
      }
      come_to_rest();
      still_ = true;
      attempt_->open = mutator_->open();
      attempt_->round(true);
      reactor_.run([this] { ending_ = true; });
      if (cut_off_ || one_in(8)) throw ImageSource::Cancelled(kCutOff);
      attempt_->end(mutator_->orphans());
    } catch (const std::runtime_error& ended) {
      EXPECT_EQ(std::string(ended.what()), kCutOff);
      come_to_rest();
      if (one_in(2)) std::this_thread::sleep_for(std::chrono::milliseconds(below(30)));
      end_attempt();
      settled_ = false;
      return false;
    }
    expect_equal();
    settled_ = true;
    mutator_->take_written();
    return true;
  }
  void end_attempt() { attempt_.reset(); }

  // Of what the other one has not got since the last attempt that came to its end.
  void expect_little_was_sent() {
    std::uint64_t bytes = 0;
    std::set<InodeId> sent = mutator_->take_written();
    sent.insert(mutator_->orphans().begin(), mutator_->orphans().end());
    for (const InodeId id : sent) {
      if (const auto opened = open_inode(*owner_->inodes, id)) bytes += data_bytes(opened->backing);
    }
    EXPECT_LE(attempt_->source().counters().image_bytes_sent, bytes);
  }

  void change_places() {
    end_attempt();
    reactor_.run([&] {
      Relocation up(*other_->inodes, other_->store_path(), Relocation::Direction::up);
      Relocation down(*owner_->inodes, owner_->store_path(), Relocation::Direction::down);
      up.all();
      down.all();
      for (Site* site : {&owner_, &other_}) (*site)->store->drop_descriptors();
      std::swap(owner_, other_);
      std::swap(homes_[0], homes_[1]);
      arrived_[0] = true;
      std::swap(arrived_[0], arrived_[1]);
      owner_->inodes->set_epoch(++epoch_);
      other_->opens.clear();
      mutator_->use(*owner_->store);
      mutator_->open_again(owner_->opens);
    });
  }

  void expect_equal() {
    static const std::atomic<bool> ending{false};
    identify_all(*owner_->inodes, ending);
    const auto one = describe(*owner_->inodes, owner_->store_path());
    const auto two = describe(*other_->inodes, other_->tree());
    EXPECT_TRUE(one == two) << difference(one, two);
    expect_verified(ending);
    for (const auto& [name, line] : one) EXPECT_EQ(line.find("out of reach"), std::string::npos) << name;
    EXPECT_EQ(names_in(other_->area() / "parked"), std::set<std::string>());
    std::set<std::string> orphans;
    for (const InodeId id : mutator_->orphans()) {
      orphans.insert(hex_name(id));
      expect_equal_orphan(id);
    }
    EXPECT_EQ(names_in(other_->area() / "orphans"), orphans);
  }

  void expect_equal_orphan(InodeId id) {
    std::string lines[2];
    for (const bool owner : {false, true}) {
      const Copy& copy = owner ? *owner_ : *other_;
      EXPECT_TRUE(copy.inodes->is_orphan(id)) << "orphan " << id << " owner " << owner;
      const auto opened = open_inode(*copy.inodes, id);
      if (!opened) continue;
      std::map<std::string, std::string> found;
      describe(*copy.inodes, open_path(copy.area() / "orphans").get(), hex_name(id), "orphan", found);
      lines[owner] = found.begin()->second;
      pb::Attr attributes = copy.store->attributes(id, opened->fd.get());
      attributes.clear_atime();  // of who has read it
      attributes.clear_blocks();
      lines[owner] += " " + attributes.ShortDebugString();
    }
    EXPECT_EQ(lines[0], lines[1]) << "orphan " << id;
  }

  void expect_verified(const std::atomic<bool>& ending) {
    DigestComparison comparison;
    while (!comparison.done()) {
      const auto page = [&](Copy& copy, std::uint64_t after) {
        pb::VerifyAsk ask;
        ask.set_count(500);
        ask.set_after(after);
        auto reply = digest_inodes(*copy.inodes, *copy.store, copy.home / "state.db", ask, ending);
        EXPECT_EQ(reply.error(), "");
        if (!reply.error().empty()) reply.set_end(true);
        return reply;
      };
      if (comparison.owner_wanted()) comparison.owner_page(page(*owner_, comparison.owner_next()));
      if (comparison.other_wanted()) comparison.other_page(page(*other_, comparison.other_next()));
    }
    EXPECT_EQ(comparison.result().differences, std::vector<std::string>());
    EXPECT_EQ(comparison.result().changed_since, 0u);
  }

  RunningReactor& reactor_;
  const std::filesystem::path folder_;
  std::mt19937 random_;
  const bool handles_;
  // The owner's, the other's, the third one's.
  std::vector<std::filesystem::path> homes_;
  std::array<Site, 3> sites_;
  Site &owner_ = sites_[0], &other_ = sites_[1];
  std::array<bool, 3> arrived_{};  // something
  std::unique_ptr<Mutator> mutator_;
  std::unique_ptr<Attempt> attempt_;
  Epoch epoch_ = 1;
  bool settled_ = false;                                             // the last attempt came to its end
  std::atomic<bool> still_{false}, ending_{false}, cut_off_{false};  // of the attempt
  std::uint64_t messages_ = 0;
};

// Of all seeds that are asked for, otherwise of as many as are given, from `first` on.
void tell_stories(unsigned first, unsigned seeds, bool handles) {
  first = environment("SHAREFS_ATTEMPTS_SEED", first);
  seeds = environment("SHAREFS_ATTEMPTS_SEEDS", seeds);
  for (unsigned seed = first; seed < first + seeds && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("SHAREFS_ATTEMPTS_SEED=" + std::to_string(seed));
    const TemporaryDirectory directory;
    RunningReactor reactor;
    Story story(reactor, directory.path(), seed, handles);
    story.go_on(8);
  }
}

class AttemptsTest : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Access, AttemptsTest, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Handles" : "ParentAndName"; });

TEST_P(AttemptsTest, BothTreesAreEqualAfterEachAttemptThatComesToItsEnd) { tell_stories(1, 1, GetParam()); }

// Who may not write what he has made read-only himself.
TEST(OrdinaryUsersAttemptsTest, BothTreesAreEqualAfterEachAttemptThatComesToItsEnd) {
  if (::geteuid() != 0) GTEST_SKIP() << "an ordinary user's are all of these tests";
  const auto as_user = [] {
    ::dup2(STDERR_FILENO, STDOUT_FILENO);  // which is told of a process that ends otherwise
    if (::setgroups(0, nullptr) != 0 || ::setresgid(1000, 1000, 1000) != 0 ||
        ::setresuid(1000, 1000, 1000) != 0)
      std::exit(2);
    tell_stories(3001, 1, false);
    std::exit(testing::Test::HasFailure() ? 1 : 0);
  };
  EXPECT_EXIT(as_user(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace sharefs
