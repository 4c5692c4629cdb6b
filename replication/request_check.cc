#include "replication/request_check.h"

#include <linux/limits.h>

#include <algorithm>
#include <cerrno>
#include <string_view>

namespace sharefs {
namespace {

// Names may hold any byte but NUL, which would cut them short in a system call; more is checked by the store.
int check_name(std::string_view name) {
  if (name.find('\0') != std::string_view::npos) return EINVAL;
  return name.size() > NAME_MAX ? ENAMETOOLONG : 0;
}

int check_names(std::string_view one, std::string_view two) {
  return std::max(check_name(one), check_name(two));
}

int check_target(std::string_view target) {
  if (target.find('\0') != std::string_view::npos) return EINVAL;
  return target.size() >= PATH_MAX ? ENAMETOOLONG : 0;
}

int check_size(std::uint64_t size) { return size > kMaxPayload ? EINVAL : 0; }

}  // namespace

int check_request(const pb::Request& request, Bytes data) {
  const bool carries = request.has_write() || request.has_setxattr();
  if (!carries && !data.empty()) return EINVAL;
  if (request.answered_below() > request.seq()) return EINVAL;
  if (request.ahead_answered_below() > request.seq()) return EINVAL;
  switch (request.op_case()) {
    case pb::Request::OP_NOT_SET:
      return EINVAL;
    case pb::Request::kWrite:
      return request.write().size() == data.size() ? check_size(data.size()) : EINVAL;
    case pb::Request::kSetxattr:
      return data.size() > XATTR_SIZE_MAX ? E2BIG : check_name(request.setxattr().name());
    case pb::Request::kRead:
      return check_size(request.read().size());
    case pb::Request::kReaddir:
      return check_size(request.readdir().max_bytes());
    case pb::Request::kLookup:
      return check_name(request.lookup().name());
    case pb::Request::kGetxattr:
      return check_name(request.getxattr().name());
    case pb::Request::kRemovexattr:
      return check_name(request.removexattr().name());
    case pb::Request::kCreate:
      return check_name(request.create().name());
    case pb::Request::kMkdir:
      return check_name(request.mkdir().name());
    case pb::Request::kSymlink:
      return std::max(check_name(request.symlink().name()), check_target(request.symlink().target()));
    case pb::Request::kLink:
      return check_name(request.link().name());
    case pb::Request::kUnlink:
      return check_name(request.unlink().name());
    case pb::Request::kRmdir:
      return check_name(request.rmdir().name());
    case pb::Request::kRename:
      return check_names(request.rename().name(), request.rename().new_name());
    default:
      return 0;
  }
}

}  // namespace sharefs
