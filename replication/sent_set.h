// A set of inode ids, one bit for each: which inodes of a tree have been sent, or seen.
//
// Ids are issued in a row, so pages of 65536 bits (8 KiB), made when first touched, keep it near one bit per
// inode.
#pragma once

#include <bitset>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "meta/types.h"

namespace sharefs {

class SentSet {
 public:
  // Returns false if it was in the set before.
  bool insert(InodeId id) {
    auto& page = pages_[id >> kPageShift];
    if (!page) page = std::make_unique<Page>();
    const bool fresh = !page->test(id & kPageMask);
    page->set(id & kPageMask);
    return fresh;
  }

  void erase(InodeId id) {
    if (const auto page = pages_.find(id >> kPageShift); page != pages_.end()) {
      page->second->reset(id & kPageMask);
    }
  }

  bool contains(InodeId id) const {
    const auto page = pages_.find(id >> kPageShift);
    return page != pages_.end() && page->second->test(id & kPageMask);
  }

 private:
  static constexpr unsigned kPageShift = 16;
  static constexpr InodeId kPageMask = (1u << kPageShift) - 1;
  using Page = std::bitset<1u << kPageShift>;
  std::unordered_map<InodeId, std::unique_ptr<Page>> pages_;
};

}  // namespace sharefs
