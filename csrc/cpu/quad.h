// Four doubles, the numbers of neighbouring tokens with the first in lane 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/storage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace segk {

// *_behind: what stands one and two tokens behind each, 0 beyond the last.
#if defined(__AVX2__)
typedef double Quad __attribute__((vector_size(32)));

inline Quad quad(double a, double b, double c, double d) { return Quad{a, b, c, d}; }
inline Quad two_behind(Quad q) { return _mm256_permute2f128_pd(q, q, 0x81); }
inline Quad one_behind(Quad q) { return _mm256_shuffle_pd(q, two_behind(q), 0x5); }
inline double first_of(Quad q) { return q[0]; }
inline Quad all_first(Quad q) { return _mm256_permute4x64_pd(q, 0); }
inline void store_floats(float* x, Quad q) { _mm_storeu_ps(x, _mm256_cvtpd_ps(q)); }
#else
typedef double Pair __attribute__((vector_size(16)));

struct Quad {
  Pair early;
  Pair late;
};

inline Quad quad(double a, double b, double c, double d) { return {Pair{a, b}, Pair{c, d}}; }
inline Quad operator+(Quad p, Quad q) { return {p.early + q.early, p.late + q.late}; }
inline Quad operator-(Quad p, Quad q) { return {p.early - q.early, p.late - q.late}; }
inline Quad operator*(Quad p, Quad q) { return {p.early * q.early, p.late * q.late}; }
inline Quad two_behind(Quad q) { return {q.late, Pair{}}; }
inline Quad one_behind(Quad q) { return quad(q.early[1], q.late[0], q.late[1], 0); }
inline double first_of(Quad q) { return q.early[0]; }
inline Quad all_first(Quad q) { return quad(q.early[0], q.early[0], q.early[0], q.early[0]); }
inline void store_floats(float* x, Quad q) {
  for (int i = 0; i < 2; ++i) x[i] = static_cast<float>(q.early[i]);
  for (int i = 0; i < 2; ++i) x[i + 2] = static_cast<float>(q.late[i]);
}
#endif

inline Quad all_of(double x) { return quad(x, x, x, x); }

// Tokens t to t + 4 of an array.
template <class Array>
Quad four(const Array& x, int64_t t) {
  return quad(x[t], x[t + 1], x[t + 2], x[t + 3]);
}

#if defined(__AVX2__)
inline Quad four(const double* x, int64_t t) { return _mm256_loadu_pd(x + t); }
inline Quad four(const float* x, int64_t t) { return _mm256_cvtps_pd(_mm_loadu_ps(x + t)); }

template <DType kDType>
Quad four(const Stored<kDType>& x, int64_t t) {
  if constexpr (kDType == DType::f32) {
    return four(static_cast<const float*>(x.data), t);
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
