// A head's state at K = 32 in the accumulators of one warpgroup, which adds blocks of 64 tokens to it: in time segments of their own (segment_state.cuh),
// or beside those who read it (state_steps.cuh). Forward it is S, the sum of phi(k)^T v', in reverse its gradient E, the sum of phi(q)^T dn'. The
// normaliser's column is a matrix of its own, Z = sum of decay n_i x_i x_i^T with n_i the last component of u, kept twice as large.
#pragma once
#include "../common/launch.cuh"
#include "../common/rows.cuh"
#include "../common/segments.h"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace powertrain::sm90 {

struct SegmentParams {
  const void *x, *u;    // packed: k and v'; in reverse q and dn'
  const float* decays;  // (B, Hk, Tp), of the tokens
  int64_t boundary_stride;
  int blocks, chunks, blocks_per_chunk, segments, group;  // group: heads of x and u of a key head
};
inline void set_segment_params(SegmentParams& p, const pt_problem& problem, int segments, bool reverse) {
  p.boundary_stride = boundary_elements(problem), p.segments = segments, p.group = reverse ? problem.query_heads / problem.key_heads : 1;
  p.blocks = (int)padded_blocks(problem.seq_len), p.chunks = (int)chunks(problem.seq_len, problem.chunk_size);
  p.blocks_per_chunk = problem.chunk_size / kBlock;
}

// The blocks of this thread block's time segment.
struct SegmentBlocks {
  int64_t first_chunk;  // in the order of the scan
  int first, end;
  __device__ __forceinline__ SegmentBlocks(const SegmentParams& p, bool reverse) : first_chunk(segment_begin(p.chunks, p.segments, blockIdx.x)) {
    const int64_t end_chunk = segment_begin(p.chunks, p.segments, blockIdx.x + 1);
    first = (int)(reverse ? p.chunks - end_chunk : first_chunk) * p.blocks_per_chunk;
    end = min((int)(reverse ? p.chunks - first_chunk : end_chunk) * p.blocks_per_chunk, p.blocks);
  }
};

template <typename T>
struct StateTiles {
  static constexpr int kHeadDim = 32, kFeatureBlocks = feature_blocks(kHeadDim), kPhiTiles = phi_tiles(kHeadDim), kHalf = kFeatureBlocks / 2;
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kHeadDim / 8;

  // A block of x, u and u's decays; where u has its last component, decay_inputs leaves hi and lo of all tokens.
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2, kValueBytes = kHeadDim * kBlock * 2;
  static constexpr int kInputBytes = kXBytes + kUBytes + kBlock * 4, kRowBytes = 16;
  static constexpr int kNormHigh = kXBytes + kValueBytes, kNormLow = kNormHigh + kBlock * 2;

  // The phi tile of distance < 3 with I = i_block; there are three of i_block < 2, else two.
  __device__ static constexpr int tiles_of(int i_block) { return i_block < kHalf ? kHalf + 1 : kHalf; }
  __device__ static constexpr int tile_of(int i_block, int distance) {
    return distance < kHalf ? i_block * kHalf + distance : kFeatureBlocks * kHalf + i_block;
  }
  __device__ static constexpr int j_block_of(int i_block, int distance) { return (i_block + distance) % kFeatureBlocks; }

  // A block of x and then u, of all (b, h).
  __device__ static __forceinline__ void load_block(const SegmentParams& p, uint32_t to, int64_t block, uint32_t barrier) {
    bulk_load(to, (const T*)p.x + block * feature_block_elements(kHeadDim), kXBytes, barrier);
    bulk_load(to + kXBytes, (const T*)p.u + block * value_block_elements(kHeadDim), kUBytes, barrier);
  }
  // A block of the g-th head of this thread block's key head, and its decays.
  __device__ static __forceinline__ void load_inputs(const SegmentParams& p, uint32_t to, int g, int64_t block, uint32_t barrier) {
    const int64_t head = blockIdx.y;
    barrier_expect(barrier, kInputBytes);
    load_block(p, to, (head * p.group + g) * p.blocks + block, barrier);
    bulk_load(to + kXBytes + kUBytes, p.decays + (head * p.blocks + block) * kBlock, kBlock * 4, barrier);
  }

  // The last components of tokens 2 pair and 2 pair + 1, decayed and doubled, where products read hi and lo.
  __device__ static __forceinline__ void set_norm(uint32_t block, int pair, float first, float second) {
    const float first_high = round_to<T>(first), second_high = round_to<T>(second);
    store_shared_4(block + kNormHigh + pair * 4, Pair<T>::pack(first_high, second_high));
    store_shared_4(block + kNormLow + pair * 4, Pair<T>::pack(first - first_high, second - second_high));
  }
  // u times its decays and `across`, its last component twice that, where products read it: `to` and what follows; by kThreads threads of whole warps, each
  // kBlock / kThreads tokens. From where its core matrices are, perhaps the same place.
  template <int kThreads>
  __device__ static __forceinline__ void decay_values(uint32_t to, uint32_t u, uint32_t decays, float across, int thread, CoreStrides of_u = kPackedCores) {
    constexpr int kTokens = kBlock / kThreads;
    const auto row_at = [&](int column_group, int token) { return u + column_group * of_u.columns + token / 8 * of_u.tokens + token % 8 * kRowBytes; };
    float2 last[2];
    if (thread < 32)
#pragma unroll
      for (int i = 0; i < 2; i++) last[i] = Pair<T>::unpack(load_shared_4(row_at(kColumnGroups, 2 * (thread % 32)) + i * kRowBytes));
    __syncwarp();
    if (thread < 32) {
      const float2 by = load_shared_float2(decays + thread * 8);
      set_norm(to - kXBytes, thread, 2.f * across * by.x * (last[0].x + last[0].y), 2.f * across * by.y * (last[1].x + last[1].y));
    }
    float by[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; i++) by[i] = across * load_shared_float(decays + (thread + i * kThreads) * 4);
    uint32_t from = row_at(0, thread);
    to += thread * kRowBytes;
#pragma unroll 1
    for (int c = 0; c < kColumnGroups; c++, from += of_u.columns, to += kBlock * kRowBytes) {
      uint4 values[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; i++) values[i] = load_shared_16(from + i * kThreads / 8 * of_u.tokens);
#pragma unroll
      for (int i = 0; i < kTokens; i++) store_shared_16(to + i * kThreads * kRowBytes, scaled<T>(values[i], by[i]));
    }
    fence_async_shared();
  }
  template <int kThreads>
  __device__ static __forceinline__ void decay_inputs(uint32_t block, float across, int thread) {
    const uint32_t u = block + kXBytes;
    decay_values<kThreads>(u, u, u + kUBytes, across, thread);
  }

  // kSets of operands: so many groups of products are under way while the next one's are formed, less one. Fragments of x are loaded kAhead groups before.
  template <int kSets, int kAhead>
  struct Accumulators {
    const int lane, warp;
    // The state of the tile of tile_of, and Z: rows are features, so two warps have nothing of it.
    float acc[kPhiTiles][kHeadDim / 2], z[kHeadDim / 2];

    __device__ Accumulators() : lane(threadIdx.x % 32), warp(uniform_warp() % 4) {}
    __device__ __forceinline__ bool has_norm() const { return warp < kHeadDim / 16; }

    // From a head's boundary state, or null: zero.
    __device__ __forceinline__ void enter(const float* entering) {
#pragma unroll
      for (int t = 0; t < kPhiTiles; t++) {
        const float* const from = entering + (t * kBlock + 16 * warp + lane / 4) * kColumns + 2 * (lane % 4);
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float2 value = entering ? *(const float2*)(from + c * 8 + half * 8 * kColumns) : make_float2(0.f, 0.f);
            acc[t][4 * c + 2 * half] = value.x, acc[t][4 * c + 2 * half + 1] = value.y;
          }
      }
#pragma unroll
      for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {  // Z_ab
          z[4 * c + e] = 0.f;
          if (!has_norm() || !entering) continue;
          const int a_block = 2 * warp + e / 2, a = lane / 4, b = 2 * (lane % 4) + e % 2;
          bool swapped;
          const int tile = tile_of_pair(a_block, c, kHeadDim, swapped);
          z[4 * c + e] = 2.f * entering[(tile * kBlock + (swapped ? 8 * b + a : 8 * a + b)) * kColumns + kHeadDim];
        }
    }

    // To a head's boundary state.
    __device__ __forceinline__ void leave(float* leaving) const {
      const int lane = opaque(this->lane);
#pragma unroll
      for (int t = 0; t < kPhiTiles; t++) {
        float* const to = leaving + (t * kBlock + 16 * warp + lane / 4) * kColumns + 2 * (lane % 4);
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            *(float2*)(to + c * 8 + half * 8 * kColumns) = make_float2(acc[t][4 * c + 2 * half], acc[t][4 * c + 2 * half + 1]);
      }
      if (!has_norm()) return;
#pragma unroll
      for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {  // Z_ab, where the boundary has the pair (a, b); of a tile's two on the diagonal, which are rounded apart, one for both
          const int a_block = 2 * warp + e / 2, a = lane / 4, b = 2 * (lane % 4) + e % 2;
          bool swapped;
          const int tile = tile_of_pair(a_block, c, kHeadDim, swapped);
          if (swapped || (a_block == c && a < b)) continue;
          const float4 value = make_float4(0.5f * z[4 * c + e], 0.f, 0.f, 0.f), zero = make_float4(0.f, 0.f, 0.f, 0.f);
          float4* to = (float4*)(leaving + (tile * kBlock + 8 * a + b) * kColumns + kHeadDim);
          to[0] = value, to[1] = zero;
          if (a_block != c || a == b) continue;
          to = (float4*)(leaving + (tile * kBlock + 8 * b + a) * kColumns + kHeadDim);
          to[0] = value, to[1] = zero;
        }
    }

    __device__ __forceinline__ void decay(float by) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 2; c++) {
        z[c] *= by;
#pragma unroll
        for (int t = 0; t < kPhiTiles; t++) acc[t][c] *= by;
      }
    }

    // acc += phi(x)^T u and Z += (n x) x^T over a block of inputs.
    __device__ __forceinline__ void add(uint32_t x, CoreStrides of_x = kPackedCores, CoreStrides of_u = kPackedCores) {
      constexpr int kTurns = kBlock / 16 * kFeatureBlocks;  // groups of products
      // ldmatrix row addresses within a block of x (chunk_state.cuh): x_i of a feature, the same one for all rows, and x_j of two blocks of features. A
      // warp's rows of Z are two of these blocks.
      const uint32_t i_offset = (lane >> 4) * of_x.tokens + (2 * warp + (lane >> 3 & 1)) * kRowBytes;
      const uint32_t j_offset = (lane >> 4) * of_x.columns + (lane >> 3 & 1) * of_x.tokens + (lane & 7) * kRowBytes;
      const CoreMatrices u(x + kXBytes, of_u.tokens, of_u.columns), features(x, of_x.tokens, of_x.columns);
      uint32_t sets[kSets][kHalf + 1][4], xi[kAhead][4], xj[kAhead][kFeatureBlocks][2];
      const auto load_xi = [&](int turn) {
        load_matrices(xi[turn % kAhead], x + turn / kFeatureBlocks * 2 * of_x.tokens + turn % kFeatureBlocks * of_x.columns + i_offset);
      };
      const auto load_xj = [&](int k) {
#pragma unroll
        for (int j = 0; j < kFeatureBlocks; j += 2) load_matrices(xj[k % kAhead][j], xj[k % kAhead][j + 1], x + k * 2 * of_x.tokens + j * of_x.columns + j_offset);
      };
      load_xj(0);
#pragma unroll
      for (int turn = 0; turn < kAhead; turn++) load_xi(turn);
#pragma unroll
      for (int turn = 0; turn < kTurns; turn++) {
        const int k = turn / kFeatureBlocks, i_block = turn % kFeatureBlocks;
        uint32_t(&a)[kHalf + 1][4] = sets[turn % kSets];
        uint32_t(&x_of)[kFeatureBlocks][2] = xj[k % kAhead];
        uint32_t norm[2];  // two tokens' last components of u: lo, and with the next block hi
        if (i_block >= kHalf)
#pragma unroll
          for (int half = 0; half < 2; half++) norm[half] = load_shared_4(x + (i_block == kHalf ? kNormLow : kNormHigh) + (16 * k + 8 * half + 2 * (lane % 4)) * 2);
        wgmma_wait<kSets - 1>();  // the products that read these operands are done
#pragma unroll
        for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
          for (int r = 0; r < 4; r++) a[distance][r] = Pair<T>::multiply(x_of[j_block_of(i_block, distance)][r / 2], xi[turn % kAhead][r]);
        if (i_block >= kHalf)  // one tile less, and Z
#pragma unroll
          for (int half = 0; half < 2; half++)
#pragma unroll
            for (int b = 0; b < 2; b++) a[kHalf][2 * half + b] = Pair<T>::multiply(warp % 2 ? x_of[2 + b][half] : x_of[b][half], norm[half]);
        if (turn + kAhead < kTurns) load_xi(turn + kAhead);
        if (turn % kFeatureBlocks == (kAhead > 1 ? 1 : kFeatureBlocks - 1) && k + 1 < kBlock / 16) load_xj(k + 1);
        wgmma_fence();
#pragma unroll
        for (int distance = 0; distance < tiles_of(i_block); distance++) wgmma<T, true>(acc[tile_of(i_block, distance)], a[distance], u.at(k * 2 * of_u.tokens), true);
        if (i_block >= kHalf) wgmma<T, false>(z, a[kHalf], features.at(k * 2 * of_x.tokens), true);
        wgmma_commit();
      }
      wgmma_wait<0>();
    }
  };
};

}  // namespace powertrain::sm90
