// Rows on a GPU: which threads work on which row, and eight tokens of a row for each thread.
#pragma once

#include "cuda/scan.cuh"
#include "segk/dtype.h"
#include "segk/rows.h"

namespace segk {

constexpr int kItems = 8;      // per thread: 16 bytes of bf16, two times 16 of fp32
constexpr int kWarpRow = 512;  // the longest row that a warp works on; longer ones get a block
constexpr uint32_t kAllItems = (1u << kItems) - 1;

// The eight neighbouring tokens of a thread, and which of them belong to the row: bit i of `valid`
// stands for token first + i, as in all sets of items here.
struct Items {
  int64_t first;
  uint32_t valid;

  // Whether all of them may be moved as vectors of so many bytes, the first of which is at `data`.
  __device__ bool vectorized(const void* data, unsigned bytes) const {
    return valid == kAllItems && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  }
};

__device__ inline bool has(uint32_t set, int i) { return (set >> i & 1u) != 0; }

// x[i] for an i that the compiler does not know, of an array that stays in registers.
__device__ inline float get(const float (&x)[kItems], int i) {
  float value = x[0];
#pragma unroll
  for (int j = 1; j < kItems; ++j) value = i == j ? x[j] : value;
  return value;
}

__device__ inline void set(float (&x)[kItems], int i, float value) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) x[j] = i == j ? value : x[j];
}

namespace detail {

// The set of the first n items, for n of any size.
template <class Int>
__device__ uint32_t items_below(Int n) {
  if (n >= kItems) return kAllItems;
  return n <= 0 ? 0 : (1u << n) - 1;
}

}  // namespace detail

// Those that start at token `first`, a multiple of eight, of a stream of n tokens.
__device__ inline Items items_at(int64_t first, int64_t n) {
  return {first, detail::items_below(n - first)};
}

// A row, of fewer than 2^31 tokens, cut into tiles of eight tokens for each thread. Tiles start at
// multiples of eight of the whole stream, wherever the row starts, so that aligned vectors can be
// moved.
class Tiles {
 public:
  __device__ Tiles(Group group, int64_t begin, int64_t end)
      : group_(group),
        base_(begin / kItems * kItems),
        begin_(static_cast<int32_t>(begin - base_)),
        end_(static_cast<int32_t>(end - base_)) {}

  __device__ int32_t count() const { return (end_ + width() - 1) / width(); }
  __device__ int64_t first(int32_t tile) const { return base_ + tile * width(); }

  __device__ Items items(int32_t tile) const {
    const int32_t first = tile * width() + kItems * group_.rank();
    return {base_ + first,
            detail::items_below(end_ - first) & ~detail::items_below(begin_ - first)};
  }

 private:
  __device__ int32_t width() const { return kItems * group_.size(); }

  Group group_;
  int64_t base_;
  int32_t begin_;  // counted from base
  int32_t end_;
};

namespace detail {

// Four bytes of 0 or 1 as four bits, and back. The products shift each bit to where it belongs
// without a carry.
__device__ inline uint32_t bits_of_bytes(uint32_t bytes) {
  return (bytes & 0x01010101u) * 0x10204080u >> 28;
}
__device__ inline uint32_t bytes_of_bits(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

}  // namespace detail

// The set of items where `flags` is true; all valid ones if it is null.
__device__ inline uint32_t load_flags(const bool* flags, Items items) {
  if (!flags) return items.valid;
  if (items.valid == 0) return 0;
  const bool* at = flags + items.first;
  if (items.vectorized(at, 8)) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(at);
    return detail::bits_of_bytes(bytes.x) | detail::bits_of_bytes(bytes.y) << 4;
  }
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(items.valid, i) && at[i]) set |= 1u << i;
  }
  return set;
}

__device__ inline void store_flags(uint32_t set, bool* flags, Items items) {
  bool* at = flags + items.first;
  if (items.vectorized(at, 8)) {
    *reinterpret_cast<uint2*>(at) =
        uint2{detail::bytes_of_bits(set & 15u), detail::bytes_of_bits(set >> 4)};
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(items.valid, i)) at[i] = has(set, i);
  }
}

namespace detail {

template <float (*convert)(uint16_t)>
__device__ void unpack(uint4 packed, float (&out)[kItems]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = convert(static_cast<uint16_t>(words[i] & 0xffffu));
    out[2 * i + 1] = convert(static_cast<uint16_t>(words[i] >> 16));
  }
}

}  // namespace detail

// x of the wanted items; what `out` holds of the others means nothing. Where none is wanted,
// nothing is read.
__device__ inline void load(Floats x, Items items, uint32_t wanted, float (&out)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) out[i] = 0;
  if (wanted == 0) return;
  const char* at = static_cast<const char*>(x.data) +
                   items.first * (x.dtype == DType::f32 ? int64_t{4} : int64_t{2});
  if (items.vectorized(at, 16)) {
    if (x.dtype == DType::f32) {
      const float4 low = reinterpret_cast<const float4*>(at)[0];
      const float4 high = reinterpret_cast<const float4*>(at)[1];
      const float values[kItems] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kItems; ++i) out[i] = values[i];
    } else if (x.dtype == DType::bf16) {
      detail::unpack<bf16_to_float>(*reinterpret_cast<const uint4*>(at), out);
    } else {
      detail::unpack<f16_to_float>(*reinterpret_cast<const uint4*>(at), out);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(wanted, i)) out[i] = x[items.first + i];
  }
}

__device__ inline void store(const float (&x)[kItems], float* out, Items items) {
  float* at = out + items.first;
  if (items.vectorized(at, 16)) {
    float4* vectors = reinterpret_cast<float4*>(at);
    vectors[0] = float4{x[0], x[1], x[2], x[3]};
    vectors[1] = float4{x[4], x[5], x[6], x[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(items.valid, i)) at[i] = x[i];
  }
}

// The rows first .. first + count - 1: short ones by a warp each, then long ones by the whole
// block, one after the other. Calls body(group, row, begin, end) in every thread of the group;
// count is at most the number of warps. Both kinds share one call: inlined twice, it would need
// more registers.
template <class Body>
__device__ void for_each_row(Rows rows, int64_t first, int count, Body body) {
  for (int turn = 0; turn <= count; ++turn) {
    const bool by_block = turn > 0;
    const int which = by_block ? turn - 1 : static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = first + which;
    if (which >= count || row >= rows.count) continue;
    const int64_t begin = rows.begin(row);
    const int64_t end = rows.end(row);
    if ((end - begin > kWarpRow) == by_block) body(Group(by_block), row, begin, end);
  }
}

}  // namespace segk
