#include "replication/given_records.h"

#include <chrono>
#include <string>
#include <utility>

#include "meta/fault.h"
#include "replication/json_line.h"

namespace sharefs {
namespace {

constexpr auto kResendInterval = std::chrono::seconds(1);

}  // namespace

bool GivenRecords::is_asked_again(const pb::Request& request) {
  return request.setlock().wait() || request.has_attach() || op_class(request.op_case()) == OpClass::query;
}

GivenRecords::GivenRecords(const SiteParts& parts, HandoffRecord committed, std::vector<Gate::Record> records)
    : parts_(parts), committed_(std::move(committed)) {
  for (auto& record : records) {
    const Number number = records_.size() + 1;
    outstanding_.insert(number);
    records_.emplace(number, std::move(record));
  }
}

GivenRecords::~GivenRecords() { parts_.reactor.cancel(retry_timer_); }

void GivenRecords::send() {
  send_if([](Number) { return true; });
}

void GivenRecords::send_if(const std::function<bool(Number)>& wanted) {
  parts_.reactor.cancel(retry_timer_);
  const auto to_target = [this](const pb::Envelope& envelope, std::string_view part) {
    std::vector<zmq::message_t> parts;
    parts.emplace_back(part.data(), part.size());
    parts_.transport.send(committed_.target, Lane::requests, envelope, std::move(parts));
  };
  pb::Envelope envelope;
  auto* commit = envelope.mutable_commit();
  commit->set_attempt(committed_.attempt);
  commit->set_epoch(committed_.epoch);
  commit->set_records(records_.size());
  to_target(envelope, to_line(to_json(committed_)));
  for (const auto& [number, record] : records_) {
    if (!wanted(number)) continue;
    pb::Envelope one;
    one.mutable_record()->set_attempt(committed_.attempt);
    one.mutable_record()->set_number(number);
    *one.mutable_record()->mutable_request() = record.request;
    to_target(one, record.data);
  }
  fault_point("source.records_sent");
  retry_timer_ = parts_.reactor.after(kResendInterval, [this] {
    retry_timer_ = 0;
    send_if([this](Number number) { return outstanding_.contains(number); });
  });
}

void GivenRecords::done(const pb::RecordDone& message, const Message& raw) {
  if (outstanding_.erase(message.number()) == 0) return;
  const Reply reply = std::exchange(records_.at(message.number()).reply, nullptr);
  if (!reply) return;  // its caller was one of a process that has ended
  reply(message.outcome(), raw.parts.empty() ? Bytes() : as_bytes(raw.parts[0].to_string_view()));
}

}  // namespace sharefs
