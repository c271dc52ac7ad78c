// Four doubles: the values of neighbouring tokens, the first in lane 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "segk/storage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace segk {

// one_behind, two_behind: the lanes one and two further on, 0 beyond the last.
#if defined(__AVX2__)
typedef double Vec4d __attribute__((vector_size(32)));

inline Vec4d vec4d(double a, double b, double c, double d) { return Vec4d{a, b, c, d}; }
inline Vec4d two_behind(Vec4d v) { return _mm256_permute2f128_pd(v, v, 0x81); }
inline Vec4d one_behind(Vec4d v) { return _mm256_shuffle_pd(v, two_behind(v), 0x5); }
inline double first_of(Vec4d v) { return v[0]; }
inline Vec4d broadcast_first(Vec4d v) { return _mm256_permute4x64_pd(v, 0); }
inline void store_floats(float* x, Vec4d v) { _mm_storeu_ps(x, _mm256_cvtpd_ps(v)); }
#else
typedef double Vec2d __attribute__((vector_size(16)));

struct Vec4d {
  Vec2d early;
  Vec2d late;
};

inline Vec4d vec4d(double a, double b, double c, double d) { return {Vec2d{a, b}, Vec2d{c, d}}; }
inline Vec4d operator+(Vec4d a, Vec4d b) { return {a.early + b.early, a.late + b.late}; }
inline Vec4d operator-(Vec4d a, Vec4d b) { return {a.early - b.early, a.late - b.late}; }
inline Vec4d operator*(Vec4d a, Vec4d b) { return {a.early * b.early, a.late * b.late}; }
inline Vec4d two_behind(Vec4d v) { return {v.late, Vec2d{}}; }
inline Vec4d one_behind(Vec4d v) { return vec4d(v.early[1], v.late[0], v.late[1], 0); }
inline double first_of(Vec4d v) { return v.early[0]; }
inline Vec4d broadcast_first(Vec4d v) {
  return vec4d(v.early[0], v.early[0], v.early[0], v.early[0]);
}
inline void store_floats(float* x, Vec4d v) {
  for (int i = 0; i < 2; ++i) x[i] = static_cast<float>(v.early[i]);
  for (int i = 0; i < 2; ++i) x[i + 2] = static_cast<float>(v.late[i]);
}
#endif

inline Vec4d broadcast(double x) { return vec4d(x, x, x, x); }

// Elements t to t + 3 of an array.
template <class Array>
Vec4d load_vec4d(const Array& x, int64_t t) {
  return vec4d(x[t], x[t + 1], x[t + 2], x[t + 3]);
}

#if defined(__AVX2__)
inline Vec4d load_vec4d(const double* x, int64_t t) { return _mm256_loadu_pd(x + t); }
inline Vec4d load_vec4d(const float* x, int64_t t) { return _mm256_cvtps_pd(_mm_loadu_ps(x + t)); }

template <DType kDType>
Vec4d load_vec4d(const Stored<kDType>& x, int64_t t) {
  if constexpr (kDType == DType::f32) {
    return load_vec4d(static_cast<const float*>(x.data), t);
  } else {
    int64_t bits;
    std::memcpy(&bits, static_cast<const uint16_t*>(x.data) + t, sizeof bits);
    const __m128i halves = _mm_cvtsi64_si128(bits);
    const __m128i words = _mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16);
    return _mm256_cvtps_pd(kDType == DType::f16 ? _mm_cvtph_ps(halves) : _mm_castsi128_ps(words));
  }
}
#endif

}  // namespace segk
