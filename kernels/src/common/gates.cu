// pt_gates, pt_gate_grad: gates and document boundaries as products of decays, and the way back.
#include "numeric.cuh"
#include "stages.h"

namespace powertrain {
namespace {

constexpr int kThreads = 256;

// 2^-160 is zero in fp32, and 64 such gates in a row still leave the sums of a block exact to 2^-10 of an exponent.
constexpr float kClosedGate = -160.f;
constexpr float kLog2E = 1.4426950408889634f;

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
  int num_cu_seqlens, heads;
};

// The gates of one block of 64 tokens by one warp, two tokens a lane.
__device__ __forceinline__ void block_gates(const GateInputs& a, int64_t bh, int64_t block, int64_t blocks, const Gates& gates) {
  const int lane = threadIdx.x % 32;
  const int64_t b = (uint32_t)bh / (uint32_t)a.heads, h = (uint32_t)bh % (uint32_t)a.heads, first = block * kBlock + 2 * lane;
  float gate[2], closed[2];
  int32_t start[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t t = first + i, row = b * a.seq_len, last = min(t, a.seq_len - 1);
    gate[i] = a.log_G && t < a.seq_len ? fmaxf(a.log_G[b * a.stride_b + t * a.stride_t + h * a.stride_h] * kLog2E, kClosedGate) : 0.f;
    start[i] = a.cu_seqlens ? (int32_t)max((int64_t)0, document_begin(a.cu_seqlens, a.num_cu_seqlens, row + last) - row) : 0;
    closed[i] = start[i] == t && t > 0 ? 0.f : 1.f;
  }
  // Inclusive sums of the gates and products of the closed ones, over the block.
  float sum = gate[0] + gate[1], open = closed[0] * closed[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float s = __shfl_up_sync(~0u, sum, step), o = __shfl_up_sync(~0u, open, step);
    if (lane >= step) sum += s, open *= o;
  }
  const float total_sum = __shfl_sync(~0u, sum, 31), open_before = __shfl_up_sync(~0u, open, 1);
  const float inclusive[2] = {sum - gate[1], sum};
  const float open_in[2] = {(lane ? open_before : 1.f) * closed[0], open};
  // Products from the right, of the tokens after this one.
  float after = closed[0] * closed[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float o = __shfl_down_sync(~0u, after, step);
    if (lane + step < 32) after *= o;
  }
  const float next = __shfl_down_sync(~0u, after, 1);
  const float open_out1 = lane < 31 ? next : 1.f;
  const float open_out[2] = {open_out1 * closed[1], open_out1};
  const int64_t at = bh * blocks * kBlock + first;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    gates.log2_decay[at + i] = inclusive[i];
    gates.block_in[at + i] = open_in[i] * exp2f(inclusive[i]);
    gates.block_out[at + i] = open_out[i] * exp2f(total_sum - inclusive[i]);
    if (h == 0) gates.document_start[b * blocks * kBlock + first + i] = start[i];
  }
  if (lane == 31) gates.block_decay[bh * blocks + block] = open * exp2f(total_sum);
}

// Inclusive products over the 256 threads of a block; the returned total is that of all of them.
__device__ __forceinline__ float scan_products(float x, float* shared, float* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float y = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x *= y;
  }
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  float before = 1.f, all = 1.f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) {
    if (w < warp) before *= shared[w];
    all *= shared[w];
  }
  __syncthreads();
  *total = all;
  return x * before;
}

// One thread block per chunk: first each warp its blocks of tokens, then 256 blocks at a time, from the left for chunk_in and from the right for
// chunk_out. One launch for both: a chunk long enough to make this slow costs the other stages far more.
__global__ void __launch_bounds__(kThreads) chunk_gates(const __grid_constant__ GateInputs a, int64_t blocks, int64_t chunk_count, int blocks_per_chunk,
                                                        Gates gates) {
  __shared__ float outside[kThreads], partial[kThreads / 32];
  const int64_t bh = blockIdx.x / (uint32_t)chunk_count, n = blockIdx.x % (uint32_t)chunk_count;
  const int64_t begin = n * blocks_per_chunk, end = min(begin + blocks_per_chunk, blocks);
  const int count = (int)(end - begin);
  for (int i = threadIdx.x / 32; i < count; i += kThreads / 32) block_gates(a, bh, begin + i, blocks, gates);
  __syncthreads();
#pragma unroll
  for (int direction = 0; direction < 2; direction++) {
    float carried = 1.f;
    for (int done = 0; done < count; done += kThreads) {
      const int i = done + threadIdx.x;  // in the order of the scan
      const auto block_of = [&](int k) { return direction ? end - 1 - k : begin + k; };
      const float decay = i < count ? gates.block_decay[bh * blocks + block_of(i)] : 1.f;
      float total;
      const float inclusive = scan_products(decay, partial, &total);
      // Exclusive: the decay of the blocks between the chunk's edge and this one.
      if (threadIdx.x + 1 < kThreads) outside[threadIdx.x + 1] = carried * inclusive;
      if (threadIdx.x == 0) outside[0] = carried;
      __syncthreads();
      const int here = min(kThreads, count - done);
      for (int e = threadIdx.x; e < here * kBlock; e += kThreads) {
        const int64_t at = (bh * blocks + block_of(done + e / kBlock)) * kBlock + e % kBlock;
        if (direction) gates.chunk_out[at] = outside[e / kBlock] * gates.block_out[at];
        else gates.chunk_in[at] = outside[e / kBlock] * gates.block_in[at];
      }
      carried *= total;
      __syncthreads();
    }
    if (direction == 0 && threadIdx.x == 0) gates.chunk_decay[blockIdx.x] = carried;
  }
  // The pads of the arrays, so that the same inputs give the same bytes.
  if (blockIdx.x == 0 && threadIdx.x < 64) {
    const int64_t heads = gridDim.x / (uint32_t)chunk_count, decays = heads * blocks + threadIdx.x, of_chunks = (int64_t)gridDim.x + threadIdx.x;
    if (decays < ceil_div(heads * blocks, 64) * 64) gates.block_decay[decays] = 0.f;
    if (of_chunks < ceil_div((int64_t)gridDim.x, 64) * 64) gates.chunk_decay[of_chunks] = 0.f;
  }
}

// Sums of a thread block's values in the order of threads (lower threads first), exclusive of the thread's own; `closed` cuts off what lies
// before. fp64, because a chunk may be the whole sequence and its terms nearly cancel.
struct Segment {
  double sum;
  int closed;
};
__device__ __forceinline__ Segment then(Segment before, Segment after) {
  return {after.sum + (after.closed ? 0. : before.sum), before.closed | after.closed};
}
__device__ __forceinline__ double exclusive_sum(Segment mine, double* carried, Segment* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Segment scan = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Segment before = {__shfl_up_sync(~0u, scan.sum, step), __shfl_up_sync(~0u, scan.closed, step)};
    if (lane >= step) scan = then(before, scan);
  }
  if (lane == 31) warps[warp] = scan;
  Segment within = {__shfl_up_sync(~0u, scan.sum, 1), __shfl_up_sync(~0u, scan.closed, 1)};
  if (lane == 0) within = {0., 0};
  __syncthreads();
  Segment before_warp = {*carried, 0}, all = {*carried, 0};
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) {
    if (w < warp) before_warp = then(before_warp, warps[w]);
    all = then(all, warps[w]);
  }
  __syncthreads();
  *carried = all.sum;
  return then(before_warp, within).sum;
}

// One thread block per chunk, four tokens a thread.
__global__ void __launch_bounds__(kThreads) gate_grad(pt_gate_grad_params a, int heads, int group, int64_t batch_heads, int64_t seq_len, int64_t padded,
                                                      int64_t chunk_size, int64_t chunk_count) {
  constexpr int kTokens = 4, kStep = kThreads * kTokens;
  __shared__ Segment warps[kThreads / 32];
  const int64_t bh = blockIdx.x / chunk_count, n = blockIdx.x % chunk_count, b = bh / heads, h = bh % heads;
  const int64_t begin = n * chunk_size, end = min(begin + chunk_size, seq_len);
  const double factor = 1. / ((a.dn_scale ? (double)a.dn_scale[bh] : 1.) * (a.value_scale ? (double)a.value_scale[bh] : 1.)), through = a.through ? a.through[blockIdx.x] : 0.;
  float* out = a.dlog_G + b * a.dlog_G_stride_b + h * a.dlog_G_stride_h;
  const float *keys = a.key_dots + bh * padded, *key_states = keys + batch_heads * padded;
  const float* queries = a.query_dots + bh * group * padded;

  double carried = 0.;
  for (int64_t done = 0; begin + done < end; done += kStep) {  // from the left: what goes on to later chunks
    const int64_t first = begin + done + threadIdx.x * kTokens;
    double value[kTokens], mine = 0.;
#pragma unroll
    for (int i = 0; i < kTokens; i++) mine += value[i] = first + i < end ? key_states[first + i] : 0.f;
    double sum = exclusive_sum({mine, 0}, &carried, warps);
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (first + i < end) out[(first + i) * a.dlog_G_stride_t] = (float)((sum + through) * factor);
      sum += value[i];
    }
  }
  carried = 0.;
  for (int64_t done = 0; begin + done < end; done += kStep) {  // from the right: everything else
    const int64_t last = end - 1 - done - threadIdx.x * kTokens;
    double value[kTokens];
    bool closed[kTokens];  // a document begins here (or the row, from nothing): its gate has no say, and nothing later reaches further left
    Segment mine = {0., 0};
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      const int64_t t = last - i;
      value[i] = 0., closed[i] = false;
      if (t >= begin) {
        double sum = (double)key_states[t] - keys[t];
        for (int q = 0; q < group; q++) sum += queries[q * padded + t];
        value[i] = sum;
        closed[i] = t == 0 ? !a.has_initial_state
                           : a.cu_seqlens && document_begin(a.cu_seqlens, a.num_cu_seqlens, b * seq_len + t) == b * seq_len + t;
      }
      mine = then(mine, {closed[i] ? 0. : value[i], closed[i]});
    }
    double sum = exclusive_sum(mine, &carried, warps);
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      const int64_t t = last - i;
      sum = closed[i] ? 0. : sum + value[i];
      if (t >= begin) out[t * a.dlog_G_stride_t] = closed[i] ? 0.f : out[t * a.dlog_G_stride_t] + (float)(sum * factor);
    }
  }
}

// One thread block per chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads) state_flow(const T* states, const T* grad_states, const float* chunk_decay, int head_dim, float scale,
                                                       float* through) {
  __shared__ float partial[kThreads / 32];
  const float decay = chunk_decay[blockIdx.x];
  const int tiles = phi_tiles(head_dim), groups = head_dim / 8 + 1;
  const int64_t at = (int64_t)blockIdx.x * tiles * state_tile_elements(head_dim);
  float sum = 0.f;
  if (decay > 0.f) {
    for (int piece = threadIdx.x; piece < tiles * groups * kBlock; piece += kThreads) {  // eight columns of one row
      const uint4 s = *(const uint4*)(states + at + (int64_t)piece * 8), e = *(const uint4*)(grad_states + at + (int64_t)piece * 8);
      const uint32_t *sw = &s.x, *ew = &e.x;
      float dot = 0.f;
      if (piece / kBlock % groups == head_dim / 8) {  // the normaliser, hi and lo
        dot = (Numeric<T>::low(sw[0]) + Numeric<T>::high(sw[0])) * (Numeric<T>::low(ew[0]) + Numeric<T>::high(ew[0]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) dot += Numeric<T>::low(sw[i]) * Numeric<T>::low(ew[i]) + Numeric<T>::high(sw[i]) * Numeric<T>::high(ew[i]);
      }
      // Both carry the weight of their tile, and the product is to have it once.
      sum += tile_pair(piece / (kBlock * groups), head_dim).distance == 0 ? dot : 0.5f * dot;
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; w++) sum += partial[w];
    through[blockIdx.x] = decay * sum * scale;
  }
}

}  // namespace

}  // namespace powertrain

using namespace powertrain;

#define PT_REQUIRE(condition) \
  if (!(condition)) return fail(PT_INVALID, "%s: %s does not hold", __func__, #condition)

extern "C" {

int pt_gates(const pt_problem* problem, const pt_gates_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->gates && (!params->cu_seqlens || params->num_cu_seqlens > 0));
  const pt_problem& p = *problem;
  const pt_gates_params& a = *params;
  const Gates gates = gates_of(p, a.gates);
  const int64_t blocks = padded_blocks(p.seq_len), heads = (int64_t)p.batch * p.key_heads, chunk_count = chunks(p.seq_len, p.chunk_size);
  const GateInputs inputs = {a.log_G, a.log_G_stride_b, a.log_G_stride_t, a.log_G_stride_h, p.seq_len, a.cu_seqlens, a.num_cu_seqlens, p.key_heads};
  chunk_gates<<<(unsigned)(heads * chunk_count), kThreads, 0, (cudaStream_t)stream>>>(inputs, blocks, chunk_count, p.chunk_size / kBlock, gates);
  return check_cuda(cudaGetLastError(), "chunk_gates");
}

int pt_state_flow(const pt_problem* problem, const pt_state_flow_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->states && params->grad_states && params->gates && params->through);
  const pt_problem& p = *problem;
  const unsigned grid = (unsigned)(p.batch * p.key_heads * chunks(p.seq_len, p.chunk_size));
  const float* chunk_decay = gates_of(p, params->gates).chunk_decay;
  const float scale = 1.f / (p.state_scale * p.state_scale);
  if (p.dtype == PT_BF16)
    state_flow<__nv_bfloat16><<<grid, kThreads, 0, (cudaStream_t)stream>>>((const __nv_bfloat16*)params->states, (const __nv_bfloat16*)params->grad_states,
                                                                           chunk_decay, p.head_dim, scale, params->through);
  else
    state_flow<__half><<<grid, kThreads, 0, (cudaStream_t)stream>>>((const __half*)params->states, (const __half*)params->grad_states, chunk_decay,
                                                                    p.head_dim, scale, params->through);
  return check_cuda(cudaGetLastError(), "state_flow");
}

int pt_gate_grad(const pt_problem* problem, const pt_gate_grad_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->query_dots && params->key_dots && params->dlog_G && (!params->cu_seqlens || params->num_cu_seqlens > 0));
  const pt_problem& p = *problem;
  const int64_t heads = (int64_t)p.batch * p.key_heads, chunk_count = chunks(p.seq_len, p.chunk_size);
  gate_grad<<<(unsigned)(heads * chunk_count), kThreads, 0, (cudaStream_t)stream>>>(*params, p.key_heads, p.query_heads / p.key_heads, heads, p.seq_len,
                                                                                    padded_blocks(p.seq_len) * kBlock, p.chunk_size, chunk_count);
  return check_cuda(cudaGetLastError(), "gate_grad");
}

}  // extern "C"
