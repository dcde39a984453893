#include "segments.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace powertrain {
namespace {

constexpr int kThreads = 128;
constexpr float kNegligible = 1e-12f;  // a carried state below this share of itself is beyond the 16 bits of any sum it enters

struct JoinParams {
  const float* locals;
  const float* chunk_decay;  // (B, Hk, N)
  void* states;
  float* final_state;
  int64_t chunks, boundary_stride;  // boundary elements of all (b, h)
  int segments, tiles, reverse;
  float state_scale;
};

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Grid (8-column row pieces of all tiles / kThreads, segments, B * Hk). A thread owns 8 columns of one row of a tile.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) join_kernel(const JoinParams p) {
  constexpr int kColumns = kHeadDim + kNormColumns, kGroups = kColumns / 8;
  const int piece = blockIdx.x * kThreads + threadIdx.x;
  if (piece >= p.tiles * kGroups * kBlock) return;
  const int row = piece % kBlock, group = piece / kBlock % kGroups, tile = piece / (kBlock * kGroups);
  const int64_t head = blockIdx.z;
  const int segment = blockIdx.y + 1;  // `segment == p.segments` stands for the final state
  const int64_t boundary_at = (head * p.tiles + tile) * kBlock * kColumns + (int64_t)row * kColumns + group * 8;
  const float* decay = p.chunk_decay + head * p.chunks;
  auto physical = [&](int64_t logical) { return p.reverse ? p.chunks - 1 - logical : logical; };

  float incoming[8] = {};
  for (int s = 0; s < segment; s++) {
    float carried = s == 0 ? 0.f : 1.f;
    for (int64_t l = segment_begin(p.chunks, p.segments, s); l < segment_begin(p.chunks, p.segments, s + 1) && carried > 0.f; l++)
      carried *= decay[physical(l)];
    const float* local = p.locals + s * p.boundary_stride + boundary_at;
#pragma unroll
    for (int c = 0; c < 8; c++) incoming[c] = carried * incoming[c] + local[c];
  }
  if (segment == p.segments) {
    if (p.final_state)
#pragma unroll
      for (int c = 0; c < 8; c++) p.final_state[boundary_at + c] = incoming[c];
    return;
  }
  if (!p.states) return;
  const float weight = (tile_pair(tile, kHeadDim).distance ? 2.f : 1.f) * p.state_scale;
  float carried = 1.f;
  const int64_t end = segment_begin(p.chunks, p.segments, segment + 1);
  for (int64_t l = segment_begin(p.chunks, p.segments, segment); l < end && carried > kNegligible; l++) {
    const int64_t n = physical(l);
    T* at = (T*)p.states + ((head * p.chunks + n) * p.tiles + tile) * (kBlock * kColumns) + state_index(row, group * 8);
    alignas(16) T values[8];
    *(uint4*)values = *(const uint4*)at;
    const float factor = carried * weight;
    if (group == kGroups - 1) {
      const float total = to_float(values[0]) + to_float(values[1]) + factor * incoming[0];
      values[0] = from_float<T>(total);
      values[1] = from_float<T>(total - to_float(values[0]));
    } else {
#pragma unroll
      for (int c = 0; c < 8; c++) values[c] = from_float<T>(to_float(values[c]) + factor * incoming[c]);
    }
    *(uint4*)at = *(const uint4*)values;
    carried *= decay[n];
  }
}

template <typename T, int kHeadDim>
int launch(const pt_problem& problem, const JoinParams& p, cudaStream_t stream) {
  const int pieces = p.tiles * (kHeadDim + kNormColumns) / 8 * kBlock;
  dim3 grid((unsigned)ceil_div(pieces, kThreads), (unsigned)(p.segments - (p.final_state ? 0 : 1)), (unsigned)(problem.batch * problem.key_heads));
  join_kernel<T, kHeadDim><<<grid, kThreads, 0, stream>>>(p);
  return check_cuda(cudaGetLastError(), "join_segments");
}

template <typename T>
int dispatch(const pt_problem& problem, const JoinParams& p, cudaStream_t stream) {
  switch (problem.head_dim) {
    case 32: return launch<T, 32>(problem, p, stream);
    case 64: return launch<T, 64>(problem, p, stream);
    default: return launch<T, 128>(problem, p, stream);
  }
}

}  // namespace

int64_t boundary_elements(const pt_problem& problem) {
  return (int64_t)problem.batch * problem.key_heads * phi_tiles(problem.head_dim) * kBlock * (problem.head_dim + kNormColumns);
}

int choose_segments(const pt_problem& problem, int64_t blocks_per_segment) {
  constexpr int kMost = 32;            // bounds the workspace and the join's own serial part
  constexpr double kJoinCost = 0.15;   // of the whole scan; measured at K = 64 (docs/kernels.md)
  const int64_t limit = std::min<int64_t>(kMost, chunks(problem.seq_len, problem.chunk_size));
  const double device = multiprocessors();
  int best = 1;
  double best_cost = 0;
  for (int s = 1; s <= limit; s++) {
    const double waves = (double)ceil_div(blocks_per_segment * s, (int64_t)device);
    const double ideal = blocks_per_segment / device;
    const double cost = waves / s + (s > 1 ? kJoinCost * ideal : 0.0);
    if (s == 1 || cost < best_cost * 0.97) best = s, best_cost = cost;
  }
  return best;
}

int join_segments(const pt_problem& problem, const pt_chunk_state_params& params, int segments, const float* locals, cudaStream_t stream) {
  JoinParams p;
  p.locals = locals;
  p.chunk_decay = gates_of(problem, params.gates).chunk_decay;
  p.states = params.states;
  p.final_state = params.final_state;
  p.chunks = chunks(problem.seq_len, problem.chunk_size);
  p.boundary_stride = boundary_elements(problem);
  p.segments = segments;
  p.tiles = phi_tiles(problem.head_dim);
  p.reverse = params.reverse;
  p.state_scale = problem.state_scale;
  return problem.dtype == PT_FP16 ? dispatch<__half>(problem, p, stream) : dispatch<__nv_bfloat16>(problem, p, stream);
}

}  // namespace powertrain
