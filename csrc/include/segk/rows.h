// The rows of a token stream: a padded [N, T] grid, or a flat [T] with cu_seqlens.
#pragma once

#include <cstdint>

#include "segk/dtype.h"

namespace segk {

struct Rows {
  int64_t count;              // N
  int64_t row_len;            // T of the grid; with cu_seqlens the mean length, rounded up
  const int32_t* cu_seqlens;  // [N + 1], or null for the grid

  SEGK_HD int64_t begin(int64_t row) const {
    return cu_seqlens ? static_cast<int64_t>(cu_seqlens[row]) : row * row_len;
  }
  SEGK_HD int64_t end(int64_t row) const { return begin(row + 1); }
  SEGK_HD int64_t tokens() const { return begin(count); }
};

// A sum over some tokens of a row, and how many they are. In double: a row may hold a hundred
// thousand of them.
struct RowSum {
  double sum;
  int32_t count;
};

SEGK_HD inline RowSum combine(RowSum left, RowSum right) {
  return {left.sum + right.sum, left.count + right.count};
}

}  // namespace segk
