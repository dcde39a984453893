// What chunk_scan and chunk_scan_grad have in common: the rows of a row tile meet the blocks of columns on their causal side, from the diagonal away, so
// that decays between blocks are a running product.
#pragma once
#include "../common/layout.cuh"
#include "../common/numeric.cuh"
#include "pipeline.cuh"
#include "scan_tile.cuh"
#include "wgmma.cuh"

namespace powertrain::sm90 {

// x are queries of rows and keys of columns; in reverse keys of rows, queries of columns. u of the columns is v', in reverse dn'.
struct ScanParams : ScanShape {
  const void *rows_x, *columns_x, *columns_u;  // packed
  const void* states;
  const float* row_chunk_decay;     // (B, Hk, Tp): chunk_in; reverse: chunk_out
  const float* row_block_decay;     // block_in; reverse: block_out
  const float* column_block_decay;  // block_out; reverse: block_in
  const float *log2_decay, *block_decay;
  const int32_t* document_start;
  void* out;
  int64_t out_stride_b, out_stride_t, out_stride_h;
  float inverse_state_scale;
};

template <class Params>  // of a stage, as it was called
void set_scan_params(ScanParams& p, const pt_problem& problem, const Params& params, const void* columns_u, bool reverse, int row_blocks) {
  const Gates gates = gates_of(problem, params.gates);
  static_cast<ScanShape&>(p) = scan_shape(problem, reverse, row_blocks, params.has_boundary);
  p.rows_x = reverse ? params.k : params.q;
  p.columns_x = reverse ? params.q : params.k;
  p.columns_u = columns_u;
  p.states = params.states;
  p.row_chunk_decay = reverse ? gates.chunk_out : gates.chunk_in;
  p.row_block_decay = reverse ? gates.block_out : gates.block_in;
  p.column_block_decay = reverse ? gates.block_in : gates.block_out;
  p.log2_decay = gates.log2_decay;
  p.block_decay = gates.block_decay;
  p.document_start = gates.document_start;
  p.out = params.out.data;
  p.out_stride_b = params.out.stride_b, p.out_stride_t = params.out.stride_t, p.out_stride_h = params.out.stride_h;
  p.inverse_state_scale = 1.f / problem.state_scale;
}

// A block of columns in a stage: x, u, and three numbers of each token (its decay within the block, log2 of all decay, where its document starts).
template <int kHeadDim>
struct ColumnBlock {
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2;
  static constexpr int kVectorBytes = kBlock * 4, kBytes = kXBytes + kUBytes + 3 * kVectorBytes;
  uint32_t x;
  __device__ __forceinline__ uint32_t u() const { return x + kXBytes; }
  __device__ __forceinline__ uint32_t decays() const { return u() + kUBytes; }
  __device__ __forceinline__ uint32_t log2_decays() const { return decays() + kVectorBytes; }
  __device__ __forceinline__ uint32_t documents() const { return log2_decays() + kVectorBytes; }
};

template <int kHeadDim, typename T, class Tile, class StageRing>
__device__ __forceinline__ void produce_columns(const ScanParams& p, const Tile& tile, StageRing& ring, uint32_t stages, int stage_bytes) {
  using Columns = ColumnBlock<kHeadDim>;
#pragma unroll 1
  for (int g = 0; g < Tile::column_heads(p); g++) {
    const int64_t head = tile.first_column_head + g, batch = tile.key_head / p.key_heads;
#pragma unroll 1
    for (int i = 0; i < tile.column_count; i++) {
      const int block = tile.column_block(i);
      const int64_t from = head * p.blocks + block, token = ((int64_t)tile.key_head * p.blocks + block) * kBlock;
      const Columns to = {stages + ring.stage() * stage_bytes};
      ring.wait_empty();
      const uint32_t full = ring.full_barrier();
      barrier_expect(full, Columns::kBytes);
      bulk_load(to.x, (const T*)p.columns_x + from * feature_block_elements(kHeadDim), Columns::kXBytes, full);
      bulk_load(to.u(), (const T*)p.columns_u + from * value_block_elements(kHeadDim), Columns::kUBytes, full);
      bulk_load(to.decays(), p.column_block_decay + token, Columns::kVectorBytes, full);
      bulk_load(to.log2_decays(), p.log2_decay + token, Columns::kVectorBytes, full);
      bulk_load(to.documents(), p.document_start + (batch * p.blocks + block) * kBlock, Columns::kVectorBytes, full);
      ring.advance();
    }
  }
}

// This thread's rows 16 warp + lane / 4 and + 8 of a block of the row tile: their decays.
template <class Tile>
__device__ __forceinline__ void load_row_decays(float (&decay)[2], const float* from, const ScanParams& p, const Tile& tile, int block, int warp, int lane) {
  const int64_t at = ((int64_t)tile.key_head * p.blocks + min(tile.row_block + block, p.blocks - 1)) * kBlock + 16 * warp + lane / 4;
  decay[0] = from[at], decay[1] = from[at + 8];
}

// a b times the decay between row and column, rounded to 16 bits as A operands: of a block of rows and another block's columns ...
using Weights = uint32_t[kBlock / 16][4];
template <typename T>
__device__ __forceinline__ void weigh(Weights& weights, const float (&a)[kBlock / 2], const float (&b)[kBlock / 2], const float (&row_factor)[2],
                                      uint32_t column_decays) {
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const float2 column_decay = load_shared_float2(column_decays + c * 32);
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; e++) value[e] = (a[4 * c + e] * row_factor[e / 2]) * (b[4 * c + e] * (e % 2 ? column_decay.y : column_decay.x));
    weights[c / 2][c % 2 * 2] = Pair<T>::pack(value[0], value[1]);
    weights[c / 2][c % 2 * 2 + 1] = Pair<T>::pack(value[2], value[3]);
  }
}

// ... and of a block with itself, times kFactor: zero where the column is not before the row (reverse: after), or of another document.
template <typename T, bool kReverse, int kFactor, int kHeadDim>
__device__ __forceinline__ void weigh_diagonal(Weights& weights, const float (&a)[kBlock / 2], const float (&b)[kBlock / 2], const ColumnBlock<kHeadDim>& columns,
                                               int warp, int lane) {
  float row_log2[2];
  int row_document[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t row = 4 * (16 * warp + lane / 4 + half * 8);
    row_log2[half] = load_shared_float(columns.log2_decays() + row), row_document[half] = __float_as_int(load_shared_float(columns.documents() + row));
  }
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const uint32_t mine = 8 * (lane % 4) + c * 32;
    const float2 column_log2 = load_shared_float2(columns.log2_decays() + mine), column_document = load_shared_float2(columns.documents() + mine);
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = 16 * warp + lane / 4 + e / 2 * 8, column = 8 * c + 2 * (lane % 4) + e % 2;
      const float log2 = e % 2 ? column_log2.y : column_log2.x;
      const int document = __float_as_int(e % 2 ? column_document.y : column_document.x);
      const bool visible = (kReverse ? column >= row : column <= row) && document == row_document[e / 2];
      const float decay = exp2_fast(kReverse ? log2 - row_log2[e / 2] : row_log2[e / 2] - log2);
      value[e] = visible ? (kFactor * a[4 * c + e]) * decay * b[4 * c + e] : 0.f;
    }
    weights[c / 2][c % 2 * 2] = Pair<T>::pack(value[0], value[1]);
    weights[c / 2][c % 2 * 2 + 1] = Pair<T>::pack(value[2], value[3]);
  }
}

// What a kernel does with its columns. kApart: columns before (reverse: after) a whole row tile go in a loop of their own without branches, where
// products may be under way from one block to the next (kUnderWay). kAhead: the decay across a block is loaded a block ahead. Both where registers
// allow it.
template <bool kApart, bool kUnderWay, bool kAhead>
struct ColumnWalk {
  static_assert(kApart || !kUnderWay);

  // `meet(m, diagonal, columns, between)` for each block of columns and the m-th of the `blocks` of the row tile that this warpgroup takes, where
  // something is left of the decay across the blocks between; it ends its products. `meet_apart(m, columns, between, read_previous)` may leave products
  // under way if kUnderWay, and calls read_previous() when those of the block before are done.
  template <int kHeadDim, int kM, int kRowBlocks, class Tile, class StageRing, class Meet, class MeetApart>
  __device__ static __forceinline__ void walk(const ScanParams& p, const Tile& tile, const int (&blocks)[kM], StageRing& ring, uint32_t stages, int stage_bytes,
                                              float first_across, Meet meet, MeetApart meet_apart) {
    const float* const block_decay = p.block_decay + (int64_t)tile.key_head * p.blocks;
    const int end = tile.column_block(tile.column_count);
    const auto after = [&](int column) { return block_decay[column + Tile::kStep != end ? column + Tile::kStep : column]; };
#pragma unroll 1
    for (int g = 0; g < Tile::column_heads(p); g++) {
      float between[kM];  // decay across the blocks between these rows and the columns
#pragma unroll
      for (int m = 0; m < kM; m++) between[m] = 1.f;
      // From here on the columns are all before (reverse: after) the rows.
      const int apart = kApart && tile.row_blocks == kRowBlocks ? tile.column_block(kRowBlocks) : end;
      float across = first_across, next;
      int column = tile.column_block(0);
#pragma unroll 1
      for (; column != apart; column += Tile::kStep, across = next) {
        if constexpr (kAhead) next = after(column);
        else across = next = block_decay[column];
        ring.wait_full();
        const ColumnBlock<kHeadDim> columns = {stages + ring.stage() * stage_bytes};
#pragma unroll
        for (int m = 0; m < kM; m++) {
          const int mine = tile.row_block + blocks[m];
          if (blocks[m] >= tile.row_blocks) continue;
          const bool diagonal = column == mine;
          if (!diagonal && (Tile::kStep > 0 ? column < mine : column > mine)) continue;
          if (diagonal || between[m] > 0.f) meet(m, diagonal, columns, between[m]);
          if (!diagonal) between[m] *= across;
        }
        ring.release(ring.stage());
        ring.advance();
      }
      if constexpr (!kApart) continue;
      bool started = false;
#pragma unroll 1
      for (; column != end && fmaxf(between[0], between[kM - 1]) > 0.f; column += Tile::kStep) {
        next = after(column);
        ring.wait_full();
        const ColumnBlock<kHeadDim> columns = {stages + ring.stage() * stage_bytes};
#pragma unroll
        for (int m = 0; m < kM; m++) {
          meet_apart(m, columns, between[m], [&] {
            if (kUnderWay && m == 0 && started) ring.release(ring.previous());
          });
          between[m] *= across;
        }
        if constexpr (!kUnderWay) ring.release(ring.stage());
        started = true, across = next;
        ring.advance();
      }
      if constexpr (kUnderWay) {
        wgmma_wait<0>();
        if (started) ring.release(ring.previous());
      }
#pragma unroll 1
      for (; column != end; column += Tile::kStep, ring.advance()) {  // whatever comes has no weight
        ring.wait_full();
        ring.release(ring.stage());
      }
    }
  }
};

}  // namespace powertrain::sm90
