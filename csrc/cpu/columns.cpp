// SIMD kernels over adjacent logits.
#include "cpu/columns.h"

#include "segk/isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX2__) || defined(__aarch64__)
#define SEGK_FMA 1
#endif

namespace segk {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 or NEON, which every x86-64 and AArch64 processor has
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

// The steps of one exp wait for each other: four are worked on side by side.
constexpr int kVectors = 4;
constexpr int64_t kGroup = kVectors * kLanes;

// Groups whose sums are found together. A lane adds up the columns of a block, then the blocks of
// all columns: the rounding error of many thousands stays near that of a hundred.
constexpr int64_t kBlock = 4;

// Columns that the processor is told to fetch ahead. Its own prefetching ends at each page, and an
// exp is too much work for the next page's loads to be seen in time.
constexpr int64_t kAhead = 1024;

constexpr float kLowest = -__FLT_MAX__;

#define SEGK_INLINE inline __attribute__((always_inline))

SEGK_INLINE Vec splat(float value) { return value - Vec{}; }

// at_least and at_most keep NaN in x. The intrinsics, because GCC makes a comparison and a blend
// of the select.
#if defined(__AVX512F__)
SEGK_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The masked forms, with every lane kept: GCC 12 warns of uninitialised memory in the plain ones.
SEGK_INLINE Vec at_least(Vec low, Vec x) { return _mm512_maskz_max_ps(0xffff, low, x); }
SEGK_INLINE Vec at_most(Vec high, Vec x) { return _mm512_maskz_min_ps(0xffff, high, x); }
#elif defined(__AVX2__)
SEGK_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SEGK_INLINE Vec at_least(Vec low, Vec x) { return _mm256_max_ps(low, x); }
SEGK_INLINE Vec at_most(Vec high, Vec x) { return _mm256_min_ps(high, x); }
#elif defined(__SSE2__)
SEGK_INLINE Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
SEGK_INLINE Vec at_least(Vec low, Vec x) { return _mm_max_ps(low, x); }
SEGK_INLINE Vec at_most(Vec high, Vec x) { return _mm_min_ps(high, x); }
#else
#if defined(SEGK_FMA)
SEGK_INLINE Vec fused(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
#else
SEGK_INLINE Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
SEGK_INLINE Vec at_least(Vec low, Vec x) { return x < low ? low : x; }
SEGK_INLINE Vec at_most(Vec high, Vec x) { return high < x ? high : x; }
#endif

SEGK_INLINE bool any_negative(Vec v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(v) != 0;
#else
  uint64_t pairs[2];
  __builtin_memcpy(pairs, &v, sizeof pairs);
  return ((pairs[0] | pairs[1]) & 0x8000000080000000u) != 0;
#endif
}

struct Group {
  Vec v[kVectors];

  SEGK_INLINE Vec& operator[](int k) { return v[k]; }
  SEGK_INLINE const Vec& operator[](int k) const { return v[k]; }
};

template <class F>
SEGK_INLINE Group each(F f) {
  Group g;
  for (int k = 0; k < kVectors; ++k) g[k] = f(k);
  return g;
}

// log2(e) / temperature as the sum of two floats, and the distance at which exp has vanished.
struct Rate {
  float high;
  float low;
  float limit;
  double temperature;
  float inverse_temperature;
};

Rate rate_of(double temperature) {
  const double rate = 0x1.71547652b82fep+0 / temperature;
  const float high = static_cast<float>(rate);
  return {high, static_cast<float>(rate - high), static_cast<float>(126 / rate), temperature,
          static_cast<float>(1 / temperature)};
}

// exp(-u / temperature) for u >= 0, within 1.1 ulp (1.4 without a fused multiply-add) while it is
// above 2^-125.5. Exactly 0 from there on, where u is replaced by rate.limit, so that exp times
// u is 0 too. NaN stays NaN.
//
// With y = -u log2(e) / temperature, n = round(y) and r = y - n, it is 2^(n - 1) times 2 2^r.
// Adding 1.5 * 2^23 + 126 rounds y to an integer and leaves n + 126, the exponent field of
// 2^(n - 1), in the low bits. That field is 0 for n = -126, so the limit needs no comparison.
SEGK_INLINE Group exp_of_distance(Group& u, const Rate& rate) {
  constexpr float kMagic = 12582912.0f + 126.0f;
  u = each([&](int k) { return at_most(splat(rate.limit), u[k]); });
#if defined(SEGK_FMA)
  const Vec high = splat(-rate.high), low = splat(-rate.low);
  const Group rounded = each([&](int k) { return fused(u[k], high, splat(kMagic)); });
  Group r = each([&](int k) { return rounded[k] - kMagic; });
  r = each([&](int k) { return fused(u[k], high, -r[k]); });
  r = each([&](int k) { return fused(u[k], low, r[k]); });
#else
  // Without a fused multiply-add the product with log2(e) would be rounded. n ln 2 is subtracted
  // instead, in two parts; the first has nine bits, so that its product with n is exact.
  constexpr float kLog2e = 0x1.715476p+0f;
  const Group d = each([&](int k) { return u[k] * -rate.inverse_temperature; });
  const Group rounded = each([&](int k) { return fused(d[k], splat(kLog2e), splat(kMagic)); });
  const Group r = each([&](int k) {
    const Vec n = rounded[k] - kMagic;
    return fused(n, splat(0x1.bd0106p-13f), fused(n, splat(-0x1.63p-1f), d[k])) * kLog2e;
  });
#endif
  // Minimax in relative error over |r| <= 1 / 2: 0.05 ulp.
  constexpr float kTwoToThe[] = {0x1.5f094ap-9f, 0x1.3b2dd0p-6f, 0x1.c6af7ap-4f,
                                 0x1.ebfbdcp-2f, 0x1.62e430p+0f, 2.0f};
  Group p = each([&](int) { return splat(0x1.417ce2p-12f); });
  for (const float c : kTwoToThe) p = each([&](int k) { return fused(p[k], r[k], splat(c)); });
  // A product, not an addition to the exponent of p: the latter can turn NaN into a number.
  return each([&](int k) { return p[k] * (Vec)((Bits)rounded[k] << 23); });
}

template <class V>
SEGK_INLINE V load_vector(const void* x) {
  V v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

// `streaming` goes past the caches; the address must be a multiple of the vector's size.
template <bool streaming, class V>
SEGK_INLINE void store_vector(void* x, V v) {
#if defined(__AVX512F__)
  if constexpr (streaming && sizeof(V) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(x), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (streaming && sizeof(V) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(x), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (streaming && sizeof(V) == 16)
    return _mm_stream_si128(static_cast<__m128i*>(x), (__m128i)v);
#endif
  __builtin_memcpy(x, &v, sizeof v);
}

struct F32 {
  using T = float;
  static constexpr T minus_infinity = -__builtin_inff();
  static SEGK_INLINE Group load(const T* x) {
    return each([&](int k) { return load_vector<Vec>(x + k * kLanes); });
  }
  template <bool streaming>
  static SEGK_INLINE void store(T* x, const Group& g) {
    for (int k = 0; k < kVectors; ++k) store_vector<streaming>(x + k * kLanes, g[k]);
  }
};

// Even columns are in one vector of a group, odd ones in the next: each is half of a 32-bit lane,
// so that nothing has to move between lanes.
struct BF16 {
  using T = uint16_t;
  static constexpr T minus_infinity = 0xff80;
  static constexpr uint32_t kHigh = 0xffff0000u;
  static SEGK_INLINE Group load(const T* x) {
    return each([&](int k) {
      const Bits pairs = load_vector<Bits>(x + k / 2 * 2 * kLanes);
      return (Vec)(k % 2 == 0 ? pairs << 16 : pairs & kHigh);
    });
  }
  // To the nearest, ties to even. A NaN must be one that arithmetic makes: its payload is 0.
  template <bool streaming>
  static SEGK_INLINE void store(T* x, const Group& g) {
    const auto rounded = [](Vec v) {
      const Bits bits = (Bits)v;
      return bits + 0x7fffu + ((bits >> 16) & 1u);
    };
    for (int k = 0; k < kVectors; k += 2) {
      const Bits pairs = rounded(g[k]) >> 16 | (rounded(g[k + 1]) & kHigh);
      store_vector<streaming>(x + k * kLanes, pairs);
    }
  }
};

struct F16 {
  using T = uint16_t;
  static constexpr T minus_infinity = 0xfc00;
#if defined(__AVX512F__)
  static SEGK_INLINE Vec widened(Halves h) { return _mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
  static SEGK_INLINE Halves narrowed(Vec v) {
    return (Halves)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(__AVX2__)
  static SEGK_INLINE Vec widened(Halves h) { return _mm256_cvtph_ps((__m128i)h); }
  static SEGK_INLINE Halves narrowed(Vec v) {
    return (Halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  }
#else
  static SEGK_INLINE Vec widened(Halves h) {
    const Bits bits = __builtin_convertvector(h, Bits);
    // The product also normalises subnormals; infinities and NaN become 2^16 and more.
    const Vec magnitude = (Vec)((bits & 0x7fffu) << 13) * 0x1p112f;
    const Bits special = (Bits)magnitude | 0x7f800000u;
    const Bits value = magnitude >= splat(65536.0f) ? special : (Bits)magnitude;
    return (Vec)(value | ((bits & 0x8000u) << 16));
  }
  static SEGK_INLINE Halves narrowed(Vec v) {
    const Bits sign = (Bits)v & 0x80000000u;
    const Bits bits = (Bits)v ^ sign;
    const Vec magnitude = (Vec)bits;
    const Bits normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // Adding 0.5 rounds to multiples of 2^-24, the unit of half-precision subnormals.
    const Bits subnormal = (Bits)(magnitude + 0.5f) - 0x3f000000u;
    const Bits infinite = Bits{} + 0x7c00u;
    const Bits quiet_nan = Bits{} + 0x7e00u;
    Bits out = magnitude < splat(0x1p-14f) ? subnormal : normal;
    out = magnitude >= splat(65520.0f) ? infinite : out;
    out = v == v ? out : quiet_nan;
    return __builtin_convertvector(out | (sign >> 16), Halves);
  }
#endif
  static SEGK_INLINE Group load(const T* x) {
    return each([&](int k) { return widened(load_vector<Halves>(x + k * kLanes)); });
  }
  template <bool streaming>
  static SEGK_INLINE void store(T* x, const Group& g) {
    for (int k = 0; k < kVectors; ++k) store_vector<streaming>(x + k * kLanes, narrowed(g[k]));
  }
};

// Fewer columns than a group; -inf beyond them is no column at all.
template <class S>
struct Part {
  typename S::T columns[kGroup];

  Part(const typename S::T* x, int64_t n) {
    for (auto& column : columns) column = S::minus_infinity;
    __builtin_memcpy(columns, x, static_cast<size_t>(n) * sizeof *x);
  }
};

template <class S>
void store_part(typename S::T* x, const Group& g, int64_t n) {
  typename S::T columns[kGroup];
  S::template store<false>(columns, g);
  __builtin_memcpy(x, columns, static_cast<size_t>(n) * sizeof *x);
}

template <class S>
SEGK_INLINE void prefetch(const typename S::T* x) {
  const auto ahead = reinterpret_cast<uintptr_t>(x) + kAhead * sizeof *x;
  for (size_t i = 0; i < kGroup * sizeof *x; i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + i));
}

// The largest logit; kLowest where there is only -inf. Ignores NaN, which the sums will show.
template <class S>
float max_of(const typename S::T* x, int64_t groups) {
  Group max = each([](int) { return splat(kLowest); });
  for (int64_t i = 0; i < groups; ++i) {
    const Group z = S::load(x + i * kGroup);
    max = each([&](int k) { return at_least(z[k], max[k]); });
  }
  for (int k = 1; k < kVectors; ++k) max[0] = at_least(max[k], max[0]);
  float row_max = kLowest;
  for (int i = 0; i < kLanes; ++i) row_max = max[0][i] > row_max ? max[0][i] : row_max;
  return row_max;
}

double sum_of_lanes(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Sums of exp(-u / temperature) and of that times u, where u = max - logit.
struct Sums {
  float max;
  Vec exps;
  Vec distances;
};

// The maximum is that of the columns so far. Should the block exceed it, its sums are thrown away
// and found again: the maximum of many columns changes a few times, and looking for it first would
// read each of them twice.
template <class S>
SEGK_INLINE void add_block(Sums& sums, const typename S::T* x, int64_t groups, const Rate& rate) {
  for (;;) {
    Vec exps{}, distances{};
    Bits signs{};
    for (int64_t i = 0; i < groups; ++i) {
      prefetch<S>(x + i * kGroup);
      const Group z = S::load(x + i * kGroup);
      Group u = each([&](int k) { return sums.max - z[k]; });
      for (int k = 0; k < kVectors; ++k) signs |= (Bits)u[k];
      const Group e = exp_of_distance(u, rate);
      for (int k = 0; k < kVectors; ++k) {
        exps += e[k];
        distances = fused(e[k], u[k], distances);
      }
    }
    if (__builtin_expect(any_negative((Vec)signs), 0)) {
      const float max = max_of<S>(x, groups);
      if (max > sums.max) {
        const float rise = max - sums.max;
        const auto factor = static_cast<float>(__builtin_exp(-rise / rate.temperature));
        const Vec moved = sums.distances + sums.exps * rise;
        sums = {max, sums.exps * factor, factor > 0 ? moved * factor : Vec{}};
        continue;
      }
      // What looks negative is a NaN.
    }
    sums.exps += exps;
    sums.distances += distances;
    return;
  }
}

template <class S>
RowState forward_of(const typename S::T* x, int64_t n, double temperature) {
  const Rate rate = rate_of(temperature);
  const int64_t groups = n / kGroup;
  const Part<S> rest(x + groups * kGroup, n - groups * kGroup);
  // The more columns the first maximum has seen, the fewer blocks exceed it.
  constexpr int64_t kSeen = 8 * kBlock;
  const float start =
      groups ? max_of<S>(x, groups < kSeen ? groups : kSeen) : max_of<S>(rest.columns, 1);
  Sums sums{start, {}, {}};
  for (int64_t i = 0; i < groups; i += kBlock)
    add_block<S>(sums, x + i * kGroup, groups - i < kBlock ? groups - i : kBlock, rate);
  add_block<S>(sums, rest.columns, 1, rate);
  return {sums.max, sum_of_lanes(sums.exps), -sum_of_lanes(sums.distances) / temperature, 0};
}

// dz = dlogprob [v = y] - p (dlogprob + dentropy (d - mean d)); the logits' gradient is dz / T.
template <class S, bool streaming>
void backward_of(const typename S::T* x, typename S::T* dx, int64_t n, const RowGradient& row) {
  const Rate rate = rate_of(row.temperature);
  const float scale = -row.stats.inverse_sum_exp * rate.inverse_temperature;
  const float per_distance = -row.dentropy * rate.inverse_temperature;
  const float constant = row.dlogprob - row.dentropy * row.stats.mean_shift;
  const auto gradient = [&](const Group& z) __attribute__((always_inline)) {
    Group u = each([&](int k) { return row.stats.max - z[k]; });
    const Group e = exp_of_distance(u, rate);
    return each(
        [&](int k) { return e[k] * scale * fused(u[k], splat(per_distance), splat(constant)); });
  };
  const auto part = [&](int64_t begin, int64_t size) {
    store_part<S>(dx + begin, gradient(S::load(Part<S>(x + begin, size).columns)), size);
  };

  Group at_target;  // from the logits before dx, which may be the same memory, is written
  if (row.target >= 0) {
    at_target = gradient(S::load(Part<S>(x + row.target, 1).columns));
    at_target[0][0] += row.dlogprob * rate.inverse_temperature;
  }
  int64_t i = 0;
  if constexpr (streaming) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dx) % sizeof(Vec));
    i = past ? static_cast<int64_t>((sizeof(Vec) - past) / sizeof *dx) : 0;
    i = i < n ? i : n;
    part(0, i);
  }
  for (; i + kGroup <= n; i += kGroup) {
    prefetch<S>(x + i);
    S::template store<streaming>(dx + i, gradient(S::load(x + i)));
  }
  part(i, n - i);
  if (row.target >= 0) store_part<S>(dx + row.target, at_target, 1);
#if defined(__SSE2__)
  if constexpr (streaming) _mm_sfence();
#endif
}

template <class S>
void backward_as(const void* x, void* dx, int64_t n, const RowGradient& row, bool streaming) {
  using T = typename S::T;
  const auto* logits = static_cast<const T*>(x);
  auto* dlogits = static_cast<T*>(dx);
  streaming ? backward_of<S, true>(logits, dlogits, n, row)
            : backward_of<S, false>(logits, dlogits, n, row);
}

}  // namespace

RowState columns_forward(DType dtype, const void* x, int64_t n, double temperature) {
  switch (dtype) {
    case DType::bf16:
      return forward_of<BF16>(static_cast<const uint16_t*>(x), n, temperature);
    case DType::f16:
      return forward_of<F16>(static_cast<const uint16_t*>(x), n, temperature);
    default:
      return forward_of<F32>(static_cast<const float*>(x), n, temperature);
  }
}

void columns_backward(DType dtype, const void* x, void* dx, int64_t n, const RowGradient& row,
                      bool streaming) {
  switch (dtype) {
    case DType::bf16:
      return backward_as<BF16>(x, dx, n, row, streaming);
    case DType::f16:
      return backward_as<F16>(x, dx, n, row, streaming);
    default:
      return backward_as<F32>(x, dx, n, row, streaming);
  }
}

const char* isa_name() { return SEGK_ISA; }

void vocab_exp(const float* x, float* out, int64_t count) {
  const Rate rate = rate_of(1.0);
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t size = count - i < kGroup ? count - i : kGroup;
    const Group z = F32::load(Part<F32>(x + i, size).columns);
    Group u = each([&](int k) { return -z[k]; });
    store_part<F32>(out + i, exp_of_distance(u, rate), size);
  }
}

}  // namespace segk
