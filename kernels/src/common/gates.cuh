// Gates and document boundaries as products of decays (layout.cuh, Gates), formed by the thread blocks that pack the values.
#pragma once
#include <stdint.h>

#include "layout.cuh"

namespace powertrain {

// 2^-160 is zero in fp32, and 64 such gates in a row still leave the sums of a block exact to 2^-10 of an exponent.
constexpr float kClosedGate = -160.f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kGateBlocks = 8, kGateThreads = 32 * kGateBlocks;  // the most blocks that a thread block forms the gates of, one a warp

// The start, over the flattened tokens, of the document that holds token `at`.
__device__ __forceinline__ int64_t document_begin(const int32_t* cu_seqlens, int count, int64_t at) {
  int low = 0, high = count;  // the last offset <= at is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= at) low = middle;
    else high = middle;
  }
  return cu_seqlens[low];
}

struct GateInputs {
  const float* log_G;
  int64_t stride_b, stride_t, stride_h, seq_len;
  const int32_t* cu_seqlens;
  int num_cu_seqlens;
  uint32_t blocks_per_chunk;
  int64_t blocks, chunk_count;  // of one (b, h)
};

// The gates of one (b, h).
class GateRow {
 public:
  __device__ __forceinline__ GateRow(const GateInputs& inputs, int b, int h)
      : a_(inputs), log_G_(inputs.log_G ? inputs.log_G + b * inputs.stride_b + h * inputs.stride_h : nullptr), b_(b) {}
  __device__ __forceinline__ bool gated() const { return log_G_; }
  __device__ __forceinline__ float log2_gate(int64_t t) const {
    return log_G_ && t < a_.seq_len ? fmaxf(log_G_[t * a_.stride_t] * kLog2E, kClosedGate) : 0.f;
  }
  // The first token of t's document.
  __device__ __forceinline__ int32_t document_start(int64_t t) const {
    if (!a_.cu_seqlens) return 0;
    const int64_t row = b_ * a_.seq_len;
    return (int32_t)max((int64_t)0, document_begin(a_.cu_seqlens, a_.num_cu_seqlens, row + min(t, a_.seq_len - 1)) - row);
  }
  // Whether the first token of a document, its gate closed, is one of the `count` tokens from `begin` on.
  __device__ __forceinline__ bool closes(int64_t begin, uint32_t count) const {
    return a_.cu_seqlens && count && document_start(begin + count - 1) >= max(begin, (int64_t)1);
  }

 private:
  const GateInputs& a_;
  const float* log_G_;
  int b_;
};

// Decay of the chunks' tokens around blocks first .. first + count - 1 of a row: x from the start of the first one's chunk to the first, y from the last
// to the end of its chunk. Thread blocks do not wait for each other, so each, as a whole, sums these gates again: outwards, 4096 tokens at a time, until
// nothing is left of the decay. (A sum of gates, all at most 0, is as exact as the product of their decays.) `partial` is shared memory of 16 floats.
__device__ __forceinline__ float2 decay_around(const GateRow& row, uint32_t blocks, uint32_t blocks_per_chunk, uint32_t first, uint32_t count,
                                               float* partial) {
  constexpr uint32_t kPiece = 16 * kGateThreads;  // in 32 bits: a chunk has less than 2^31 tokens
  uint32_t before_left = first % blocks_per_chunk * kBlock;
  uint32_t after_left = min(blocks - first - count, blocks_per_chunk - 1 - (first + count - 1) % blocks_per_chunk) * kBlock;
  const int64_t begin = (int64_t)first * kBlock, end = begin + count * kBlock;
  const float open_before = row.closes(begin - before_left, before_left) ? 0.f : 1.f, open_after = row.closes(end, after_left) ? 0.f : 1.f;
  if (!row.gated() || open_before == 0.f) before_left = 0;
  if (!row.gated() || open_after == 0.f) after_left = 0;
  float before = 0.f, after = 0.f;
  for (uint32_t done = 0; done < max(before_left, after_left); done += kPiece) {
    float sums[2] = {0.f, 0.f};
    const uint32_t stop = min(max(before_left, after_left), done + kPiece);
#pragma unroll 2
    for (uint32_t i = done + threadIdx.x; i < stop; i += kGateThreads) {
      if (i < before_left) sums[0] += row.log2_gate(begin - 1 - i);
      if (i < after_left) sums[1] += row.log2_gate(end + i);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      sums[0] += __shfl_xor_sync(~0u, sums[0], step);
      sums[1] += __shfl_xor_sync(~0u, sums[1], step);
    }
    if (threadIdx.x % 32 == 0) *(float2*)(partial + threadIdx.x / 16) = make_float2(sums[0], sums[1]);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kGateBlocks; w++) before += partial[2 * w], after += partial[2 * w + 1];
    __syncthreads();
    if (before < kClosedGate) before_left = 0;
    if (after < kClosedGate) after_left = 0;
  }
  return make_float2(open_before * exp2f(before), open_after * exp2f(after));
}

// By a whole thread block: the gates of blocks first .. first + count - 1 of row (b, h), a warp for each, two tokens a lane. chunk_out is also left in
// `chunk_out`, shared memory of count * 64 floats, for whoever synchronises after the call; `partial` is shared memory of 24 floats.
__device__ __forceinline__ void form_gates(const GateInputs& a, const Gates& gates, int64_t bh, int b, int h, uint32_t first, uint32_t count,
                                           float* chunk_out, float* partial) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const GateRow row(a, b, h);
  const float2 around = decay_around(row, a.blocks, a.blocks_per_chunk, first, count, partial);
  float* const block_decays = partial + 2 * kGateBlocks;
  const int64_t at = (bh * a.blocks + first) * kBlock + threadIdx.x * 2;
  float in[2], out[2];
  if (warp < count) {
    const int64_t token = (int64_t)first * kBlock + threadIdx.x * 2;
    const float gate[2] = {row.log2_gate(token), row.log2_gate(token + 1)};
    const int32_t start[2] = {row.document_start(token), row.document_start(token + 1)};
    if (h == 0) *(int2*)(gates.document_start + b * a.blocks * kBlock + token) = make_int2(start[0], start[1]);
    float sum = gate[0] + gate[1];  // inclusive, over the block
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float s = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += s;
    }
    const float inclusive[2] = {sum - gate[1], sum}, total = __shfl_sync(~0u, sum, 31);
    // Decay from one token to another is zero where the latter's document begins after the former.
    const int32_t last_start = __shfl_sync(~0u, start[1], 31);
    const int64_t block_begin = max(token - 2 * lane, (int64_t)1);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      in[i] = start[i] < block_begin ? exp2f(inclusive[i]) : 0.f;
      out[i] = last_start <= token + i ? exp2f(total - inclusive[i]) : 0.f;
    }
    *(float2*)(gates.log2_decay + at) = make_float2(inclusive[0], inclusive[1]);
    *(float2*)(gates.block_in + at) = make_float2(in[0], in[1]);
    *(float2*)(gates.block_out + at) = make_float2(out[0], out[1]);
    if (lane == 31) block_decays[warp] = in[1];
  }
  __syncthreads();
  if (warp >= count) return;
  // Times the decay of those of these blocks that lie between, of the same chunk.
  const uint32_t before = (first + warp) % a.blocks_per_chunk, after = a.blocks_per_chunk - 1 - before;  // blocks of the chunk
  float factor_in = before >= warp ? around.x : 1.f, factor_out = warp + after >= count - 1 ? around.y : 1.f;
#pragma unroll
  for (uint32_t w = 0; w < kGateBlocks; w++) {
    if (w < warp && w + before >= warp) factor_in *= block_decays[w];
    if (w > warp && w < count && w <= warp + after) factor_out *= block_decays[w];
  }
  *(float2*)(gates.chunk_in + at) = make_float2(factor_in * in[0], factor_in * in[1]);
  const float2 decay_out = make_float2(factor_out * out[0], factor_out * out[1]);
  *(float2*)(gates.chunk_out + at) = decay_out;
  *(float2*)(chunk_out + threadIdx.x * 2) = decay_out;
  if (lane == 0) {
    const float decay = block_decays[warp];
    gates.block_decay[bh * a.blocks + first + warp] = decay;
    if (before == 0) gates.chunk_decay[bh * a.chunk_count + (first + warp) / a.blocks_per_chunk] = decay * factor_out;
  }
}

// The pads of the arrays, by some thread block of at least 64 threads, so that the same inputs give the same bytes.
__device__ __forceinline__ void clear_pads(const GateInputs& a, const Gates& gates, int64_t heads) {
  const int64_t decays = heads * a.blocks, of_chunks = heads * a.chunk_count;
  if (threadIdx.x < ceil_div(decays, 64) * 64 - decays) gates.block_decay[decays + threadIdx.x] = 0.f;
  if (threadIdx.x < ceil_div(of_chunks, 64) * 64 - of_chunks) gates.chunk_decay[of_chunks + threadIdx.x] = 0.f;
}

}  // namespace powertrain
