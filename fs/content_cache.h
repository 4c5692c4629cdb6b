// The contents of small files, as this site has been promised them: for NameCache, which knows whether the
// promise of an inode's attributes holds. Whoever changes data changes attributes, so the contents hold as
// long. A kernel keeps pages too, but loses them with the inode, whenever it is short of memory or of names.
//
// Filled by what goes through anyway: a read or a write of the whole file. Each is followed from its request
// to its outcome, since the content may change in between.
//
// Bounded: when it is full, everything is forgotten. Threads: reactor thread only.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>

#include "meta/types.h"

namespace sharefs {

class ContentCache {
 public:
  static constexpr std::size_t kLongest = std::size_t{64} << 10;  // bytes of one file
  static constexpr std::size_t kMost = std::size_t{16} << 20;     // of all

  // A request under way that reads or writes the whole content.
  struct Fill {
    InodeId id;
    std::string content;
    bool spoiled = false;  // it may have changed since
  };
  using FillPtr = std::shared_ptr<Fill>;
  FillPtr begin(InodeId id, std::string content = {});
  // Its outcome has come: keeps the content, if it is `whole` and not spoiled. What else is under way is
  // spoiled then.
  void end(Fill& fill, bool whole);

  // The content is, or may be, another one from now on: forgets it, and spoils what is under way.
  void changed(InodeId id);
  void changed_all();

  // nullptr: not known.
  const std::string* find(InodeId id) const;
  std::size_t bytes() const { return bytes_; }

 private:
  std::unordered_map<InodeId, std::string> contents_;
  std::size_t bytes_ = 0;  // of them
  std::unordered_multimap<InodeId, std::weak_ptr<Fill>> fills_;
};

}  // namespace sharefs
