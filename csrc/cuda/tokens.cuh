// Rows on a GPU: which threads work on which row, and eight tokens of a row for each thread.
#pragma once

#include "cuda/scan.cuh"
#include "segk/dtype.h"
#include "segk/rows.h"
#include "segk/storage.h"

namespace segk {

constexpr int kItems = 8;      // per thread: 16 bytes of bf16, two times 16 of fp32
constexpr int kWarpRow = 512;  // the longest row that a warp works on; longer ones get a block
constexpr uint32_t kAllItems = (1u << kItems) - 1;

// The eight neighbouring tokens of a thread, and which of them belong to the row: bit i of `valid`
// stands for token first + i, as in all sets of items here.
struct Items {
  int64_t first;
  uint32_t valid;
  bool in_stream;  // all eight are tokens of the stream, so they may be read together
};

// Whether vectors of so many bytes may be moved. Items start at multiples of eight, so it is the
// same for all threads.
__device__ inline bool aligned(const void* data, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

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

// The same number, from which the compiler computes anew what it would otherwise keep in registers
// from tile to tile.
__device__ inline uint32_t anew(uint32_t number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

}  // namespace detail

// Those that start at token `first`, a multiple of eight, of a stream of n tokens.
__device__ inline Items items_at(int64_t first, int64_t n) {
  const uint32_t valid = detail::items_below(n - first);
  return {first, valid, valid == kAllItems};
}

// A row, of fewer than 2^31 tokens, cut into tiles of eight tokens for each thread. Tiles start at
// multiples of eight of the whole stream, wherever the row starts, so that aligned vectors can be
// moved.
class Tiles {
 public:
  // The row begin .. end of a stream of so many tokens.
  __device__ Tiles(Group group, int64_t begin, int64_t end, int64_t tokens)
      : group_(group), eighth_(static_cast<uint32_t>(begin / kItems)) {
    const int64_t base = begin / kItems * kItems;
    end_ = static_cast<int32_t>(end - base);
    const bool past_end = (tokens - base) / kItems * kItems >= end - base;
    edges_ = static_cast<uint32_t>(begin - base) | (past_end ? kPastEnd : 0);
  }

  __device__ int32_t count() const { return (end_ + width() - 1) / width(); }
  __device__ int64_t first(int32_t tile) const { return base() + tile * width(); }

  __device__ Items items(int32_t tile) const {
    const int32_t first = tile * width() + kItems * group_.rank();
    const uint32_t edges = detail::anew(edges_);
    const auto begin = static_cast<int32_t>(edges & (kItems - 1));
    return {base() + first, detail::items_below(end_ - first) & ~detail::items_below(begin - first),
            (edges & kPastEnd) != 0 || first + kItems <= end_};
  }

 private:
  // The stream goes on at least to the next multiple of eight.
  static constexpr uint32_t kPastEnd = kItems;

  __device__ int64_t base() const { return int64_t{detail::anew(eighth_)} * kItems; }
  __device__ int32_t width() const { return kItems * group_.size(); }

  // As few registers as can be: kernels keep them from the first tile to the last.
  Group group_;
  uint32_t eighth_;  // an eighth of the multiple of eight, base, where the first tile starts
  int32_t end_;      // of the row, counted from base
  uint32_t edges_;   // where the row begins, counted from base, and kPastEnd
};

namespace detail {

// Four bytes of 0 or 1 as four bits, and back. The products shift each bit to where it belongs
// without a carry.
__device__ inline uint32_t bits_of_bytes(uint32_t bytes) {
  return (bytes & 0x01010101u) * 0x10204080u >> 28;
}
__device__ inline uint32_t bytes_of_bits(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

}  // namespace detail

// The flags of eight tokens as they are in memory.
class FetchedFlags {
 public:
  __device__ FetchedFlags(const bool* flags, Items items) : bytes_{0, 0} {
    if (items.valid == 0) return;
    const bool* at = flags + items.first;
    if (items.in_stream && aligned(flags, 8)) {
      bytes_ = *reinterpret_cast<const uint2*>(at);
      return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has(items.valid, i)) continue;
      (i < 4 ? bytes_.x : bytes_.y) |= static_cast<uint32_t>(at[i]) << (8 * (i % 4));
    }
  }
  // The set of those that are true.
  __device__ uint32_t set() const {
    return detail::bits_of_bytes(bytes_.x) | detail::bits_of_bytes(bytes_.y) << 4;
  }

 private:
  uint2 bytes_;
};

// The set of items where `flags` is true; all valid ones if it is null.
__device__ inline uint32_t load_flags(const bool* flags, Items items) {
  return flags ? FetchedFlags(flags, items).set() & items.valid : items.valid;
}

__device__ inline void store_flags(uint32_t set, bool* flags, Items items) {
  bool* at = flags + items.first;
  if (items.valid == kAllItems && aligned(flags, 8)) {
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

template <class Array>
__device__ const uint4* vectors(Array x, int64_t first) {
  const int64_t bytes = first * (x.dtype == DType::f32 ? 4 : 2);
  return reinterpret_cast<const uint4*>(static_cast<const char*>(x.data) + bytes);
}
template <class Array>
__device__ uint32_t bits(Array x, int64_t i) {
  return x.dtype == DType::f32 ? static_cast<const uint32_t*>(x.data)[i]
                               : static_cast<const uint16_t*>(x.data)[i];
}

}  // namespace detail

// Eight tokens of an array of floats as they are in memory: several arrays can be asked for before
// the first number of any is waited for. Array: Stored, or Floats where the compiler does not know
// the dtype.
template <class Array>
class Fetched {
 public:
  __device__ explicit Fetched(Array x) : x_(x) {}

  __device__ bool aligned() const { return segk::aligned(x_.data, 16); }

  __device__ void by_vector(Items items) {
    const uint4* at = detail::vectors(x_, items.first);
    take(at, at + 1);
  }
  // Item i alone.
  __device__ void one(Items items, int i) {
    const bool halves = x_.dtype != DType::f32;
    const uint32_t word = detail::bits(x_, items.first + i) << (halves ? 16 * (i % 2) : 0);
    const int which = halves ? i / 2 : i;
#pragma unroll
    for (int j = 0; j < kItems; ++j) words_[j] |= j == which ? word : 0;
  }
  __device__ void unpack(float (&out)[kItems]) const {
    switch (x_.dtype) {
      case DType::bf16:
        return unpack_halves<bf16_to_float>(out);
      case DType::f16:
        return unpack_halves<f16_to_float>(out);
      default:
#pragma unroll
        for (int i = 0; i < kItems; ++i) out[i] = detail::bits_to_float(words_[i]);
    }
  }

  // The vectors as they are in memory; halves have no high one.
  __device__ void take(const uint4* low, const uint4* high) {
    put(0, *low);
    if (x_.dtype == DType::f32) put(4, *high);
  }

 private:
  __device__ void put(int i, uint4 four) {
    words_[i] = four.x;
    words_[i + 1] = four.y;
    words_[i + 2] = four.z;
    words_[i + 3] = four.w;
  }
  template <float (*convert)(uint16_t)>
  __device__ void unpack_halves(float (&out)[kItems]) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      out[i] = convert(static_cast<uint16_t>(words_[i / 2] >> (16 * (i % 2))));
    }
  }

  Array x_;
  uint32_t words_[kItems] = {};  // of halves the first four
};

namespace detail {

// Copies a vector of global memory to shared[kOffset] without a register; `arrived` waits for all
// copies of this thread.
template <int kOffset>
__device__ void copy_async(uint4* shared, const uint4* global) {
#if defined(__CUDA_ARCH__)
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0 + %2], [%1], 16;" ::"r"(to), "l"(global),
               "n"(kOffset * sizeof(uint4))
               : "memory");
#else
  shared[kOffset] = *global;
#endif
}
__device__ inline void arrived() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace detail

// The same as Fetched, in shared memory (2 * kMaxThreads vectors for the block) instead of
// registers. No other thread looks at it, so there is no barrier.
template <class Array>
class Parked {
 public:
  __device__ Parked(Array x, uint4* of_block) : x_(x), at_(of_block + threadIdx.x) {}

  __device__ bool aligned() const { return segk::aligned(x_.data, 16); }

  __device__ void by_vector(Items items) const {
    const uint4* at = detail::vectors(x_, items.first);
    detail::copy_async<0>(at_, at);
    if (x_.dtype == DType::f32) detail::copy_async<kMaxThreads>(at_, at + 1);
  }
  __device__ void one(Items items, int i) const {
    const uint32_t bits = detail::bits(x_, items.first + i);
    if (x_.dtype == DType::f32) {
      reinterpret_cast<uint32_t*>(at_ + (i < 4 ? 0 : kMaxThreads))[i % 4] = bits;
    } else {
      reinterpret_cast<uint16_t*>(at_)[i] = static_cast<uint16_t>(bits);
    }
  }
  __device__ void unpack(float (&out)[kItems]) const {
    detail::arrived();
    Fetched<Array> numbers(x_);
    numbers.take(at_, at_ + kMaxThreads);
    numbers.unpack(out);
  }

 private:
  Array x_;
  uint4* at_;
};

// Asks for all of the arrays, Fetched or Parked. Where no item is wanted, nothing is read, and what
// the arrays hold of items that are not wanted means nothing.
template <class... Arrays>
__device__ void fetch(Items items, uint32_t wanted, Arrays&... x) {
  if (wanted == 0) return;
  if (items.in_stream && (x.aligned() && ...)) {
    (x.by_vector(items), ...);
  } else {
#pragma unroll 1
    for (int i = 0; i < kItems; ++i) {
      if (has(items.valid, i)) (x.one(items, i), ...);
    }
  }
}

// x of the wanted items, as fetch.
template <DType kDType>
__device__ void load(Stored<kDType> x, Items items, uint32_t wanted, float (&out)[kItems]) {
  Fetched<Stored<kDType>> numbers(x);
  fetch(items, wanted, numbers);
  numbers.unpack(out);
}
__device__ inline void load(Floats x, Items items, uint32_t wanted, float (&out)[kItems]) {
  switch (x.dtype) {
    case DType::bf16:
      return load(Stored<DType::bf16>{x.data}, items, wanted, out);
    case DType::f16:
      return load(Stored<DType::f16>{x.data}, items, wanted, out);
    default:
      return load(Stored<DType::f32>{x.data}, items, wanted, out);
  }
}

namespace detail {

// By value: a choice between elements of an array would be one between their addresses, and the
// array would leave the registers.
__device__ inline float pick(bool first, float a, float b) { return first ? a : b; }

// The compiler would take some of these apart.
__device__ inline void store_vector(const float (&x)[4], float* out) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(out), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) out[i] = x[i];
#endif
}

}  // namespace detail

// Every lane of the warp takes part. Two neighbours write the eight tokens of one of them together,
// then those of the other, so that each store fills whole sectors of 32 bytes.
__device__ inline void store(const float (&x)[kItems], float* out, Items items) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool whole = items.valid == kAllItems && aligned(out, 16);
  const bool neighbour_whole = __shfl_xor_sync(kAllLanes, whole ? 1u : 0u, 1) != 0;
  float kept[4], received[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = x[i], high = x[i + 4];
    kept[i] = detail::pick(odd, high, low);
    const float given = detail::pick(odd, low, high);
    uint32_t word;
    memcpy(&word, &given, sizeof word);
    received[i] = detail::bits_to_float(__shfl_xor_sync(kAllLanes, word, 1));
  }
  float of_even[4], of_odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    of_even[i] = detail::pick(odd, received[i], kept[i]);
    of_odd[i] = detail::pick(odd, kept[i], received[i]);
  }
  float* at = out + items.first - (odd ? 4 : 0);
  if (odd ? neighbour_whole : whole) detail::store_vector(of_even, at);
  if (odd ? whole : neighbour_whole) detail::store_vector(of_odd, at + kItems);
  if (whole) return;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (has(items.valid, i)) out[items.first + i] = x[i];
  }
}

// The rows first .. first + count - 1: short ones by a warp each, then long ones by the whole
// block, one after the other. Calls body(group, row, tiles) in every thread of the group; count is
// at most the number of warps. Both kinds share one call: inlined twice, it would need more
// registers.
template <class Body>
__device__ void for_each_row(Rows rows, int64_t first, int count, Body body) {
  __shared__ uint8_t turn_of[kMaxThreads];  // one register less
  uint8_t& turn = turn_of[threadIdx.x];
  for (turn = 0; turn <= count; ++turn) {
    const bool by_block = turn > 0;
    const int which = by_block ? turn - 1 : static_cast<int>(threadIdx.x / kWarp);
    const int64_t row = first + which;
    if (which >= count || row >= rows.count) continue;
    const int64_t begin = rows.begin(row);
    const int64_t end = rows.end(row);
    const int64_t tokens = rows.tokens();
    if ((end - begin > kWarpRow) != by_block) continue;
    const Group group(by_block);
    body(group, row, Tiles(group, begin, end, tokens));
  }
}

}  // namespace segk
