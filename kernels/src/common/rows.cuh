// Rows of tensors with strides, 16 bytes at a time, and what the packs make of them.
#pragma once
#include "numeric.cuh"

namespace powertrain {

template <typename T>
struct Strided {
  const T* data;
  int64_t stride_b, stride_t, stride_h;
  __device__ __forceinline__ const T* row(int b, int64_t t, int h) const { return data + b * stride_b + t * stride_t + h * stride_h; }
};
template <typename T>
Strided<T> strided(const pt_tensor& x) {
  return {(const T*)x.data, x.stride_b, x.stride_t, x.stride_h};
}

// 16 bytes in one store. Of an assignment nvcc makes four, as soon as it does not see that the address is a multiple of 16.
template <typename T>
__device__ __forceinline__ void store8(T* to, uint4 v) {
  __stwb((uint4*)to, v);
}
template <typename T>
__device__ __forceinline__ uint32_t scaled(uint32_t w, float s) {
  return Numeric<T>::pack(Numeric<T>::low(w) * s, Numeric<T>::high(w) * s);
}
template <typename T>
__device__ __forceinline__ uint4 scaled(uint4 v, float s) {
  return make_uint4(scaled<T>(v.x, s), scaled<T>(v.y, s), scaled<T>(v.z, s), scaled<T>(v.w, s));
}

// x as a sum of two 16-bit numbers: high in the low half.
template <typename T>
__device__ __forceinline__ uint32_t high_and_low(float x) {
  const float high = Numeric<T>::to_float(Numeric<T>::from_float(x));
  return Numeric<T>::pack(high, x - high);
}

// Eight columns of a row of dn' = scale * [dy / d, -(dy . y) / d], of which D / 8 lanes hold one.
// Before the scale is known the values are not rounded: they may lie beyond the type.
template <typename T, bool kRounded>
struct GradRow {
  float value[8];
  uint32_t packed[4];  // kRounded
  float dot = 0.f;     // its part of the last column, not negated
  __device__ __forceinline__ GradRow(uint4 dy, uint4 y, float d, float scale) {
    const uint32_t* dyw = &dy.x;
    const uint32_t* yw = &y.x;
    // By __fdividef: two units in the last place, of what is rounded to 16 bits.
    const float inverse = fabsf(d) < kSmallestNormalizer ? 0.f : __fdividef(scale, d);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // The last column answers to the rounded values, so that dn' . o' vanishes for what is stored.
      value[2 * i] = Numeric<T>::low(dyw[i]) * inverse;
      value[2 * i + 1] = Numeric<T>::high(dyw[i]) * inverse;
      if (kRounded) {
        packed[i] = Numeric<T>::pack(value[2 * i], value[2 * i + 1]);
        value[2 * i] = Numeric<T>::low(packed[i]), value[2 * i + 1] = Numeric<T>::high(packed[i]);
      }
      dot = fmaf(value[2 * i], Numeric<T>::low(yw[i]), fmaf(value[2 * i + 1], Numeric<T>::high(yw[i]), dot));
    }
  }
  __device__ __forceinline__ uint4 row() const { return make_uint4(packed[0], packed[1], packed[2], packed[3]); }
};

}  // namespace powertrain
