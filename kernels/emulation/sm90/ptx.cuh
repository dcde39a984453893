// Emulated twin of src/sm90/ptx.cuh.
#pragma once
#include "emulate.h"

namespace powertrain::sm90 {

inline uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }
inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulate::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulate::barrier_expect(barrier, bytes); }
inline void barrier_arrive(uint32_t barrier) { emulate::barrier_arrive(barrier); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulate::barrier_wait(barrier, parity); }
inline void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  emulate::bulk_load(destination, source, bytes, barrier);
}
inline void copy_16(uint32_t destination, const void* source, bool exists) { emulate::copy_own(destination, source, 16, exists); }
inline void copy_4(uint32_t destination, const void* source, bool exists) { emulate::copy_own(destination, source, 4, exists); }
inline void barrier_arrive_after_copies(uint32_t barrier) { emulate::arrive_after_copies(barrier); }
inline void wait_for_copies() { emulate::wait_for_own_copies(); }
inline void fence_async_shared() { emulate::fence_async(); }
constexpr int kProducerRegisters = 24;
template <int kConsumers>
constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 112;
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { emulate::load_matrices(r, 4, address, false); }
inline void load_matrices(uint32_t (&r)[2], uint32_t address) { emulate::load_matrices(r, 2, address, false); }
inline void load_matrices(uint32_t (&first)[2], uint32_t (&second)[2], uint32_t address) {
  uint32_t r[4];
  load_matrices(r, address);
  first[0] = r[0], first[1] = r[1], second[0] = r[2], second[1] = r[3];
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { emulate::load_matrices(r, 4, address, true); }
inline void load_matrices_transposed(uint32_t (&r)[2], uint32_t address) { emulate::load_matrices(r, 2, address, true); }
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  const int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; matrix++) {
    const uint32_t row = __shfl_sync(~0u, address, 8 * matrix + lane / 4), to = row + lane % 4 * 4;
    emulate::shared_at(row, 16);  // checks its alignment
    *(uint32_t*)emulate::shared_at(to, 4) = r[matrix];
    emulate::written(to, 4);
  }
}
inline float load_shared_float(uint32_t address) { return *(float*)emulate::shared_at(address, 4); }
inline float2 load_shared_float2(uint32_t address) { return *(float2*)emulate::shared_at(address, 8); }
inline void store_shared_float2(uint32_t address, float2 value) { *(float2*)emulate::shared_at(address, 8) = value; }
inline uint4 load_shared_16(uint32_t address) { return *(uint4*)emulate::shared_at(address, 16); }
inline void store_shared_16(uint32_t address, uint4 value) {
  *(uint4*)emulate::shared_at(address, 16) = value;
  emulate::written(address, 16);
}
inline uint32_t load_shared_2(uint32_t address) { return *(uint16_t*)emulate::shared_at(address, 2); }
inline uint32_t load_shared_4(uint32_t address) { return *(uint32_t*)emulate::shared_at(address, 4); }
inline void store_shared_4(uint32_t address, uint32_t value) {
  *(uint32_t*)emulate::shared_at(address, 4) = value;
  emulate::written(address, 4);
}
inline void store_shared_2(uint32_t address, uint16_t value) {
  *(uint16_t*)emulate::shared_at(address, 2) = value;
  emulate::written(address, 2);
}
inline int opaque(int x) { return x; }
template <typename T>
T* opaque(T* x) {
  return x;
}
inline float exp2_fast(float x) { return exp2f(x); }

template <typename T>
struct Pair {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static uint16_t round(float x) { return kHalf ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static float2 unpack(uint32_t r) { return make_float2(emulate::to_float((uint16_t)r, kHalf), emulate::to_float((uint16_t)(r >> 16), kHalf)); }
  static uint32_t pack(float low, float high) { return (uint32_t)round(high) << 16 | round(low); }
  static uint32_t multiply(uint32_t a, uint32_t b) {
    const float2 x = unpack(a), y = unpack(b);
    return pack(x.x * y.x, x.y * y.y);
  }
  static uint32_t add(uint32_t a, uint32_t b) {
    const float2 x = unpack(a), y = unpack(b);
    return pack(x.x + y.x, x.y + y.y);
  }
};
inline uint32_t both_low(uint32_t r) { return __byte_perm(r, r, 0x1010); }
inline uint32_t both_high(uint32_t r) { return __byte_perm(r, r, 0x3232); }
template <typename T>
float round_to(float x) {
  return emulate::to_float(Pair<T>::round(x), Pair<T>::kHalf);
}

}  // namespace powertrain::sm90
