// The scratch memory of the ops that sum over all rows.
#pragma once

#include <cstdint>

namespace segk {

// Sums over all rows are taken in this many parts whatever the GPU, and then over the parts, so
// that they are the same on a GPU of any size.
constexpr int64_t kParts = 512;
constexpr int64_t kBytesPerPart = 24;
constexpr int64_t kScratchBytes = kParts * kBytesPerPart;

}  // namespace segk
