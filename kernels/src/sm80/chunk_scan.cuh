// chunk_scan on mma.sync: o'_i = decay_in_i phi(q_i) S + sum_{j <= i} (q_i . k_j)^2 decay_ij v'_j, and its mirror image for dv'.
#pragma once
#include "scan_tile.cuh"

namespace powertrain::sm80 {

template <int D>
struct ChunkScanConfig : ScanConfig<D> {
  using Base = ScanConfig<D>;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = Base::kColumnBytes;  // a state tile is smaller
  static constexpr int kSharedBytes = Base::kRowBytes + kStages * kStageBytes;
  static_assert(Base::kTileBytes <= kStageBytes);
};

template <typename T, int D, bool kReverse>
__global__ void __launch_bounds__(ChunkScanConfig<D>::kThreads) chunk_scan_kernel(const ScanArguments a) {
  follow_earlier_kernels();
  using Config = ChunkScanConfig<D>;
  using N = Numeric<T>;
  constexpr int kM = Config::kM, kGroups = Config::kGroups, kStages = Config::kStages;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ ScanPosition<D, kReverse> p;
  if (threadIdx.x == 0) p.locate(a);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp * 16 * kM, row_block = p.tile_block + warp_row / kBlock, row = warp_row % kBlock;
  const bool active = row_block < p.chunk_blocks;
  const uint32_t base = shared_address(shared), ring = base + Config::kRowBytes;
  const uint32_t rows = base + warp_row / kBlock * Config::kFeatureBytes;

  load_rows(a, p, base);
  float acc[kM][kGroups][4];
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int c = 0; c < kGroups; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[m][c][i] = 0.f;

  if (p.has_state) {
    const char* state = (const char*)a.states + (p.key_bh * a.chunk_count + p.n) * Config::kTiles * Config::kTileBytes;
    const auto load = [&](int tile) {
      if (tile < Config::kTiles)
        copy_async<Config::kThreads>(ring + tile % kStages * Config::kStageBytes, state + tile * Config::kTileBytes, Config::kTileBytes);
      cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) load(s);
    uint32_t xi[kM][8][2];
    int loaded_block = -1;
    for (int tile = 0; tile < Config::kTiles; tile++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      load(tile + kStages - 1);
      if (!active) continue;
      const uint32_t tile_address = ring + tile % kStages * Config::kStageBytes;
      const TilePair pair = tile_pair(tile, D);
      if (pair.i_block != loaded_block) {
        loaded_block = pair.i_block;
        uint32_t f[kM][2];
        load_row_features<kM>(f, rows, pair.i_block, row / 8);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 8; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) xi[m][i][r] = duplicate(__shfl_sync(~0u, f[m][r], g * 4 + i / 2), i % 2);
      }
      uint32_t xj[kM][2];
      load_row_features<kM>(xj, rows, pair.j_block, row / 8);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        uint32_t phi[kM][4];
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int r = 0; r < 4; r++) phi[m][r] = N::mul(xj[m][r % 2], xi[m][2 * k + r / 2][r % 2]);
#pragma unroll
        for (int c = 0; c < kGroups; c += 2) {
          uint32_t s[4];
          ldmatrix4_trans(s, tile_address + (min(c + lane / 16, kGroups - 1) * 8 + 2 * k + lane / 8 % 2) * 128 + lane % 8 * 16);
#pragma unroll
          for (int m = 0; m < kM; m++) {
            mma<T>(acc[m][c], phi[m], s[0], s[1]);
            if (c + 1 < kGroups) mma<T>(acc[m][c + 1], phi[m], s[2], s[3]);
          }
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int c = 0; c < kGroups; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][c][i] *= a.inverse_state_scale;
  }

  const ColumnWalk<kReverse> walk(a, p);
  const auto load = [&](int step) {
    if (step < walk.count) load_columns(a, p, walk.block(step), walk.head(step), ring + step % kStages * Config::kStageBytes);
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) load(s);
  const int64_t key_block = p.key_bh * a.blocks + p.first_block;  // of the chunk's first block
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
    const uint32_t columns = ring + step % kStages * Config::kStageBytes, values = columns + Config::kFeatureBytes;
    const float2* factors = (const float2*)(shared + (values + Config::kValueBytes - base));
    if (walk.head(step) == 0) {
      const float across = diagonal ? 0.f : a.gates.block_decay[key_block + block];
      const float* row_factors = (kReverse ? a.gates.block_out : a.gates.block_in) + (key_block + block) * kBlock + row;
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float f = diagonal ? row_factors[m * 16 + r * 8 + g] : across;
#pragma unroll
          for (int c = 0; c < kGroups; c++) acc[m][c][2 * r] *= f, acc[m][c][2 * r + 1] *= f;
        }
    }
#pragma unroll 1
    for (int sub = 0; sub < 4; sub++) {
      if (diagonal && (kReverse ? sub * 16 + 15 < row : sub * 16 >= row + 16 * kM)) continue;
      float s[kM][2][4];
      scores<T, D, kM>(s, x, columns, sub);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[m][c][e] *= s[m][c][e];
      apply_decay(s, a, p, block, row, sub, diagonal, factors);
      uint32_t w[kM][4];
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
          for (int r = 0; r < 2; r++) w[m][2 * c + r] = N::pack(s[m][c][2 * r], s[m][c][2 * r + 1]);
#pragma unroll
      for (int c = 0; c < kGroups; c += 2) {
        uint32_t u[4];
        ldmatrix4_trans(u, values + (min(c + lane / 16, kGroups - 1) * 8 + 2 * sub + lane / 8 % 2) * 128 + lane % 8 * 16);
#pragma unroll
        for (int m = 0; m < kM; m++) {
          mma<T>(acc[m][c], w[m], u[0], u[1]);
          if (c + 1 < kGroups) mma<T>(acc[m][c + 1], w[m], u[2], u[3]);
        }
      }
    }
  }
  if (!active) return;

  const float out_scale = a.out_scale ? a.out_scale[p.key_bh] : 1.f;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int local = row + m * 16 + r * 8 + g;
      const int64_t token = (p.first_block + row_block) * kBlock + local;
      const float norm = __shfl_sync(~0u, acc[m][kGroups - 1][2 * r] + acc[m][kGroups - 1][2 * r + 1], g * 4);
      float factor = 1.f / out_scale;
      if (!kReverse) {
        factor = fabsf(norm) < kSmallestNormalizer ? 0.f : 1.f / (norm * out_scale);
        if (t == 0 && token < a.seq_len) a.normalizer[p.row_bh * a.seq_len + token] = norm;
      }
      if (token < a.seq_len) {
        uint32_t* out = (uint32_t*)((T*)a.out.data + p.b * a.out.stride_b + token * a.out.stride_t + p.head * a.out.stride_h) + t;
#pragma unroll
        for (int c = 0; c < kGroups - 1; c++) out[c * 4] = N::pack(acc[m][c][2 * r] * factor, acc[m][c][2 * r + 1] * factor);
      }
    }
  }
}

template <typename T, int D, bool kReverse>
int run_chunk_scan(const pt_problem& p, const pt_chunk_scan_params& s, cudaStream_t stream) {
  using Config = ChunkScanConfig<D>;
  ScanArguments a = scan_arguments<kReverse>(p, s.gates);
  a.x = kReverse ? s.k : s.q, a.y = kReverse ? s.q : s.k, a.y_values = s.u;
  a.states = s.states, a.out = s.out, a.out_scale = s.out_scale, a.normalizer = s.normalizer;
  a.has_boundary = s.has_boundary;
  return launch_scan(chunk_scan_kernel<T, D, kReverse>, Config::kThreads, Config::kSharedBytes, a, stream, "chunk_scan");
}

// One configuration is one translation unit, so that a build uses every core.
#define PT_SM80_CHUNK_SCAN(T, name, D)                                                                                                     \
  namespace powertrain::sm80 {                                                                                                             \
  static const RegisterKernel forward_##D##_##name({"sm80 chunk_scan " #D " " #name, (const void*)chunk_scan_kernel<T, D, false>, 80,      \
                                                    ChunkScanConfig<D>::kThreads, ChunkScanConfig<D>::kSharedBytes});                      \
  static const RegisterKernel reverse_##D##_##name({"sm80 chunk_scan reverse " #D " " #name,                                               \
                                                    (const void*)chunk_scan_kernel<T, D, true>, 80, ChunkScanConfig<D>::kThreads,          \
                                                    ChunkScanConfig<D>::kSharedBytes});                                                    \
  int chunk_scan_##D##_##name(const pt_problem& p, const pt_chunk_scan_params& s, cudaStream_t stream) {                                   \
    return s.reverse ? run_chunk_scan<T, D, true>(p, s, stream) : run_chunk_scan<T, D, false>(p, s, stream);                               \
  }                                                                                                                                        \
  }

}  // namespace powertrain::sm80
