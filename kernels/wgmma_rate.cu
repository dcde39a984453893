// Cycles that one wgmma m64nNk16 with A in registers takes a multiprocessor, by the warpgroups that issue it and the products of a commit group:
//
//     nvcc -std=c++17 -O3 -Isrc --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -o wgmma_rate wgmma_rate.cu && ./wgmma_rate
//
// Every warpgroup has one accumulator and two sets of fragments: one group runs while the next one is issued. `formed`: fragments are formed
// anew for each group from an ldmatrix, as the kernels do.
#include <cstdio>

#include "sm90/wgmma.cuh"

using namespace powertrain::sm90;

constexpr int kSharedBytes = 40960, kIterations = 500, kGroupsOfIteration = 4;

template <int kN, int kGroup, bool kFormed>
__global__ void __launch_bounds__(512, 1) wgmma_rate(long long* cycles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  for (int i = threadIdx.x; i < kSharedBytes / 4; i += blockDim.x) ((uint32_t*)memory)[i] = 0;
  const uint32_t at = shared_address(memory), row = at + kSharedBytes / 2 + threadIdx.x % 32 * 16;
  const CoreMatrices columns(at, 128, 1024);
  float sum[kN / 2] = {};
  uint32_t a[2][kGroup][4];
#pragma unroll
  for (int i = 0; i < 2 * kGroup * 4; i++) a[i / (4 * kGroup)][i / 4 % kGroup][i % 4] = threadIdx.x == 1000;  // unknown to the compiler
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < kIterations; i++) {
#pragma unroll
    for (int s = 0; s < kGroupsOfIteration; s++) {
      wgmma_wait<1>();
      if constexpr (kFormed) {
        uint32_t x[4];
        load_matrices(x, row + s * 512);
#pragma unroll
        for (int g = 0; g < kGroup; g++)
#pragma unroll
          for (int r = 0; r < 4; r++) a[s % 2][g][r] = Pair<__nv_bfloat16>::multiply(x[r], x[(r + g) % 4]);
      }
      wgmma_fence();
#pragma unroll
      for (int g = 0; g < kGroup; g++) wgmma<__nv_bfloat16, true>(sum, a[s % 2][g], columns.at(s * 256), true);
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
  const long long end = clock64();
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = end - begin;
#pragma unroll
  for (int c = 0; c < kN / 2; c += 2) store_shared_float2(at + threadIdx.x * 8, make_float2(sum[c], sum[c + 1]));
}

template <int kN, int kGroup, bool kFormed>
void measure(long long* cycles, int blocks) {
  auto* kernel = wgmma_rate<kN, kGroup, kFormed>;
  printf("N=%d, groups of %d%s, ideal %d:", kN, kGroup, kFormed ? ", formed" : "", kN / 2);
  for (int warpgroups = 1; warpgroups <= 4; warpgroups++) {
    for (int run = 0; run < 2; run++) kernel<<<blocks, 128 * warpgroups, kSharedBytes>>>(cycles);  // the second one counts
    if (cudaDeviceSynchronize() != cudaSuccess) printf(" %s", cudaGetErrorString(cudaGetLastError()));
    printf(" %.1f", (double)*cycles / (kIterations * kGroupsOfIteration * kGroup * warpgroups));
  }
  printf("\n");
}

int main() {
  long long* cycles;
  int blocks;
  if (cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0) != cudaSuccess || cudaMallocManaged(&cycles, sizeof *cycles) != cudaSuccess) {
    fprintf(stderr, "wgmma_rate needs a Hopper GPU\n");
    return 1;
  }
  printf("cycles per product with 1, 2, 3 and 4 warpgroups\n");
  measure<40, 1, false>(cycles, blocks);
  measure<40, 1, true>(cycles, blocks), measure<40, 2, true>(cycles, blocks), measure<40, 4, true>(cycles, blocks);
  measure<72, 1, true>(cycles, blocks), measure<72, 4, true>(cycles, blocks);
  return 0;
}
