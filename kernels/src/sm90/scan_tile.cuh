// How the rows of a problem are cut into row tiles, shared by chunk_scan and chunk_scan_grad.
#pragma once
#include "../common/launch.cuh"
#include "ptx.cuh"

namespace powertrain::sm90 {

// Division of 0 <= n < 2^31 by a number that the host knows, as a product: a thread block decodes a tile's index with several of them in a row.
struct Divisor {
  uint32_t divisor, multiplier;
  int shift;
  Divisor() = default;
  explicit Divisor(int by) : divisor(by), shift(31) {
    while ((1ull << (shift - 31)) < divisor) shift++;
    multiplier = (uint32_t)((1ull << shift) / divisor + 1);
  }
  __device__ __forceinline__ int quotient(int n) const { return (int)((uint64_t)(uint32_t)n * multiplier >> shift); }
  __device__ __forceinline__ int remainder(int n) const { return n - quotient(n) * (int)divisor; }
};

struct ScanShape {
  int64_t seq_len;
  int tiles, group;  // row tiles of the whole problem; query heads per key head
  int blocks, chunks, blocks_per_chunk, tiles_per_chunk, query_heads, key_heads, has_boundary;
  unsigned grid;  // thread blocks
  Divisor by_grid, by_tiles, by_chunks, by_members, by_heads;  // grid, tiles_per_chunk, chunks, heads of rows that read one state, heads of rows
};

inline ScanShape scan_shape(const pt_problem& problem, bool reverse, int row_blocks, int has_boundary) {
  ScanShape s;
  s.seq_len = problem.seq_len;
  s.blocks = (int)padded_blocks(problem.seq_len);
  s.chunks = (int)chunks(problem.seq_len, problem.chunk_size);
  s.blocks_per_chunk = problem.chunk_size / kBlock;
  s.tiles_per_chunk = (int)ceil_div(s.blocks_per_chunk < s.blocks ? s.blocks_per_chunk : s.blocks, row_blocks);
  s.query_heads = problem.query_heads, s.key_heads = problem.key_heads;
  s.group = problem.query_heads / problem.key_heads;
  const int64_t tiles = (int64_t)problem.batch * (reverse ? problem.key_heads : problem.query_heads) * s.chunks * s.tiles_per_chunk;
  s.tiles = tiles < INT32_MAX / 2 ? (int)tiles : 0;  // 0: too many for one launch
  s.has_boundary = has_boundary;
  s.grid = s.tiles < multiprocessors() ? s.tiles : multiprocessors();
  s.by_grid = Divisor(s.grid ? s.grid : 1), s.by_tiles = Divisor(s.tiles_per_chunk), s.by_chunks = Divisor(s.chunks);
  s.by_members = Divisor(reverse ? 1 : s.group), s.by_heads = Divisor(reverse ? s.key_heads : s.query_heads);
  return s;
}

// One row tile, decoded from its index: row tiles of a chunk are neighbours, then the heads that read the same state, then chunks, then heads.
// A later place in the chunk is more work (reverse: less), and thread blocks take every gridDim-th index: without the rotation one that gets the
// last place once would get it always.
template <bool kReverse, int kRowBlocks>
struct ScanTile {
  int row_head, key_head, chunk;   // flat (b, h) of rows and of the state
  int row_block, row_blocks;       // first block of rows, blocks of rows (up to kRowBlocks; <= 0: past the end of a short last chunk)
  int first_column_head, column_count;  // the first of the column_heads heads that columns come from, blocks of columns of each
  bool has_state;
  __device__ ScanTile(const ScanShape& p, int index) {
    const int chunk_of_all = p.by_tiles.quotient(index), turn = p.by_grid.quotient(chunk_of_all * p.tiles_per_chunk);
    const int within = p.by_tiles.remainder(index + turn);
    const int members = kReverse ? 1 : p.group, state = p.by_members.quotient(chunk_of_all), member = chunk_of_all - state * members;
    key_head = p.by_chunks.quotient(state);
    chunk = state - key_head * p.chunks;
    row_head = key_head * members + member;  // b Hq + h = (b Hk + h / group) group + h % group
    const int first_block = chunk * p.blocks_per_chunk, chunk_blocks = min(p.blocks_per_chunk, p.blocks - first_block);
    row_block = first_block + within * kRowBlocks;
    row_blocks = min(kRowBlocks, chunk_blocks - within * kRowBlocks);
    first_column_head = kReverse ? row_head * p.group : key_head;
    column_count = kReverse ? chunk_blocks - within * kRowBlocks : within * kRowBlocks + row_blocks;
    has_state = p.has_boundary || (kReverse ? chunk + 1 < p.chunks : chunk > 0);
  }
  __device__ static int column_heads(const ScanShape& p) { return kReverse ? p.group : 1; }
  // Columns run from the diagonal away, by kStep.
  static constexpr int kStep = kReverse ? 1 : -1;
  __device__ int column_block(int index) const { return kReverse ? row_block + index : row_block + row_blocks - 1 - index; }
};

// The m-th block of 64 rows that a warpgroup takes from a row tile, so that all warpgroups have about as many pairs within the chunk: with two
// of four it is 0 and 3, or 1 and 2; with one each the order is turned around every other row tile.
template <int kWarpgroups, int kM>
__device__ __forceinline__ int row_block_of(int warpgroup, int m, uint32_t turn) {
  return (kM == 1 ? turn % 2 == 0 : m == 0) ? warpgroup : kWarpgroups * kM - 1 - warpgroup;
}

// Writes this thread's part (columns 2 (lane % 4) and + 1) of two neighbouring groups of 8 columns of one row. Neighbouring threads exchange
// halves first, so that four of them write 32 contiguous bytes.
template <typename T>
__device__ __forceinline__ void store_two_groups(T* row, bool exists, int lane, float a0, float a1, float b0, float b1) {
  const uint32_t first = Pair<T>::pack(a0, a1), second = Pair<T>::pack(b0, b1);
  const bool odd = lane & 1;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  const uint2 both = odd ? make_uint2(other, second) : make_uint2(first, other);
  if (exists) *(uint2*)(row + (odd ? 8 : 0) + 2 * (lane % 4 & 2)) = both;
}

}  // namespace powertrain::sm90
