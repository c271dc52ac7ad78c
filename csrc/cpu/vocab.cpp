// SIMD kernels over rows of logits, compiled once per instruction set (SEGK_ISA).
//
// Everything here has internal linkage except the table at the end, and no inline function of a
// header is called: the linker keeps one copy of such a function, and if that were the AVX-512 one,
// older processors would run it too.
#include "segk/vocab.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace segk {
namespace SEGK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 or NEON, which every x86-64 and AArch64 processor has
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

constexpr float kInfinity = __builtin_inff();

// Columns taken at a time: they are read twice, for their maximum and for the sums, the second time
// from the first-level cache. A lane adds up 128 columns of a block, then the blocks of the row:
// the rounding error of 150,000 columns stays near that of a few hundred.
constexpr int64_t kBlock = 128 * kLanes;

Vec splat(float value) { return value - Vec{}; }

// A select that keeps NaN in x.
Vec at_least(Vec low, Vec x) { return x < low ? low : x; }

Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(d) for d <= 0, within 0.9 ulp (1.2 ulp without a fused multiply-add) down to kLowest, about
// ln of the smallest normal float. Below it exactly 0, and d is replaced by kLowest so that exp(d)
// d is 0 too. NaN stays NaN.
//
// With n = round(d / ln 2) and r = d - n ln 2, exp(d) = 2^n exp(r). Adding 1.5 * 2^23 + 127 rounds
// d / ln 2 to an integer and leaves n + 127, the exponent field of 2^n, in the low bits. The first
// part of ln 2 has nine bits, so that its product with n is exact without a fused multiply-add.
constexpr float kLowest = -87.3f;

Vec exp_shifted(Vec& d) {
  const Ints vanishes = d < splat(kLowest);
  d = at_least(splat(kLowest), d);
  const float magic = 12582912.0f + 127.0f;
  const Vec rounded = fused(d, splat(0x1.715476p+0f), splat(magic));
  const Vec n = rounded - magic;
  Vec r = fused(n, splat(-0x1.63p-1f), d);
  r = fused(n, splat(0x1.bd0106p-13f), r);
  // Minimax in relative error over |r| <= ln(2) / 2: 0.08 ulp.
  Vec p = splat(0x1.6a2352p-10f);
  p = fused(p, r, splat(0x1.123a6cp-7f));
  p = fused(p, r, splat(0x1.5558f4p-5f));
  p = fused(p, r, splat(0x1.55549p-3f));
  p = fused(p, r, splat(0x1.fffffcp-2f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  // A product, not an addition to the exponent of p: the latter can turn NaN into a number.
  const Vec e = p * (Vec)((Bits)rounded << 23);
  return vanishes ? Vec{} : e;
}

// Zero-extended; the compilers' own conversion of vectors takes three instructions.
Bits load_halves(const uint16_t* x) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  Halves h;
  __builtin_memcpy(&h, x, sizeof h);
  return __builtin_convertvector(h, Bits);
#endif
}

void store_halves(uint16_t* x, Bits bits) {
  const Halves h = __builtin_convertvector(bits, Halves);
  __builtin_memcpy(x, &h, sizeof h);
}

struct F32 {
  using T = float;
  static constexpr T minus_infinity = -kInfinity;
  static Vec load(const T* x) {
    Vec v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
  static void store(T* x, Vec v) { __builtin_memcpy(x, &v, sizeof v); }
};

struct BF16 {
  using T = uint16_t;
  static constexpr T minus_infinity = 0xff80;
  static Vec load(const T* x) { return (Vec)(load_halves(x) << 16); }
  static void store(T* x, Vec v) {
    const Bits bits = (Bits)v;
    const Bits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits quiet_nan = Bits{} + 0x7fc0u;
    store_halves(x, v == v ? nearest_even : quiet_nan);
  }
};

struct F16 {
  using T = uint16_t;
  static constexpr T minus_infinity = 0xfc00;
#if defined(__AVX512F__)
  // The masked forms, with every lane kept: GCC 12 warns of uninitialised memory in the plain ones.
  static Vec load(const T* x) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void store(T* x, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                        _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  static Vec load(const T* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static void store(T* x, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Vec load(const T* x) {
    const Bits bits = load_halves(x);
    // The product also normalises subnormals; infinities and NaN become 2^16 and more.
    const Vec magnitude = (Vec)((bits & 0x7fffu) << 13) * 0x1p112f;
    const Bits special = (Bits)magnitude | 0x7f800000u;
    const Bits value = magnitude >= splat(65536.0f) ? special : (Bits)magnitude;
    return (Vec)(value | ((bits & 0x8000u) << 16));
  }
  static void store(T* x, Vec v) {
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
    store_halves(x, out | (sign >> 16));
  }
#endif
};

// The last columns of a row; -inf beyond them is no column at all.
template <class S>
Vec load_tail(const typename S::T* x, int64_t n) {
  typename S::T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = S::minus_infinity;
  __builtin_memcpy(lanes, x, static_cast<size_t>(n) * sizeof(typename S::T));
  return S::load(lanes);
}

template <class S>
void store_tail(typename S::T* x, Vec v, int64_t n) {
  typename S::T lanes[kLanes];
  S::store(lanes, v);
  __builtin_memcpy(x, lanes, static_cast<size_t>(n) * sizeof(typename S::T));
}

float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

double total(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

int64_t offset_of(const VocabRows& rows, int64_t row) {
  return row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

float inverse_temperature(const VocabRows& rows, int64_t row) {
  return static_cast<float>(1 / (rows.temperatures ? rows.temperatures[row] : rows.temperature));
}

// Ignores NaN: a row that has one gets it from the sums.
template <class S>
float largest_of(const typename S::T* x, int64_t n) {
  Vec a = splat(-kInfinity), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = at_least(S::load(x + i), a);
    b = at_least(S::load(x + i + kLanes), b);
    c = at_least(S::load(x + i + 2 * kLanes), c);
    d = at_least(S::load(x + i + 3 * kLanes), d);
  }
  for (; i + kLanes <= n; i += kLanes) a = at_least(S::load(x + i), a);
  if (i < n) b = at_least(load_tail<S>(x + i, n - i), b);
  return largest(at_least(at_least(a, b), at_least(c, d)));
}

template <class S>
void accumulate_row(const typename S::T* x, int64_t n, float inverse, RowState& state) {
  float max = static_cast<float>(state.max);
  Vec sum{}, weighted{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const typename S::T* block = x + begin;
    const float top = largest_of<S>(block, size);
    if (top > max) {
      // Everything so far is measured from the old maximum; from -inf there is nothing so far.
      if (max > -kInfinity) {
        const float lower = (max - top) * inverse;
        const double factor = __builtin_exp(lower);
        const double kept = factor > 0 ? lower : 0;
        state.weighted = factor * (state.weighted + state.sum * kept);
        state.sum *= factor;
        weighted = (weighted + sum * static_cast<float>(kept)) * static_cast<float>(factor);
        sum *= static_cast<float>(factor);
      }
      max = top;
    }
    const float shift = max > -kInfinity ? max : 0.0f;  // -inf - (-inf) would be NaN
    Vec block_sum{}, block_weighted{};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      Vec d = (S::load(block + i) - shift) * inverse;
      const Vec e = exp_shifted(d);
      block_sum += e;
      block_weighted = fused(e, d, block_weighted);
    }
    if (i < size) {
      Vec d = (load_tail<S>(block + i, size - i) - shift) * inverse;
      const Vec e = exp_shifted(d);
      block_sum += e;
      block_weighted = fused(e, d, block_weighted);
    }
    sum += block_sum;
    weighted += block_weighted;
  }
  state.max = max;
  state.sum += total(sum);
  state.weighted += total(weighted);
}

template <class S>
void accumulate_rows(const VocabRows& rows, const bool* mask, RowState* states, int64_t begin,
                     int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (mask && !mask[row]) continue;
    const auto* x = static_cast<const typename S::T*>(rows.logits) + offset_of(rows, row);
    RowState& state = states[row - begin];
    if (rows.first == 0) state = {-kInfinity, 0, 0, 0};
    accumulate_row<S>(x, rows.vocab, inverse_temperature(rows, row), state);
    if (!rows.targets) continue;
    const int64_t target = rows.targets[row] - rows.first;
    if (target >= 0 && target < rows.vocab) state.target = load_tail<S>(x + target, 1)[0];
  }
}

// dz = dlogprob [v = y] - p (dlogprob + dentropy (d - mean d)); the logits' gradient is dz / T.
template <class S>
void backward_row(const typename S::T* x, typename S::T* dx, int64_t n, float inverse,
                  RowStats stats, int64_t target, float dlogprob, float dentropy) {
  const float scale = -stats.inverse_sum * inverse;
  const auto gradient = [&](Vec logits) __attribute__((always_inline)) {
    Vec d = (logits - stats.max) * inverse;
    const Vec e = exp_shifted(d);
    return e * scale * fused(splat(dentropy), d - stats.mean_shift, splat(dlogprob));
  };
  Vec at_target{};  // from the logits before dx, which may be the same memory, is written
  if (target >= 0) at_target = gradient(load_tail<S>(x + target, 1)) + dlogprob * inverse;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) S::store(dx + i, gradient(S::load(x + i)));
  if (i < n) store_tail<S>(dx + i, gradient(load_tail<S>(x + i, n - i)), n - i);
  if (target >= 0) store_tail<S>(dx + target, at_target, 1);
}

template <class S>
void backward_rows(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
                   const float* dentropy, void* dlogits, int64_t begin, int64_t end) {
  using T = typename S::T;
  for (int64_t row = begin; row < end; ++row) {
    T* dx = static_cast<T*>(dlogits) + row * rows.vocab;
    const bool has_target = dlogprobs && rows.targets && rows.targets[row] >= 0;
    const float dlogprob = has_target ? dlogprobs[row] : 0.0f;
    const float dh = dentropy ? dentropy[row] : 0.0f;
    if (stats[row].inverse_sum == 0 || (dlogprob == 0 && dh == 0)) {
      __builtin_memset(dx, 0, static_cast<size_t>(rows.vocab) * sizeof(T));
      continue;
    }
    int64_t target = has_target ? rows.targets[row] - rows.first : -1;
    if (target >= rows.vocab) target = -1;
    backward_row<S>(static_cast<const T*>(rows.logits) + offset_of(rows, row), dx, rows.vocab,
                    inverse_temperature(rows, row), stats[row], target, dlogprob, dh);
  }
}

void accumulate(const VocabRows& rows, const bool* mask, RowState* states, int64_t begin,
                int64_t end) {
  switch (rows.dtype) {
    case DType::f32:
      return accumulate_rows<F32>(rows, mask, states, begin, end);
    case DType::bf16:
      return accumulate_rows<BF16>(rows, mask, states, begin, end);
    case DType::f16:
      return accumulate_rows<F16>(rows, mask, states, begin, end);
  }
}

void backward(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
              const float* dentropy, void* dlogits, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case DType::f32:
      return backward_rows<F32>(rows, stats, dlogprobs, dentropy, dlogits, begin, end);
    case DType::bf16:
      return backward_rows<BF16>(rows, stats, dlogprobs, dentropy, dlogits, begin, end);
    case DType::f16:
      return backward_rows<F16>(rows, stats, dlogprobs, dentropy, dlogits, begin, end);
  }
}

void exp(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    Vec d = load_tail<F32>(x + i, n);
    store_tail<F32>(out + i, exp_shifted(d), n);
  }
}

}  // namespace

const VocabKernels kernels = {accumulate, backward, exp};

}  // namespace SEGK_ISA
}  // namespace segk
