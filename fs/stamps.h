// With which times the kernel stamps changes of files.
#pragma once

#include <chrono>
#include <cstdint>

namespace sharefs {

// No kernel's clock for stamps ticks more slowly (10 ms).
constexpr std::chrono::milliseconds kStampTick{20};

// Whatever is changed from now on has a later ctime, in ns since 1970: kernels stamp changes with a clock
// that ticks, and file systems keep what they can of it.
std::int64_t ctime_floor();

// No change up to now has a later ctime than this, unless the clock was ahead then.
std::int64_t ctime_ceiling();

// Looks how much of it the file system of this directory keeps, which is this user's; stamps it. A process
// has one store.
void learn_stamps(int directory);

}  // namespace sharefs
