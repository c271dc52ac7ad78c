// The scratch memory of the ops that sum over all rows: one partial sum of each part.
#pragma once

#include <cstdint>

namespace segk {

// Sums over all rows are taken in so many parts on every GPU, and then over the parts: the order
// of summation does not depend on how many blocks run at the same time.
constexpr int64_t kParts = 512;
constexpr int64_t kBytesPerPart = 40;
constexpr int64_t kScratchBytes = kParts * kBytesPerPart;

}  // namespace segk
