// Rows on a GPU: which threads work on which row, and a row's tokens eight to a thread.
#pragma once

#include "cuda/scan.cuh"
#include "segk/dtype.h"
#include "segk/rows.h"

namespace segk {

constexpr int kItems = 8;      // tokens of one thread: 16 bytes of bf16, two times 16 of fp32
constexpr int kWarpRow = 512;  // longer rows are worth a block
constexpr uint32_t kAllItems = (1u << kItems) - 1;

// Eight neighbouring tokens, of which those in `inside` belong to the row. Bit i is token first +
// i.
struct Octet {
  int64_t first;
  uint32_t inside;

  // Whether all of `data` [first, first + 8) may be moved at once.
  __device__ bool whole(const void* data, unsigned bytes) const {
    return inside == kAllItems && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  }
};

__device__ inline bool has(uint32_t items, int i) { return (items >> i & 1u) != 0; }

// x[i] of an array that stays in registers.
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

// The first n items, n of any size.
template <class Int>
__device__ uint32_t items_below(Int n) {
  if (n >= kItems) return kAllItems;
  return n <= 0 ? 0 : (1u << n) - 1;
}

}  // namespace detail

// The octet that starts at a multiple of eight of a stream of n tokens.
__device__ inline Octet octet_of(int64_t first, int64_t n) {
  return {first, detail::items_below(n - first)};
}

// A row, of fewer than 2^31 tokens, cut into tiles of eight tokens a thread. They start at
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

  __device__ Octet octet(int32_t tile) const {
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

// Four bytes of 0 or 1 as four bits, and back: the products place each bit without a carry.
__device__ inline uint32_t gather(uint32_t bytes) {
  return (bytes & 0x01010101u) * 0x10204080u >> 28;
}
__device__ inline uint32_t spread(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

}  // namespace detail

// The tokens of the octet where `flags` is true; all of them where it is null.
__device__ inline uint32_t load_flags(const bool* flags, Octet octet) {
  if (!flags) return octet.inside;
  if (octet.inside == 0) return 0;
  const bool* at = flags + octet.first;
  if (octet.whole(at, 8)) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(at);
    return detail::gather(bytes.x) | detail::gather(bytes.y) << 4;
  }
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(octet.inside, i) && at[i]) set |= 1u << i;
  }
  return set;
}

__device__ inline void store_flags(uint32_t set, bool* flags, Octet octet) {
  bool* at = flags + octet.first;
  if (octet.whole(at, 8)) {
    *reinterpret_cast<uint2*>(at) = uint2{detail::spread(set & 15u), detail::spread(set >> 4)};
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(octet.inside, i)) at[i] = has(set, i);
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

// The wanted tokens of the octet; what `out` holds elsewhere is nobody's. Nothing is read where
// none is wanted.
__device__ inline void load(Floats x, Octet octet, uint32_t wanted, float (&out)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) out[i] = 0;
  if (wanted == 0) return;
  const char* at = static_cast<const char*>(x.data) +
                   octet.first * (x.dtype == DType::f32 ? int64_t{4} : int64_t{2});
  if (octet.whole(at, 16)) {
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
    if (has(wanted, i)) out[i] = x[octet.first + i];
  }
}

__device__ inline void store(const float (&x)[kItems], float* out, Octet octet) {
  float* at = out + octet.first;
  if (octet.whole(at, 16)) {
    float4* vectors = reinterpret_cast<float4*>(at);
    vectors[0] = float4{x[0], x[1], x[2], x[3]};
    vectors[1] = float4{x[4], x[5], x[6], x[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(octet.inside, i)) at[i] = x[i];
  }
}

// The rows first .. first + count - 1: short ones by a warp each, then long ones by the whole block
// in turn. Calls body(group, row, begin, end) in every thread of the group; count is at most the
// number of warps. One call for both kinds: inlined twice it would need more registers.
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
