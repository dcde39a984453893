// What a warpgroup of chunk_scan_grad holds of its rows, for the attention within the chunk and for the state's part (state_contraction.cuh,
// state_outer.cuh).
#pragma once
#include "columns.cuh"

namespace powertrain::sm90 {

template <int kHeadDim>
struct GradShape {
  static constexpr int kFeatureBlocks = feature_blocks(kHeadDim), kPhiTiles = phi_tiles(kHeadDim);
  static constexpr int kSteps = kHeadDim / 16 + 1;  // products of 16 columns of u; the last is the normaliser's
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * 128;  // the last warpgroup produces
  // 64-row blocks of a warpgroup: u takes 4 kSteps registers for each, two do not fit at K = 128.
  static constexpr int kM = kHeadDim == 128 ? 1 : 2, kRowBlocks = kWarpgroups * kM;
  using Columns = ColumnBlock<kHeadDim>;
  static constexpr int kXBytes = Columns::kXBytes, kUBytes = Columns::kUBytes;
  static constexpr int kRowBytes = kRowBlocks * (kXBytes + kUBytes);
};

// A packed block's rows as A operands: x, whose tiles are transposed, and the columns of u without the normaliser's.
template <int kHeadDim>
using RowOperands = uint32_t[kHeadDim / 16][4];
template <int kHeadDim>
__device__ __forceinline__ void load_features(RowOperands<kHeadDim>& x, uint32_t block, int warp, int lane, CoreStrides of_x = kPackedCores) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; k++)
    load_matrices_transposed(x[k], block + (2 * k + (lane >> 4)) * of_x.columns + (2 * warp + (lane >> 3 & 1)) * of_x.tokens + (lane & 7) * 16);
}
template <int kHeadDim>
__device__ __forceinline__ void load_values(RowOperands<kHeadDim>& u, uint32_t block, int warp, int lane) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step++)
    load_matrices(u[step], block + ((2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2 + (2 * step + (lane >> 4)) * 1024);
}

template <int kHeadDim, typename T>
struct GradRows : GradShape<kHeadDim> {
  using Shape = GradShape<kHeadDim>;
  using Shape::kFeatureBlocks, Shape::kM, Shape::kRowBlocks, Shape::kSteps, Shape::kUBytes, Shape::kWarpgroups, Shape::kXBytes;

  const int lane, warp, warpgroup;
  const int block_stride;       // packed blocks from its first block to its second
  uint32_t rows_x, rows_u;      // of its first block
  float acc[kM][kHeadDim / 2];  // dx

  __device__ GradRows()
      : lane(threadIdx.x % 32), warp(uniform_warp() % 4), warpgroup(uniform_warp() / 4), block_stride(block(kM - 1) - block(0)) {}
  // A row tile's packed rows.
  __device__ __forceinline__ void select(uint32_t rows) {
    rows_x = rows + block(0) * kXBytes, rows_u = rows + kRowBlocks * kXBytes + block(0) * kUBytes;
  }

  __device__ __forceinline__ int block(int m) const { return row_block_of<kWarpgroups, kM>(warpgroup, m, 0); }
  __device__ __forceinline__ uint32_t x_at(int m) const { return rows_x + m * block_stride * kXBytes; }
  __device__ __forceinline__ uint32_t u_at(int m) const { return rows_u + m * block_stride * kUBytes; }

  // x of rows block m as A operands.
  using XOperands = RowOperands<kHeadDim>;
  __device__ __forceinline__ void load_x(XOperands& x, int m) const { load_features<kHeadDim>(x, x_at(m), warp, lane); }
  // x_i of block I for every thread of a row, in pairs (2 s, 2 s + 1): matrix s of the ldmatrix repeats the rows of features 2 s and 2 s + 1 four times.
  __device__ __forceinline__ void load_pairs(uint32_t (&pairs)[4], int m, int half, int i_block) const {
    load_matrices_transposed(pairs, x_at(m) + ((i_block * 8 + 2 * warp + half) * 64 + (2 * (lane >> 3) + (lane & 1)) * 8) * 2);
  }

  // take(m, half, s, pair) for each of them.
  template <typename F>
  __device__ __forceinline__ void for_each_pair(int i_block, F take) const {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t pairs[4];
        load_pairs(pairs, m, half, i_block);
#pragma unroll
        for (int s = 0; s < 4; s++) take(m, half, s, pairs[s]);
      }
  }

  // u of rows block m as A operands: its columns without the normaliser's ...
  __device__ __forceinline__ uint32_t u_matrices(int m) const { return u_at(m) + ((2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2; }
  __device__ __forceinline__ void load_values(RowOperands<kHeadDim>& u, int m) const { sm90::load_values<kHeadDim>(u, u_at(m), warp, lane); }
  // ... and with them. The last operand meets the columns' (hi, lo) twice, with u's hi and then with its lo.
  using UOperands = uint32_t[kSteps][4];
  __device__ __forceinline__ void load_u(UOperands& u, int m) const {
#pragma unroll
    for (int step = 0; step < kSteps - 1; step++) load_matrices(u[step], u_matrices(m) + (2 * step + (lane >> 4)) * 1024);
    uint32_t norm[4];
    load_matrices(norm, u_matrices(m) + (kHeadDim / 8) * 1024);
    const bool mine = lane % 4 == 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u[kSteps - 1][half] = mine ? both_low(norm[half]) : 0;
      u[kSteps - 1][half + 2] = mine ? both_high(norm[half]) : 0;
    }
  }
  // The normaliser's column of this thread's row of block m, hi + lo.
  __device__ __forceinline__ float u_norm(int m, int half) const {
    const uint32_t at = u_at(m) + (kHeadDim / 8) * 1024 + (16 * warp + lane / 4 + half * 8) * 16;
    const float2 both = Pair<T>::unpack(__float_as_uint(load_shared_float(at)));
    return both.x + both.y;
  }

  // out = u columns^T where columns are 64 rows of value columns: a phi tile of the state, or a block of u.
  __device__ __forceinline__ static void multiply_values(float (&out)[kBlock / 2], const UOperands& u, uint32_t columns) {
    const CoreMatrices values(columns, 1024, 128), norm(columns + (kHeadDim / 8) * 1024, 0, 128);
#pragma unroll
    for (int step = 0; step < kSteps; step++) wgmma<T, false>(out, u[step], step < kSteps - 1 ? values.at(step * 2048) : norm.at(0), step > 0);
  }
};

}  // namespace powertrain::sm90
