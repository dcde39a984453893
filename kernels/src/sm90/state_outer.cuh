// The state's part of chunk_scan_grad by outer products: dx_a = sum over b and c of (x_b u_c) S_abc, one matrix product with A = x_b u_c (rounded to 16
// bits, like phi) formed in registers. At K = 32 that is as many tensor cycles as the contraction (state_contraction.cuh) takes, whose u S^T is padded
// to whole tiles, and none of its fp32 arithmetic. At K = 64 it is half as many again, and slower (docs/kernels.md).
//
// B needs all (a, b) of the state, which holds each unordered pair of feature blocks once. The producing thread loads the state I by I, all J, and the
// three warps beside it transpose in shared memory what is stored as (J, I), and double what is stored as (I, I), whose pairs have no weight 2.
// The normaliser's column keeps its hi and lo: those warps gather it in two K x K matrices Z, and u_norm (Z x) is added in fp32.
#pragma once
#include "grad_rows.cuh"

namespace powertrain::sm90 {

template <int kHeadDim, typename T>
struct StateOuter : GradShape<kHeadDim> {
  using Shape = GradShape<kHeadDim>;
  using Shape::kFeatureBlocks, Shape::kM, Shape::kPhiTiles, Shape::kWarpgroups;
  using Rows = GradRows<kHeadDim, T>;

  // A stage is the tiles (I, J) of one I and all J, in slots by J and without the normaliser's columns.
  static constexpr int kSlotBytes = kHeadDim * kBlock * 2, kStageBytes = kFeatureBlocks * kSlotBytes, kStages = 8, kRowBuffers = 2;
  static_assert(kHeadDim == 32, "the loops below take the four groups of columns of a slot at once");
  static constexpr int kNormBytes = kHeadDim * kHeadDim * 2, kMemoryBytes = 2 * kNormBytes;  // Z's hi, then its lo
  static constexpr int kAssistants = 3;                                                      // warps
  static constexpr int kBarriers = kStages + 1, kPadBytes = 0;  // pairs: stages of the state loaded, and complete; Z
  static constexpr int kProducing = 72, kConsuming = 216;  // registers
  using StageRing = Ring<kStages>;

  // The stages that hold a part of the state, counted on their own: who waits for each of them never falls two turns behind. A stage is loaded, then
  // complete.
  struct StateTurns {
    uint32_t barriers, count = 0;
    __device__ StateTurns(uint32_t barriers) : barriers(barriers) {}
    __device__ uint32_t loaded() const { return barriers + 8 * (count % kStages); }
    __device__ uint32_t complete() const { return loaded() + 8 * kStages; }
    __device__ uint32_t phase() const { return count / kStages & 1; }
  };
  __device__ static void init(uint32_t barriers) {
    for (int i = 0; i < kStages; i++) barrier_init(barriers + 8 * i, 1), barrier_init(barriers + 8 * (kStages + i), kAssistants * 32);
    Ring<1>::init(barriers + 16 * kStages, kWarpgroups * 128, kAssistants * 32);
  }

  struct Producer {
    StateTurns turns;
    __device__ Producer(uint32_t barriers) : turns(barriers) {}
    __device__ __forceinline__ void produce(StageRing& ring, uint32_t stages, const T* state) {
#pragma unroll 1
      for (int i = 0; i < kFeatureBlocks; i++, ring.advance(), turns.count++) {
        ring.wait_empty();
        barrier_arrive(ring.full_barrier());  // nobody waits for it
        barrier_expect(turns.loaded(), kStageBytes);
#pragma unroll 1
        for (int j = 0; j < kFeatureBlocks; j++) {
          bool swapped;
          const int tile = tile_of_pair(i, j, kHeadDim, swapped);
          bulk_load(stages + ring.stage() * kStageBytes + j * kSlotBytes, state + tile * state_tile_elements(kHeadDim), kSlotBytes, turns.loaded());
        }
      }
    }
  };

  // One of the assisting warps.
  struct Assistant {
    const int lane, warp;
    StageRing ring;
    StateTurns turns;
    Ring<1> norm;
    const uint32_t stages, memory;

    __device__ Assistant(int warp, uint32_t stages, uint32_t memory, uint32_t ring_barriers, uint32_t barriers)
        : lane(threadIdx.x % 32), warp(warp), ring(ring_barriers), turns(barriers), norm(barriers + 16 * kStages), stages(stages), memory(memory) {}

    __device__ __forceinline__ void done(uint32_t barrier) const {
      fence_async_shared();
      barrier_arrive(barrier);
    }

    // 16-byte rows (8 a + b) and (8 b + a) of each group of columns change places. Eight lanes have eight a and eight b: no bank conflicts.
    __device__ __forceinline__ void transpose(uint32_t slot) const {
      const int a = lane % 8;
      slot += lane / 8 * 1024;
#pragma unroll 1
      for (int k = 1; k <= 3; k += 2) {
        uint32_t here[2], there[2];
        uint4 first[2], second[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int b = (a + k + e) % 8;
          here[e] = slot + (8 * a + b) * 16, there[e] = slot + (8 * b + a) * 16;
          first[e] = load_shared_16(here[e]), second[e] = load_shared_16(there[e]);
        }
        if (k == 3) __syncwarp();  // at a distance of 4 two lanes have the same pair of rows, and write the same
#pragma unroll
        for (int e = 0; e < 2; e++) store_shared_16(here[e], second[e]), store_shared_16(there[e], first[e]);
      }
    }
    __device__ __forceinline__ void double_all(uint32_t slot) const {
      slot += lane * 16;
#pragma unroll 1
      for (int k = 0; k < kSlotBytes / 512; k += 4) {
        uint4 v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = load_shared_16(slot + (k + e) * 512);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          v[e].x = Pair<T>::add(v[e].x, v[e].x), v[e].y = Pair<T>::add(v[e].y, v[e].y);
          v[e].z = Pair<T>::add(v[e].z, v[e].z), v[e].w = Pair<T>::add(v[e].w, v[e].w);
          store_shared_16(slot + (k + e) * 512, v[e]);
        }
      }
    }

    // Where Z_ab is: core matrices of rows a and columns b.
    __device__ static __forceinline__ uint32_t norm_at(int a_block, int a, int b_block, int b) {
      return ((a_block * kFeatureBlocks + b_block) * 64 + a * 8 + b) * 2;
    }
    __device__ __forceinline__ void gather_norm(const T* state) {
      constexpr int kAhead = 4;
      norm.wait_empty();
#pragma unroll 1
      for (int first = warp * 32 + lane; first < kPhiTiles * kBlock; first += kAhead * kAssistants * 32) {
        uint32_t value[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
          const int at = first + k * kAssistants * 32;
          if (at < kPhiTiles * kBlock)
            value[k] = *(const uint32_t*)(state + at / kBlock * state_tile_elements(kHeadDim) + state_index(at % kBlock, kHeadDim));
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
          const int at = first + k * kAssistants * 32, a = at % kBlock / 8, b = at % 8;
          if (at >= kPhiTiles * kBlock) break;
          const TilePair pair = tile_pair(at / kBlock, kHeadDim);
          const uint32_t v = pair.distance == 0 ? Pair<T>::add(value[k], value[k]) : value[k];
          const uint32_t here = memory + norm_at(pair.i_block, a, pair.j_block, b), there = memory + norm_at(pair.j_block, b, pair.i_block, a);
          store_shared_2(here, (uint16_t)v), store_shared_2(here + kNormBytes, (uint16_t)(v >> 16));
          store_shared_2(there, (uint16_t)v), store_shared_2(there + kNormBytes, (uint16_t)(v >> 16));
        }
      }
      done(norm.full_barrier());
      norm.advance();
    }

    // Prepares one row tile's state.
    __device__ __forceinline__ void assist(const T* state) {
      gather_norm(state);
#pragma unroll 1
      for (int i = 0; i < kFeatureBlocks; i++, ring.advance(), turns.count++) {
        barrier_wait(turns.loaded(), turns.phase());
        const uint32_t stage = stages + ring.stage() * kStageBytes;
        // The pairs (J, I) with J before I, up to the distance at which there are only half as many.
        const int farthest = i < kFeatureBlocks / 2 ? kFeatureBlocks / 2 - 1 : kFeatureBlocks / 2;
#pragma unroll 1
        for (int distance = warp; distance <= farthest; distance += kAssistants) {
          const uint32_t slot = stage + (i - distance + kFeatureBlocks) % kFeatureBlocks * kSlotBytes;
          if (distance == 0) double_all(slot);
          else transpose(slot);
        }
        done(turns.complete());
      }
    }
  };

  struct Consumer {
    StateTurns turns;
    Ring<1> norm;
    const uint32_t memory;

    __device__ Consumer(const Rows&, uint32_t memory, uint32_t barriers) : turns(barriers), norm(barriers + 16 * kStages), memory(memory) {}

    using Scalars = uint32_t[kM][2][8];  // x_i in both halves of a register
    __device__ __forceinline__ void load_scalars(const Rows& rows, Scalars& xi, int i_block) const {
      rows.for_each_pair(i_block, [&](int m, int half, int s, uint32_t pair) {
        xi[m][half][2 * s] = both_low(pair), xi[m][half][2 * s + 1] = both_high(pair);
      });
    }

    // rows.acc = the state's part of dx, without decay and scale.
    __device__ __forceinline__ void scan(Rows& rows, float (&)[2][kBlock / 2], StageRing& ring, uint32_t stages) {
      uint32_t u[kM][kHeadDim / 16][4], a[2][kM][kHeadDim / 16][4];
      Scalars xi;
#pragma unroll
      for (int m = 0; m < kM; m++) {
        rows.load_values(u[m], m);
#pragma unroll
        for (int c = 0; c < kHeadDim / 2; c++) rows.acc[m][c] = 0.f;
      }
#pragma unroll 1
      for (int block = 0; block < kFeatureBlocks; block++, ring.advance(), turns.count++) {
        load_scalars(rows, xi, block);
        barrier_wait(turns.loaded(), turns.phase());
        barrier_wait(turns.complete(), turns.phase());
        const CoreMatrices state(stages + ring.stage() * kStageBytes, 1024, kSlotBytes);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          wgmma_wait<1>();  // the products that read a[i % 2] are done
#pragma unroll
          for (int m = 0; m < kM; m++)
#pragma unroll
            for (int s = 0; s < kHeadDim / 16; s++)
#pragma unroll
              for (int r = 0; r < 4; r++) a[i % 2][m][s][r] = Pair<T>::multiply(u[m][s][r], xi[m][r % 2][i]);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < kHeadDim / 16; s++)
#pragma unroll
            for (int m = 0; m < kM; m++) wgmma<T, false>(rows.acc[m], a[i % 2][m][s], state.at(i * 128 + s * 2048), true);
          wgmma_commit();
        }
        wgmma_wait<0>();  // products under way across this loop's back edge would be serialised by ptxas
        ring.release(ring.stage());
      }
      norm.wait_full();
#pragma unroll
      for (int m = 0; m < kM; m++) add_norm(rows, m);
      norm.release(0);
      norm.advance();
    }

    __device__ __forceinline__ void add_norm(Rows& rows, int m) const {
      typename Rows::XOperands x;
      rows.load_x(x, m);
      float zx[kHeadDim / 2];
      wgmma_fence();
#pragma unroll
      for (int low = 0; low < 2; low++)
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; k++)
          wgmma<T, false>(zx, x[k], CoreMatrices(memory + low * kNormBytes, 128, kFeatureBlocks * 128).at(k * 256), low + k > 0);
      wgmma_commit();
      const float u[2] = {rows.u_norm(m, 0), rows.u_norm(m, 1)};
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < kHeadDim / 2; c++) rows.acc[m][c] = fmaf(u[c % 4 / 2], zx[c], rows.acc[m][c]);
    }
  };
};

}  // namespace powertrain::sm90
