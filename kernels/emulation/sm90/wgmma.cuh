// Emulated twin of src/sm90/wgmma.cuh.
#pragma once
#include "ptx.cuh"

namespace powertrain::sm90 {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulate::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulate::wgmma_wait(kPending);
}

struct CoreMatrices {
  uint32_t low, high;
  CoreMatrices(uint32_t address, uint32_t k_stride, uint32_t n_stride) : low(address >> 4 | k_stride >> 4 << 16), high(n_stride >> 4) {}
  uint64_t at(uint32_t offset) const { return (uint64_t)high << 32 | (low + (offset >> 4)); }
};

template <typename T, bool kBTransposed, int kRegisters>
void wgmma(float (&c)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
  emulate::wgmma({c, a, b_descriptor, 2 * kRegisters, accumulate, kBTransposed, std::is_same_v<T, __half>});
}

}  // namespace powertrain::sm90
