// chunk_scan_grad on mma.sync: dx_i = d phi(x_i) contracted with u_i S^T, plus 2 sum_j (x_i . y_j) (u_i . w_j) decay_ij y_j within the chunk.
//
// For a phi tile (I, J) the product G = u S^T has rows of tokens and one column for each pair (i, j); it stays in registers, where
// dx_J[j] += sum_i G_ij x_I[i] and dx_I[i] += sum_j G_ij x_J[j]. The first sum falls on the thread that owns (row, 2t, 2t + 1) of block J
// already; the second is completed by a butterfly over four lanes once per block I. dx lives in shared memory during this part, every
// element owned by one thread, and moves into the accumulator of the second part, which has the same layout.
//
// The normaliser's columns are (hi, lo) on both sides; the A operand repeats them as (hi, hi, lo, lo) and the B operand as (hi, lo, hi, lo),
// so that one instruction gives the whole product.
#pragma once
#include "scan_tile.cuh"

namespace powertrain::sm80 {

template <int D>
struct ChunkScanGradConfig : ScanConfig<D> {
  using Base = ScanConfig<D>;
  static constexpr int kStages = 3;
  static constexpr int kGradBytes = kRows * D * 4;
  static constexpr int kStateBytes = kGradBytes + kStages * Base::kTileBytes;
  static constexpr int kWalkBytes = kStages * Base::kColumnBytes;
  static constexpr int kSharedBytes = Base::kRowBytes + (kStateBytes > kWalkBytes ? kStateBytes : kWalkBytes);
};

// (x . dx) / 2 of a warp's rows, times `decay` where given.
template <typename T, int D, int kM>
__device__ __forceinline__ void write_dots(float* dots, const float (&dx)[kM][D / 8][4], uint32_t rows, int row, int64_t block, const float* decay) {
  using N = Numeric<T>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float dot[kM][2] = {};
#pragma unroll
  for (int c = 0; c < D / 8; c++) {
    uint32_t f[kM][2];
    load_row_features<kM>(f, rows, c, row / 8);
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) dot[m][r] += N::low(f[m][r]) * dx[m][c][2 * r] + N::high(f[m][r]) * dx[m][c][2 * r + 1];
  }
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      dot[m][r] += __shfl_xor_sync(~0u, dot[m][r], 1);
      dot[m][r] += __shfl_xor_sync(~0u, dot[m][r], 2);
      const int local = row + m * 16 + r * 8 + g;
      if (t == 0) dots[block * kBlock + local] = 0.5f * dot[m][r] * (decay ? decay[local] : 1.f);
    }
}

template <typename T, int D, bool kReverse>
__global__ void __launch_bounds__(ChunkScanGradConfig<D>::kThreads, 1) chunk_scan_grad_kernel(const ScanArguments a) {
  follow_earlier_kernels();
  using Config = ChunkScanGradConfig<D>;
  using N = Numeric<T>;
  constexpr int kM = Config::kM, kStages = Config::kStages, kSteps = D / 16 + 1;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ ScanPosition<D, kReverse> p;
  if (threadIdx.x == 0) p.locate(a);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp * 16 * kM, row_block = p.tile_block + warp_row / kBlock, row = warp_row % kBlock;
  const bool active = row_block < p.chunk_blocks;
  const uint32_t base = shared_address(shared);
  const uint32_t rows = base + warp_row / kBlock * Config::kFeatureBytes;

  load_rows(a, p, base);
  uint32_t u[kM][kSteps][4];
  if (active) {
    const uint32_t* from = (const uint32_t*)a.x_values + (p.row_bh * a.blocks + p.first_block + row_block) * (value_block_elements(D) / 2) + lane;
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int k = 0; k < kSteps - 1; k++)
#pragma unroll
        for (int r = 0; r < 4; r++) u[m][k][r] = from[((2 * k + r / 2) * 8 + row / 8 + 2 * m + r % 2) * 32];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint32_t word = from[(D / 8 * 8 + row / 8 + 2 * m + r) * 32];
        u[m][kSteps - 1][r] = duplicate(word, false), u[m][kSteps - 1][2 + r] = duplicate(word, true);
      }
    }
  }
  float acc[kM][D / 8][4];

  if (p.has_state) {
    // Every thread touches its own elements alone: [m][block of features][lane] of four.
    float4* dx = (float4*)(shared + Config::kRowBytes) + warp * (kM * D / 8 * 32) + lane;
#pragma unroll
    for (int e = 0; e < kM * D / 8; e++) dx[e * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
    const uint32_t ring = base + Config::kRowBytes + Config::kGradBytes;
    const char* state = (const char*)a.states + (p.key_bh * a.chunk_count + p.n) * Config::kTiles * Config::kTileBytes;
    const auto load = [&](int tile) {
      if (tile < Config::kTiles)
        copy_async<Config::kThreads>(ring + tile % kStages * Config::kTileBytes, state + tile * Config::kTileBytes, Config::kTileBytes);
      cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) load(s);
    uint32_t xi[kM][8];  // rows g and g + 8
    float dxi[kM][8][2];
    int i_block = -1;
    // Sums dx_I over the four lanes that share its rows; lane t keeps features 2t and 2t + 1.
    const auto flush = [&] {
#pragma unroll
      for (int m = 0; m < kM; m++) {
        float4 sum = dx[(m * D / 8 + i_block) * 32];
        float* s = &sum.x;
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float half[4], quarter[2];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float low = dxi[m][i][r], high = dxi[m][i + 4][r];
            half[i] = (t & 2 ? high : low) + __shfl_xor_sync(~0u, t & 2 ? low : high, 2);
          }
#pragma unroll
          for (int i = 0; i < 2; i++) {
            quarter[i] = (t & 1 ? half[i + 2] : half[i]) + __shfl_xor_sync(~0u, t & 1 ? half[i] : half[i + 2], 1);
            s[2 * r + i] += quarter[i];
          }
        }
        dx[(m * D / 8 + i_block) * 32] = sum;
      }
    };
    for (int tile = 0; tile < Config::kTiles; tile++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      load(tile + kStages - 1);
      if (!active) continue;
      const uint32_t s = ring + tile % kStages * Config::kTileBytes + lane % 8 * 16;
      const TilePair pair = tile_pair(tile, D);
      if (pair.i_block != i_block) {
        if (i_block >= 0) flush();
        i_block = pair.i_block;
        uint32_t f[kM][2];
        load_row_features<kM>(f, rows, i_block, row / 8);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const uint32_t top = __shfl_sync(~0u, f[m][0], g * 4 + i / 2), bottom = __shfl_sync(~0u, f[m][1], g * 4 + i / 2);
            xi[m][i] = __byte_perm(top, bottom, i % 2 ? 0x7632 : 0x5410);
            dxi[m][i][0] = dxi[m][i][1] = 0.f;
          }
      }
      uint32_t xj[kM][2];
      load_row_features<kM>(xj, rows, pair.j_block, row / 8);
      float dxj[kM][4] = {};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float product[kM][4] = {};
        if (i == 4) __syncwarp();  // bounds how far the compiler looks ahead, and with it the registers
#pragma unroll
        for (int k = 0; k < kSteps - 1; k += 2) {
          uint32_t b[4];
          ldmatrix4(b, s + ((2 * k + lane / 8) * 8 + i) * 128);
#pragma unroll
          for (int m = 0; m < kM; m++) {
            mma<T>(product[m], u[m][k], b[0], b[1]);
            mma<T>(product[m], u[m][k + 1], b[2], b[3]);
          }
        }
        uint32_t b;
        ldmatrix1(b, s + (D / 8 * 8 + i) * 128);
#pragma unroll
        for (int m = 0; m < kM; m++) {
          mma<T>(product[m], u[m][kSteps - 1], b, b);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float p0 = product[m][2 * r], p1 = product[m][2 * r + 1];
            const float x = r ? N::high(xi[m][i]) : N::low(xi[m][i]);
            dxj[m][2 * r] += p0 * x, dxj[m][2 * r + 1] += p1 * x;
            dxi[m][i][r] += p0 * N::low(xj[m][r]) + p1 * N::high(xj[m][r]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kM; m++) {
        float4 sum = dx[(m * D / 8 + pair.j_block) * 32];
        sum.x += dxj[m][0], sum.y += dxj[m][1], sum.z += dxj[m][2], sum.w += dxj[m][3];
        dx[(m * D / 8 + pair.j_block) * 32] = sum;
      }
    }
    if (active) {
      flush();
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int c = 0; c < D / 8; c++) {
          const float4 sum = dx[(m * D / 8 + c) * 32];
          acc[m][c][0] = sum.x * a.inverse_state_scale, acc[m][c][1] = sum.y * a.inverse_state_scale;
          acc[m][c][2] = sum.z * a.inverse_state_scale, acc[m][c][3] = sum.w * a.inverse_state_scale;
        }
      if (kReverse && a.dots) {
        const int64_t block = p.first_block + row_block, heads = (int64_t)a.batch * a.row_heads;
        const float* decay = a.gates.chunk_out + (p.key_bh * a.blocks + block) * kBlock;
        write_dots<T, D, kM>(a.dots, acc, rows, row, (heads + p.row_bh) * a.blocks + block, decay);
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  } else {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int c = 0; c < D / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][c][i] = 0.f;
    if (kReverse && a.dots && active) {
      const int64_t block = ((int64_t)a.batch * a.row_heads + p.row_bh) * a.blocks + p.first_block + row_block;
      if (t == 0) {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) a.dots[block * kBlock + row + m * 16 + r * 8 + g] = 0.f;
      }
    }
  }

  const uint32_t ring = base + Config::kRowBytes;
  const ColumnWalk<kReverse> walk(a, p);
  const auto load = [&](int step) {
    if (step < walk.count) load_columns(a, p, walk.block(step), walk.head(step), ring + step % kStages * Config::kColumnBytes);
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) load(s);
  const int64_t key_block = p.key_bh * a.blocks + p.first_block;  // of the chunk's first block
  // The rows' factors enter here before the gradients of the scores are rounded, and the state's part at once: then a pair's is rounded to the same
  // number for its query and for its key, and cancels where the gates' gradient adds up the difference of both over a chunk.
  const float* row_factors = (kReverse ? a.gates.block_out : a.gates.block_in) + (key_block + row_block) * kBlock + row + g;
  if (active) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float f = row_factors[m * 16 + r * 8];
#pragma unroll
        for (int c = 0; c < D / 8; c++) acc[m][c][2 * r] *= f, acc[m][c][2 * r + 1] *= f;
      }
  }
  uint32_t x[kM][D / 16][4];
  for (int step = 0; step < walk.count; step++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    if (!active) continue;
    if (step == 0) load_row_operand<D, kM>(x, rows, row / 8);
    const int block = walk.block(step);
    if (kReverse ? block < row_block : block > row_block) continue;
    const bool diagonal = block == row_block;
    const uint32_t columns = ring + step % kStages * Config::kColumnBytes, values = columns + Config::kFeatureBytes;
    const float2* factors = (const float2*)(shared + (values + Config::kValueBytes - base));
    if (walk.head(step) == 0 && !diagonal) {
      const float across = a.gates.block_decay[key_block + block];
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int c = 0; c < D / 8; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[m][c][i] *= across;
    }
#pragma unroll 1
    for (int sub = 0; sub < 4; sub++) {
      if (diagonal && (kReverse ? sub * 16 + 15 < row : sub * 16 >= row + 16 * kM)) continue;
      float s[kM][2][4], d[kM][2][4] = {};
      scores<T, D, kM>(s, x, columns, sub);
      apply_decay(s, a, p, block, row, sub, diagonal, factors);
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        uint32_t b[4];
        // Core matrices (group 2k, 2 sub), (2k + 1, 2 sub), then token group 2 sub + 1; the normaliser's group stands for both.
        const int group = k + 1 < kSteps ? 2 * k + lane / 8 % 2 : D / 8;
        ldmatrix4(b, values + (group * 8 + 2 * sub + lane / 16) * 128 + lane % 8 * 16);
#pragma unroll
        for (int m = 0; m < kM; m++) {
          mma<T>(d[m][0], u[m][k], b[0], b[1]);
          mma<T>(d[m][1], u[m][k], b[2], b[3]);
        }
      }
      uint32_t z[kM][4];
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          // Read again rather than kept: registers are what this kernel has least of.
          const float f = diagonal ? 2.f : 2.f * row_factors[m * 16 + r * 8];
#pragma unroll
          for (int c = 0; c < 2; c++)
            z[m][2 * c + r] = N::pack(f * s[m][c][2 * r] * d[m][c][2 * r], f * s[m][c][2 * r + 1] * d[m][c][2 * r + 1]);
        }
#pragma unroll
      for (int c = 0; c < D / 8; c += 2) {
        uint32_t y[4];
        ldmatrix4(y, columns + ((c + lane / 16) * 8 + 2 * sub + lane / 8 % 2) * 128 + lane % 8 * 16);
#pragma unroll
        for (int m = 0; m < kM; m++) {
          mma<T>(acc[m][c], z[m], y[0], y[1]);
          mma<T>(acc[m][c + 1], z[m], y[2], y[3]);
        }
      }
    }
  }
  if (!active) return;

  float factor = a.x_scale ? a.x_scale[p.row_bh] : 1.f;
  if (a.value_scale) factor /= a.value_scale[p.key_bh];
  if (a.dn_scale) factor /= a.dn_scale[p.key_bh];
  if (a.dots) write_dots<T, D, kM>(a.dots, acc, rows, row, p.row_bh * a.blocks + p.first_block + row_block, nullptr);
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t token = (p.first_block + row_block) * kBlock + row + m * 16 + r * 8 + g;
      if (token >= a.seq_len) continue;
      uint32_t* out = (uint32_t*)((T*)a.out.data + p.b * a.out.stride_b + token * a.out.stride_t + p.head * a.out.stride_h) + t;
      const float by = a.row_scale ? factor * a.row_scale[p.row_bh * a.seq_len + token] : factor;
#pragma unroll
      for (int c = 0; c < D / 8; c++) out[c * 4] = N::pack(acc[m][c][2 * r] * by, acc[m][c][2 * r + 1] * by);
    }
}

template <typename T, int D, bool kReverse>
int run_chunk_scan_grad(const pt_problem& p, const pt_chunk_scan_grad_params& s, cudaStream_t stream) {
  using Config = ChunkScanGradConfig<D>;
  ScanArguments a = scan_arguments<kReverse>(p, s.gates);
  a.x = kReverse ? s.k : s.q, a.y = kReverse ? s.q : s.k;
  a.x_values = kReverse ? s.v : s.dn, a.y_values = kReverse ? s.dn : s.v;
  a.states = s.states, a.out = s.out, a.x_scale = s.x_scale, a.value_scale = s.value_scale, a.dn_scale = s.dn_scale, a.row_scale = s.row_scale;
  a.has_boundary = s.has_boundary, a.dots = s.dots;
  return launch_scan(chunk_scan_grad_kernel<T, D, kReverse>, Config::kThreads, Config::kSharedBytes, a, stream, "chunk_scan_grad");
}

// One configuration is one translation unit, so that a build uses every core.
#define PT_SM80_CHUNK_SCAN_GRAD(T, name, D)                                                                                                \
  namespace powertrain::sm80 {                                                                                                             \
  static const RegisterKernel forward_##D##_##name({"sm80 chunk_scan_grad " #D " " #name, (const void*)chunk_scan_grad_kernel<T, D, false>, 80, \
                                                    ChunkScanGradConfig<D>::kThreads, ChunkScanGradConfig<D>::kSharedBytes});              \
  static const RegisterKernel reverse_##D##_##name({"sm80 chunk_scan_grad reverse " #D " " #name,                                          \
                                                    (const void*)chunk_scan_grad_kernel<T, D, true>, 80, ChunkScanGradConfig<D>::kThreads, \
                                                    ChunkScanGradConfig<D>::kSharedBytes});                                                \
  int chunk_scan_grad_##D##_##name(const pt_problem& p, const pt_chunk_scan_grad_params& s, cudaStream_t stream) {                         \
    return s.reverse ? run_chunk_scan_grad<T, D, true>(p, s, stream) : run_chunk_scan_grad<T, D, false>(p, s, stream);                     \
  }                                                                                                                                        \
  }

}  // namespace powertrain::sm80
