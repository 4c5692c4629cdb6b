#include "meta/state.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>

#include "scratch.h"

namespace sharefs {
namespace {

class StateTest : public testing::Test {
 protected:
  StateTest() { reopen(); }
  void reopen() {
    state_.reset();
    database_.reset();
    database_ = std::make_unique<Database>(scratch_ / "state.db");
    state_ = std::make_unique<State>(*database_);
  }

  Scratch scratch_;
  std::unique_ptr<Database> database_;
  std::unique_ptr<State> state_;
};

TEST_F(StateTest, settings_are_empty_until_set_and_survive_reopening) {
  EXPECT_EQ(state_->setting("site"), "");
  state_->set_setting("site", "a");
  state_->set_setting("site", "b");
  reopen();
  EXPECT_EQ(state_->setting("site"), "b");
}

TEST_F(StateTest, ownership_never_goes_back) {
  EXPECT_EQ(state_->ownership().epoch, 0U);
  EXPECT_EQ(state_->ownership().owner, "");
  state_->set_ownership({5, "a", 7});
  EXPECT_THROW(state_->set_ownership({4, "b", 9}), std::logic_error);
  EXPECT_THROW(state_->set_ownership({5, "b", 9}), std::logic_error) << "two owners at one epoch";
  reopen();
  EXPECT_EQ(state_->ownership().epoch, 5U);
  EXPECT_EQ(state_->ownership().owner, "a");
  EXPECT_EQ(state_->ownership().burnt, 7U);
}

TEST_F(StateTest, burnt_epochs_never_fall_and_include_the_present_one) {
  state_->set_ownership({1, "a", 0});
  EXPECT_EQ(state_->ownership().burnt, 1U);
  state_->set_ownership({1, "a", 9});  // an attempt burns an epoch, the owner stays
  state_->set_ownership({3, "b", 3});
  EXPECT_EQ(state_->ownership().burnt, 9U);
}

TEST_F(StateTest, ownership_may_be_part_of_a_durable_transaction_of_the_caller_only) {
  {
    Transaction transaction(*database_, Durability::full);
    state_->set_ownership({2, "a", 2});
    state_->put_blob("live/2", "x");
  }
  EXPECT_EQ(state_->ownership().epoch, 0U) << "rolled back with its transaction";
  {
    Transaction transaction(*database_, Durability::full);
    state_->set_ownership({2, "a", 2});
    state_->put_handoff({.attempt = 1, .phase = "committed"}, Durability::full);
    transaction.commit();
  }
  EXPECT_EQ(state_->ownership().epoch, 2U);
  Transaction transaction(*database_);
  EXPECT_THROW(state_->set_ownership({3, "b", 3}), std::logic_error);
}

TEST_F(StateTest, sites_are_the_others) {
  state_->set_setting("site", "me");
  state_->put_site({"me", "tcp://m:1", "km"});
  state_->put_site({"b", "tcp://b:1", "kb"});
  state_->put_site({"a", "", "ka"});
  state_->put_site({"b", "tcp://b:2", "kb"});
  const auto sites = state_->sites();
  ASSERT_EQ(sites.size(), 2U);
  EXPECT_EQ(sites[0].name, "a");
  EXPECT_EQ(sites[1].name, "b");
  EXPECT_EQ(sites[1].endpoint, "tcp://b:2");
}

TEST_F(StateTest, a_site_that_was_removed_is_remembered_by_its_key) {
  state_->put_site({"b", "tcp://b:1", "kb"});
  state_->put_site({"c", "tcp://c:1", "kc"});
  state_->remove_site("b", "kb");
  state_->remove_site("b", "kb");
  state_->remove_site("c", "an older key");
  state_->put_site({"b", "tcp://b:1", "another key"});
  reopen();
  const auto sites = state_->sites();
  ASSERT_EQ(sites.size(), 2U);
  EXPECT_EQ(sites[0].public_key, "another key");
  EXPECT_EQ(sites[1].public_key, "kc");
  const auto removed = state_->removed_sites();
  ASSERT_EQ(removed.size(), 2U);
  EXPECT_EQ(removed[0].name, "b");
  EXPECT_EQ(removed[0].public_key, "kb");
  EXPECT_EQ(removed[1].public_key, "an older key");
}

TEST_F(StateTest, a_site_that_is_admitted_again_under_another_name_is_one_site) {
  state_->add_invitation("first", 100);
  state_->add_invitation("second", 100);
  state_->put_site({"other", "tcp://o:1", "ko"});
  EXPECT_TRUE(state_->admit_site("first", 50, {"a", "tcp://a:1", "ka"}));
  EXPECT_TRUE(state_->admit_site("second", 50, {"z", "tcp://z:1", "ka"}));
  const auto sites = state_->sites();
  ASSERT_EQ(sites.size(), 2U);
  EXPECT_EQ(sites[0].name, "other");
  EXPECT_EQ(sites[1].name, "z");
}

TEST_F(StateTest, an_invitation_is_used_once_and_expires) {
  state_->add_invitation("key", 100);
  state_->add_invitation("late", 10);
  EXPECT_EQ(state_->invitations(50), std::vector<std::string>{"key"});
  EXPECT_FALSE(state_->admit_site("unknown", 50, {"a", "tcp://a:1", "ka"}));
  EXPECT_FALSE(state_->admit_site("late", 50, {"a", "tcp://a:1", "ka"}));
  EXPECT_TRUE(state_->sites().empty());
  EXPECT_TRUE(state_->admit_site("key", 50, {"a", "tcp://a:1", "ka"}));
  reopen();
  EXPECT_EQ(state_->sites().size(), 1U);
  EXPECT_FALSE(state_->admit_site("key", 50, {"b", "tcp://b:1", "kb"}));
  EXPECT_EQ(state_->sites().size(), 1U);
  EXPECT_TRUE(state_->invitations(50).empty());
  EXPECT_THROW(state_->add_invitation("key", 200), DatabaseError) << "a used key must not be revived";
}

TEST_F(StateTest, handoffs_keep_every_field_and_come_newest_first) {
  HandoffRecord old{.attempt = ~0ULL, .epoch = 2, .started = 30};  // the clock was set back
  HandoffRecord wanted{
      .attempt = 7, .epoch = 3, .source = "a", .target = "b", .role = "source", .phase = "image"};
  wanted.started = 20;
  wanted.t0 = 21;
  wanted.t1 = 22;
  wanted.t2 = 23;
  wanted.t3 = 24;
  wanted.ended = 25;
  wanted.image_files = 31;
  wanted.image_bytes = 32;
  wanted.image_bytes_sent = 33;
  wanted.log_entries = 34;
  wanted.log_bytes = 35;
  wanted.rounds = 36;
  wanted.records = 37;
  wanted.pause_ms = 12.5;
  wanted.result = "failed";
  wanted.error = "why";
  wanted.tries = 3;
  state_->put_handoff(old, Durability::normal);
  state_->put_handoff({.attempt = 7}, Durability::normal);
  state_->put_handoff(wanted, Durability::full);
  reopen();
  const auto got = state_->handoff(7);
  ASSERT_TRUE(got);
  const auto fields = [](const HandoffRecord& h) {
    return std::tie(h.attempt, h.epoch, h.source, h.target, h.role, h.phase, h.started, h.t0, h.t1, h.t2,
                    h.t3, h.ended, h.image_files, h.image_bytes, h.image_bytes_sent, h.log_entries,
                    h.log_bytes, h.rounds, h.records, h.pause_ms, h.result, h.error, h.tries);
  };
  EXPECT_EQ(fields(*got), fields(wanted));
  EXPECT_FALSE(state_->handoff(8));
  EXPECT_EQ(state_->handoff(~0ULL)->epoch, 2U);
  const auto all = state_->handoffs(5);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].attempt, 7U);
  EXPECT_EQ(state_->handoffs(1).size(), 1U);
}

TEST_F(StateTest, records_come_back_in_order_with_their_bytes) {
  const std::string bytes("\0\xff\n", 3);
  state_->put_record(1, {.number = 2, .request = "second", .data = ""}, 9, 102, "unlink");
  state_->put_record(1, {.number = 1, .request = "first", .data = bytes}, 9, 101, "write");
  state_->put_record(2, {.number = 1, .request = "other attempt", .data = ""}, 9, 103, "write");
  state_->finish_record(1, 2, bytes, "result");
  reopen();
  const auto records = state_->records(1);
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[0].request, "first");
  EXPECT_EQ(records[0].data, bytes);
  EXPECT_FALSE(records[0].done);
  EXPECT_EQ(records[1].number, 2U);
  EXPECT_TRUE(records[1].done);
  EXPECT_EQ(records[1].outcome, bytes);
  EXPECT_EQ(records[1].outcome_data, "result");
}

TEST_F(StateTest, a_record_sent_twice_stays_done) {
  state_->put_record(1, {.number = 1, .request = "r", .data = ""}, 9, 101, "write");
  state_->finish_record(1, 1, "outcome", "");
  state_->put_record(1, {.number = 1, .request = "r", .data = ""}, 9, 101, "write");
  ASSERT_EQ(state_->records(1).size(), 1U);
  EXPECT_TRUE(state_->records(1)[0].done);
  EXPECT_EQ(state_->records(1)[0].outcome, "outcome");
}

TEST_F(StateTest, dropping_the_records_of_an_attempt_leaves_the_others) {
  state_->put_record(1, {.number = 1, .request = "r", .data = ""}, 9, 101, "write");
  state_->put_record(2, {.number = 1, .request = "r", .data = ""}, 9, 101, "write");
  state_->drop_records(1);
  EXPECT_TRUE(state_->records(1).empty());
  EXPECT_EQ(state_->records(2).size(), 1U);
}

TEST_F(StateTest, a_blob_is_replaced_and_removed_by_an_empty_one) {
  EXPECT_EQ(state_->blob("k"), "");
  state_->put_blob("k", std::string_view("a\0b", 3));
  state_->put_blob("k", std::string_view("c\0d", 3));
  reopen();
  EXPECT_EQ(state_->blob("k"), std::string_view("c\0d", 3));
  state_->put_blob("k", "");
  Statement count(*database_, "SELECT count(*) FROM blob");
  ASSERT_TRUE(count.step());
  EXPECT_EQ(count.integer(0), 0);
}

}  // namespace
}  // namespace sharefs
