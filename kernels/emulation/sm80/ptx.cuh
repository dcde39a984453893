// Emulated twin of src/sm80/ptx.cuh.
#pragma once
#include "emulate.h"
#include "numeric.cuh"

namespace powertrain::sm80 {

inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
inline void ldmatrix4(uint32_t (&r)[4], uint32_t address) { emulate::load_matrices(r, 4, address, false); }
inline void ldmatrix4_trans(uint32_t (&r)[4], uint32_t address) { emulate::load_matrices(r, 4, address, true); }
inline void ldmatrix2_trans(uint32_t& r0, uint32_t& r1, uint32_t address) {
  uint32_t r[2];
  emulate::load_matrices(r, 2, address, true);
  r0 = r[0], r1 = r[1];
}
inline void ldmatrix1(uint32_t& r, uint32_t address) { emulate::load_matrices(&r, 1, address, false); }
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::mma_m16n8k16(c, a, b0, b1, std::is_same_v<T, __half>);
}
// A copy happens at once, or (PT_EMULATED_COPIES=late) not before the wait that needs it.
inline void cp_async16(uint32_t to, const void* from) { emulate::copy(to, from); }
inline void cp_async_commit() { emulate::copy_commit(); }
template <int N>
void cp_async_wait() {
  emulate::copy_wait(N);
}
template <int kThreads>
void copy_async(uint32_t to, const void* from, int bytes) {
  for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16) cp_async16(to + at, (const char*)from + at);
}
inline int32_t load_acquire(const int32_t* p) { return *p; }  // blocks run one after another
inline void store_release(int32_t* p, int32_t value) { *p = value; }
inline float4 load_past_l1(const float4* p) { return *p; }
inline void store_past_l1(float4* p, float4 value) { *p = value; }
inline uint32_t duplicate(uint32_t word, bool high) { return __byte_perm(word, 0, high ? 0x3232 : 0x1010); }

}  // namespace powertrain::sm80
