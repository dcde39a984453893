// Runs the kernels' own sources on a CPU, one thread block after another, every CUDA thread a fiber. For checking on machines without a GPU:
// what is computed, the index maps, and the order of barriers, copies and products; nothing about speed.
//
// The asynchronous parts are made to happen at a bad permitted time: bulk copies at once (so a stage that is released too early is
// overwritten under its readers), wgmma as late as its wait allows and from the registers as they are then (so an operand that is changed too
// early, or an accumulator that is read too early, gives wrong numbers). With PT_EMULATED_SEED=n, n > 0, copies land at random times instead, their
// destination NaN until then (so a stage that is read too early gives NaN), and warps run in random order at random pace. A wgmma or a copy that meets
// what a thread wrote without a proxy fence aborts, and so does a deadlock. Shared memory starts as NaN.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

namespace emulate {

constexpr int kSharedBytes = 227 * 1024;
alignas(1024) extern uint8_t shared_memory[kSharedBytes];

void fail(const char* format, ...);

// Shared addresses are offsets from shared_memory; a kernel's static __shared__ arrays lie outside it and are not bounds-checked.
inline uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  if (address < kSharedBytes ? address + bytes > kSharedBytes || address % (bytes < 16 ? bytes : 16) : address < 2 * kSharedBytes)
    fail("%u bytes of shared memory at %u", bytes, address);
  return shared_memory + (int32_t)address;
}

struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int index() const { return (int)((thread.z * block_dim.y + thread.y) * block_dim.x + thread.x); }
};
extern Thread* current;

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
// All threads of a warp (32), a warpgroup (128) or the block (0) call this; the last one runs `together` on everybody's arguments.
void collective(int threads, void* argument, void (*together)(void** arguments, int count));

void barrier_init(uint32_t address, uint32_t arrivals);
void barrier_arrive(uint32_t address);
void barrier_expect(uint32_t address, uint32_t bytes);
void barrier_wait(uint32_t address, uint32_t parity);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier);
void written(uint32_t address, uint32_t bytes);  // by this thread, and not to be read by the asynchronous parts before its ...
void fence_async();

struct Product {  // one thread's share of a wgmma, operands by reference
  float* c;
  const uint32_t* a;
  uint64_t b;
  int n;
  bool accumulate, transposed, half;
};
void wgmma(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

// cp.async as a write of this thread, zeros where not `exists`; waiting for all that it has started, and its arrival when they are there.
void copy_own(uint32_t destination, const void* source, uint32_t bytes, bool exists);
void wait_for_own_copies();
void arrive_after_copies(uint32_t barrier);

void copy(uint32_t destination, const void* source);  // cp.async of 16 bytes, by one thread
void copy_commit();
void copy_wait(int pending);

void load_matrices(uint32_t* registers, int count, uint32_t address, bool transposed);
void mma_m16n8k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool half);  // of one warp, at once

inline float to_float(uint16_t bits, bool half) {
  if (half) return __half2float(__ushort_as_half(bits));
  return __bfloat162float(__ushort_as_bfloat16(bits));
}

inline uint32_t pack(float low, float high, bool half) {
  const uint16_t l = half ? __half_as_ushort(__float2half_rn(low)) : __bfloat16_as_ushort(__float2bfloat16_rn(low));
  const uint16_t h = half ? __half_as_ushort(__float2half_rn(high)) : __bfloat16_as_ushort(__float2bfloat16_rn(high));
  return (uint32_t)h << 16 | l;
}

template <typename T>
T shuffle(T value, int (*source)(int lane, int argument), int argument) {
  struct Slot {
    T value, result;
    int (*source)(int, int);
    int argument;
  } slot{value, value, source, argument};
  collective(32, &slot, [](void** arguments, int count) {
    for (int lane = 0; lane < count; lane++) {
      Slot& mine = *(Slot*)arguments[lane];
      const int from = mine.source(lane, mine.argument);
      mine.result = from >= 0 && from < count ? ((Slot*)arguments[from])->value : mine.value;
    }
  });
  return slot.result;
}

}  // namespace emulate

#define threadIdx (emulate::current->thread)
#define blockIdx (emulate::current->block)
#define blockDim (emulate::current->block_dim)
#define gridDim (emulate::current->grid_dim)

inline void __syncthreads() { emulate::collective(0, nullptr, [](void**, int) {}); }
inline void __syncwarp(unsigned = ~0u) { emulate::collective(32, nullptr, [](void**, int) {}); }
template <typename T>
T __shfl_sync(unsigned, T v, int from) {
  return emulate::shuffle(v, [](int, int a) { return a & 31; }, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulate::shuffle(v, [](int lane, int a) { return lane ^ a; }, mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int by) {
  return emulate::shuffle(v, [](int lane, int a) { return lane - a; }, by);
}
template <typename T>
T __shfl_down_sync(unsigned, T v, int by) {
  return emulate::shuffle(v, [](int lane, int a) { return lane + a; }, by);
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
void __stwb(T* p, T v) {
  *p = v;
}
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
inline void __threadfence() {}
template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
template <typename To, typename From>
To emulated_bits(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline size_t __cvta_generic_to_shared(const void* p) { return (uint32_t)((const uint8_t*)p - emulate::shared_memory); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? 0.f : a / b; }
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? (std::common_type_t<A, B>)a : (std::common_type_t<A, B>)b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return (std::common_type_t<A, B>)a > (std::common_type_t<A, B>)b ? (std::common_type_t<A, B>)a : (std::common_type_t<A, B>)b;
}
