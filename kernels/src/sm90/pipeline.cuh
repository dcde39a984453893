#pragma once
#include "ptx.cuh"

namespace powertrain::sm90 {

// A ring of shared-memory stages between one producing thread and the consuming warps.
template <int kStages>
struct Ring {
  uint32_t full, empty;  // addresses of kStages barriers each
  int stage = 0;
  uint32_t phase = 0;
  __device__ Ring(uint32_t barriers) : full(barriers), empty(barriers + 8 * kStages) {}
  __device__ static void init(uint32_t barriers, int consumers) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(barriers + 8 * i, 1);
      barrier_init(barriers + 8 * (kStages + i), consumers);
    }
  }
  __device__ uint32_t full_barrier() const { return full + 8 * stage; }
  __device__ void wait_full() const { barrier_wait(full + 8 * stage, phase); }
  __device__ void wait_empty() const { barrier_wait(empty + 8 * stage, phase ^ 1); }
  __device__ void release(int which) const { barrier_arrive(empty + 8 * which); }
  __device__ int previous() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace powertrain::sm90
