// Scans over the threads of a warp or of a block, in tree order, by the operators of
// include/segk.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace segk {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;

enum class From { left, right };

// The combination of all threads between the start of the scan and this one, exclusively, and that
// of all threads.
template <class T>
struct Scanned {
  T before;
  T total;
};

namespace detail {

// A shuffle moves 32 bits.
template <class T, class Shuffle>
__device__ T shuffled(T value, Shuffle shuffle) {
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  static_assert(sizeof(T) == kWords * sizeof(uint32_t), "whole words");
  uint32_t words[kWords];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  memcpy(&value, words, sizeof value);
  return value;
}

template <From from, class T>
__device__ T neighbour(T value, unsigned distance) {
  return shuffled(value, [distance](uint32_t word) {
    return from == From::left ? __shfl_up_sync(kAllLanes, word, distance)
                              : __shfl_down_sync(kAllLanes, word, distance);
  });
}

template <From from, class T>
__device__ T in_order(T nearer, T farther) {
  return from == From::left ? combine(farther, nearer) : combine(nearer, farther);
}

// Lanes between where the scan starts and this one.
template <From from>
__device__ int steps_from_start() {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  return from == From::left ? lane : kWarp - 1 - lane;
}

template <From from, class T>
__device__ Scanned<T> scan_warp(T mine, T initial) {
  const int steps = steps_from_start<from>();
  T sum = mine;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T farther = neighbour<from>(sum, static_cast<unsigned>(distance));
    if (steps >= distance) sum = in_order<from>(sum, farther);
  }
  const T before = neighbour<from>(sum, 1);
  const T total = shuffled(sum, [](uint32_t word) {
    return __shfl_sync(kAllLanes, word, from == From::left ? kWarp - 1 : 0);
  });
  return {steps == 0 ? initial : in_order<from>(before, initial), in_order<from>(total, initial)};
}

}  // namespace detail

// The threads that share a row: a warp of the block, or all of it.
class Group {
 public:
  __device__ explicit Group(bool block) : block_(block) {}

  __device__ int rank() const {
    return static_cast<int>(block_ ? threadIdx.x : threadIdx.x % kWarp);
  }
  __device__ int size() const { return block_ ? static_cast<int>(blockDim.x) : kWarp; }

  // Waits for the others, whose writes are then visible.
  __device__ void sync() const {
    if (block_) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Every thread of the group takes part. `initial` comes before the first one and is the same in
  // all of them; combining with `identity` changes nothing. Two arrays: a warp that is already in
  // the next scan writes `totals` while others still read `befores`.
  template <From from, class T>
  __device__ Scanned<T> scan(T mine, T initial, T identity) const {
    constexpr int kMaxWarps = kMaxThreads / kWarp;
    __shared__ T totals[kMaxWarps];
    __shared__ T befores[kMaxWarps + 1];
    const Scanned<T> in_warp = detail::scan_warp<from>(mine, block_ ? identity : initial);
    if (!block_) return in_warp;

    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    if (lane == 0) totals[warp] = in_warp.total;
    __syncthreads();
    if (warp == 0) {
      const Scanned<T> of_warps =
          detail::scan_warp<from>(lane < warps ? totals[lane] : identity, initial);
      if (lane < warps) befores[lane] = of_warps.before;
      if (lane == 0) befores[kMaxWarps] = of_warps.total;
    }
    __syncthreads();
    return {detail::in_order<from>(in_warp.before, befores[warp]), befores[kMaxWarps]};
  }

 private:
  bool block_;
};

// The combination of the parts that the blocks of a grid have left in scratch memory; every thread
// of the block gets it.
template <class T>
__device__ T sum_of_parts(const T* parts, int64_t count, T identity) {
  const Group block(true);
  T mine = identity;
  for (int64_t part = block.rank(); part < count; part += block.size()) {
    mine = combine(mine, parts[part]);
  }
  return block.scan<From::left>(mine, identity, identity).total;
}

}  // namespace segk
