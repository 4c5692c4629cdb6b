#include "fs/content_cache.h"

#include <algorithm>
#include <utility>

namespace sharefs {

ContentCache::FillPtr ContentCache::begin(InodeId id, std::string content) {
  auto fill = std::make_shared<Fill>(Fill{.id = id, .content = std::move(content)});
  fills_.emplace(id, fill);
  return fill;
}

void ContentCache::end(Fill& fill, bool whole) {
  if (!whole || fill.spoiled || fill.content.size() > kLongest) {
    const auto [first, last] = fills_.equal_range(fill.id);
    const auto own =
        std::find_if(first, last, [&](const auto& one) { return one.second.lock().get() == &fill; });
    if (own != last) fills_.erase(own);
    return;
  }
  changed(fill.id);
  if (bytes_ + fill.content.size() > kMost) {
    contents_.clear();
    bytes_ = 0;
  }
  bytes_ += fill.content.size();
  contents_.emplace(fill.id, std::move(fill.content));
}

void ContentCache::changed(InodeId id) {
  if (const auto found = contents_.find(id); found != contents_.end()) {
    bytes_ -= found->second.size();
    contents_.erase(found);
  }
  const auto [first, last] = fills_.equal_range(id);
  for (auto one = first; one != last; ++one)
    if (const auto fill = one->second.lock()) fill->spoiled = true;
  fills_.erase(first, last);
}

void ContentCache::changed_all() {
  contents_.clear();
  bytes_ = 0;
  for (const auto& [id, running] : fills_)
    if (const auto fill = running.lock()) fill->spoiled = true;
  fills_.clear();
}

const std::string* ContentCache::find(InodeId id) const {
  const auto found = contents_.find(id);
  return found == contents_.end() ? nullptr : &found->second;
}

}  // namespace sharefs
