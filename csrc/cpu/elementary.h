// exp and log without branches or calls, so that loops over them are vectorised. The same bits from
// every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace segk {

namespace detail {

// exp(x) = 2^k (1 + r + r^2 tail) for x clamped to [-708, 709], with r = x - k ln 2.
struct Exp {
  double r;
  double tail;
  double rounded;  // the low bits are those of k

  static constexpr double kRound = 6755399441055744;  // 1.5 * 2^52: a sum with it is an integer

  explicit Exp(double x) {
    constexpr double kInverseLn2 = 1.4426950408889634;
    constexpr double kLn2 = 0.6931471805599453;
    // Comparisons that NaN fails: it stays.
    double y = x < -708.0 ? -708.0 : x;
    y = y > 709.0 ? 709.0 : y;
    rounded = y * kInverseLn2 + kRound;
    r = y - (rounded - kRound) * kLn2;
    tail = 1.0 / 3628800;
    tail = tail * r + 1.0 / 362880;
    tail = tail * r + 1.0 / 40320;
    tail = tail * r + 1.0 / 5040;
    tail = tail * r + 1.0 / 720;
    tail = tail * r + 1.0 / 120;
    tail = tail * r + 1.0 / 24;
    tail = tail * r + 1.0 / 6;
    tail = tail * r + 0.5;
  }

  double value() const {
    const double sum = (tail * r + 1.0) * r + 1.0;
    uint64_t power;
    uint64_t bits;
    std::memcpy(&power, &rounded, sizeof power);
    std::memcpy(&bits, &sum, sizeof bits);
    bits += power << 52;
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
};

}  // namespace detail

// exp(x), within a relative error of 2e-11. x is clamped to [-708, 709], whose exponentials become
// 0 and infinity in a float.
inline double exp_double(double x) { return detail::Exp(x).value(); }

// exp(x) - 1, within a relative error of 1e-10, and infinity beyond 709.
inline double expm1_double(double x) {
  const detail::Exp e(x);
  const double small = e.r + e.r * e.r * e.tail;  // for k = 0, where r = x
  double large = e.value() - 1.0;
  large = x > 709.0 ? HUGE_VAL : large;
  return e.rounded == detail::Exp::kRound ? small : large;
}

// log(x) of a positive normal number, within 1 ulp. x = 2^k m with m between the roots of 1/2 and
// 2; with f = m - 1 and s = f / (2 + f), log m = 2 artanh s = f - s (f - R) for the series R,
// written so that f, the largest term, is rounded once.
inline float log_float(float x) {
  constexpr float kLn2High = 0x1.62e3p-1f;  // 17 bits: its product with k is exact
  constexpr float kLn2Low = 0x1.2fefa4p-17f;
  constexpr uint32_t kRootHalf = 0x3f3504f3;
  constexpr uint32_t kBias = 256;                // of k: no vector shift is signed
  constexpr uint32_t kInteger = 0x4b000000;      // 2^23, to which an integer may be added
  constexpr float kUnbiased = 8388608.0f + 256;  // as it is taken away
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t power = (bits - kRootHalf + (kBias << 23)) >> 23;
  const uint32_t integer = power + kInteger;
  bits -= (power - kBias) << 23;
  float k;
  float m;
  std::memcpy(&k, &integer, sizeof k);
  std::memcpy(&m, &bits, sizeof m);
  k -= kUnbiased;
  const float f = m - 1;
  const float s = f / (2 + f);
  const float z = s * s;
  float series = 2.0f / 9;
  series = series * z + 2.0f / 7;
  series = series * z + 2.0f / 5;
  series = series * z + 2.0f / 3;
  const float half = 0.5f * f * f;
  return k * kLn2High - ((half - (s * (half + series * z) + k * kLn2Low)) - f);
}

}  // namespace segk
