// The memory layouts of every opaque buffer, in one place. See docs/kernels.md for why they are what they are.
//
// Block       64 consecutive tokens of one (b, h); T is padded to Tp, a multiple of 64, with zeros.
// Core matrix 8 x 8 16-bit elements, 128 contiguous bytes: eight rows of 16 bytes. What ldmatrix and wgmma read without bank conflicts.
//
// packed q, k (B, H, Tp/64) blocks of [K/8 feature groups][8 token groups][8 features][8 tokens]: rows are features (transposed).
// packed v', dn' (B, H, Tp/64) blocks of [V/8 + 1 column groups][8 token groups][8 tokens][8 columns]: rows are tokens.
//   The last column group is the normaliser's: v' has 1 in its column 0, dn' has hi in column 0 and lo in column 1; the rest is 0.
//
// phi tiles   The K features are NB = K/8 blocks of 8. Tile t holds the 64 products x_{8I+i} x_{8J+j}, row r = 8i + j. The pairs (I, J) are
//   cyclic, J = (I + distance) mod NB: distance 0 .. NB/2 - 1 for every I, then distance NB/2 for I < NB/2. Each unordered pair of blocks
//   occurs once; a tile with distance 0 holds both (i, j) and (j, i).
// states      (B, Hk, N, tiles) of [V/8 + 1 column groups][64 rows][8 columns] in 16 bits: core matrices of 8 rows (fixed i) x 8 columns.
//   Off-diagonal tiles carry the weight 2 (so that readers need no weights) and everything carries problem.state_scale.
//   The last column group holds the normaliser as hi in column 0 and lo in column 1; the rest is 0. In tiles of distance 0 those of (i, j) and
//   (j, i) are the same bits.
// boundary    (B, Hk, tiles, 64 rows, V + 8 columns) in fp32, no weights, no state_scale; column V is the normaliser, the rest is 0.
//   In tiles of distance 0 the entries (i, j) and (j, i) are equal.
//
// gates       Products of decays, so that nothing is the difference of two large sums. A document's first token (t > 0) closes its own gate.
//   log2_decay      (B, Hk, Tp)      inclusive sum of log2 gates since the start of the block (documents do not close it: diagonal blocks
//                                    mask by document_start instead)
//   block_in        (B, Hk, Tp)      decay from before the block's first token to token t (its own gate included)
//   block_out       (B, Hk, Tp)      decay from token t (its own gate excluded) to the end of the block
//   chunk_in, chunk_out              the same from the start, to the end of the chunk
//   block_decay     (B, Hk, Tp/64)   decay across the block
//   chunk_decay     (B, Hk, N)       decay across the chunk
//   document_start  (B, Tp) int32    index within the row of the first token of t's document (0 without documents)
// Tokens beyond T have gate 1 and belong to the last document.
#pragma once
#include <stdint.h>

#include "powertrain_kernels.h"

#ifdef __CUDACC__
#define PT_HD __host__ __device__ __forceinline__
#else
#define PT_HD inline
#endif

namespace powertrain {

constexpr int kBlock = 64;       // tokens of a block, rows of a phi tile
constexpr int kNormColumns = 8;  // columns that the normaliser occupies
constexpr int kStepBlocks = 2;   // blocks of a step of query_scan and key_grads

PT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// phi tiles -----------------------------------------------------------------------------------------------------------------------
PT_HD constexpr int feature_blocks(int head_dim) { return head_dim / 8; }
PT_HD constexpr int phi_tiles(int head_dim) { return (head_dim / 8) * (head_dim / 8 + 1) / 2; }
struct TilePair {
  int i_block, j_block, distance;
};
PT_HD constexpr TilePair tile_pair(int tile, int head_dim) {
  const int nb = feature_blocks(head_dim), half = nb / 2, full = nb * half;
  const int i = tile < full ? tile / half : tile - full;
  const int distance = tile < full ? tile % half : half;
  return {i, (i + distance) % nb, distance};
}
// Inverse: the tile of the unordered pair of blocks (a, b); `swapped` where its I is b.
PT_HD constexpr int tile_of_pair(int a, int b, int head_dim, bool& swapped) {
  const int nb = feature_blocks(head_dim), half = nb / 2;
  const int forward = (b - a + nb) % nb;
  swapped = forward > half || (forward == half && a >= half);
  const int i = swapped ? b : a;
  const int distance = swapped ? nb - forward : forward;
  return distance < half ? i * half + distance : nb * half + i;
}

// Elements of a packed block, a state tile, a boundary tile ------------------------------------------------------------------------
PT_HD constexpr int feature_block_elements(int head_dim) { return kBlock * head_dim; }
PT_HD constexpr int value_block_elements(int head_dim) { return kBlock * (head_dim + kNormColumns); }
PT_HD constexpr int state_tile_elements(int head_dim) { return kBlock * (head_dim + kNormColumns); }
PT_HD constexpr int feature_index(int feature, int token) {  // within a packed block of q or k
  return ((feature / 8) * 8 + token / 8) * 64 + (feature % 8) * 8 + token % 8;
}
PT_HD constexpr int value_index(int column, int token) {  // within a packed block of v' or dn'
  return ((column / 8) * 8 + token / 8) * 64 + (token % 8) * 8 + column % 8;
}
// Bytes between the core matrices of a packed block in shared memory: from eight features or columns to the next, and from eight tokens to the next.
struct CoreStrides {
  uint32_t columns, tokens;
};
constexpr CoreStrides kPackedCores = {feature_index(8, 0) * 2, feature_index(0, 8) * 2};
PT_HD constexpr int state_index(int row, int column) {  // within a state tile
  return ((column / 8) * 8 + row / 8) * 64 + (row % 8) * 8 + column % 8;
}

// Sizes of a problem ---------------------------------------------------------------------------------------------------------------
PT_HD int64_t padded_blocks(int64_t seq_len) { return ceil_div(seq_len, kBlock); }
PT_HD int64_t chunks(int64_t seq_len, int chunk_size) { return ceil_div(seq_len, chunk_size); }

struct Gates {
  float *log2_decay, *block_in, *block_out, *chunk_in, *chunk_out, *block_decay, *chunk_decay;
  int32_t* document_start;
  int64_t bytes;
};
PT_HD Gates gates_of(const pt_problem& p, const void* base) {
  const int64_t blocks = padded_blocks(p.seq_len), heads = (int64_t)p.batch * p.key_heads;
  const int64_t tokens = heads * blocks * kBlock;  // a multiple of 64, so every array stays 256-byte aligned
  char* at = (char*)const_cast<void*>(base);
  int64_t used = 0;
  auto take = [&](int64_t count) {
    char* start = at + used;
    used += ceil_div(count * 4, 256) * 256;
    return start;
  };
  Gates g;
  g.log2_decay = (float*)take(tokens);
  g.block_in = (float*)take(tokens);
  g.block_out = (float*)take(tokens);
  g.chunk_in = (float*)take(tokens);
  g.chunk_out = (float*)take(tokens);
  g.block_decay = (float*)take(heads * blocks);
  g.chunk_decay = (float*)take(heads * chunks(p.seq_len, p.chunk_size));
  g.document_start = (int32_t*)take((int64_t)p.batch * blocks * kBlock);
  g.bytes = used;
  return g;
}

}  // namespace powertrain
