// Blocks of 64 tokens of tensors as they are, copied into shared memory and packed there and for later kernels (layout.cuh), on the way: what pt_pack does,
// where a kernel at K = 32 in bf16 that is not bound by bytes reads the tokens first. A warp copies rows as they are; it, or others, make core matrices of
// them, eight tokens at a time in their place, and packed tiles in device memory.
#pragma once
#include "../common/layout.cuh"
#include "../common/rows.cuh"
#include "ptx.cuh"

namespace powertrain::sm90 {

enum class Packs { kNothing, kInputs, kGradients, kQueries, kKeys };  // kInputs: q, k and v'; kGradients: dn', of dy, y and d; kQueries: q; kKeys: k and v'

template <typename T>
struct RowPacks {
  static constexpr int kHeadDim = 32, kColumnGroups = kHeadDim / 8, kRowBytes = 16;

  static constexpr int kCopiers = 33;  // arrivals for a copied block: of the copying warp, and once more of its first lane, which starts bulk copies

  // Of a block, tokens before T.
  __device__ static __forceinline__ int existing(int64_t seq_len, int block) { return (int)min(seq_len - (int64_t)block * kBlock, (int64_t)kBlock); }

  // Where a copied block has columns 8 c to 8 c + 7 of a token: rows lie one after another, since cp.async writes at a time what comes from one line of 128
  // bytes to one line of shared memory; a row's column groups are in one of four orders, so that no two of eight tokens have the same one in the same banks.
  // Between eight tokens and the next there may be a gap. Where their core matrices go is the same place, for each c in turn.
  static constexpr uint32_t kTokensBytes = 8 * kHeadDim * 2;
  static constexpr CoreStrides kCores = {8 * kRowBytes, kTokensBytes};
  __device__ static __forceinline__ uint32_t copied_at(int token, int c) { return token * kHeadDim * 2 + (c ^ token / 2 % 4) * kRowBytes; }  // of the first eight
  // By a warp: a block's rows of a tensor, zeros beyond `count`, where nothing is read.
  __device__ static __forceinline__ void copy_rows(uint32_t to, const T* from, int64_t stride_t, int count, uint32_t stride = kTokensBytes) {
    const int lane = threadIdx.x % 32, token = lane / 4;
    from += token * stride_t + lane % 4 * 8, to += copied_at(token, lane % 4);
#pragma unroll
    for (int i = 0; i < kBlock / 8; i++, from = opaque(from + 8 * stride_t)) copy_16(to + i * stride, from, token + 8 * i < count);
  }

  // By a warp: a block of rows into one of features, packed and in its place here; kAtOnce times eight tokens under way.
  template <int kAtOnce>
  __device__ static __forceinline__ void pack_features(uint32_t at, T* packed, int lane) {
    uint32_t* to = (uint32_t*)packed + lane;
    uint32_t from = at + copied_at(lane % 8, lane / 8);
    at += lane * kRowBytes;
#pragma unroll 1
    for (int tokens = 0; tokens < kBlock / 8; tokens += kAtOnce, at += kAtOnce * kTokensBytes, from += kAtOnce * kTokensBytes, to += kAtOnce * 32) {
      uint32_t r[kAtOnce][4];  // core matrices of all columns
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) load_matrices_transposed(r[i], from + i * kTokensBytes);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        store_matrices(at + i * kTokensBytes, r[i]);
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++) to[(c * kBlock / 8 + i) * 32] = r[i][c];
      }
    }
  }
  // By a warp: v' of a block of rows: packed, and what `changed` makes of a token's rows of 16 bytes in its place here.
  template <typename Changed>
  __device__ static __forceinline__ void pack_values(uint32_t at, T* packed, int count, int lane, Changed changed, uint32_t stride = kTokensBytes) {
    constexpr int kAtOnce = 2;  // times eight tokens
#pragma unroll
    for (int half = 0; half < 2; half++) store8(packed + value_index(kHeadDim, lane + 32 * half), ones(lane + 32 * half < count));
    uint32_t from = at + copied_at(lane % 8, lane / 8);
    at += lane * kRowBytes, packed += value_index(lane / 8 * 8, lane % 8);
#pragma unroll 1
    for (int token = lane % 8; token < kBlock; token += kAtOnce * 8, at += kAtOnce * stride, from += kAtOnce * stride, packed += kAtOnce * 64) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) values[i] = load_shared_16(from + i * stride);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        store8(packed + i * 64, values[i]);
        store_shared_16(at + i * stride, changed(values[i], token + 8 * i));
      }
    }
  }
  // A token's row of the normaliser's column group.
  __device__ static __forceinline__ uint4 ones(bool exists) { return make_uint4(exists ? Pair<T>::pack(1.f, 0.f) : 0, 0, 0, 0); }
};

}  // namespace powertrain::sm90
