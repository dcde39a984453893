// chunk_scan on Hopper: phi(x) S plus the causal attention within the chunk, in one accumulator; then y = n / d, or dv.
//
// A block of threads owns 256 rows (tokens) of one chunk, a warpgroup two blocks of 64 (K = 32: one, and there are four, because one alone waits
// for most of its time). Phase 1 streams the chunk's state past them, two phi tiles a stage, and forms phi(x) in registers: the fragment of x_J times
// x_i, which one ldmatrix delivers to every thread of a row. Phase 2 streams blocks of keys and values (reverse: queries and dn') from the diagonal
// away, so that decays between blocks are a running product.
// Row tiles are taken in turns by a persistent grid: the producing warpgroup runs ahead into the next one.
#pragma once
#include "columns.cuh"

namespace powertrain::sm90 {

struct ChunkScanParams : ScanParams {
  const float* out_scale;
  float* normalizer;
};

template <int kHeadDim, typename T, bool kReverse>
struct ChunkScan {
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kColumns / 8;
  static constexpr int kFeatureBlocks = feature_blocks(kHeadDim), kHalf = kFeatureBlocks / 2, kPhiTiles = phi_tiles(kHeadDim);
  static constexpr int kWarpgroups = kHeadDim == 32 ? 4 : 2, kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kM = kHeadDim == 32 ? 1 : 2, kRowBlocks = kWarpgroups * kM;  // 64-row accumulators of a warpgroup, blocks of a row tile
  using Columns = ColumnBlock<kHeadDim>;
  static constexpr int kXBytes = Columns::kXBytes, kTileBytes = state_tile_elements(kHeadDim) * 2, kStageBytes = 2 * kTileBytes;
  static_assert(Columns::kBytes <= kStageBytes, "a stage holds two phi tiles or one block of columns");
  // Shared memory holds 227 KiB: rows twice where that leaves enough stages, so that the next tile's rows load early.
  static constexpr int kRowBuffers = kHeadDim == 128 ? 1 : 2, kStages = kHeadDim == 128 ? 4 : 8;
  static constexpr int kRowBytes = kRowBlocks * kXBytes;
  // What registers allow beside the accumulators (72 at K = 64, 136 at K = 128).
  static constexpr bool kExpanded = kHeadDim < 128;
  static constexpr int kSlices = kHeadDim < 128 ? 2 : 1;  // slices of 16 phi rows of one wgmma group, of the 4 of a tile
  static constexpr int kScoreSteps = kHeadDim < 128 ? kHeadDim / 16 : 2;  // products of the scores in flight at once
  static constexpr int kSharedBytes = kRowBuffers * kRowBytes + kStages * kStageBytes + 16 * (kStages + kRowBuffers);

  using Walk = ColumnWalk<kHeadDim == 64, kHeadDim == 64, true>;
  using Tile = ScanTile<kReverse, kRowBlocks>;

  __device__ static void produce(const ChunkScanParams& p, uint32_t rows, uint32_t stages, uint32_t ring_barriers, uint32_t row_barriers) {
    Ring<kStages> ring(ring_barriers);
    Ring<kRowBuffers> row_ring(row_barriers);
#pragma unroll 1
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, row_ring.advance()) {
      const Tile tile(p, index);
      row_ring.wait_empty();
      barrier_expect(row_ring.full_barrier(), max(tile.row_blocks, 0) * kXBytes);
      if (tile.row_blocks <= 0) continue;
      bulk_load(rows + row_ring.stage() * kRowBytes, (const T*)p.rows_x + ((int64_t)tile.row_head * p.blocks + tile.row_block) * feature_block_elements(kHeadDim),
                tile.row_blocks * kXBytes, row_ring.full_barrier());
      if (tile.has_state) {
        const T* state = (const T*)p.states + ((int64_t)tile.key_head * p.chunks + tile.chunk) * kPhiTiles * state_tile_elements(kHeadDim);
#pragma unroll 1
        for (int t = 0; t < kPhiTiles; t += 2) {
          ring.wait_empty();
          barrier_expect(ring.full_barrier(), 2 * kTileBytes);
          bulk_load(stages + ring.stage() * kStageBytes, state + t * state_tile_elements(kHeadDim), 2 * kTileBytes, ring.full_barrier());
          ring.advance();
        }
      }
      produce_columns<kHeadDim, T>(p, tile, ring, stages, kStageBytes);
    }
  }

  struct Consumer {
    const ChunkScanParams& p;
    const int lane, warp, warpgroup;
    Ring<kStages> ring;
    uint32_t stages;
    int blocks[kM];  // of the row tile, that this warpgroup takes
    float acc[kM][kColumns / 2];

    __device__ Consumer(const ChunkScanParams& p, uint32_t stages, uint32_t barriers)
        : p(p), lane(threadIdx.x % 32), warp(uniform_warp() % 4), warpgroup(uniform_warp() / 4), ring(barriers), stages(stages) {
      start_turn(0);
    }

    __device__ __forceinline__ void start_turn(uint32_t turn) {
#pragma unroll
      for (int m = 0; m < kM; m++) blocks[m] = row_block_of<kWarpgroups, kM>(warpgroup, m, turn);
    }
    __device__ __forceinline__ int block(int m) const { return blocks[m]; }
    // Bytes from the packed rows of the first block to those of the last.
    __device__ __forceinline__ int row_stride() const { return (blocks[kM - 1] - blocks[0]) * kXBytes; }

    // x_i of block I at this thread's rows, pairs (2 s, 2 s + 1) of a row block's upper and lower half. Matrix s of the ldmatrix repeats the rows of
    // features 2 s and 2 s + 1 four times, so that every thread of a row gets that pair.
    using Pairs = uint32_t[kM][2][4];
    __device__ __forceinline__ void load_pairs(Pairs& pairs, uint32_t rows, int i_block) const {
      const uint32_t at = rows + (2 * warp * 64 + (2 * (lane >> 3) + (lane & 1)) * 8) * 2 + i_block * 1024;
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) load_matrices_transposed(pairs[m][half], at + m * row_stride() + half * 128);
    }
    // The same, each x_i in both halves of a register, where registers allow it; there the next block's pairs are loaded ahead, too.
    using Scalars = uint32_t[kM][2][kExpanded ? 8 : 4];
    __device__ static __forceinline__ void expand(Scalars& xi, const Pairs& pairs) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int s = 0; s < 4; s++) {
            if constexpr (kExpanded)
              xi[m][half][2 * s] = both_low(pairs[m][half][s]), xi[m][half][2 * s + 1] = both_high(pairs[m][half][s]);
            else
              xi[m][half][s] = pairs[m][half][s];
          }
    }
    __device__ static __forceinline__ uint32_t scalar(const uint32_t (&xi)[kExpanded ? 8 : 4], int i) {
      if constexpr (kExpanded) return xi[i];
      return i % 2 ? both_high(xi[i / 2]) : both_low(xi[i / 2]);
    }

    // acc += phi tile (I, J) of the rows times tile `which` (0 or 1) of the stage; then xj becomes that of the block at `next_xj`.
    __device__ __forceinline__ void multiply_tile(const Scalars& xi, uint32_t (&xj)[2 * kM], uint32_t (&a)[2][kM][kSlices][4], int which,
                                                  uint32_t next_xj, bool release_previous) {
      const CoreMatrices state(stages + ring.stage() * kStageBytes + which * kTileBytes, 128, 1024);
#pragma unroll
      for (int group = 0; group < 4 / kSlices; group++) {
        wgmma_wait<1>();  // the products that read a[group % 2] are done
        if (release_previous && group == 1) ring.release(ring.previous());
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int s = 0; s < kSlices; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int i = 2 * (group * kSlices + s);
              a[group % 2][m][s][half] = Pair<T>::multiply(xj[2 * m + half], scalar(xi[m][half], i));
              a[group % 2][m][s][half + 2] = Pair<T>::multiply(xj[2 * m + half], scalar(xi[m][half], i + 1));
            }
        if (group == 4 / kSlices - 1) load_matrices_transposed(xj, next_xj);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kSlices; s++)
#pragma unroll
          for (int m = 0; m < kM; m++) wgmma<T, true>(acc[m], a[group % 2][m][s], state.at((group * kSlices + s) * 256), true);
        wgmma_commit();
      }
    }

    // Tiles of distance < NB/2 first, I by I; then those of distance NB/2. Two tiles a stage. What the next tile needs of the rows is loaded
    // before this one's products, and addresses are sums of few terms: between two tiles the tensor cores wait for nothing else.
    __device__ __forceinline__ void scan_state(uint32_t rows) {
      // ldmatrix of x_J: (block m, rows + 0 or 8) = matrices 2 m + half.
      const uint32_t xj_at = rows + (lane >> 4) * row_stride() + ((2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2;
      const auto j_address = [&](int block) { return xj_at + block % kFeatureBlocks * 1024; };
      Scalars xi;
      Pairs pairs;
      uint32_t a[2][kM][kSlices][4], xj[2 * kM];
      if constexpr (kExpanded) load_pairs(pairs, rows, 0);
      load_matrices_transposed(xj, j_address(0));
#pragma unroll 1
      for (int i = 0; i < kFeatureBlocks; i++) {
        if constexpr (!kExpanded) load_pairs(pairs, rows, i);
        expand(xi, pairs);
#pragma unroll
        for (int distance = 0; distance < kHalf; distance++) {
          if (distance % 2 == 0) ring.wait_full();
          if (kExpanded && distance == kHalf - 1) load_pairs(pairs, rows, (i + 1) % kFeatureBlocks);
          // After the last of an I comes (I + 1, I + 1), and after the last of all (0, NB/2).
          const int next = distance + 1 < kHalf ? i + distance + 1 : i + 1 < kFeatureBlocks ? i + 1 : kHalf;
          multiply_tile(xi, xj, a, distance % 2, j_address(next), distance % 2 == 0 && i + distance > 0);
          if (distance % 2 == 1) ring.advance();
        }
      }
#pragma unroll
      for (int i = 0; i < kHalf; i++) {
        if (i % 2 == 0) ring.wait_full();
        if constexpr (!kExpanded) load_pairs(pairs, rows, i);
        expand(xi, pairs);
        if (kExpanded && i + 1 < kHalf) load_pairs(pairs, rows, i + 1);
        multiply_tile(xi, xj, a, i % 2, j_address(i + 1 + kHalf), i % 2 == 0);
        if (i % 2 == 1) ring.advance();
      }
      wgmma_wait<0>();
      ring.release(ring.previous());
    }

    // x of a block of rows as A operands of the scores, from step `first` on. Where registers allow it they stay there for all columns.
    using RowOperands = uint32_t[kScoreSteps][4];
    __device__ __forceinline__ void load_rows(RowOperands& xa, uint32_t rows, int m, int first) const {
#pragma unroll
      for (int k = 0; k < kScoreSteps; k++)
        load_matrices_transposed(
            xa[k], rows + m * row_stride() + (((2 * (first + k) + (lane >> 4)) * 8 + 2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2);
    }

    // s = x . columns of rows block m, done when it returns, and with it all products before.
    using Scores = float[kBlock / 2];
    __device__ __forceinline__ void score(Scores& s, int m, uint32_t rows, uint32_t x, RowOperands& xa) {
#pragma unroll
      for (int first = 0; first < kHeadDim / 16; first += kScoreSteps) {
        if constexpr (!kExpanded) load_rows(xa, rows, m, first);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kScoreSteps; k++) wgmma<T, true>(s, xa[k], CoreMatrices(x, 1024, 128).at((first + k) * 2048), first + k > 0);
        wgmma_commit();
        wgmma_wait<0>();
      }
    }
    // acc[m] += P u with P = s^2 times the decay between row and column, under way when it returns.
    __device__ __forceinline__ void multiply_weights(int m, const Weights& weights, uint32_t u) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) wgmma<T, true>(acc[m], weights[k], CoreMatrices(u, 128, 1024).at(k * 256), true);
      wgmma_commit();
    }

    // One block of columns against one block of rows.
    __device__ __forceinline__ void attend(bool diagonal, int m, uint32_t rows, const Columns& columns, const float (&row_decay)[2], RowOperands& xa) {
      Scores s;
      score(s, m, rows, columns.x, xa);
      Weights weights;
      if (diagonal) weigh_diagonal<T, kReverse, 1>(weights, s, s, columns, warp, lane);
      else weigh<T>(weights, s, s, row_decay, columns.decays() + 8 * (lane % 4));
      multiply_weights(m, weights, columns.u());
      wgmma_wait<0>();  // the other warpgroup fills the gap; products in flight across the branches above would be serialised by ptxas
    }

    __device__ __forceinline__ void load_decays(float (&decay)[2], const float* from, const Tile& tile, int m) const {
      load_row_decays(decay, from, p, tile, block(m), warp, lane);
    }

    __device__ __forceinline__ void scan_columns(const Tile& tile, uint32_t rows, float first_across) {
      // Where registers allow it, what belongs to the rows is loaded long before it is needed.
      float row_decay[kM][2];
      RowOperands xa[kExpanded ? kM : 1];
      if constexpr (kExpanded)
#pragma unroll
        for (int m = 0; m < kM; m++) load_decays(row_decay[m], p.row_block_decay, tile, m);
      if constexpr (kExpanded)
#pragma unroll
        for (int m = 0; m < kM; m++) load_rows(xa[m], rows, m, 0);
      Weights weights;
      Walk::template walk<kHeadDim, kM, kRowBlocks>(
          p, tile, blocks, ring, stages, kStageBytes, first_across,
          [&](int m, bool diagonal, const Columns& columns, float between) {
            if constexpr (!kExpanded) load_decays(row_decay[m], p.row_block_decay, tile, m);
            attend(diagonal, m, rows, columns, {row_decay[m][0] * between, row_decay[m][1] * between}, xa[kExpanded ? m : 0]);
          },
          [&](int m, const Columns& columns, float between, auto read_previous) {
            Scores s;
            score(s, m, rows, columns.x, xa[kExpanded ? m : 0]);
            read_previous();
            weigh<T>(weights, s, s, {row_decay[m][0] * between, row_decay[m][1] * between}, columns.decays() + 8 * (lane % 4));
            multiply_weights(m, weights, columns.u());
          });
    }

    __device__ __forceinline__ void run(const Tile& tile, uint32_t rows) {
      const float first_across = p.block_decay[(int64_t)tile.key_head * p.blocks + tile.column_block(0)];
      float chunk_decay[kM][2];
      if constexpr (kExpanded)
#pragma unroll
        for (int m = 0; m < kM; m++) load_decays(chunk_decay[m], p.row_chunk_decay, tile, m);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int c = 0; c < kColumns / 2; c++) acc[m][c] = 0.f;
      if (tile.has_state) {
        scan_state(rows);
#pragma unroll
        for (int m = 0; m < kM; m++) {
          if constexpr (!kExpanded) load_decays(chunk_decay[m], p.row_chunk_decay, tile, m);
#pragma unroll
          for (int c = 0; c < kColumns / 2; c++) acc[m][c] *= chunk_decay[m][c % 4 / 2] * p.inverse_state_scale;
        }
      }
      scan_columns(tile, rows, first_across);
    }

    // Writes y and the normaliser, or dv, of the rows that exist.
    __device__ __forceinline__ void store(const Tile& tile) {
      const int64_t batch = p.by_heads.quotient(tile.row_head), head = p.by_heads.remainder(tile.row_head);
      const float unscale = p.out_scale ? 1.f / p.out_scale[tile.key_head] : 1.f;
#pragma unroll
      for (int m = 0; m < kM; m++) {
        if (block(m) >= tile.row_blocks) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t token = (int64_t)(tile.row_block + block(m)) * kBlock + 16 * warp + lane / 4 + half * 8;
          float factor = unscale;
          if constexpr (!kReverse) {
            const float norm = acc[m][4 * (kColumnGroups - 1) + 2 * half] + acc[m][4 * (kColumnGroups - 1) + 2 * half + 1];
            const float d = __shfl_sync(0xffffffffu, norm, lane & ~3);
            factor *= fabsf(d) < kSmallestNormalizer ? 0.f : 1.f / d;
            if (lane % 4 == 0 && token < p.seq_len) p.normalizer[(int64_t)tile.row_head * p.seq_len + token] = d;
          }
          T* out = (T*)p.out + batch * p.out_stride_b + token * p.out_stride_t + head * p.out_stride_h;
#pragma unroll
          for (int c = 0; c < kColumnGroups - 1; c += 2) {
            const float* from = acc[m] + 4 * c + 2 * half;
            store_two_groups(out + 8 * c, token < p.seq_len, lane, from[0] * factor, from[1] * factor, from[4] * factor, from[5] * factor);
          }
        }
      }
    }
  };

  __device__ static void consume(const ChunkScanParams& p, uint32_t rows, uint32_t stages, uint32_t ring_barriers, uint32_t row_barriers) {
    Consumer consumer(p, stages, ring_barriers);
    Ring<kRowBuffers> row_ring(row_barriers);  // its counter is the turn
#pragma unroll 1
    for (; (int)(blockIdx.x + row_ring.count * gridDim.x) < p.tiles; row_ring.advance()) {
      const Tile tile(p, blockIdx.x + row_ring.count * gridDim.x);
      consumer.start_turn(row_ring.count);
      row_ring.wait_full();
      if (tile.row_blocks > 0) consumer.run(tile, rows + row_ring.stage() * kRowBytes + consumer.block(0) * kXBytes);
      row_ring.release(row_ring.stage());
      if (tile.row_blocks > 0) consumer.store(tile);
    }
  }
};

template <int kHeadDim, typename T, bool kReverse>
__global__ void __launch_bounds__(ChunkScan<kHeadDim, T, kReverse>::kThreads, 1) chunk_scan_kernel(const __grid_constant__ ChunkScanParams p) {
  using Kernel = ChunkScan<kHeadDim, T, kReverse>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t rows = shared_address(shared_memory), stages = rows + Kernel::kRowBuffers * Kernel::kRowBytes;
  const uint32_t ring_barriers = stages + Kernel::kStages * Kernel::kStageBytes, row_barriers = ring_barriers + 16 * Kernel::kStages;
  if (threadIdx.x == 0) {
    Ring<Kernel::kStages>::init(ring_barriers, Kernel::kWarpgroups * 128);
    Ring<Kernel::kRowBuffers>::init(row_barriers, Kernel::kWarpgroups * 128);
    barrier_init_fence();
  }
  follow_earlier_kernels();
  __syncthreads();
  if (threadIdx.x / 128 == Kernel::kWarpgroups) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x % 128 == 0) Kernel::produce(p, rows, stages, ring_barriers, row_barriers);
  } else {
    take_registers<kConsumerRegisters<Kernel::kWarpgroups>>();
    Kernel::consume(p, rows, stages, ring_barriers, row_barriers);
  }
}

template <int kHeadDim, typename T, bool kReverse>
int launch_chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream) {
  using Kernel = ChunkScan<kHeadDim, T, kReverse>;
  ChunkScanParams p;
  set_scan_params(p, problem, params, params.u, kReverse, Kernel::kRowBlocks);
  p.out_scale = params.out_scale;
  p.normalizer = params.normalizer;
  auto* kernel = chunk_scan_kernel<kHeadDim, T, kReverse>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  if (p.tiles == 0) return fail(PT_UNSUPPORTED, "%s: batch * heads * seq_len is too large for one launch", "chunk_scan");
  return launch("chunk_scan", kernel, p.grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_SCAN(head_dim, type, type_name, reverse)                                                                              \
  namespace powertrain::sm90 {                                                                                                              \
  template int launch_chunk_scan<head_dim, type, reverse>(const pt_problem&, const pt_chunk_scan_params&, cudaStream_t);                     \
  static RegisterKernel registered({"chunk_scan K=" #head_dim " " type_name " reverse=" #reverse,                                           \
                                    (const void*)chunk_scan_kernel<head_dim, type, reverse>, 90, ChunkScan<head_dim, type, reverse>::kThreads, \
                                    ChunkScan<head_dim, type, reverse>::kSharedBytes});                                                     \
  }
