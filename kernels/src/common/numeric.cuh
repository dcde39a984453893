// 16-bit element types behind one interface, and 32-bit words that hold two of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "powertrain_kernels.h"

namespace powertrain {

// A row whose normaliser is smaller has no weights to speak of: y and its gradients are zero there instead of overflowing.
constexpr float kSmallestNormalizer = 0x1p-100f;
// A state below this share of itself is beyond the 16 bits of any sum it enters.
constexpr float kNegligibleDecay = 1e-12f;

template <typename T>
struct Numeric;

template <>
struct Numeric<__nv_bfloat16> {
  static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
  // Low half: a, high half: b.
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
    return d;
  }
  static __device__ __forceinline__ float low(uint32_t w) { return __uint_as_float(w << 16); }
  static __device__ __forceinline__ float high(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    const __nv_bfloat162 d = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
};

template <>
struct Numeric<__half> {
  static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
    return d;
  }
  static __device__ __forceinline__ float low(uint32_t w) { return __low2float(reinterpret_cast<__half2&>(w)); }
  static __device__ __forceinline__ float high(uint32_t w) { return __high2float(reinterpret_cast<__half2&>(w)); }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    const __half2 d = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<const uint32_t&>(d);
  }
};

// Calls f with the element type and the head dim of a validated problem.
template <typename F>
int with_type(const pt_problem& p, F f) {
  auto with_dim = [&](auto element) {
    switch (p.head_dim) {
      case 32: return f(element, std::integral_constant<int, 32>());
      case 64: return f(element, std::integral_constant<int, 64>());
      default: return f(element, std::integral_constant<int, 128>());
    }
  };
  return p.dtype == PT_BF16 ? with_dim(__nv_bfloat16()) : with_dim(__half());
}

}  // namespace powertrain
