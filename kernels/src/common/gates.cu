// pt_state_flow, pt_gate_grad: the way back through the gates (gates.cuh).
#include <float.h>

#include <algorithm>

#include "gates.cuh"
#include "numeric.cuh"
#include "launch.cuh"

namespace powertrain {
namespace {

constexpr int kThreads = 256;

// Sums of a thread block's values in the order of threads (lower threads first), exclusive of the thread's own; `closed` cuts off what lies
// before. fp64, because a chunk may be the whole sequence and its terms nearly cancel.
struct Segment {
  double sum;
  int closed;
};
__device__ __forceinline__ Segment then(Segment before, Segment after) {
  return {after.sum + (after.closed ? 0. : before.sum), before.closed | after.closed};
}
// Inclusive, of the lanes from the first on.
__device__ __forceinline__ Segment scan_lanes(Segment mine) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Segment before = {__shfl_up_sync(~0u, mine.sum, step), __shfl_up_sync(~0u, mine.closed, step)};
    if (threadIdx.x % 32 >= step) mine = then(before, mine);
  }
  return mine;
}
__device__ __forceinline__ Segment of_lane(Segment mine, int lane) { return {__shfl_sync(~0u, mine.sum, lane), __shfl_sync(~0u, mine.closed, lane)}; }
__device__ __forceinline__ double exclusive_sum(Segment mine, double* carried, Segment* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = blockDim.x / 32;  // of warps, at most 32
  const Segment scan = scan_lanes(mine);
  if (lane == 31) warps[warp] = scan;
  Segment within = {__shfl_up_sync(~0u, scan.sum, 1), __shfl_up_sync(~0u, scan.closed, 1)};
  if (lane == 0) within = {0., 0};
  __syncthreads();
  const Segment of_warps = scan_lanes(lane < count ? warps[lane] : Segment{0., 0});
  __syncthreads();
  const Segment all_before = {*carried, 0};
  const Segment before_warp = warp > 0 ? then(all_before, of_lane(of_warps, warp - 1)) : all_before;
  *carried = then(all_before, of_lane(of_warps, count - 1)).sum;
  return then(before_warp, within).sum;
}

// Short chunks go together, up to so many and so many tokens: a thread block of gate_grad takes them, and state_flow knows the last one's end.
constexpr int kSpan = 2048, kSpanChunks = 4;
constexpr float kForgotten = 0.125f;  // a decay; see state_flow
int chunks_of_span(const pt_problem& p) { return p.chunk_size < kSpan ? std::min(kSpan / p.chunk_size, kSpanChunks) : 1; }

constexpr int kStep = kStepBlocks * kBlock;  // tokens of a step, and of a warp of gate_grad
constexpr float kForgottenStep = 0x1p-8f;    // a decay; see gate_grad

struct GateGradArguments {
  const float *query_dots, *key_dots, *step_dots, *block_decay, *flow, *dn_scale, *value_scale;
  const int32_t* document_start;
  float* out;
  int64_t stride_b, stride_t, stride_h, seq_len, padded;
  int heads, group, chunk_size, chunk_count, span_chunks, span_count, has_initial_state;
};

// dlog_G_t = dlog_G_{t+1} + q_t.dq_t / 2 - k_t.dk_t / 2: what token t receives and what it gives cross its gate, or not. From the right, a span of
// chunks for each thread block and four tokens a thread, begun anew with what state_flow knows at the ends of chunks and, with zero, where a
// document begins (or the row, from nothing): nothing passes its gate, whose gradient is zero. With step_dots also begun anew at the end of a step
// across which less than kForgottenStep of the decay is left, with what the step's own keys give to later steps: hardly anything older crosses it. Pairs
// between steps are rounded in one way by their queries and in another by their keys, and what is left of them must not go on further than that.
__global__ void __launch_bounds__(kSpan / 4) gate_grad(const __grid_constant__ GateGradArguments a) {
  follow_earlier_kernels();
  constexpr int kTokens = 4;
  __shared__ Segment warps[kSpan / kTokens / 32];
  __shared__ float4 results[kSpan / kStep][32];
  const uint32_t bh = blockIdx.x / (uint32_t)a.span_count, span = blockIdx.x % (uint32_t)a.span_count, b = bh / (uint32_t)a.heads, h = bh % (uint32_t)a.heads;
  const int64_t begin = (int64_t)span * a.span_chunks * a.chunk_size;
  const int count = (int)min((int64_t)a.span_chunks * a.chunk_size, a.padded - begin);  // dots beyond the row are zero
  const float *keys = a.key_dots + (int64_t)bh * a.padded + begin, *queries = a.query_dots + (int64_t)bh * a.group * a.padded + begin;
  const int32_t* starts = a.document_start + (int64_t)b * a.padded + begin;
  float* out = a.out + b * a.stride_b + h * a.stride_h + begin * a.stride_t;
  double carried = 0., factor = 1.;
  if (a.dn_scale || a.value_scale) factor = 1. / ((a.dn_scale ? (double)a.dn_scale[bh] : 1.) * (a.value_scale ? (double)a.value_scale[bh] : 1.));
  const int rounded = a.step_dots ? (count + kStep - 1) / kStep * kStep : count;  // a warp's tokens are a step
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int done = 0; done < rounded; done += blockDim.x * kTokens) {
    const int end = rounded - done - (int)threadIdx.x * kTokens, first = end <= count ? end - kTokens : -1;
    // All that is read, before anything waits for a part of it.
    double value[kTokens] = {};
    float given = 0.f, known = 0.f, decay = INFINITY;
    int4 start = make_int4(0, 0, 0, 0);
    const bool of_chunk = first >= 0 && (end % a.chunk_size == 0 || end == count);
    if (first >= 0) {
      const float4 key = *(const float4*)(keys + first);
      if (a.document_start) start = *(const int4*)(starts + first);
      if (of_chunk && a.flow) known = a.flow[(int64_t)bh * a.chunk_count + span * a.span_chunks + (end - 1) / a.chunk_size];
      if (a.step_dots) {
        const float4 part = *(const float4*)(a.step_dots + (int64_t)bh * a.padded + begin + first);
        if (lane == 0 && begin + end < a.padded) {
          const float* const of_blocks = a.block_decay + ((int64_t)bh * a.padded + begin + end - kStep) / kBlock;
          static_assert(kStepBlocks == 2 && kStep == 32 * kTokens);
          decay = of_blocks[0] * of_blocks[1];
        }
        given = (part.x + part.y) + (part.z + part.w);
      }
#pragma unroll 4
      for (int q = 0; q < a.group; q++) {
        const float4 query = *(const float4*)(queries + q * a.padded + first);
        value[0] += query.x, value[1] += query.y, value[2] += query.z, value[3] += query.w;
      }
      value[0] -= key.x, value[1] -= key.y, value[2] -= key.z, value[3] -= key.w;
    }
    if (a.step_dots)
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) given += __shfl_xor_sync(~0u, given, lanes);
    bool begins = of_chunk && (known != INFINITY || end == count);
    if (decay < kForgottenStep) known = given, begins = true;
    bool closed[kTokens] = {};
    Segment mine = {begins ? known : 0., begins};
    if (first >= 0) {
      const int of_token[kTokens] = {start.x, start.y, start.z, start.w};
#pragma unroll
      for (int i = kTokens - 1; i >= 0; i--) {
        const int64_t t = begin + first + i;
        closed[i] = t == 0 ? !a.has_initial_state : of_token[i] == t;
        mine = then(mine, {closed[i] ? 0. : value[i], closed[i]});
      }
    }
    double sum = exclusive_sum(mine, &carried, warps);
    if (begins) sum = known;
    // By way of shared memory: where the heads of a token lie side by side, neighbouring lanes then write neighbouring tokens. The next results are written
    // after exclusive_sum, where all threads meet.
    float4 result;
#pragma unroll
    for (int i = kTokens - 1; i >= 0; i--) {
      sum = closed[i] ? 0. : sum + value[i];
      (&result.x)[i] = (float)(sum * factor);
    }
    results[warp][31 - lane] = result;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      const int token = rounded - done - (warp + 1) * kStep + 32 * i + lane;
      if (token >= 0 && token < count && begin + token < a.seq_len) out[token * a.stride_t] = (&results[warp][0].x)[32 * i + lane];
    }
  }
}

// dlog_G beyond the end of a chunk without adding up what is to the right: what passes through the chunk, chunk_decay <S, E>, and what its keys
// give to later chunks. One thread block per chunk. Reading S and E is what it costs, so it is done for the last chunk of a span, and for others (from
// the right) wherever the decay from a chunk's start to the last end that is known falls below kForgotten: adding up brings along the rounding of every
// state in between, whose size does not decay with what they are about. And before a row's last chunk that is not whole: where a final state has a gradient,
// what passes through few tokens rests on rounded states, what a chunk's keys give on their gradient alone. The rest is infinite: to be added up.
// Without the keys' sums it is <S_{n+1}, E_n> at the end itself.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) state_flow(const T* states, const T* grad_states, const float* chunk_decay, const float* key_states,
                                                       int64_t seq_len, int chunk_size, uint32_t chunk_count, uint32_t span_chunks, float scale, float* flow) {
  follow_earlier_kernels();
  constexpr int kGroups = D / 8 + 1, kPieces = phi_tiles(D) * kGroups * kBlock, kAhead = 4;
  __shared__ double partial[kThreads / 32];
  const uint32_t bh = blockIdx.x / chunk_count, n = blockIdx.x % chunk_count;
  const uint32_t last = min(n - n % span_chunks + span_chunks, chunk_count) - 1;
  const bool last_is_whole = (int64_t)(last + 1) * chunk_size <= seq_len;
  bool known = true;
  float kept = last_is_whole ? 1.f : 0.f;
#pragma unroll 4
  for (int at = (int)(last - n) - 1; at >= 0; at--) {
    kept *= chunk_decay[blockIdx.x + at];
    known = kept < kForgotten;
    if (known) kept = 1.f;
  }
  if (!known) {
    if (threadIdx.x == 0) flow[blockIdx.x] = INFINITY;
    return;
  }
  const bool at_end = !key_states;
  const float factor = at_end ? (n + 1 < chunk_count ? 1.f : 0.f) : states ? chunk_decay[blockIdx.x] : 0.f;
  float through = 0.f;
  if (factor > kNegligibleDecay) {
    const int64_t at = (int64_t)blockIdx.x * phi_tiles(D) * state_tile_elements(D);
    if (at_end) states += phi_tiles(D) * state_tile_elements(D);
    for (int first = threadIdx.x; first < kPieces; first += kAhead * kThreads) {  // eight columns of one row a piece
      uint4 s[kAhead], e[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const int piece = first + i * kThreads;
        s[i] = e[i] = make_uint4(0, 0, 0, 0);
        if (piece < kPieces) s[i] = *(const uint4*)(states + at + piece * 8), e[i] = *(const uint4*)(grad_states + at + piece * 8);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const int piece = first + i * kThreads;
        const uint32_t *sw = &s[i].x, *ew = &e[i].x;
        float dot = 0.f;
        if (piece / kBlock % kGroups == D / 8) {  // the normaliser, hi and lo
          dot = (Numeric<T>::low(sw[0]) + Numeric<T>::high(sw[0])) * (Numeric<T>::low(ew[0]) + Numeric<T>::high(ew[0]));
        } else {
#pragma unroll
          for (int j = 0; j < 4; j++) dot += Numeric<T>::low(sw[j]) * Numeric<T>::low(ew[j]) + Numeric<T>::high(sw[j]) * Numeric<T>::high(ew[j]);
        }
        // Both carry the weight of their tile, and the product is to have it once.
        through += tile_pair(piece / (kBlock * kGroups), D).distance == 0 ? dot : 0.5f * dot;
      }
    }
  }
  const int64_t begin = (int64_t)n * chunk_size, padded = ceil_div(seq_len, kBlock) * kBlock;
  const int count = (int)min((int64_t)chunk_size, padded - begin);  // zero beyond the row
  double sum = (double)(factor * scale) * through;
  for (int t = threadIdx.x * 4; t < count && !at_end; t += kThreads * 4) {
    const float4 key = *(const float4*)(key_states + bh * padded + begin + t);
    sum += (double)key.x + key.y + key.z + key.w;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; w++) sum += partial[w];
    const float value = (float)sum;
    flow[blockIdx.x] = value == INFINITY ? FLT_MAX : value;  // infinity says something else
  }
}

template <typename T, int D>
int run_state_flow(const pt_problem& p, const pt_state_flow_params& a, cudaStream_t stream) {
  const int64_t padded = padded_blocks(p.seq_len) * kBlock, heads = (int64_t)p.batch * p.key_heads, chunk_count = chunks(p.seq_len, p.chunk_size);
  const uint32_t span_chunks = a.every_chunk ? 1 : chunks_of_span(p);
  return launch("state_flow", state_flow<T, D>, (unsigned)(heads * chunk_count), kThreads, 0, stream, (const T*)a.states, (const T*)a.grad_states,
                gates_of(p, a.gates).chunk_decay, a.key_dots ? a.key_dots + heads * padded : nullptr, p.seq_len, p.chunk_size, (uint32_t)chunk_count,
                span_chunks, 1.f / (p.state_scale * p.state_scale), a.flow);
}

}  // namespace

}  // namespace powertrain

using namespace powertrain;

#define PT_REQUIRE(condition) \
  if (!(condition)) return fail(PT_INVALID, "%s: %s does not hold", __func__, #condition)

extern "C" {

int pt_state_flow(const pt_problem* problem, const pt_state_flow_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->grad_states && params->gates && params->flow);
  PT_REQUIRE(params->states || chunks(problem->seq_len, problem->chunk_size) == 1);
  return with_type(*problem, [&](auto element, auto dim) {
    return run_state_flow<decltype(element), dim.value>(*problem, *params, (cudaStream_t)stream);
  });
}

int pt_gate_grad(const pt_problem* problem, const pt_gate_grad_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->query_dots && params->key_dots && params->dlog_G);
  PT_REQUIRE(params->gates || !(params->step_dots || params->has_documents));
  PT_REQUIRE(!params->step_dots || problem->chunk_size % kStep == 0);
  PT_REQUIRE(params->flow || chunks(problem->seq_len, problem->chunk_size) == 1);
  const pt_problem& p = *problem;
  const pt_gate_grad_params& a = *params;
  GateGradArguments k;
  k.query_dots = a.query_dots, k.key_dots = a.key_dots, k.step_dots = a.step_dots, k.flow = a.flow, k.dn_scale = a.dn_scale, k.value_scale = a.value_scale;
  k.block_decay = gates_of(p, a.gates).block_decay;
  k.document_start = a.has_documents ? gates_of(p, a.gates).document_start : nullptr;
  k.out = a.dlog_G, k.stride_b = a.dlog_G_stride_b, k.stride_t = a.dlog_G_stride_t, k.stride_h = a.dlog_G_stride_h;
  k.seq_len = p.seq_len, k.padded = padded_blocks(p.seq_len) * kBlock;
  k.heads = p.key_heads, k.group = p.query_heads / p.key_heads, k.chunk_size = p.chunk_size, k.chunk_count = (int)chunks(p.seq_len, p.chunk_size);
  k.span_chunks = chunks_of_span(p), k.span_count = (int)ceil_div(k.chunk_count, k.span_chunks), k.has_initial_state = a.has_initial_state;
  // Four tokens a thread, whole warps.
  const int64_t tokens = std::min({(int64_t)k.span_chunks * p.chunk_size, k.padded, (int64_t)kSpan});
  return launch("gate_grad", gate_grad, (unsigned)((int64_t)p.batch * p.key_heads * k.span_count), (unsigned)(ceil_div(tokens, 128) * 32), 0,
                (cudaStream_t)stream, k);
}

}  // extern "C"
