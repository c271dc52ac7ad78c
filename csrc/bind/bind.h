// What the bindings share: numbers from Python as what the kernels take. The files of this folder
// are the only ones that know Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "segk/executor.h"
#include "segk/rewards.h"
#include "segk/rows.h"
#include "segk/segments.h"

namespace segk {

// segkernels.native.floats: (address, dtype code).
using FloatsArg = std::tuple<uintptr_t, int>;
// segkernels.native.rows: (rows, tokens per row of a grid, address of cu_seqlens or 0).
using RowsArg = std::tuple<int64_t, int64_t, uintptr_t>;
// segkernels.native.executor: (number of threads or address of a cudaStream_t, index of the GPU).
using ExecutorArg = std::tuple<int64_t, int>;
// (address of the floats that Curve.packed in normalizer.py gives, whether they are in the memory
// of the GPU); the address is 0 without a normaliser.
using CurveArg = std::tuple<uintptr_t, bool>;

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

inline Executor executor_of(ExecutorArg arg) { return {std::get<0>(arg), std::get<1>(arg)}; }

// (threshold, current, address of exclude_last or 0, exclude_all), as Boundaries has them.
using BoundariesArg = std::tuple<float, bool, uintptr_t, bool>;

inline Boundaries boundaries_of(BoundariesArg arg) {
  const auto [threshold, current, exclude_last, exclude_all] = arg;
  return {threshold, current, at<const bool>(exclude_last), exclude_all};
}

inline Credit credit_of(CurveArg arg, int spread, bool mean, float clip) {
  return {{at<const float>(std::get<0>(arg))},
          static_cast<Spread>(spread),
          mean,
          clip,
          std::get<1>(arg)};
}

}  // namespace segk
