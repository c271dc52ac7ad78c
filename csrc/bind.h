// What the bind_*.cpp files share: addresses from Python as what the kernels take.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "segk/rows.h"

namespace segk {

// segkernels.native.floats: (address, dtype code).
using FloatsArg = std::tuple<uintptr_t, int>;
// segkernels.native.rows: (rows, tokens per row of a grid, address of cu_seqlens or 0).
using RowsArg = std::tuple<int64_t, int64_t, uintptr_t>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Floats floats(FloatsArg arg) {
  return {at<const void>(std::get<0>(arg)), static_cast<DType>(std::get<1>(arg))};
}

inline Rows rows_of(RowsArg arg) {
  return {std::get<0>(arg), std::get<1>(arg), at<const int32_t>(std::get<2>(arg))};
}

}  // namespace segk
