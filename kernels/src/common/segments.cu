#include "segments.h"

#include <algorithm>

#include "launch.cuh"
#include "numeric.cuh"

namespace powertrain {
namespace {

constexpr int kThreads = 128;

struct JoinParams {
  const float* locals;
  const float* initial;      // null unless kCarryIn
  const float* chunk_decay;  // (B, Hk, N)
  void* states;
  float* final_state;
  int64_t chunks, boundary_stride;  // boundary elements of all (b, h)
  int segments, tiles, reverse;
  float state_scale;
};

// Eight 16-bit values plus factor * incoming; the normaliser's are a sum hi + lo.
template <typename T>
__device__ inline uint4 add(uint4 old, const float (&incoming)[8], float factor, bool is_norm) {
  alignas(16) T values[8];
  *(uint4*)values = old;
  if (is_norm) {
    const float total = Numeric<T>::to_float(values[0]) + Numeric<T>::to_float(values[1]) + factor * incoming[0];
    values[0] = Numeric<T>::from_float(total);
    values[1] = Numeric<T>::from_float(total - Numeric<T>::to_float(values[0]));
  } else {
#pragma unroll
    for (int c = 0; c < 8; c++) values[c] = Numeric<T>::from_float(Numeric<T>::to_float(values[c]) + factor * incoming[c]);
  }
  return *(uint4*)values;
}

// Grid (8-column row pieces of all tiles / kThreads, B * Hk). A thread owns 8 columns of one row of a tile and walks through time; the states of
// kAhead chunks are in flight at once. kCarryIn: one segment, which `initial` enters, and nobody reads what leaves it.
template <typename T, int kHeadDim, bool kCarryIn>
__global__ void __launch_bounds__(kThreads) join_kernel(const JoinParams p) {
  follow_earlier_kernels();
  constexpr int kColumns = kHeadDim + kNormColumns, kGroups = kColumns / 8;
  constexpr int kAhead = kHeadDim == 32 ? 16 : 4;  // so few threads cover the latency of memory only with more loads in flight each
  const int piece = blockIdx.x * kThreads + threadIdx.x;
  if (piece >= p.tiles * kGroups * kBlock) return;
  const int row = piece % kBlock, group = piece / kBlock % kGroups, tile = piece / (kBlock * kGroups);
  const int64_t head = blockIdx.y;
  const int64_t boundary_at = (head * p.tiles + tile) * kBlock * kColumns + (int64_t)row * kColumns + group * 8;
  const float* decay = p.chunk_decay + head * p.chunks;
  const float weight = (tile_pair(tile, kHeadDim).distance ? 2.f : 1.f) * p.state_scale;
  T* const states = p.states ? (T*)p.states + (head * p.chunks * p.tiles + tile) * (kBlock * kColumns) + state_index(row, group * 8) : nullptr;
  const int64_t stride = p.reverse ? -(int64_t)p.tiles * (kBlock * kColumns) : (int64_t)p.tiles * (kBlock * kColumns);
  auto physical = [&](int64_t logical) { return p.reverse ? p.chunks - 1 - logical : logical; };

  float incoming[8] = {};
  if constexpr (kCarryIn)
#pragma unroll
    for (int c = 0; c < 8; c++) incoming[c] = p.initial[boundary_at + c];
  for (int segment = 0; segment < p.segments; segment++) {
    const int64_t begin = segment_begin(p.chunks, p.segments, segment), end = segment_begin(p.chunks, p.segments, segment + 1);
    float carried = segment == 0 && !kCarryIn ? 0.f : 1.f;
    int64_t l = begin;
    // What the segment adds by itself is under way while its states are.
    alignas(16) float own[8];
    if constexpr (!kCarryIn) {
      const float4* const local = (const float4*)(p.locals + segment * p.boundary_stride + boundary_at);
      ((float4*)own)[0] = local[0], ((float4*)own)[1] = local[1];
    }
    if (states)
      for (; l < end && carried > kNegligibleDecay; l += kAhead) {
        T* at = states + physical(l) * (stride < 0 ? -stride : stride);
        uint4 loaded[kAhead];
        float factor[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
          factor[a] = carried * weight;
          if (l + a < end) {
            loaded[a] = *(const uint4*)(at + a * stride);
            carried *= decay[physical(l + a)];
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; a++)
          if (l + a < end) *(uint4*)(at + a * stride) = add<T>(loaded[a], incoming, factor[a], group == kGroups - 1);
      }
    if constexpr (!kCarryIn) {
      for (; l < end && carried > 0.f; l++) carried *= decay[physical(l)];
#pragma unroll
      for (int c = 0; c < 8; c++) incoming[c] = carried * incoming[c] + own[c];
    }
  }
  if (p.final_state)
#pragma unroll
    for (int c = 0; c < 8; c++) p.final_state[boundary_at + c] = incoming[c];
}

// Grid (boundary elements of a head / (4 kThreads), B * Hk). What the first segments leave is under way while the decays across them are multiplied.
__global__ void __launch_bounds__(kThreads) enter_kernel(float* locals, const float* chunk_decay, const float* initial, float* final_state,
                                                         int64_t chunks, int64_t head_elements, int64_t boundary_stride, int segments, bool reverse) {
  follow_earlier_kernels();
  __shared__ float across[kMostEntered];
  constexpr int kAhead = 16;
  const int64_t element = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * 4, at = blockIdx.y * head_elements + element;
  const bool exists = element < head_elements;
  const int owned = exists ? final_state ? segments : segments - 1 : 0;
  float4 own[kAhead];
  const auto load = [&](int first) {
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      own[a] = first + a < owned ? *(const float4*)(locals + (first + a) * boundary_stride + at) : make_float4(0.f, 0.f, 0.f, 0.f);
  };
  load(0);
  float4 entering = initial && exists ? *(const float4*)(initial + at) : make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kLanes = 8;  // of a segment
  for (int segment = threadIdx.x / kLanes; segment < (segments + 3) / 4 * 4; segment += kThreads / kLanes) {  // whole warps
    const int64_t end = segment < segments ? segment_begin(chunks, segments, segment + 1) : 0;
    float decay = 1.f;
    for (int64_t l = segment_begin(chunks, segments, segment) + threadIdx.x % kLanes; l < end; l += kLanes)
      decay *= chunk_decay[blockIdx.y * chunks + (reverse ? chunks - 1 - l : l)];
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) decay *= __shfl_xor_sync(~0u, decay, step);
    if (threadIdx.x % kLanes == 0 && segment < segments) across[segment] = decay;
  }
  __syncthreads();
  if (!exists) return;
  for (int first = 0; first < segments; first += kAhead) {
    if (first > 0) load(first);
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (first + a >= segments) continue;
      __stwb((float4*)(locals + (first + a) * boundary_stride + at), entering);  // an intrinsic: nvcc makes four stores of an assignment
      const float decay = across[first + a];
      entering = make_float4(fmaf(decay, entering.x, own[a].x), fmaf(decay, entering.y, own[a].y), fmaf(decay, entering.z, own[a].z),
                             fmaf(decay, entering.w, own[a].w));
    }
  }
  if (final_state) __stwb((float4*)(final_state + at), entering);
}

template <typename T, int kHeadDim>
int launch_join(const pt_problem& problem, const JoinParams& p, cudaStream_t stream) {
  const int pieces = p.tiles * (kHeadDim + kNormColumns) / 8 * kBlock;
  dim3 grid((unsigned)ceil_div(pieces, kThreads), (unsigned)(problem.batch * problem.key_heads));
  const auto kernel = p.initial ? join_kernel<T, kHeadDim, true> : join_kernel<T, kHeadDim, false>;
  return launch("join_segments", kernel, grid, kThreads, 0, stream, p);
}

int join(const pt_problem& problem, const pt_chunk_state_params& params, int segments, const float* locals, const float* initial,
         cudaStream_t stream) {
  JoinParams p;
  p.locals = locals;
  p.initial = initial;
  p.chunk_decay = gates_of(problem, params.gates).chunk_decay;
  p.states = params.states;
  p.final_state = params.final_state;
  p.chunks = chunks(problem.seq_len, problem.chunk_size);
  p.boundary_stride = boundary_elements(problem);
  p.segments = segments;
  p.tiles = phi_tiles(problem.head_dim);
  p.reverse = params.reverse;
  p.state_scale = problem.state_scale;
  return with_type(problem, [&](auto element, auto dim) { return launch_join<decltype(element), dim.value>(problem, p, stream); });
}

// The number of segments of least cost, the fewest among those that differ by little.
template <typename Cost>
int cheapest_segments(int64_t most, Cost cost) {
  constexpr double kWorthwhile = 0.97;
  int best = 1;
  double best_cost = cost(1);
  for (int s = 2; s <= most; s++)
    if (const double of_s = cost(s); of_s < best_cost * kWorthwhile) best = s, best_cost = of_s;
  return best;
}

}  // namespace

int64_t boundary_elements(const pt_problem& problem) {
  return (int64_t)problem.batch * problem.key_heads * phi_tiles(problem.head_dim) * kBlock * (problem.head_dim + kNormColumns);
}

int choose_segments(const pt_problem& problem, int64_t blocks_per_segment) {
  constexpr int kMost = 32;  // bounds the workspace
  // In units of the time that a thread block takes for 1024 tokens, estimated from bytes: the pass over the states, per thread
  // block and chunk of the device, and writing and reading one thread block's part of a segment's final state.
  constexpr double kJoinCost = 0.15, kLocalCost = 0.007;
  const int64_t count = chunks(problem.seq_len, problem.chunk_size);
  const int64_t device = multiprocessors();
  return cheapest_segments(std::min<int64_t>(kMost, count), [&](int s) {
    // In chunks that the busiest multiprocessor walks through, one thread block at a time.
    return (double)ceil_div(blocks_per_segment * s, device) * ceil_div(count, s) +
           (s > 1 ? (kJoinCost * count / device + kLocalCost * s * 1024.0 / problem.chunk_size) * blocks_per_segment : 0.0);
  });
}

int choose_entered_segments(const pt_problem& problem) {
  constexpr double kOwn = 0.33;  // of the rest: a segment's state or gradient by itself (measured: 0.30 of key_grads, 0.44 of query_scan)
  const int64_t count = chunks(problem.seq_len, problem.chunk_size), heads = (int64_t)problem.batch * problem.key_heads;
  const int64_t device = multiprocessors();
  // Every call asks several times, nearly always for the same shapes, and the search takes microseconds. A memo of what follows from the shapes alone.
  static thread_local struct {
    int64_t count, heads, device;
    int segments;
  } last;
  if (last.count != count || last.heads != heads || last.device != device) {
    const int best = cheapest_segments(std::min<int64_t>(kMostEntered, count), [&](int s) {
      return (double)ceil_div(heads * s, device) * ceil_div(count, s) * (s > 1 ? 1 + kOwn : 1);
    });
    last = {count, heads, device, best};
  }
  return last.segments;
}

int join_segments(const pt_problem& problem, const pt_chunk_state_params& params, int segments, const float* locals, cudaStream_t stream) {
  return join(problem, params, segments, locals, nullptr, stream);
}

int enter_segments(const pt_problem& problem, const SegmentScan& scan, int segments, float* locals, cudaStream_t stream) {
  const int64_t heads = (int64_t)problem.batch * problem.key_heads, all = boundary_elements(problem), of_head = all / heads;
  return launch("enter_segments", enter_kernel, dim3((unsigned)ceil_div(of_head, 4 * kThreads), (unsigned)heads), kThreads, 0, stream, locals,
                gates_of(problem, scan.gates).chunk_decay, scan.initial, scan.final_state, chunks(problem.seq_len, problem.chunk_size), of_head, all, segments,
                scan.reverse);
}

int carry_in(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream) {
  return join(problem, params, 1, nullptr, params.initial, stream);
}

}  // namespace powertrain
