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
  if (std::exchange(sent_, true)) {
    for (const Number number : outstanding_)
      if (Gate::Record& record = records_.at(number); record.reply && record.request.has_setlock())
        record.reply = telling_of_changes(std::move(record.reply));
  }
  send_commit();
  for (const auto& [number, record] : records_) {
    pb::Envelope envelope;
    envelope.mutable_record()->set_attempt(committed_.attempt);
    envelope.mutable_record()->set_number(number);
    *envelope.mutable_record()->mutable_request() = record.request;
    send(envelope, record.data);
  }
  fault_point("source.records_sent");
}

void GivenRecords::send_commit() {
  parts_.reactor.cancel(retry_timer_);
  pb::Envelope envelope;
  auto* commit = envelope.mutable_commit();
  commit->set_attempt(committed_.attempt);
  commit->set_epoch(committed_.epoch);
  commit->set_records(records_.size());
  send(envelope, to_line(to_json(committed_)));
  retry_timer_ = parts_.reactor.after(kResendInterval, [this] { send_commit(); });
}

void GivenRecords::send(const pb::Envelope& envelope, std::string_view part) {
  std::vector<zmq::message_t> parts;
  parts.emplace_back(part.data(), part.size());
  parts_.transport.send(committed_.target, Lane::requests, envelope, std::move(parts));
}

void GivenRecords::done(const pb::RecordDone& message, const Message& raw) {
  if (outstanding_.erase(message.number()) == 0) return;
  const Reply reply = std::exchange(records_.at(message.number()).reply, nullptr);
  if (!reply) return;  // its caller was one of a process that has ended
  reply(message.outcome(), raw.parts.empty() ? Bytes() : as_bytes(raw.parts[0].to_string_view()));
}

void GivenRecords::ask_again(ClientId mount) {
  for (const Number number : std::exchange(outstanding_, {})) {
    Gate::Record& record = records_.at(number);
    Reply reply = std::exchange(record.reply, nullptr);
    if (reply && record.request.client() == mount)
      parts_.peer.execute_again(record.request, as_bytes(record.data), std::move(reply));
  }
}

}  // namespace sharefs
