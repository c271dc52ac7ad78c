// Storage types. Arithmetic is fp32 everywhere; these only load and store.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SEGK_HD __host__ __device__
#else
#define SEGK_HD
#endif

namespace segk {

// The numbers cross the Python boundary: segkernels/native.py holds the same table.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

namespace detail {
SEGK_HD inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace detail

SEGK_HD inline float bf16_to_float(uint16_t half) {
  return detail::bits_to_float(static_cast<uint32_t>(half) << 16);
}

SEGK_HD inline float f16_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return detail::bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0)
    return detail::bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24 is exact in fp32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return sign ? -magnitude : magnitude;
#endif
}

// A read-only array of fp32, bf16 or fp16 that reads as fp32.
struct Floats {
  const void* data;
  DType dtype;

  SEGK_HD float operator[](int64_t i) const {
    switch (dtype) {
      case DType::bf16:
        return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
      case DType::f16:
        return f16_to_float(static_cast<const uint16_t*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

}  // namespace segk
