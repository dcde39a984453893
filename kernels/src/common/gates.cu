// pt_gates, pt_gate_grad: gates and document boundaries as products of decays, and the way back.
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

// One warp per block of 64 tokens, two tokens a lane.
__global__ void __launch_bounds__(kThreads) block_gates(const float* log_G, int64_t stride_b, int64_t stride_t, int64_t stride_h,
                                                        const int32_t* cu_seqlens, int num_cu_seqlens, int heads, int64_t seq_len,
                                                        int64_t blocks, int64_t total, Gates gates) {
  const int64_t index = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;  // (b, h, block)
  if (index >= total) return;
  const int lane = threadIdx.x % 32;
  const int64_t block = index % blocks, bh = index / blocks, b = bh / heads, h = bh % heads, first = block * kBlock + 2 * lane;
  float gate[2], closed[2];
  int32_t start[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t t = first + i, last = min(t, seq_len - 1);
    gate[i] = log_G && t < seq_len ? fmaxf(log_G[b * stride_b + t * stride_t + h * stride_h] * kLog2E, kClosedGate) : 0.f;
    start[i] = cu_seqlens ? (int32_t)max((int64_t)0, document_begin(cu_seqlens, num_cu_seqlens, b * seq_len + last) - b * seq_len) : 0;
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
  if (lane == 31) gates.block_decay[index] = open * exp2f(total_sum);
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

// One thread block per chunk; 256 blocks of tokens at a time, from the left for chunk_in and from the right for chunk_out.
__global__ void __launch_bounds__(kThreads) chunk_gates(int64_t blocks, int64_t chunk_count, int blocks_per_chunk, Gates gates) {
  __shared__ float outside[kThreads], partial[kThreads / 32];
  const int64_t bh = blockIdx.x / chunk_count, n = blockIdx.x % chunk_count;
  const int64_t begin = n * blocks_per_chunk, end = min(begin + blocks_per_chunk, blocks);
  const int count = (int)(end - begin);
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
    const int64_t heads = gridDim.x / chunk_count, decays = heads * blocks + threadIdx.x, of_chunks = (int64_t)gridDim.x + threadIdx.x;
    if (decays < ceil_div(heads * blocks, 64) * 64) gates.block_decay[decays] = 0.f;
    if (of_chunks < ceil_div((int64_t)gridDim.x, 64) * 64) gates.chunk_decay[of_chunks] = 0.f;
  }
}

// One thread block per (b, h) walks from the last token to the first, four tokens a thread; sums are kept in fp64, because a row may hold a
// million terms of both signs that nearly cancel.
struct Segment {
  double sum;
  int closed;  // a document begins in here: nothing later reaches what is to the left
};
__device__ __forceinline__ Segment join(Segment left, Segment right) {  // left: earlier in time
  return {left.sum + (left.closed ? 0. : right.sum), left.closed | right.closed};
}

__global__ void __launch_bounds__(1024) gate_grad(const float* query_dots, const float* key_dots, int group, const float* final_term, const int32_t* cu_seqlens, int num_cu_seqlens,
                                                  int has_initial_state, const float* scale, int heads, int64_t seq_len, int64_t padded, float* dlog_G,
                                                  int64_t stride_b, int64_t stride_t, int64_t stride_h) {
  constexpr int kTokens = 4, kStep = 1024 * kTokens;
  __shared__ Segment warps[32];
  const int64_t bh = blockIdx.x, b = bh / heads, h = bh % heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const double factor = scale ? 1. / scale[bh] : 1.;
  double carried = 0.;
  for (int64_t end = ceil_div(seq_len, kStep) * kStep; end > 0; end -= kStep) {
    // Thread 0 holds the latest tokens; token i of a thread is its i-th from the right.
    const int64_t last = end - 1 - (int64_t)threadIdx.x * kTokens;
    double value[kTokens];
    bool begins[kTokens];  // this token's gate is closed whatever it says
    double sum = 0.;       // from the right, within this thread, reset where a document begins
    Segment mine = {0., 0};
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      const int64_t t = last - i;
      value[i] = 0.;
      if (t < seq_len) {
        double rows = 0.;
        for (int q = 0; q < group; q++) rows += query_dots[(bh * group + q) * padded + t];
        value[i] = (rows - key_dots[bh * padded + t]) * factor;
      }
      if (final_term && t == seq_len - 1) value[i] += final_term[bh];
      begins[i] = (t == 0 && !has_initial_state) ||
                  (cu_seqlens && t > 0 && t < seq_len && document_begin(cu_seqlens, num_cu_seqlens, b * seq_len + t) == b * seq_len + t);
      mine = join({begins[i] ? 0. : value[i], begins[i]}, mine);
    }
    // Inclusive over threads to the right (lower lanes), then over warps.
    Segment scan = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Segment right = {__shfl_up_sync(~0u, scan.sum, step), __shfl_up_sync(~0u, scan.closed, step)};
      if (lane >= step) scan = join(scan, right);
    }
    if (lane == 31) warps[warp] = scan;
    Segment before = {__shfl_up_sync(~0u, scan.sum, 1), __shfl_up_sync(~0u, scan.closed, 1)};
    if (lane == 0) before = {0., 0};
    __syncthreads();
    Segment right_of_warp = {carried, 0}, all = {carried, 0};
    for (int w = 0; w < 32; w++) {
      if (w < warp) right_of_warp = join(warps[w], right_of_warp);
      all = join(warps[w], all);
    }
    __syncthreads();
    sum = join(before, right_of_warp).sum;
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      const int64_t t = last - i;
      sum += value[i];
      // The closed gate of a document's first token has no say; nor does what lies to its right reach further left.
      if (begins[i]) sum = 0.;
      if (t < seq_len) dlog_G[b * stride_b + t * stride_t + h * stride_h] = (float)sum;
    }
    carried = all.sum;
  }
}

}  // namespace

int64_t gate_grad_workspace(const pt_problem&) { return 0; }

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
  const int64_t blocks = padded_blocks(p.seq_len), heads = (int64_t)p.batch * p.key_heads, total = heads * blocks;
  const int64_t chunk_count = chunks(p.seq_len, p.chunk_size);
  block_gates<<<(unsigned)ceil_div(total, kThreads / 32), kThreads, 0, (cudaStream_t)stream>>>(
      a.log_G, a.log_G_stride_b, a.log_G_stride_t, a.log_G_stride_h, a.cu_seqlens, a.num_cu_seqlens, p.key_heads, p.seq_len, blocks, total,
      gates);
  if (int status = check_cuda(cudaGetLastError(), "block_gates")) return status;
  chunk_gates<<<(unsigned)(heads * chunk_count), kThreads, 0, (cudaStream_t)stream>>>(blocks, chunk_count, p.chunk_size / kBlock, gates);
  return check_cuda(cudaGetLastError(), "chunk_gates");
}

int pt_gate_grad(const pt_problem* problem, const pt_gate_grad_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->query_dots && params->key_dots && params->dlog_G && (!params->cu_seqlens || params->num_cu_seqlens > 0));
  const pt_problem& p = *problem;
  const pt_gate_grad_params& a = *params;
  gate_grad<<<(unsigned)(p.batch * p.key_heads), 1024, 0, (cudaStream_t)stream>>>(
      a.query_dots, a.key_dots, p.query_heads / p.key_heads, a.final_term, a.cu_seqlens, a.num_cu_seqlens, a.has_initial_state, a.scale, p.key_heads, p.seq_len, padded_blocks(p.seq_len) * kBlock,
      a.dlog_G, a.dlog_G_stride_b, a.dlog_G_stride_t, a.dlog_G_stride_h);
  return check_cuda(cudaGetLastError(), "gate_grad");
}

}  // extern "C"
