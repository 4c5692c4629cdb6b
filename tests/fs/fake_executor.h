// An Executor for tests that stands where the store stands: notes what it was asked, and answers at once or
// when told.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "meta/executor.h"

namespace sharefs::test {

class FakeExecutor final : public Executor {
 public:
  struct Call {
    pb::Request request;
    std::string data;
    Reply reply;  // empty once answered
  };

  void execute(const pb::Request& request, Bytes data, Reply reply) override {
    calls.push_back({request, std::string(as_text(data)), std::move(reply)});
    if (!late) answer(calls.size() - 1);
  }

  // Answers the call with what `result` makes of its request.
  void answer(std::size_t index) {
    const Reply reply = std::exchange(calls.at(index).reply, nullptr);
    reply(result(calls[index].request), {});
  }

  std::vector<pb::Request::OpCase> ops() const {
    std::vector<pb::Request::OpCase> list;
    for (const Call& call : calls) list.push_back(call.request.op_case());
    return list;
  }
  std::vector<std::uint64_t> seqs() const {
    std::vector<std::uint64_t> list;
    for (const Call& call : calls) list.push_back(call.request.seq());
    return list;
  }

  bool late = false;
  std::function<pb::Outcome(const pb::Request&)> result = [](const pb::Request&) { return pb::Outcome(); };
  std::vector<Call> calls;
};

// What came of one request.
struct Answer {
  int times = 0;
  pb::Outcome outcome;
  std::function<void()> then = [] {};  // when it is given

  Reply reply() {
    return [this](const pb::Outcome& given, Bytes) {
      ++times;
      outcome = given;
      then();
    };
  }
  bool given() const { return times == 1; }
  int error() const { return static_cast<int>(outcome.error()); }
};

inline pb::Request request_of(std::uint64_t client, std::uint64_t seq) {
  pb::Request request;
  request.set_client(client);
  request.set_seq(seq);
  return request;
}

inline pb::Request write_of(std::uint64_t client, std::uint64_t seq, InodeId id, std::uint64_t offset,
                            std::uint32_t size, bool writeback = false) {
  pb::Request request = request_of(client, seq);
  request.mutable_write()->set_id(id);
  request.mutable_write()->set_offset(offset);
  request.mutable_write()->set_size(size);
  request.mutable_write()->set_writeback(writeback);
  return request;
}

}  // namespace sharefs::test
