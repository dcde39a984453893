// How fast m64nNk16 with A from registers goes while other instructions form A: cycles of a wgmma by N, packed products a wgmma, and warpgroups, one
// JSON object a line. What kernels here may hope for (docs/kernels-speed.md, section 4).
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Ikernels/src -Ikernels/include kernels/wgmma_rate.cu -o build/wgmma_rate && build/wgmma_rate
#include <cstdio>
#include <cuda_runtime.h>

#include "sm90/wgmma.cuh"

using namespace powertrain::sm90;

constexpr int kThreads = 512, kGroup = 4, kTurns = 16, kLoops = 2000, kSharedBytes = 65536, kMultiprocessors = 132;

// Groups of four wgmmas into one accumulator, kProducts packed products for each of them; the operands of one group are formed while the one before runs.
template <int kN, int kProducts>
__global__ void __launch_bounds__(kThreads, 1) multiply(float* out, long long* cycles) {
  extern __shared__ __align__(1024) unsigned char memory[];
  for (int i = threadIdx.x; i < kSharedBytes / 4; i += blockDim.x) ((unsigned*)memory)[i] = 0x3c003c00 + i % 7;
  __syncthreads();
  fence_async_shared();
  __syncthreads();
  const uint32_t b = shared_address(memory);
  float acc[kN / 2] = {};
  uint32_t a[2][kGroup][4], x[4], y[8];
  for (int r = 0; r < 4; r++) x[r] = 0x3c003c00 + threadIdx.x % 5 + r;
  for (int r = 0; r < 8; r++) y[r] = 0x3c003c00 + threadIdx.x % 3 + r;
  for (auto& operands : a)
    for (auto& operand : operands)
      for (int r = 0; r < 4; r++) operand[r] = x[r];
  const long long begin = clock64();
#pragma unroll 1
  for (int loop = 0; loop < kLoops; loop++) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      wgmma_wait<1>();
#pragma unroll
      for (int g = 0; g < kGroup; g++)
#pragma unroll
        for (int r = 0; r < kProducts; r++)
          a[turn % 2][g][r % 4] = Pair<__nv_bfloat16>::multiply(r < 4 ? x[r] : a[turn % 2][g][r % 4], y[(g + turn + r) % 8]);
      wgmma_fence();
#pragma unroll
      for (int g = 0; g < kGroup; g++) wgmma<__nv_bfloat16, true>(acc, a[turn % 2][g], CoreMatrices(b, 128, 1024).at(g * 256), true);
      wgmma_commit();
    }
    wgmma_wait<0>();
    for (int r = 0; r < 8; r++) y[r] ^= loop & 1;
  }
  const long long end = clock64();
  float sum = 0;
  for (int c = 0; c < kN / 2; c++) sum += acc[c];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = end - begin;
}

template <int kN, int kProducts>
void measure(int warpgroups) {
  float* out;
  long long* cycles;
  cudaMalloc(&out, kMultiprocessors * kThreads * sizeof(float));
  cudaMallocManaged(&cycles, sizeof *cycles);
  cudaFuncSetAttribute(multiply<kN, kProducts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  for (int i = 0; i < 2; i++) multiply<kN, kProducts><<<kMultiprocessors, warpgroups * 128, kSharedBytes>>>(out, cycles);
  const cudaError_t error = cudaDeviceSynchronize();
  const double of_one = (double)*cycles / ((double)kLoops * kTurns * kGroup * warpgroups);
  printf("{\"n\": %d, \"products\": %d, \"warpgroups\": %d, \"cycles\": %.2f, \"of_the_tensor_rate\": %.3f, \"error\": \"%s\"}\n", kN, kProducts, warpgroups, of_one,
         kN / 2. / of_one, error ? cudaGetErrorString(error) : "");
  cudaFree(out);
  cudaFree(cycles);
}

template <int kN>
void measure_all() {
  for (int warpgroups = 1; warpgroups <= (kN > 64 ? 2 : 3); warpgroups++) {
    measure<kN, 0>(warpgroups);
    measure<kN, 4>(warpgroups);
    measure<kN, 8>(warpgroups);
  }
}

int main() {
  measure_all<32>();
  measure_all<40>();
  measure_all<64>();
  measure_all<72>();
  measure_all<128>();
}
