// Blocks of 64 tokens of tensors as they are, copied into shared memory and packed there and for later kernels (layout.cuh), on the way: what pt_pack does,
// where a kernel at K = 32 in bf16 that is not bound by bytes reads the tokens first. One warp copies rows, 16 bytes at a time, to about where packed
// values have them; others make packed tiles of them, of keys and queries by transposing core matrices in place.
#pragma once
#include "../common/layout.cuh"
#include "../common/rows.cuh"
#include "ptx.cuh"

namespace powertrain::sm90 {

enum class Packs { kNothing, kInputs, kGradients, kQueries, kKeys };  // kInputs: q, k and v'; kGradients: dn', of dy, y and d; kQueries: q; kKeys: k and v'

template <typename T>
struct RowPacks {
  static constexpr int kHeadDim = 32, kColumnGroups = kHeadDim / 8, kRowBytes = 16, kBytes = kHeadDim * kBlock * 2;

  static constexpr int kCopiers = 33;  // arrivals for a copied block: of the copying warp, and once more of its first lane, which starts bulk copies

  // Of a block, tokens before T.
  __device__ static __forceinline__ int existing(int64_t seq_len, int block) { return (int)min(seq_len - (int64_t)block * kBlock, (int64_t)kBlock); }

  // Where a copied block has columns 8 c to 8 c + 7 of a token: where packed values have them, but for odd c with tokens 4 apart exchanged, so that the
  // two lanes that copy a sector of 32 bytes, and those of the next three tokens, write to different banks.
  __device__ static __forceinline__ uint32_t copied_at(int token, int c) { return (c * kBlock + (token ^ c % 2 * 4)) * kRowBytes; }
  // By a warp: a block's rows of a tensor, zeros beyond `count`, where nothing is read.
  __device__ static __forceinline__ void copy_rows(uint32_t to, const T* from, int64_t stride_t, int count) {
    const int lane = threadIdx.x % 32;
    from += lane / 2 * stride_t + lane % 2 * 8, to += copied_at(lane / 2, lane % 2);
#pragma unroll
    for (int step = 0; step < kBlock / 16; step++, from = opaque(from + 16 * stride_t))
#pragma unroll
      for (int c = 0; c < kColumnGroups; c += 2) copy_16(to + (c * kBlock + 16 * step) * kRowBytes, from + c * 8, lane / 2 + 16 * step < count);
  }

  // By a warp: a block of rows into one of features, where products read it and in its place here.
  __device__ static __forceinline__ void pack_features(uint32_t at, T* packed, int lane) {
    constexpr int kAtOnce = 4;  // times four core matrices
    uint32_t* to = (uint32_t*)packed + lane;
    at += lane * kRowBytes;
#pragma unroll 1
    for (int cores = 0; cores < kBytes / 128; cores += 4 * kAtOnce, at += kAtOnce * 512, to += kAtOnce * 128) {
      static_assert(4 * kAtOnce == 2 * kBlock / 8);  // an even column group, then an odd one
      uint32_t r[kAtOnce][4];
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) load_matrices_transposed(r[c], c < kAtOnce / 2 ? at + c * 512 : (at ^ 4 * kRowBytes) + c * 512);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        store_matrices(at + c * 512, r[c]);
#pragma unroll
        for (int i = 0; i < 4; i++) to[(4 * c + i) * 32] = r[c][i];
      }
    }
  }
  // v' of a block of rows: packed, and what `changed` makes of rows of 16 bytes in its place here. Lanes have tokens `lane` and 32 further.
  template <typename Changed>
  __device__ static __forceinline__ void pack_values(uint32_t at, T* packed, int count, int lane, Changed changed) {
    at += lane * kRowBytes, packed += lane * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) store8(packed + (kColumnGroups * kBlock + 32 * half) * 8, ones(lane + 32 * half < count));
#pragma unroll 1
    for (int c = 0; c < kColumnGroups; c++, at += kBlock * kRowBytes, packed += kBlock * 8) {
      uint4 values[2];
#pragma unroll
      for (int half = 0; half < 2; half++) values[half] = load_shared_16((at ^ c % 2 * 4 * kRowBytes) + half * 32 * kRowBytes);
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++) {
        store8(packed + half * 32 * 8, values[half]);
        store_shared_16(at + half * 32 * kRowBytes, changed(values[half], half));
      }
    }
  }
  // A token's row of the normaliser's column group.
  __device__ static __forceinline__ uint4 ones(bool exists) { return make_uint4(exists ? Pair<T>::pack(1.f, 0.f) : 0, 0, 0, 0); }
};

}  // namespace powertrain::sm90
