// Which files a request is about, as far as it says so itself.
#pragma once

#include <string>

#include "meta/executor.h"

namespace sharefs {

// Calls visit(id) for every file that the request names by its number.
template <class Visit>
void visit_named_files(const pb::Request& request, const Visit& visit) {
  switch (request.op_case()) {
    case pb::Request::kGetattr:
      return visit(request.getattr().id());
    case pb::Request::kRead:
      return visit(request.read().id());
    case pb::Request::kSeek:
      return visit(request.seek().id());
    case pb::Request::kGetlock:
      return visit(request.getlock().id());
    case pb::Request::kOpen:
      return visit(request.open().id());
    case pb::Request::kRelease:
      return visit(request.release().id());
    case pb::Request::kFlush:
      return visit(request.flush().id());
    case pb::Request::kSetlock:
      return visit(request.setlock().id());
    case pb::Request::kSetattr:
      return visit(request.setattr().id());
    case pb::Request::kLink:
      return visit(request.link().id());
    case pb::Request::kWrite:
      return visit(request.write().id());
    case pb::Request::kFallocate:
      return visit(request.fallocate().id());
    case pb::Request::kCopyFileRange:
      visit(request.copy_file_range().id_in());
      return visit(request.copy_file_range().id_out());
    case pb::Request::kSetxattr:
      return visit(request.setxattr().id());
    case pb::Request::kRemovexattr:
      return visit(request.removexattr().id());
    case pb::Request::kSync:
      return visit(request.sync().id());
    default:
      return;
  }
}

// Calls visit(parent, name) for every name that may lead the request to a file.
template <class Visit>
void visit_names(const pb::Request& request, const Visit& visit) {
  switch (request.op_case()) {
    case pb::Request::kLookup:
      return visit(request.lookup().parent(), request.lookup().name());
    case pb::Request::kCreate:
      return visit(request.create().parent(), request.create().name());
    case pb::Request::kUnlink:
      return visit(request.unlink().parent(), request.unlink().name());
    case pb::Request::kRename:
      visit(request.rename().parent(), request.rename().name());
      return visit(request.rename().new_parent(), request.rename().new_name());
    default:
      return;
  }
}

}  // namespace sharefs
