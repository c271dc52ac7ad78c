// How a kernel is put on a stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/scratch.h"
#include "cuda/tokens.cuh"
#include "segk/place.h"

namespace segk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows are divided: groups of neighbouring rows, a block each.
struct Division {
  int64_t groups;
  int threads;  // of a block
  int rows;     // of a group

  // Short rows get a warp each and eight warps a block; long ones get as many threads as hold the
  // row at once, so that blocks of rows of a thousand tokens do not idle.
  explicit Division(Rows all) {
    if (all.row_len <= kWarpRow) {
      threads = 256;
      rows = threads / kWarp;
    } else {
      const int64_t octets = ceil_div(all.row_len, kItems);
      threads = static_cast<int>(std::min<int64_t>(ceil_div(octets, kWarp) * kWarp, kMaxThreads));
      rows = 1;
    }
    groups = ceil_div(all.count, rows);
  }
};

namespace detail {

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": expected its CUDA kernel to start, got '" +
                           cudaGetErrorString(status) +
                           "'; an earlier kernel may have failed (CUDA_LAUNCH_BLOCKING=1 shows "
                           "which), or the GPU is none that this build has code for");
}

// Makes the device that owns `memory` the current one: the default stream has no device.
class DeviceOf {
 public:
  DeviceOf(const char* op, const void* memory) {
    cudaPointerAttributes owner;
    check(op, cudaPointerGetAttributes(&owner, memory));
    check(op, cudaGetDevice(&before_));
    now_ = owner.device;
    if (now_ != before_) check(op, cudaSetDevice(now_));
  }
  ~DeviceOf() {
    if (now_ != before_) cudaSetDevice(before_);
  }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  int number() const { return now_; }

 private:
  int before_ = 0;
  int now_ = 0;
};

template <class Args>
void start(const char* op, void (*kernel)(Args), Args args, int64_t blocks, int threads,
           Place place, bool together) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(place);
  config.attrs = &attribute;
  config.numAttrs = together ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t last = cudaGetLastError();  // and forgets it: the next call starts anew
  check(op, status != cudaSuccess ? status : last);
}

}  // namespace detail

// `out` is memory on the GPU that the kernel runs on; null where there is nothing to write.
template <class Args>
void launch(const char* op, void (*kernel)(Args), const Args& args, int64_t blocks, int threads,
            const void* out, Place place) {
  if (blocks == 0 || !out) return;
  const detail::DeviceOf device(op, out);
  detail::start(op, kernel, args, blocks, threads, place, false);
}

// At most `blocks`, as many as run at the same time, so that they can wait for each other. One at
// least: a sum over nothing has to be written too.
template <class Args>
void launch_together(const char* op, void (*kernel)(Args), const Args& args, int64_t blocks,
                     int threads, const void* out, Place place) {
  const detail::DeviceOf device(op, out);
  int of_each = 0;
  int processors = 0;
  detail::check(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, 0));
  detail::check(
      op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device.number()));
  const int64_t fit = int64_t{of_each} * processors;
  detail::start(op, kernel, args, std::max<int64_t>(std::min(blocks, fit), 1), threads, place,
                true);
}

}  // namespace segk
