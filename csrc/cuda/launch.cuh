// Starts kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/scratch.h"
#include "cuda/tokens.cuh"
#include "segk/executor.h"

namespace segk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of a kernel over rows, each of which works on some neighbouring rows. A cooperative
// kernel may be started with fewer, which then do the work of several.
struct RowGrid {
  int64_t blocks;
  int threads;  // of a block
  int rows_per_block;

  // Short rows get a warp each, with eight warps in a block; long ones a block with as many threads
  // as hold the row at once, wherever in a tile it starts, so that threads do not idle on rows of a
  // thousand tokens.
  explicit RowGrid(Rows rows) {
    if (rows.row_len <= kWarpRow) {
      threads = 256;
      rows_per_block = threads / kWarp;
    } else {
      const bool start_anywhere = !rows.cu_seqlens && rows.row_len % kItems != 0;
      const int64_t wanted = ceil_div(rows.row_len + (start_anywhere ? kItems - 1 : 0), kItems);
      threads = static_cast<int>(std::min<int64_t>(ceil_div(wanted, kWarp) * kWarp, kMaxThreads));
      rows_per_block = 1;
    }
    blocks = ceil_div(rows.count, rows_per_block);
  }
};

namespace detail {

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": expected its CUDA kernel to start, got '" +
                           cudaGetErrorString(status) +
                           "'; an earlier kernel may have failed (CUDA_LAUNCH_BLOCKING=1 shows "
                           "which), or this build has no code for the GPU");
}

// Whether this process has a context on the GPU, without creating one.
inline bool has_context(int device) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr char name[] = "cuDevicePrimaryCtxGetState";
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &entry, 7000, cudaEnableDefault, &found);
#else
  cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#endif
  if (!entry) return false;
  unsigned flags = 0;
  int active = 0;
  const auto get_state = reinterpret_cast<int (*)(int, unsigned*, int*)>(entry);
  return get_state(device, &flags, &active) == 0 && active != 0;
}

// Makes a GPU the current one for as long as it exists. Going back to one without a context would
// create it, some hundred MiB that nobody asked for; then, as in torch, it stays the current one.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) : device_(device) {
    check(op, cudaGetDevice(&before_));
    if (device_ != before_) check(op, cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != before_ && has_context(before_)) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

template <class Args>
void start(const char* op, void (*kernel)(Args), Args args, int64_t blocks, int threads,
           Executor executor, bool cooperative) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(executor.threads_or_stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t last = cudaGetLastError();  // also resets it for the next call
  check(op, status != cudaSuccess ? status : last);
}

}  // namespace detail

// `out` is null where there is nothing to write.
template <class Args>
void launch(const char* op, void (*kernel)(Args), const Args& args, int64_t blocks, int threads,
            const void* out, Executor executor) {
  if (blocks == 0 || !out) return;
  const detail::DeviceGuard guard(op, executor.device);
  detail::start(op, kernel, args, blocks, threads, executor, false);
}

template <class Args>
void launch(const char* op, void (*kernel)(Args), const Args& args, const RowGrid& grid,
            const void* out, Executor executor) {
  launch(op, kernel, args, grid.blocks, grid.threads, out, executor);
}

// A cooperative kernel, whose blocks can wait for each other because all run at the same time: as
// many as do, and at most `blocks`. At least one: a sum over nothing has to be written too.
template <class Args>
void launch_cooperative(const char* op, void (*kernel)(Args), const Args& args, int64_t blocks,
                        int threads, Executor executor) {
  const detail::DeviceGuard guard(op, executor.device);
  int of_each = 0;
  int processors = 0;
  detail::check(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, 0));
  detail::check(
      op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, executor.device));
  const int64_t fit = int64_t{of_each} * processors;
  detail::start(op, kernel, args, std::max<int64_t>(std::min(blocks, fit), 1), threads, executor,
                true);
}

}  // namespace segk
