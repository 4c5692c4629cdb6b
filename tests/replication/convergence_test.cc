// Whatever changes meanwhile, both trees are equal after the last round.

#include <cstdlib>
#include <iostream>

#include "tests/replication/image_fixture.h"
#include "tests/replication/mutator.h"

namespace sharefs {
namespace {

unsigned environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : otherwise;
}

class ConvergenceTest : public ImageTest {
 protected:
  void converge(unsigned seed, bool holds_image) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    begin(holds_image);
    reactor_.run([&] { mutator_->start(environment("SHAREFS_TEST_OPERATIONS", 3000)); });
    attempt_->image();
    for (int i = 0; i < 3; ++i) attempt_->round();
    for (bool idle = false; !idle;)
      reactor_.run([&] {
        mutator_->stop();
        idle = mutator_->idle();
      });
    finish(mutator_->orphans());
    expect_equal();
    for (const InodeId id : mutator_->orphans()) {
      EXPECT_TRUE(b_->inodes->open(id, O_PATH)) << "orphan " << id;
    }
  }
  void populate(unsigned seed, int operations) {
    mutator_ = std::make_unique<Mutator>(*reactor_, *a_->store, seed);
    for (int i = 0; i < operations; ++i) reactor_.run([&] { mutator_->perform(); });
  }
  std::unique_ptr<Mutator> mutator_;
};

INSTANTIATE_TEST_SUITE_P(Access, ConvergenceTest, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Handles" : "ParentAndName"; });

TEST_P(ConvergenceTest, BothTreesAreEqualAfterTheLastRound) {
  const unsigned first = environment("SHAREFS_TEST_SEED", 1), seeds = environment("SHAREFS_TEST_SEEDS", 3);
  for (unsigned seed = first; seed < first + seeds && !HasFailure(); ++seed) {
    attempt_.reset();
    reactor_.run([&] {
      a_.reset();
      b_.reset();
    });
    std::filesystem::remove_all(directory_.path() / "a");
    std::filesystem::remove_all(directory_.path() / "b");
    restart();
    for (int i = 0; i < 300; ++i) {  // seen by nobody yet
      const std::string folder = a("old" + std::to_string(i % 17)).string();
      std::filesystem::create_directories(folder);
      write_file(folder + "/file" + std::to_string(i), std::string(static_cast<std::size_t>(i) * 97, 'o'));
    }
    populate(seed, 1500);
    converge(seed, false);
    if (!HasFailure() && seed % 2 == 1) converge(seed, true);  // again, over what is there
    if (HasFailure()) std::cerr << "seed " << seed << "\n";
  }
}

}  // namespace
}  // namespace sharefs
