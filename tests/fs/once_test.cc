#include "fs/once.h"

#include <linux/falloc.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <utility>

#include "tests/fs/store_fixture.h"

namespace sharefs {
namespace {

// Between a Once and the store: at a kill, changes are performed, or not, and nobody learns of it.
class Killed final : public Executor {
 public:
  enum class When { never, before, after };
  explicit Killed(Executor& store) : store_(store) {}
  void execute(const pb::Request& request, Bytes data, Reply reply) override {
    if (when == When::never || op_class(request.op_case()) == OpClass::query)
      return store_.execute(request, data, std::move(reply));
    if (when == When::after) store_.execute(request, data, [](const pb::Outcome&, Bytes) {});
  }
  When when = When::never;

 private:
  Executor& store_;
};

class OnceTest : public StoreFixture {
 protected:
  static constexpr std::uint64_t kClient = 77;

  OnceTest() { next_process(); }

  std::filesystem::path slots() const { return directory_.path() / "once.slots"; }
  // The dead ones stay: workers of theirs may still answer.
  void next_process() {
    all_.push_back(std::make_unique<Once>(killed_, slots()));
    once().settle();
  }
  Once& once() { return *all_.back(); }

  Answer through(Executor& executor, const pb::Request& request, std::string_view data = {}) {
    std::optional<Answer> answer;
    executor.execute(request, as_bytes(data), [&](const pb::Outcome& outcome, Bytes bytes) {
      answer = Answer{outcome, std::string(as_text(bytes))};
      reactor_.stop();
    });
    if (!answer) reactor_.run();
    return answer.value_or(Answer{});
  }
  void leave_unanswered(const pb::Request& request, std::string_view data = {}) {
    once().execute(request, as_bytes(data), [](const pb::Outcome&, Bytes) {});
  }
  pb::Request asked(std::uint64_t seq) const {
    pb::Request result = request();
    result.set_client(kClient);
    result.set_seq(seq);
    return result;
  }
  pb::Request append(std::uint64_t seq, InodeId id, std::size_t size, bool sync) const {
    pb::Request result = asked(seq);
    auto* write = result.mutable_write();
    write->set_id(id);
    write->set_append(true);
    write->set_size(static_cast<std::uint32_t>(size));
    write->set_sync(sync);
    return result;
  }

  // One of each kind that must not be performed twice, by what it is called.
  std::map<std::string, std::pair<pb::Request, std::string>> requests() {
    std::map<std::string, std::pair<pb::Request, std::string>> all;
    std::uint64_t seq = 0;
    const auto add = [&](const char* name, const std::string& data = "") -> pb::Request& {
      auto& one = all[name];
      one = {asked(++seq), data};
      return one.first;
    };
    const InodeId file = create(kRootInode, "file").id();
    const InodeId grows = create(kRootInode, "grows").id();
    create(kRootInode, "goes");
    create(kRootInode, "moves");
    mkdir(kRootInode, "empty");
    EXPECT_EQ(::setxattr(path("file").c_str(), "user.there", "x", 1, 0), 0);
    auto* create = add("create").mutable_create();
    create->set_parent(kRootInode);
    create->set_name("new");
    create->set_mode(S_IFREG | 0644);
    create->set_flags(O_CREAT | O_EXCL | O_RDWR);
    auto* mkdir = add("mkdir").mutable_mkdir();
    mkdir->set_parent(kRootInode);
    mkdir->set_name("newdir");
    mkdir->set_mode(0755);
    auto* symlink = add("symlink").mutable_symlink();
    symlink->set_parent(kRootInode);
    symlink->set_name("newlink");
    symlink->set_target("x");
    auto* link = add("link").mutable_link();
    link->set_id(file);
    link->set_parent(kRootInode);
    link->set_name("second");
    auto* unlink = add("unlink").mutable_unlink();
    unlink->set_parent(kRootInode);
    unlink->set_name("goes");
    auto* rmdir = add("rmdir").mutable_rmdir();
    rmdir->set_parent(kRootInode);
    rmdir->set_name("empty");
    auto* rename = add("rename").mutable_rename();
    rename->set_parent(kRootInode);
    rename->set_name("moves");
    rename->set_new_parent(kRootInode);
    rename->set_new_name("moved");
    add("append", "data") = append(++seq, grows, 4, false);
    auto* set = add("setxattr", "value").mutable_setxattr();
    set->set_id(file);
    set->set_name("user.new");
    set->set_flags(XATTR_CREATE);
    auto* remove = add("removexattr").mutable_removexattr();
    remove->set_id(file);
    remove->set_name("user.there");
    return all;
  }
  void expect_all_performed_once() {
    for (const char* there : {"new", "newdir", "newlink", "second", "moved"})
      EXPECT_TRUE(std::filesystem::exists(std::filesystem::symlink_status(path(there)))) << there;
    for (const char* gone : {"goes", "empty", "moves"})
      EXPECT_FALSE(std::filesystem::exists(path(gone))) << gone;
    EXPECT_EQ(std::filesystem::file_size(path("grows")), 4U);
    EXPECT_EQ(::getxattr(path("file").c_str(), "user.new", nullptr, 0), 5);
    EXPECT_EQ(::getxattr(path("file").c_str(), "user.there", nullptr, 0), -1);
  }

  Killed killed_{*store_};
  std::vector<std::unique_ptr<Once>> all_;
};

TEST_P(OnceTest, what_was_performed_and_not_answered_is_answered_and_not_performed_again) {
  const auto all = requests();
  killed_.when = Killed::When::after;
  for (const auto& [name, one] : all) leave_unanswered(one.first, one.second);
  killed_.when = Killed::When::never;
  next_process();
  for (const auto& [name, one] : all) EXPECT_EQ(through(once(), one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

TEST_P(OnceTest, what_was_only_intended_is_performed) {
  const auto all = requests();
  killed_.when = Killed::When::before;
  for (const auto& [name, one] : all) leave_unanswered(one.first, one.second);
  killed_.when = Killed::When::never;
  next_process();
  for (const auto& [name, one] : all) EXPECT_EQ(through(once(), one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

TEST_P(OnceTest, what_was_intended_here_and_performed_by_the_next_owner_is_not_performed_again) {
  const auto all = requests();
  killed_.when = Killed::When::before;
  for (const auto& [name, one] : all) leave_unanswered(one.first, one.second);
  killed_.when = Killed::When::never;
  next_process();
  Once other(killed_, directory_.path() / "other.slots");
  for (const auto& [name, one] : all) EXPECT_EQ(through(other, one.first, one.second).error(), 0) << name;
  for (const auto& known : other.left([](std::uint64_t, std::uint64_t) { return true; })) once().adopt(known);
  for (const auto& [name, one] : all) EXPECT_EQ(through(once(), one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

TEST_P(OnceTest, synced_appends_that_overlap_are_each_performed_once) {
  const InodeId id = create(kRootInode, "log").id();
  const auto first = append(1, id, 5, true), second = append(2, id, 6, true);
  leave_unanswered(first, "first");
  leave_unanswered(second, "second");
  next_process();
  EXPECT_EQ(through(once(), first, "first").outcome.count(), 5U);
  EXPECT_EQ(through(once(), second, "second").outcome.count(), 6U);
  EXPECT_EQ(std::filesystem::file_size(path("log")), 11U);
}

TEST_P(OnceTest, of_requests_that_waited_with_one_intent_each_is_performed) {
  const InodeId file = create(kRootInode, "log").id();
  auto made = asked(3);
  made.mutable_mkdir()->set_parent(kRootInode);
  made.mutable_mkdir()->set_name("lock");
  made.mutable_mkdir()->set_mode(0755);
  auto again = made;
  again.set_seq(4);
  const std::vector<pb::Request> all{append(1, file, 5, false), append(2, file, 5, false), made, again};
  killed_.when = Killed::When::before;
  for (const pb::Request& request : all) {
    leave_unanswered(request, "12345");
    once().put_aside(request, true);  // there is no space
  }
  once().put_aside(all[0], false);
  next_process();
  killed_.when = Killed::When::never;
  for (const int i : {0, 1}) EXPECT_EQ(through(once(), all[i], "12345").outcome.count(), 5u);
  EXPECT_EQ(std::filesystem::file_size(path("log")), 10u);
  EXPECT_EQ(through(once(), made).error(), 0);
  EXPECT_EQ(through(once(), again).error(), EEXIST) << "as if it had not been asked before";
}

TEST_P(OnceTest, the_next_owner_knows_what_its_site_may_be_asked_again) {
  const auto all = requests();
  for (const auto& [name, one] : all) through(once(), one.first, one.second);
  const auto left = once().left([](std::uint64_t client, std::uint64_t) { return client == kClient; });
  EXPECT_EQ(left.size(), all.size());
  EXPECT_TRUE(once().left([](std::uint64_t, std::uint64_t) { return false; }).empty());
  Once other(killed_, directory_.path() / "other.slots");
  for (const auto& known : left) other.adopt(known);
  for (const auto& known : left) other.adopt(known);
  for (const auto& [name, one] : all) EXPECT_EQ(through(other, one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

// The slots are a ring, which an owner's next process goes on with where the last one was.
TEST_P(OnceTest, the_newest_outcomes_are_the_last_to_give_way_also_after_a_restart) {
  const auto all = requests();
  for (const auto& [name, one] : all) leave_unanswered(one.first, one.second);
  next_process();
  // Of a site that is back before the one that asked for them.
  const InodeId log = create(kRootInode, "log").id();
  for (std::uint64_t seq = 1; seq + all.size() <= Once::kSlots; ++seq) {
    auto other = append(seq, log, 1, false);
    other.set_client(kClient + 1);
    EXPECT_EQ(through(once(), other, "x").error(), 0);
  }
  for (const auto& [name, one] : all) EXPECT_EQ(through(once(), one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

// A site that was cut off before it heard the outcome asks again when others have gone on.
TEST_P(OnceTest, what_others_have_done_since_is_not_undone) {
  const InodeId file = create(kRootInode, "file").id();
  std::vector<std::pair<pb::Request, std::string>> late;
  const auto add = [&](const std::string& data = "") -> pb::Request& {
    late.emplace_back(asked(late.size() + 1), data);
    return late.back().first;
  };
  auto* write = add("ours").mutable_write();
  write->set_id(file);
  write->set_size(4);
  write = add("ours").mutable_write();
  write->set_id(file);
  write->set_size(4);
  write->set_sync(true);
  auto* truncation = add().mutable_setattr();
  truncation->set_id(file);
  truncation->set_size(0);
  auto* mode = add().mutable_setattr();
  mode->set_id(file);
  mode->set_mode(0600);
  auto* open = add().mutable_open();
  open->set_id(file);
  open->set_handle(1);
  open->set_flags(O_WRONLY | O_TRUNC);
  auto* xattr = add("ours").mutable_setxattr();
  xattr->set_id(file);
  xattr->set_name("user.whose");
  for (const auto& [one, data] : late) EXPECT_EQ(through(once(), one, data).error(), 0) << one.op_case();

  std::ofstream(path("file")) << "their";
  ASSERT_EQ(::chmod(path("file").c_str(), 0640), 0);
  ASSERT_EQ(::setxattr(path("file").c_str(), "user.whose", "their", 5, 0), 0);
  next_process();
  for (const auto& [one, data] : late) EXPECT_EQ(through(once(), one, data).error(), 0) << one.op_case();
  std::string content;
  std::getline(std::ifstream(path("file")), content);
  EXPECT_EQ(content, "their");
  struct stat found {};
  ASSERT_EQ(::stat(path("file").c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 07777, 0640u);
  char whose[8] = {};
  EXPECT_EQ(::getxattr(path("file").c_str(), "user.whose", whose, sizeof whose), 5);
  EXPECT_STREQ(whose, "their");
}

// Its bytes may be gone, and are not looked for.
TEST_P(OnceTest, an_overwrite_from_before_a_power_cut_is_performed_again) {
  const InodeId file = create(kRootInode, "overwritten").id();
  auto write = asked(1000);
  write.mutable_write()->set_id(file);
  write.mutable_write()->set_size(4);
  const auto all = requests();
  using Process = std::pair<std::uint64_t, const char*>;  // its power, and what it makes of the file
  for (const auto& [power, made] : {Process{1, "ours"}, Process{1, "lost"}, Process{2, "ours"}}) {
    std::ofstream(path("overwritten")) << "lost";
    Once process(killed_, slots(), power);
    process.settle();
    EXPECT_EQ(through(process, write, "ours").error(), 0);
    for (const auto& [name, one] : all) EXPECT_EQ(through(process, one.first, one.second).error(), 0) << name;
    std::string content;
    std::getline(std::ifstream(path("overwritten")), content);
    EXPECT_EQ(content, made);
  }
  expect_all_performed_once();
}

TEST_P(OnceTest, what_a_site_has_not_heard_of_stays_however_much_others_ask) {
  const auto all = requests();
  for (const auto& [name, one] : all) leave_unanswered(one.first, one.second);
  const InodeId log = create(kRootInode, "log").id();
  const std::uint64_t half = 2 * Once::kSlots;
  for (std::uint64_t seq = 1; seq <= 2 * half; ++seq) {
    auto other = append(seq, log, 1, false);
    other.set_client(kClient + 1);
    other.set_answered_below(std::min(seq, half));  // one of its requests waits then, for a lock
    EXPECT_EQ(through(once(), other, "x").error(), 0);
  }
  next_process();
  for (const auto& [name, one] : all) EXPECT_EQ(through(once(), one.first, one.second).error(), 0) << name;
  expect_all_performed_once();
}

TEST_P(OnceTest, an_intent_is_over_when_its_request_is_performed_after_all) {
  const InodeId id = create(kRootInode, "log").id();
  const auto before = append(1, id, 1, false), ours = append(2, id, 4, false),
             after = append(3, id, 1, false);
  through(once(), before, "x");
  killed_.when = Killed::When::before;
  leave_unanswered(ours, "ours");
  next_process();
  killed_.when = Killed::When::never;
  leave_unanswered(ours, "ours");
  through(once(), after, "x");
  next_process();
  EXPECT_EQ(through(once(), ours, "ours").outcome.count(), 4U);
  EXPECT_EQ(std::filesystem::file_size(path("log")), 6U);
}

TEST_P(OnceTest, more_requests_under_way_than_there_are_slots_wait_for_nothing) {
  const InodeId id = create(kRootInode, "log").id();
  killed_.when = Killed::When::before;  // all wait
  for (std::uint64_t seq = 1; seq <= Once::kSlots + 1; ++seq)
    leave_unanswered(append(seq, id, 1, false), "x");
  killed_.when = Killed::When::never;
  EXPECT_EQ(through(once(), append(Once::kSlots + 2, id, 1, false), "x").error(), 0);
}

// Whoever asked it may come back behind others, who change what would tell whether it was performed.
TEST_P(OnceTest, what_others_do_before_it_is_asked_again_tells_nothing_of_it) {
  const InodeId lost = create(kRootInode, "lost").id(), doubled = create(kRootInode, "doubled").id();
  create(kRootInode, "goes");
  auto exclusive = asked(1);
  exclusive.mutable_create()->set_parent(kRootInode);
  exclusive.mutable_create()->set_name(std::string(255, 'n'));
  exclusive.mutable_create()->set_mode(S_IFREG | 0644);
  auto renamed = asked(2);
  renamed.mutable_rename()->set_parent(kRootInode);
  renamed.mutable_rename()->set_name("goes");
  renamed.mutable_rename()->set_new_parent(kRootInode);
  renamed.mutable_rename()->set_new_name(std::string(255, 'm'));
  auto symlink = asked(3);
  symlink.mutable_symlink()->set_parent(kRootInode);
  symlink.mutable_symlink()->set_name("link");
  symlink.mutable_symlink()->set_target(std::string(4000, 't'));
  killed_.when = Killed::When::before;
  leave_unanswered(exclusive);
  leave_unanswered(append(4, lost, 4, false), "ours");
  killed_.when = Killed::When::after;
  leave_unanswered(append(5, doubled, 4, false), "ours");
  leave_unanswered(renamed);
  leave_unanswered(symlink);
  killed_.when = Killed::When::never;
  next_process();
  const auto by_another = [&](pb::Request request, std::string_view data = {}) {
    request.set_client(kClient + 1);
    EXPECT_EQ(through(once(), request, data).error(), 0);
  };
  by_another(exclusive);
  by_another(append(4, lost, 4, false), "them");
  by_another(append(5, doubled, 4, false), "them");
  auto unlinked = asked(6);
  unlinked.mutable_unlink()->set_parent(kRootInode);
  unlinked.mutable_unlink()->set_name("link");
  by_another(unlinked);
  auto moved_on = renamed;
  moved_on.set_seq(7);
  moved_on.mutable_rename()->set_name(renamed.rename().new_name());
  moved_on.mutable_rename()->set_new_name("elsewhere");
  by_another(moved_on);
  EXPECT_EQ(through(once(), exclusive).error(), EEXIST);
  EXPECT_EQ(through(once(), append(4, lost, 4, false), "ours").error(), 0);
  EXPECT_EQ(std::filesystem::file_size(path("lost")), 8U);
  EXPECT_EQ(through(once(), append(5, doubled, 4, false), "ours").error(), 0);
  EXPECT_EQ(std::filesystem::file_size(path("doubled")), 8U);
  EXPECT_EQ(through(once(), renamed).error(), 0);
  EXPECT_EQ(through(once(), symlink).error(), 0);
  EXPECT_FALSE(std::filesystem::exists(std::filesystem::symlink_status(path("link"))));
}

// A full disk must not be met at a store into the mapping.
TEST_P(OnceTest, its_slots_have_their_space_also_where_an_earlier_version_left_holes) {
  const auto file = directory_.path() / "with.holes";
  std::ofstream(file).close();
  std::filesystem::resize_file(file, Once::kSlots * Once::kSlotSize);
  const Once opened(*store_, file);
  struct stat found {};
  ASSERT_EQ(::stat(file.c_str(), &found), 0);
  EXPECT_GE(static_cast<std::size_t>(found.st_blocks) * 512, Once::kSlots * Once::kSlotSize);
}

INSTANTIATE_TEST_SUITE_P(WithHandles, OnceTest, testing::Values(true));

}  // namespace
}  // namespace sharefs
