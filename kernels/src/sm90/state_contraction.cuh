// The state's part of chunk_scan_grad by contraction: dphi = u S^T comes from tensor cores, one phi tile (64 rows x 64 products) at a time, and is
// contracted with x in fp32: element (i, j) of a tile adds dphi x_j to dx_i and dphi x_i to dx_j. Two accumulators alternate, so that one product
// runs while the other is contracted. dx is kept in shared memory as storage private to each thread; the sum over j for a fixed I stays in registers
// while I does. The normaliser is one more column of u and S. Its halves hi and lo occupy two columns each, which the last product crosses.
#pragma once
#include "grad_rows.cuh"

namespace powertrain::sm90 {

template <int kHeadDim, typename T>
struct StateContraction : GradShape<kHeadDim> {
  using Shape = GradShape<kHeadDim>;
  using Shape::kFeatureBlocks, Shape::kM, Shape::kPhiTiles, Shape::kRowBlocks, Shape::kWarpgroups;
  using Rows = GradRows<kHeadDim, T>;

  static constexpr int kTileBytes = state_tile_elements(kHeadDim) * 2, kStageBytes = 2 * kTileBytes;
  static constexpr int kStages = kHeadDim == 128 ? 2 : (kHeadDim == 64 ? 4 : 8), kRowBuffers = 1;
  static constexpr int kMemoryBytes = kRowBlocks * kBlock * kHeadDim * 4, kBarriers = 0;
  // The product with the normaliser reads its 1024 bytes twice (a stride of 0). memcheck knows no such stride: the pad keeps what it takes for the
  // second half of the last tile's within the block's memory.
  static constexpr int kPadBytes = 1024;
  static constexpr int kProducing = kProducerRegisters, kConsuming = kConsumerRegisters<kWarpgroups>;  // registers
  using StageRing = Ring<kStages>;

  __device__ static void init(uint32_t) {}

  // The phi tiles I by I, those of distance NB/2 with the others of their I: sums over j for a fixed I are done once for each I.
  struct TileWalk {
    static constexpr int kHalf = kFeatureBlocks / 2;
    int i = 0, distance = 0;
    __device__ __forceinline__ int tile() const { return distance < kHalf ? i * kHalf + distance : kFeatureBlocks * kHalf + i; }
    __device__ __forceinline__ int j() const { return (i + distance) % kFeatureBlocks; }
    __device__ __forceinline__ void next() {
      const bool last = distance == (i < kHalf ? kHalf : kHalf - 1);
      distance = last ? 0 : distance + 1;
      i += last;
    }
  };

  struct Producer {
    __device__ Producer(uint32_t) {}
    __device__ __forceinline__ void produce(StageRing& ring, uint32_t stages, const T* state) {
      TileWalk walk;
#pragma unroll 1
      for (int t = 0; t < kPhiTiles; t += 2) {
        ring.wait_empty();
        barrier_expect(ring.full_barrier(), 2 * kTileBytes);
#pragma unroll
        for (int which = 0; which < 2; which++, walk.next())
          bulk_load(stages + ring.stage() * kStageBytes + which * kTileBytes, state + walk.tile() * state_tile_elements(kHeadDim), kTileBytes,
                    ring.full_barrier());
        ring.advance();
      }
    }
  };

  struct Consumer {
    const uint32_t dx;  // of this thread

    __device__ Consumer(const Rows& rows, uint32_t memory, uint32_t)
        : dx(memory + rows.warpgroup * (kMemoryBytes / kWarpgroups) + threadIdx.x % 128 * 8) {}

    // Where this thread keeps dx of rows + 8 half of block m, features 8 block + 2 (lane % 4) and + 1.
    __device__ __forceinline__ uint32_t dx_at(int m, int half, int block) const { return dx + ((m * 2 + half) * kFeatureBlocks + block) * 1024; }
    __device__ __forceinline__ void add_dx(int m, int half, int block, float first, float second) const {
      const float2 old = load_shared_float2(dx_at(m, half, block));
      store_shared_float2(dx_at(m, half, block), make_float2(old.x + first, old.y + second));
    }

    // Sums over the four threads of a row, so that each keeps its two features of block I, and adds them to dx.
    __device__ __forceinline__ void flush(const Rows& rows, float (&partial)[kM][2][8], int i_block) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float four[4], two[2];
          const bool upper = rows.lane & 2, odd = rows.lane & 1;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float keep = upper ? partial[m][half][i + 4] : partial[m][half][i], give = upper ? partial[m][half][i] : partial[m][half][i + 4];
            four[i] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
          }
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float keep = odd ? four[i + 2] : four[i], give = odd ? four[i] : four[i + 2];
            two[i] = keep + __shfl_xor_sync(0xffffffffu, give, 1);
          }
          add_dx(m, half, i_block, two[0], two[1]);
#pragma unroll
          for (int i = 0; i < 8; i++) partial[m][half][i] = 0.f;
        }
    }

    __device__ __forceinline__ void load_scalars(const Rows& rows, float (&xi)[kM][2][8], int i_block) const {
      rows.for_each_pair(i_block, [&](int m, int half, int s, uint32_t pair) {
        const float2 both = Pair<T>::unpack(pair);
        xi[m][half][2 * s] = both.x, xi[m][half][2 * s + 1] = both.y;
      });
    }

    __device__ __forceinline__ void load_xj(const Rows& rows, uint32_t (&xj)[2], int m, int j_block) const {
      load_matrices_transposed(xj, rows.x_at(m) + ((j_block * 8 + 2 * rows.warp + (rows.lane >> 3 & 1)) * 64 + (rows.lane & 7) * 8) * 2);
    }

    __device__ __forceinline__ void contract(const float (&dphi)[kBlock / 2], const float (&xi)[2][8], const uint32_t (&xj)[2],
                                             float (&partial)[2][8], int m, int j_block) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 j = Pair<T>::unpack(xj[half]);
        // Chains of fused multiply-adds by name: a sum of products added to a third costs an instruction more.
        float2 sum = load_shared_float2(dx_at(m, half, j_block));
#pragma unroll
        for (int s = 0; s < 4; s++) {
          const float* i = xi[half] + 2 * s;
          const float* even = dphi + 8 * s + 2 * half;
          partial[half][2 * s] = fmaf(even[1], j.y, fmaf(even[0], j.x, partial[half][2 * s]));
          partial[half][2 * s + 1] = fmaf(even[5], j.y, fmaf(even[4], j.x, partial[half][2 * s + 1]));
          sum.x = fmaf(even[4], i[1], fmaf(even[0], i[0], sum.x));
          sum.y = fmaf(even[5], i[1], fmaf(even[1], i[0], sum.y));
        }
        store_shared_float2(dx_at(m, half, j_block), sum);
      }
    }

    // Before the contraction of a tile: if its I is new, the old one's sums are done.
    __device__ __forceinline__ void start_tile(const Rows& rows, int next, int& i_block, float (&xi)[kM][2][8], float (&partial)[kM][2][8]) {
      if (next == i_block) return;
      flush(rows, partial, i_block);
      load_scalars(rows, xi, next);
      i_block = next;
    }

    // rows.acc = the state's part of dx, without decay and scale; d holds dphi of two tiles in turn.
    __device__ __forceinline__ void scan(Rows& rows, float (&d)[2][kBlock / 2], StageRing& ring, uint32_t stages) {
      typename Rows::UOperands u[kM];
      float xi[kM][2][8], partial[kM][2][8] = {};
#pragma unroll
      for (int m = 0; m < kM; m++) {
        rows.load_u(u[m], m);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int b = 0; b < kFeatureBlocks; b++) store_shared_float2(dx_at(m, half, b), make_float2(0.f, 0.f));
      }
      load_scalars(rows, xi, 0);
      int i_block = 0;
      TileWalk walk;
      // A stage is 2 kM products: tile 0 with each row block, then tile 1. Each runs while the one before is contracted, but none past the
      // stage's end: ptxas serialises products whose accumulators are read on the other side of a loop's back edge.
#pragma unroll 1
      for (int t = 0; t < kPhiTiles; t += 2) {
        ring.wait_full();
        const uint32_t tiles = stages + ring.stage() * kStageBytes;
        wgmma_fence();
        Rows::multiply_values(d[0], u[0], tiles);
        wgmma_commit();
#pragma unroll
        for (int slot = 0; slot < 2 * kM; slot++) {
          if (slot == kM) walk.next();
          uint32_t xj[2];
          load_xj(rows, xj, slot % kM, walk.j());
          if (slot + 1 < 2 * kM) {
            wgmma_fence();
            Rows::multiply_values(d[(slot + 1) % 2], u[(slot + 1) % kM], tiles + (slot + 1) / kM * kTileBytes);
            wgmma_commit();
            wgmma_wait<1>();
          } else {
            wgmma_wait<0>();
            ring.release(ring.stage());
          }
          if (slot % kM == 0) start_tile(rows, walk.i, i_block, xi, partial);
          contract(d[slot % 2], xi[slot % kM], xj, partial[slot % kM], slot % kM, walk.j());
        }
        walk.next();
        ring.advance();
      }
      flush(rows, partial, i_block);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int b = 0; b < kFeatureBlocks; b++) {
            const float2 value = load_shared_float2(dx_at(m, half, b));
            rows.acc[m][4 * b + 2 * half] = value.x, rows.acc[m][4 * b + 2 * half + 1] = value.y;
          }
    }
  };
};

}  // namespace powertrain::sm90
