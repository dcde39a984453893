// What chunk_scan and chunk_scan_grad share: a thread block owns 128 rows (tokens of one head and chunk), first streams the phi tiles of the
// chunk's state past them, then the 64-token blocks of the chunk on the causal side.
//
// "Rows" are queries and "columns" keys; in reverse rows are keys and columns queries, of every query head of the key head.
// Decays factor at block borders: what a row gets from a block on its far side is (decay across the blocks between) * (row factor) * (column
// factor), all <= 1. The accumulator is multiplied by a block's decay as the scan passes it and by the row factor at the diagonal block, so
// the state, which entered first, ends with the right factor too.
#pragma once
#include <type_traits>

#include "ptx.cuh"
#include "launch.cuh"

namespace powertrain::sm80 {

constexpr int kRows = 128;                      // of a thread block
constexpr int kRowBlocks = kRows / kBlock;

template <int D>
struct ScanConfig {
  static constexpr int kM = D == 128 ? 1 : 2;   // 16-row tiles of a warp: what the registers hold
  static constexpr int kWarps = kRows / (16 * kM);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kGroups = D / 8 + 1;     // column groups of u
  static constexpr int kTiles = phi_tiles(D);
  static constexpr int kFeatureBytes = feature_block_elements(D) * 2;
  static constexpr int kValueBytes = value_block_elements(D) * 2;
  static constexpr int kRowBytes = kRowBlocks * kFeatureBytes;  // x of all rows
  static constexpr int kTileBytes = state_tile_elements(D) * 2;
  static constexpr int kColumnBytes = kFeatureBytes + kValueBytes + kBlock * 4;  // y, u, column factors of a block
};

struct ScanArguments {
  const void *x, *y;         // packed rows, packed columns
  const void *x_values;      // chunk_scan reverse: v' of the rows; chunk_scan_grad: u of the rows (dn'; reverse v')
  const void* y_values;      // u of the columns: v' (reverse: dn')
  const void* states;
  Gates gates;
  pt_tensor out;
  const float *x_scale, *value_scale, *dn_scale, *row_scale, *out_scale;
  float *normalizer, *dots;
  int64_t blocks, chunk_count, seq_len;
  int batch, row_heads, key_heads;  // row_heads: Hq (reverse: Hk)
  int group;                 // query heads per key head
  int blocks_per_chunk, tiles_per_chunk;
  int has_boundary;
  float inverse_state_scale;
};

// Lives in shared memory: in registers it would crowd out the operands.
template <int D, bool kReverse>
struct ScanPosition {
  int b, head;               // of the rows
  int64_t key_bh, row_bh;    // flattened (b, key head), (b, row head)
  int64_t n, first_block;    // chunk, and its first block in the sequence
  int chunk_blocks;          // blocks of this chunk that exist
  int tile_block;            // first block of this tile within the chunk
  bool has_state;

  __device__ __forceinline__ void locate(const ScanArguments& a) {
    int64_t index = blockIdx.x;
    tile_block = (int)(index % a.tiles_per_chunk) * kRowBlocks;
    index /= a.tiles_per_chunk;
    n = index % a.chunk_count;
    row_bh = index / a.chunk_count;
    b = (int)(row_bh / a.row_heads), head = (int)(row_bh % a.row_heads);
    key_bh = kReverse ? row_bh : (int64_t)b * a.key_heads + head / a.group;
    first_block = n * a.blocks_per_chunk;
    chunk_blocks = (int)min((int64_t)a.blocks_per_chunk, a.blocks - first_block);
    has_state = a.has_boundary || (kReverse ? n + 1 < a.chunk_count : n > 0);
  }
};

// The x of the rows, as many blocks as exist.
template <int D, bool kReverse>
__device__ __forceinline__ void load_rows(const ScanArguments& a, const ScanPosition<D, kReverse>& p, uint32_t to) {
  using Config = ScanConfig<D>;
  const int count = min(kRowBlocks, p.chunk_blocks - p.tile_block);
  const char* from = (const char*)a.x + (p.row_bh * a.blocks + p.first_block + p.tile_block) * Config::kFeatureBytes;
  copy_async<Config::kThreads>(to, from, count * Config::kFeatureBytes);
}

// Blocks of columns in the order of the scan: towards the diagonal from the chunk's far edge, each for every query head.
template <bool kReverse>
struct ColumnWalk {
  int first, count, group;
  template <int D>
  __device__ __forceinline__ ColumnWalk(const ScanArguments& a, const ScanPosition<D, kReverse>& p) {
    const int last_row_block = min(p.tile_block + kRowBlocks, p.chunk_blocks) - 1;
    group = kReverse ? a.group : 1;
    first = kReverse ? p.chunk_blocks - 1 : 0;
    count = (kReverse ? p.chunk_blocks - p.tile_block : last_row_block + 1) * group;
  }
  __device__ __forceinline__ int block(int step) const { return kReverse ? first - step / group : step; }
  __device__ __forceinline__ int head(int step) const { return kReverse ? step % group : 0; }
};

template <int D, bool kReverse>
__device__ __forceinline__ void load_columns(const ScanArguments& a, const ScanPosition<D, kReverse>& p, int block, int head, uint32_t to) {
  using Config = ScanConfig<D>;
  const int64_t column_bh = kReverse ? p.key_bh * a.group + head : p.key_bh;
  const int64_t at = column_bh * a.blocks + p.first_block + block;
  const float* factors = (kReverse ? a.gates.block_in : a.gates.block_out) + (p.key_bh * a.blocks + p.first_block + block) * kBlock;
  copy_async<Config::kThreads>(to, (const char*)a.y + at * Config::kFeatureBytes, Config::kFeatureBytes);
  copy_async<Config::kThreads>(to + Config::kFeatureBytes, (const char*)a.y_values + at * Config::kValueBytes, Config::kValueBytes);
  copy_async<Config::kThreads>(to + Config::kFeatureBytes + Config::kValueBytes, factors, kBlock * 4);
}

// Eight features of a warp's rows: word [m][r] holds features 2t, 2t + 1 of row m * 16 + r * 8 + g.
template <int kM>
__device__ __forceinline__ void load_row_features(uint32_t (&f)[kM][2], uint32_t rows, int feature_group, int token_group) {
  const int lane = threadIdx.x % 32;
  const uint32_t address = rows + (feature_group * 8 + token_group + lane / 8 % (2 * kM)) * 128 + lane % 8 * 16;
  if constexpr (kM == 2) {
    uint32_t r[4];
    ldmatrix4_trans(r, address);
    f[0][0] = r[0], f[0][1] = r[1], f[1][0] = r[2], f[1][1] = r[3];
  } else {
    ldmatrix2_trans(f[0][0], f[0][1], address);
  }
}

// A operand of x (rows x features), all features.
template <int D, int kM>
__device__ __forceinline__ void load_row_operand(uint32_t (&x)[kM][D / 16][4], uint32_t rows, int token_group) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      ldmatrix4_trans(x[m][k], rows + ((2 * k + lane / 16) * 8 + token_group + 2 * m + lane / 8 % 2) * 128 + lane % 8 * 16);
}

// Scores of a warp's rows with 16 columns.
template <typename T, int D, int kM>
__device__ __forceinline__ void scores(float (&s)[kM][2][4], const uint32_t (&x)[kM][D / 16][4], uint32_t columns, int sub) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[m][c][i] = 0.f;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t y[4];
    ldmatrix4_trans(y, columns + ((2 * k + lane / 8 % 2) * 8 + 2 * sub + lane / 16) * 128 + lane % 8 * 16);
#pragma unroll
    for (int m = 0; m < kM; m++) {
      mma<T>(s[m][0], x[m][k], y[0], y[1]);
      mma<T>(s[m][1], x[m][k], y[2], y[3]);
    }
  }
}

// Multiplies the elements of a 16-column product by their decays. Off the diagonal these are the columns' factors (the rows' come later). In the
// diagonal block: the decay between two tokens of one block, zero across a document's start and on the acausal side.
template <int D, int kM, bool kReverse>
__device__ __forceinline__ void apply_decay(float (&s)[kM][2][4], const ScanArguments& a, const ScanPosition<D, kReverse>& p, int block, int row,
                                            int sub, bool diagonal, const float2* factors) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (diagonal) {
    const float* log2_decay = a.gates.log2_decay + (p.key_bh * a.blocks + p.first_block + block) * kBlock;
    const int32_t* document_start = a.gates.document_start + (p.b * a.blocks + p.first_block + block) * kBlock;
    const int first_token = (int)(p.first_block + block) * kBlock;
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = sub * 16 + c * 8 + 2 * t + e;
        const float of_column = log2_decay[column];
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const int i = row + m * 16 + r * 8 + g, query = kReverse ? column : i, key = kReverse ? i : column;
            const float difference = kReverse ? of_column - log2_decay[i] : log2_decay[i] - of_column;
            const bool open = key <= query && first_token + key >= document_start[query];
            s[m][c][2 * r + e] *= open ? exp2f(difference) : 0.f;
          }
      }
  } else {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float2 f = factors[sub * 8 + c * 4 + t];
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) s[m][c][2 * r] *= f.x, s[m][c][2 * r + 1] *= f.y;
    }
  }
}

template <bool kReverse>
inline ScanArguments scan_arguments(const pt_problem& p, const void* gates) {
  ScanArguments a = {};
  a.gates = gates_of(p, gates);
  a.blocks = padded_blocks(p.seq_len), a.chunk_count = chunks(p.seq_len, p.chunk_size), a.seq_len = p.seq_len;
  a.batch = p.batch, a.row_heads = kReverse ? p.key_heads : p.query_heads, a.key_heads = p.key_heads, a.group = p.query_heads / p.key_heads;
  a.blocks_per_chunk = p.chunk_size / kBlock;
  const int64_t most = a.blocks < a.blocks_per_chunk ? a.blocks : a.blocks_per_chunk;
  a.tiles_per_chunk = (int)ceil_div(most, kRowBlocks);
  a.inverse_state_scale = 1.f / p.state_scale;
  return a;
}

template <typename Kernel>
int launch_scan(Kernel kernel, int threads, int shared_bytes, const ScanArguments& a, cudaStream_t stream, const char* what) {
  const int64_t grid = (int64_t)a.batch * a.row_heads * a.chunk_count * a.tiles_per_chunk;
  if (grid > INT32_MAX) return fail(PT_UNSUPPORTED, "%s: %lld thread blocks are too many", what, (long long)grid);
  if (a.out.stride_b % 2 || a.out.stride_t % 2 || a.out.stride_h % 2 || (uintptr_t)a.out.data % 4)
    return fail(PT_INVALID, "%s: out must be aligned to 4 bytes in every row", what);
  if (int status = allow_shared_memory((const void*)kernel, shared_bytes)) return status;
  return launch(what, kernel, (unsigned)grid, threads, shared_bytes, stream, a);
}

}  // namespace powertrain::sm80
