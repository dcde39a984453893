#pragma once
#include "ptx.cuh"

namespace powertrain::sm90 {

// This thread's warp of the block, from a shuffle: so ptxas knows that it is the same in all lanes, and keeps what follows from it (loops, addresses,
// wgmma's descriptors) in uniform registers.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// A ring of shared-memory stages between those who fill them (one thread, unless init is told otherwise) and the consuming threads; 2 kStages
// mbarriers. One counter says where it is.
template <int kStages>
struct Ring {
  static_assert((kStages & (kStages - 1)) == 0, "the counter wraps by masking");
  uint32_t barriers, count = 0;
  __device__ Ring(uint32_t barriers) : barriers(barriers) {}
  __device__ static void init(uint32_t barriers, int consumers, int producers = 1) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(barriers + 8 * i, producers);
      barrier_init(barriers + 8 * (kStages + i), consumers);
    }
  }
  __device__ int stage() const { return count % kStages; }
  __device__ int previous() const { return (count - 1) % kStages; }
  __device__ uint32_t phase() const { return count / kStages & 1; }
  __device__ uint32_t full_barrier() const { return barriers + 8 * stage(); }
  __device__ void wait_full() const { barrier_wait(full_barrier(), phase()); }
  __device__ void wait_empty() const { barrier_wait(barriers + 8 * (kStages + stage()), phase() ^ 1); }
  // This lane has read the stage (if `read`: a predicate instead of a branch, for calls amid products). Every lane says so itself: one for its warp,
  // after __syncwarp, would do and is no faster, but compute-sanitizer's racecheck does not follow it.
  __device__ __forceinline__ void release(int which, bool read = true) const {
    if (read) barrier_arrive(barriers + 8 * (kStages + which));
  }
  __device__ void advance() { count++; }
};

}  // namespace powertrain::sm90
