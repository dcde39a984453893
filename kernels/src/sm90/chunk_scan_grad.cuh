// chunk_scan_grad on Hopper: dq (reverse: dk), the gradient of n' . (phi(x) S) and of the attention within the chunk with respect to x.
//
// dphi = u S^T comes from tensor cores, one phi tile (64 rows x 64 products) at a time, and is contracted with x in fp32: element (i, j) of a
// tile adds dphi x_j to dx_i and dphi x_i to dx_j. Two accumulators alternate, so that one product runs while the other is contracted. dx is
// kept in shared memory as storage private to each thread; the sum over j for a fixed I stays in registers while I does.
// The normaliser is one more column of u and S. Its halves hi and lo occupy two columns each, which the last product crosses.
#pragma once
#include "../common/numeric.cuh"
#include "pipeline.cuh"
#include "scan_tile.cuh"
#include "wgmma.cuh"

namespace powertrain::sm90 {

struct ChunkScanGradParams : ScanShape {
  const void *rows_x, *rows_u, *columns_x, *columns_u;  // packed q, dn', k, v'; reverse: k, v', q, dn'
  const void* states;
  const float* row_chunk_decay;     // (B, Hk, Tp): chunk_in; reverse: chunk_out
  const float* row_block_decay;     // block_in; reverse: block_out
  const float* column_block_decay;  // block_out; reverse: block_in
  const float *log2_decay, *block_decay;
  const int32_t* document_start;
  void* out;
  int64_t out_stride_b, out_stride_t, out_stride_h;
  const float *x_scale, *value_scale, *dn_scale, *row_scale;
  float *dots, *state_dots;  // (B, H, Tp), the latter in reverse alone; or null
  float inverse_state_scale;
};

template <int kHeadDim, typename T, bool kReverse>
struct ChunkScanGrad {
  static constexpr int kColumns = kHeadDim + kNormColumns;
  static constexpr int kFeatureBlocks = feature_blocks(kHeadDim), kHalf = kFeatureBlocks / 2, kPhiTiles = phi_tiles(kHeadDim);
  static constexpr int kSteps = kHeadDim / 16 + 1;  // products of 16 columns of u; the last is the normaliser's
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * 128;
  // 64-row blocks of a warpgroup: u takes 4 kSteps registers for each, two do not fit at K = 128.
  static constexpr int kM = kHeadDim == 128 ? 1 : 2, kRowBlocks = kWarpgroups * kM;
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2;
  static constexpr int kTileBytes = state_tile_elements(kHeadDim) * 2, kVectorBytes = kBlock * 4, kStageBytes = 2 * kTileBytes;
  static_assert(kXBytes + kUBytes + 3 * kVectorBytes <= kStageBytes, "a stage holds two phi tiles or one block of columns");
  static constexpr int kStages = kHeadDim == 128 ? 2 : (kHeadDim == 64 ? 4 : 8);
  static constexpr int kRowBytes = kRowBlocks * (kXBytes + kUBytes), kDxBytes = kRowBlocks * kBlock * kHeadDim * 4;
  // The product with the normaliser reads its 1024 bytes twice (a stride of 0). memcheck knows no such stride: the pad keeps what it takes for the
  // second half of the last tile's within the block's memory.
  static constexpr int kPadBytes = 1024;
  static constexpr int kSharedBytes = kRowBytes + kDxBytes + kStages * kStageBytes + kPadBytes + 16 * (kStages + 1);

  using Tile = ScanTile<kReverse, kRowBlocks>;

  // The phi tiles I by I, those of distance NB/2 with the others of their I: sums over j for a fixed I are done once for each I.
  struct TileWalk {
    int i = 0, distance = 0;
    __device__ __forceinline__ int tile() const { return distance < kHalf ? i * kHalf + distance : kFeatureBlocks * kHalf + i; }
    __device__ __forceinline__ int j() const { return (i + distance) % kFeatureBlocks; }
    __device__ __forceinline__ void next() {
      const bool last = distance == (i < kHalf ? kHalf : kHalf - 1);
      distance = last ? 0 : distance + 1;
      i += last;
    }
  };

  __device__ static void produce(const ChunkScanGradParams& p, uint32_t rows, uint32_t stages, uint32_t ring_barriers, uint32_t row_barriers) {
    Ring<kStages> ring(ring_barriers);
    Ring<1> row_ring(row_barriers);
#pragma unroll 1
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, row_ring.advance()) {
      const Tile tile(p, index);
      row_ring.wait_empty();
      barrier_expect(row_ring.full_barrier(), max(tile.row_blocks, 0) * (kXBytes + kUBytes));
      if (tile.row_blocks <= 0) continue;
      const int64_t row_at = (int64_t)tile.row_head * p.blocks + tile.row_block;
      bulk_load(rows, (const T*)p.rows_x + row_at * feature_block_elements(kHeadDim), tile.row_blocks * kXBytes, row_ring.full_barrier());
      bulk_load(rows + kRowBlocks * kXBytes, (const T*)p.rows_u + row_at * value_block_elements(kHeadDim), tile.row_blocks * kUBytes,
                row_ring.full_barrier());
      if (tile.has_state) {
        const T* state = (const T*)p.states + ((int64_t)tile.key_head * p.chunks + tile.chunk) * kPhiTiles * state_tile_elements(kHeadDim);
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
#pragma unroll 1
      for (int g = 0; g < Tile::column_heads(p); g++) {
        const int64_t head = tile.first_column_head + g, batch = tile.key_head / p.key_heads;
#pragma unroll 1
        for (int i = 0; i < tile.column_count; i++) {
          const int block = tile.column_block(i);
          const int64_t at = head * p.blocks + block;
          const uint32_t x = stages + ring.stage() * kStageBytes, u = x + kXBytes, vectors = u + kUBytes;
          ring.wait_empty();
          const uint32_t full = ring.full_barrier();
          barrier_expect(full, kXBytes + kUBytes + 3 * kVectorBytes);
          bulk_load(x, (const T*)p.columns_x + at * feature_block_elements(kHeadDim), kXBytes, full);
          bulk_load(u, (const T*)p.columns_u + at * value_block_elements(kHeadDim), kUBytes, full);
          const int64_t token = ((int64_t)tile.key_head * p.blocks + block) * kBlock;
          bulk_load(vectors, p.column_block_decay + token, kVectorBytes, full);
          bulk_load(vectors + kVectorBytes, p.log2_decay + token, kVectorBytes, full);
          bulk_load(vectors + 2 * kVectorBytes, p.document_start + (batch * p.blocks + block) * kBlock, kVectorBytes, full);
          ring.advance();
        }
      }
    }
  }

  struct Consumer {
    const ChunkScanGradParams& p;
    const int lane, warp, warpgroup;
    Ring<kStages> ring;
    const uint32_t stages, rows_x, rows_u;      // rows of this warpgroup's first block
    const int block_stride;                     // packed blocks from its first block to its second
    const uint32_t xj_at;                       // this lane's ldmatrix row of x_J, J = 0
    const uint32_t dx;                          // of this thread
    float d[2][kBlock / 2];                     // dphi of two tiles in turn; the scores and their gradient within the chunk
    float acc[kM][kHeadDim / 2];                // dx once the state is done

    __device__ Consumer(const ChunkScanGradParams& p, uint32_t rows, uint32_t stages, uint32_t dx, uint32_t barriers)
        : p(p),
          lane(threadIdx.x % 32),
          warp(uniform_warp() % 4),
          warpgroup(uniform_warp() / 4),
          ring(barriers),
          stages(stages),
          rows_x(rows + block(0) * kXBytes),
          rows_u(rows + kRowBlocks * kXBytes + block(0) * kUBytes),
          block_stride(block(kM - 1) - block(0)),
          xj_at(rows_x + ((2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2),
          dx(dx + warpgroup * (kDxBytes / kWarpgroups) + threadIdx.x % 128 * 8) {}

    __device__ __forceinline__ int block(int m) const { return row_block_of<kWarpgroups, kM>(warpgroup, m, 0); }

    __device__ void release(int stage) {
      __syncwarp();  // lane 0 speaks for what all lanes have read
      if (lane == 0) ring.release(stage);
    }

    // Where this thread keeps dx of rows + 8 half of block m, features 8 block + 2 (lane % 4) and + 1.
    __device__ __forceinline__ uint32_t dx_at(int m, int half, int block) const { return dx + ((m * 2 + half) * kFeatureBlocks + block) * 1024; }
    __device__ __forceinline__ void add_dx(int m, int half, int block, float first, float second) const {
      const float2 old = load_shared_float2(dx_at(m, half, block));
      store_shared_float2(dx_at(m, half, block), make_float2(old.x + first, old.y + second));
    }

    // u of rows block m as A operands. The last one meets S's columns (hi, lo) twice, with u's hi and then with its lo.
    __device__ __forceinline__ void load_u(uint32_t (&u)[kSteps][4], int m) const {
      const uint32_t at = rows_u + m * block_stride * kUBytes + ((2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2;
#pragma unroll
      for (int step = 0; step < kSteps - 1; step++) load_matrices(u[step], at + (2 * step + (lane >> 4)) * 1024);
      uint32_t norm[4];
      load_matrices(norm, at + (kHeadDim / 8) * 1024);
      const bool mine = lane % 4 == 0;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u[kSteps - 1][half] = mine ? both_low(norm[half]) : 0;
        u[kSteps - 1][half + 2] = mine ? both_high(norm[half]) : 0;
      }
    }

    // out = u columns^T where columns are 64 rows of value columns: a phi tile of the state, or a block of u.
    __device__ __forceinline__ void multiply_values(float (&out)[kBlock / 2], const uint32_t (&u)[kSteps][4], uint32_t columns) {
      const CoreMatrices values(columns, 1024, 128), norm(columns + (kHeadDim / 8) * 1024, 0, 128);
#pragma unroll
      for (int step = 0; step < kSteps; step++) wgmma<T, false>(out, u[step], step < kSteps - 1 ? values.at(step * 2048) : norm.at(0), step > 0);
    }

    // Sums over the four threads of a row, so that each keeps its two features of block I, and adds them to dx.
    __device__ __forceinline__ void flush(float (&partial)[kM][2][8], int i_block) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float four[4], two[2];
          const bool upper = lane & 2, odd = lane & 1;
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

    // x_i of block I for every thread of a row, as in chunk_scan.
    __device__ __forceinline__ void load_scalars(float (&xi)[kM][2][8], int i_block) const {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t pairs[4];
          load_matrices_transposed(pairs, rows_x + m * block_stride * kXBytes + ((i_block * 8 + 2 * warp + half) * 64 + (2 * (lane >> 3) + (lane & 1)) * 8) * 2);
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const float2 both = Pair<T>::unpack(pairs[s]);
            xi[m][half][2 * s] = both.x, xi[m][half][2 * s + 1] = both.y;
          }
        }
    }

    __device__ __forceinline__ void load_xj(uint32_t (&xj)[2], int m, int j_block) const {
      load_matrices_transposed(xj, xj_at + m * block_stride * kXBytes + j_block * 1024);
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

    __device__ __forceinline__ void scan_state() {
      uint32_t u[kM][kSteps][4];
      float xi[kM][2][8], partial[kM][2][8] = {};
#pragma unroll
      for (int m = 0; m < kM; m++) {
        load_u(u[m], m);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int b = 0; b < kFeatureBlocks; b++) store_shared_float2(dx_at(m, half, b), make_float2(0.f, 0.f));
      }
      load_scalars(xi, 0);
      int i_block = 0;
      TileWalk walk;
      // A stage is 2 kM products: tile 0 with each row block, then tile 1. Each runs while the one before is contracted, but none past the
      // stage's end: ptxas serialises products whose accumulators are read on the other side of a loop's back edge.
#pragma unroll 1
      for (int t = 0; t < kPhiTiles; t += 2) {
        ring.wait_full();
        const uint32_t tiles = stages + ring.stage() * kStageBytes;
        wgmma_fence();
        multiply_values(d[0], u[0], tiles);
        wgmma_commit();
#pragma unroll
        for (int slot = 0; slot < 2 * kM; slot++) {
          if (slot == kM) walk.next();
          uint32_t xj[2];
          load_xj(xj, slot % kM, walk.j());
          if (slot + 1 < 2 * kM) {
            wgmma_fence();
            multiply_values(d[(slot + 1) % 2], u[(slot + 1) % kM], tiles + (slot + 1) / kM * kTileBytes);
            wgmma_commit();
            wgmma_wait<1>();
          } else {
            wgmma_wait<0>();
            release(ring.stage());
          }
          if (slot % kM == 0) start_tile(walk.i, i_block, xi, partial);
          contract(d[slot % 2], xi[slot % kM], xj, partial[slot % kM], slot % kM, walk.j());
        }
        walk.next();
        ring.advance();
      }
      flush(partial, i_block);
    }

    // Before the contraction of a tile: if its I is new, the old one's sums are done.
    __device__ __forceinline__ void start_tile(int next, int& i_block, float (&xi)[kM][2][8], float (&partial)[kM][2][8]) {
      if (next == i_block) return;
      flush(partial, i_block);
      load_scalars(xi, next);
      i_block = next;
    }

    // x and u of a block of rows as A operands within the chunk. They stay in registers.
    struct RowOperands {
      uint32_t x[kHeadDim / 16][4], u[kSteps][4];
    };
    __device__ __forceinline__ void load_x(RowOperands& rows, int m) const {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++)
        load_matrices_transposed(rows.x[k], rows_x + m * block_stride * kXBytes + (((2 * k + (lane >> 4)) * 8 + 2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2);
    }

    // One block of columns against rows block m: acc += dS x_columns with dS = 2 s decay (u . u_columns), rounded to 16 bits.
    __device__ __forceinline__ void attend(bool diagonal, int m, uint32_t x, const float (&row_decay)[2], const RowOperands& rows) {
      const uint32_t columns_u = x + kXBytes, vectors = columns_u + kUBytes, mine = vectors + 8 * (lane % 4);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++) wgmma<T, true>(d[0], rows.x[k], CoreMatrices(x, 1024, 128).at(k * 2048), k > 0);
      multiply_values(d[1], rows.u, columns_u);
      wgmma_commit();
      wgmma_wait<0>();
      uint32_t ds[kBlock / 16][4];
      if (diagonal) {  // rows and columns are the same tokens
        float row_log2[2];
        int row_document[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t at = vectors + kVectorBytes + 4 * (16 * warp + lane / 4 + half * 8);
          row_log2[half] = load_shared_float(at), row_document[half] = __float_as_int(load_shared_float(at + kVectorBytes));
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float2 column_log2 = load_shared_float2(mine + kVectorBytes + c * 32);
          const float2 column_document = load_shared_float2(mine + 2 * kVectorBytes + c * 32);
          float value[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int row = 16 * warp + lane / 4 + e / 2 * 8, column = 8 * c + 2 * (lane % 4) + e % 2;
            const float log2 = e % 2 ? column_log2.y : column_log2.x;
            const int document = __float_as_int(e % 2 ? column_document.y : column_document.x);
            const bool visible = (kReverse ? column >= row : column <= row) && document == row_document[e / 2];
            const float decay = exp2_fast(kReverse ? log2 - row_log2[e / 2] : row_log2[e / 2] - log2);
            value[e] = visible ? (2.f * d[0][4 * c + e]) * decay * d[1][4 * c + e] : 0.f;
          }
          ds[c / 2][c % 2 * 2] = Pair<T>::pack(value[0], value[1]);
          ds[c / 2][c % 2 * 2 + 1] = Pair<T>::pack(value[2], value[3]);
        }
      } else {
        const float factor[2] = {2.f * row_decay[0], 2.f * row_decay[1]};
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float2 column_decay = load_shared_float2(mine + c * 32);
          float value[4];
#pragma unroll
          for (int e = 0; e < 4; e++)
            value[e] = (d[0][4 * c + e] * factor[e / 2]) * (d[1][4 * c + e] * (e % 2 ? column_decay.y : column_decay.x));
          ds[c / 2][c % 2 * 2] = Pair<T>::pack(value[0], value[1]);
          ds[c / 2][c % 2 * 2 + 1] = Pair<T>::pack(value[2], value[3]);
        }
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) wgmma<T, false>(acc[m], ds[k], CoreMatrices(x, 128, 1024).at(k * 256), true);
      wgmma_commit();
      wgmma_wait<0>();
    }

    // Decays of this thread's rows. They are loaded long before they are needed.
    __device__ __forceinline__ void load_row_decays(float (&decay)[kM][2], const float* from, const Tile& tile) const {
#pragma unroll
      for (int m = 0; m < kM; m++) {
        const int64_t at = ((int64_t)tile.key_head * p.blocks + min(tile.row_block + block(m), p.blocks - 1)) * kBlock + 16 * warp + lane / 4;
        decay[m][0] = from[at], decay[m][1] = from[at + 8];
      }
    }

    __device__ __forceinline__ void scan_columns(const Tile& tile) {
      float row_decay[kM][2];
      load_row_decays(row_decay, p.row_block_decay, tile);
      RowOperands rows[kM];
#pragma unroll
      for (int m = 0; m < kM; m++) load_x(rows[m], m), load_u(rows[m].u, m);
#pragma unroll 1
      for (int g = 0; g < Tile::column_heads(p); g++) {
        float between[kM];  // decay across the blocks between these rows and the columns
#pragma unroll
        for (int m = 0; m < kM; m++) between[m] = 1.f;
        const int end = tile.column_block(tile.column_count);
#pragma unroll 1
        for (int column = tile.column_block(0); column != end; column += kReverse ? 1 : -1) {
          const float across = p.block_decay[(int64_t)tile.key_head * p.blocks + column];
          ring.wait_full();
          const uint32_t x = stages + ring.stage() * kStageBytes;
#pragma unroll
          for (int m = 0; m < kM; m++) {
            const int mine = tile.row_block + block(m);
            if (block(m) >= tile.row_blocks) continue;
            const bool diagonal = column == mine;
            if (!diagonal && (kReverse ? column < mine : column > mine)) continue;
            if (diagonal || between[m] > 0.f) {
              const float decay[2] = {row_decay[m][0] * between[m], row_decay[m][1] * between[m]};
              attend(diagonal, m, x, decay, rows[m]);
            }
            if (!diagonal) between[m] *= across;
          }
          release(ring.stage());
          ring.advance();
        }
      }
    }

    // (x . dx) / 2 of every row, from acc as it is; `zero` where there is nothing.
    __device__ __forceinline__ void write_dots(const Tile& tile, float* dots, bool zero) const {
#pragma unroll
      for (int m = 0; m < kM; m++) {
        if (block(m) >= tile.row_blocks) continue;
        float dot[2] = {};
#pragma unroll
        for (int c = 0; c < kFeatureBlocks && !zero; c += 2) {
          uint32_t x[4];
          load_matrices_transposed(x, rows_x + m * block_stride * kXBytes + (((c + (lane >> 4)) * 8 + 2 * warp + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float2 a = Pair<T>::unpack(x[half]), b = Pair<T>::unpack(x[half + 2]);
            const float* dx = acc[m] + 4 * c + 2 * half;
            dot[half] += a.x * dx[0] + a.y * dx[1] + b.x * dx[4] + b.y * dx[5];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          dot[half] += __shfl_xor_sync(0xffffffffu, dot[half], 1);
          dot[half] += __shfl_xor_sync(0xffffffffu, dot[half], 2);
          const int64_t at = (int64_t)tile.row_head * p.blocks + tile.row_block + block(m);
          if (lane % 4 == 0) dots[at * kBlock + 16 * warp + lane / 4 + half * 8] = 0.5f * dot[half];
        }
      }
    }

    __device__ __forceinline__ void run(const Tile& tile) {
      float chunk_decay[kM][2];
      load_row_decays(chunk_decay, p.row_chunk_decay, tile);
      if (tile.has_state) {
        scan_state();
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float factor = chunk_decay[m][half] * p.inverse_state_scale;
#pragma unroll
            for (int b = 0; b < kFeatureBlocks; b++) {
              const float2 value = load_shared_float2(dx_at(m, half, b));
              acc[m][4 * b + 2 * half] = value.x * factor, acc[m][4 * b + 2 * half + 1] = value.y * factor;
            }
          }
        }
      } else {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int c = 0; c < kHeadDim / 2; c++) acc[m][c] = 0.f;
      }
      if (kReverse && p.state_dots) write_dots(tile, p.state_dots, !tile.has_state);
      scan_columns(tile);
      if (p.dots) write_dots(tile, p.dots, false);
    }

    __device__ __forceinline__ void store(const Tile& tile) {
      const int64_t batch = p.by_heads.quotient(tile.row_head), head = p.by_heads.remainder(tile.row_head);
      float factor = p.x_scale ? p.x_scale[tile.row_head] : 1.f;
      if (p.value_scale) factor /= p.value_scale[tile.key_head];
      if (p.dn_scale) factor /= p.dn_scale[tile.key_head];
#pragma unroll
      for (int m = 0; m < kM; m++) {
        if (block(m) >= tile.row_blocks) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t token = (int64_t)(tile.row_block + block(m)) * kBlock + 16 * warp + lane / 4 + half * 8;
          T* out = (T*)p.out + batch * p.out_stride_b + token * p.out_stride_t + head * p.out_stride_h;
          const float by = p.row_scale && token < p.seq_len ? factor * p.row_scale[tile.row_head * p.seq_len + token] : factor;
#pragma unroll
          for (int c = 0; c < kFeatureBlocks; c += 2) {
            const float* from = acc[m] + 4 * c + 2 * half;
            store_two_groups(out + 8 * c, token < p.seq_len, lane, from[0] * by, from[1] * by, from[4] * by, from[5] * by);
          }
        }
      }
    }
  };

  __device__ static void consume(const ChunkScanGradParams& p, uint32_t rows, uint32_t dx, uint32_t stages, uint32_t ring_barriers,
                                 uint32_t row_barriers) {
    Consumer consumer(p, rows, stages, dx, ring_barriers);
    Ring<1> row_ring(row_barriers);  // its counter is the turn
#pragma unroll 1
    for (; (int)(blockIdx.x + row_ring.count * gridDim.x) < p.tiles; row_ring.advance()) {
      const Tile tile(p, blockIdx.x + row_ring.count * gridDim.x);
      row_ring.wait_full();
      if (tile.row_blocks > 0) consumer.run(tile);
      __syncwarp();  // lane 0 speaks for what all lanes have read
      if (consumer.lane == 0) row_ring.release(0);
      if (tile.row_blocks > 0) consumer.store(tile);
    }
  }
};

template <int kHeadDim, typename T, bool kReverse>
__global__ void __launch_bounds__(ChunkScanGrad<kHeadDim, T, kReverse>::kThreads, 1) chunk_scan_grad_kernel(const __grid_constant__ ChunkScanGradParams p) {
  using Kernel = ChunkScanGrad<kHeadDim, T, kReverse>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t rows = shared_address(shared_memory), dx = rows + Kernel::kRowBytes, stages = dx + Kernel::kDxBytes;
  const uint32_t ring_barriers = stages + Kernel::kStages * Kernel::kStageBytes + Kernel::kPadBytes, row_barriers = ring_barriers + 16 * Kernel::kStages;
  if (threadIdx.x == 0) {
    Ring<Kernel::kStages>::init(ring_barriers, Kernel::kWarpgroups * 4);
    Ring<1>::init(row_barriers, Kernel::kWarpgroups * 4);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x / 128 == Kernel::kWarpgroups) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x % 128 == 0) Kernel::produce(p, rows, stages, ring_barriers, row_barriers);
  } else {
    take_registers<kConsumerRegisters<Kernel::kWarpgroups>>();
    Kernel::consume(p, rows, dx, stages, ring_barriers, row_barriers);
  }
}

template <int kHeadDim, typename T, bool kReverse>
int launch_chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream) {
  using Kernel = ChunkScanGrad<kHeadDim, T, kReverse>;
  const Gates gates = gates_of(problem, params.gates);
  ChunkScanGradParams p;
  static_cast<ScanShape&>(p) = scan_shape(problem, kReverse, Kernel::kRowBlocks, params.has_boundary);
  p.rows_x = kReverse ? params.k : params.q;
  p.rows_u = kReverse ? params.v : params.dn;
  p.columns_x = kReverse ? params.q : params.k;
  p.columns_u = kReverse ? params.dn : params.v;
  p.states = params.states;
  p.row_chunk_decay = kReverse ? gates.chunk_out : gates.chunk_in;
  p.row_block_decay = kReverse ? gates.block_out : gates.block_in;
  p.column_block_decay = kReverse ? gates.block_in : gates.block_out;
  p.log2_decay = gates.log2_decay;
  p.block_decay = gates.block_decay;
  p.document_start = gates.document_start;
  p.out = params.out.data;
  p.out_stride_b = params.out.stride_b, p.out_stride_t = params.out.stride_t, p.out_stride_h = params.out.stride_h;
  p.x_scale = params.x_scale, p.value_scale = params.value_scale, p.dn_scale = params.dn_scale, p.row_scale = params.row_scale;
  p.dots = params.dots;
  p.state_dots = params.dots ? params.dots + (int64_t)problem.batch * problem.key_heads * p.blocks * kBlock : nullptr;
  p.inverse_state_scale = 1.f / problem.state_scale;
  auto* kernel = chunk_scan_grad_kernel<kHeadDim, T, kReverse>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  if (p.tiles == 0) return fail(PT_UNSUPPORTED, "%s: batch * heads * seq_len is too large for one launch", "chunk_scan_grad");
  kernel<<<p.grid, Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p);
  return check_cuda(cudaGetLastError(), "chunk_scan_grad");
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_SCAN_GRAD(head_dim, type, type_name, reverse)                                                                   \
  namespace powertrain::sm90 {                                                                                                        \
  template int launch_chunk_scan_grad<head_dim, type, reverse>(const pt_problem&, const pt_chunk_scan_grad_params&, cudaStream_t);     \
  static RegisterKernel registered({"chunk_scan_grad K=" #head_dim " " type_name " reverse=" #reverse,                                \
                                    (const void*)chunk_scan_grad_kernel<head_dim, type, reverse>, 90,                                 \
                                    ChunkScanGrad<head_dim, type, reverse>::kThreads, ChunkScanGrad<head_dim, type, reverse>::kSharedBytes}); \
  }
