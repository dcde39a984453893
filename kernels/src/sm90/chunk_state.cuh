// chunk_state on Hopper: S_n = chunk_decay S_{n-1} + phi(x)^T u at every chunk boundary, phi formed in registers; u carries the decays.
//
// A warpgroup keeps a group of phi tiles (64 x (V + 8) each) in fp32 accumulators for a whole time segment and streams x and u past them in
// blocks of 64 tokens. Rows of A are features and its columns time, so with x stored transposed the fragment of phi(i, j) is the fragment of
// x_j times a pair of x_i along time; ldmatrix with one row address for all eight rows delivers that pair to every thread.
#pragma once
#include "../common/launch.cuh"
#include "../common/segments.h"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace powertrain::sm90 {

// The phi tiles that the two warpgroups of a thread block keep. Shared memory is the limit: a tile's B operand takes half of its bandwidth while
// the tensor cores take the tile, so fragments of x are loaded once for all tiles that have them in common. `i_slot`, `j_slot`: which loaded
// fragment the m-th tile uses; `i_tile`, `j_tile`: a tile that has it. Accumulators take kTiles (V + 8) / 2 registers: 100, 180 or 144, 136.
template <int kHeadDim, int kKind>
struct TileGroup;
// (I, I), (I, I+1), (I+1, I+1), (I+1, I+2) with I = 2 group, and (group, group + 2).
template <int kKind>
struct TileGroup<32, kKind> {
  static constexpr int kTiles = 5, kI = 3, kJ = 4;
  __device__ static constexpr int tile(int group, int m) { return m < 4 ? 4 * group + m : 8 + group; }
  __device__ static constexpr int i_slot(int m) { return m / 2; }
  __device__ static constexpr int j_slot(int m) { return m < 2 ? m : m - 1; }
  __device__ static constexpr int i_tile(int group, int slot) { return tile(group, 2 * slot); }
  __device__ static constexpr int j_tile(int group, int slot) { return tile(group, slot < 2 ? slot : slot + 1); }
};
// Everything with I = group: distances 0 to 3, and 4 where group < 4 (kind 0).
template <int kKind>
struct TileGroup<64, kKind> {
  static constexpr int kTiles = 5 - kKind, kI = 1, kJ = kTiles;
  __device__ static constexpr int tile(int group, int m) { return m < 4 ? 4 * group + m : 32 + group; }
  __device__ static constexpr int i_slot(int) { return 0; }
  __device__ static constexpr int j_slot(int m) { return m; }
  __device__ static constexpr int i_tile(int group, int) { return tile(group, 0); }
  __device__ static constexpr int j_tile(int group, int slot) { return tile(group, slot); }
};
// Two neighbours with the same I; or (kind 1) two of distance 8, which have none in common.
template <int kKind>
struct TileGroup<128, kKind> {
  static constexpr int kTiles = 2, kI = kKind == 0 ? 1 : 2, kJ = 2;
  __device__ static constexpr int tile(int group, int m) { return 2 * group + m; }
  __device__ static constexpr int i_slot(int m) { return kKind == 0 ? 0 : m; }
  __device__ static constexpr int j_slot(int m) { return m; }
  __device__ static constexpr int i_tile(int group, int slot) { return tile(group, slot); }
  __device__ static constexpr int j_tile(int group, int slot) { return tile(group, slot); }
};

// Thread blocks that hold a head's state, and stages of x and u: 147, 139 and 139 KiB.
template <int kHeadDim>
constexpr int kStateBlocks = kHeadDim == 32 ? 1 : kHeadDim == 64 ? 4 : 34;
template <int kHeadDim>
constexpr int kStateStages = kHeadDim == 32 ? 16 : kHeadDim == 64 ? 8 : 4;

struct ChunkStateParams {
  const void* x;             // packed features
  const void* u;             // decayed values
  const float* chunk_decay;  // (B, Hk, N)
  const float* initial;      // boundary or null
  void* states;              // or null
  float* final_state;        // boundary or null; written here only if segments == 1
  float* locals;             // (segments, boundary) if segments > 1
  int64_t boundary_stride;
  int64_t blocks, chunks;
  int blocks_per_chunk, group, segments, reverse;  // group: heads of x and u per key head
  int wants_final;  // somebody reads what the last chunk passes on
  float state_scale;
};

template <int kHeadDim, typename T>
struct ChunkState {
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kColumns / 8;
  static constexpr int kStages = kStateStages<kHeadDim>;
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2;
  static constexpr int kStageBytes = kXBytes + kUBytes;
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * 128;  // the last warpgroup produces
  static constexpr int kSharedBytes = kStages * kStageBytes + 16 * kStages;

  // Walks the chunks of this thread block's segment in scan order.
  template <typename Body>
  __device__ static void for_each_chunk(const ChunkStateParams& p, Body body) {
    const int segment = blockIdx.y;
    const int64_t end = segment_begin(p.chunks, p.segments, segment + 1);
#pragma unroll 1
    for (int64_t l = segment_begin(p.chunks, p.segments, segment); l < end; l++) {
      const int64_t n = p.reverse ? p.chunks - 1 - l : l;
      const int64_t first = n * p.blocks_per_chunk;
      const bool passed_on = l + 1 < p.chunks || p.wants_final;
      body(n, first, passed_on ? (int)min((int64_t)p.blocks_per_chunk, p.blocks - first) : 0);
    }
  }

  __device__ static void produce(const ChunkStateParams& p, uint32_t shared, uint32_t barriers) {
    Ring<kStages> ring(barriers);
    const int64_t head = blockIdx.z;
    for_each_chunk(p, [&](int64_t, int64_t first, int count) {
#pragma unroll 1
      for (int g = 0; g < p.group; g++) {
        const int64_t start = (head * p.group + g) * p.blocks + first;
#pragma unroll 1
        for (int b = 0; b < count; b++) {
          ring.wait_empty();
          const uint32_t at = shared + ring.stage() * kStageBytes, full = ring.full_barrier();
          barrier_expect(full, kStageBytes);
          bulk_load(at, (const T*)p.x + (start + b) * feature_block_elements(kHeadDim), kXBytes, full);
          bulk_load(at + kXBytes, (const T*)p.u + (start + b) * value_block_elements(kHeadDim), kUBytes, full);
          ring.advance();
        }
      }
    });
  }

  template <class Group>
  __device__ static void consume(const ChunkStateParams& p, int group, uint32_t shared, uint32_t barriers) {
    constexpr int kTiles = Group::kTiles, kPairs = Group::kJ / 2;
    const int lane = threadIdx.x % 32, warp = uniform_warp() % 4;

    // ldmatrix row addresses within a block of x. x_i: matrices (i even, odd) x (first, second 8 tokens), all rows the same one.
    // x_j: matrices (first, second 8 tokens) x (two blocks J, the last one alone where their number is odd), rows are the features of J.
    uint32_t i_offset[Group::kI], j_offset[kPairs + Group::kJ % 2];
#pragma unroll
    for (int a = 0; a < Group::kI; a++) {
      const TilePair pair = tile_pair(Group::i_tile(group, a), kHeadDim);
      i_offset[a] = ((pair.i_block * 8 + (lane >> 4)) * 64 + (2 * warp + (lane >> 3 & 1)) * 8) * 2;
    }
#pragma unroll
    for (int a = 0; a < kPairs + Group::kJ % 2; a++) {
      const TilePair pair = tile_pair(Group::j_tile(group, min(2 * a + (lane >> 4), Group::kJ - 1)), kHeadDim);
      j_offset[a] = ((pair.j_block * 8 + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2;
    }

    float acc[kTiles][kColumns / 2];
    const int64_t head = blockIdx.z;
    const int tiles = phi_tiles(kHeadDim);
    // Rows 16 warp + lane / 4 and + 8, columns 8 c + 2 (lane % 4) and + 1: where this thread's accumulators live in a boundary tile.
    const int boundary_at = (16 * warp + lane / 4) * kColumns + 2 * (lane % 4);
    if (p.initial && blockIdx.y == 0) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const float* from = p.initial + (head * tiles + Group::tile(group, m)) * (kBlock * kColumns) + boundary_at;
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++) {
          const float2 top = *(const float2*)(from + c * 8), bottom = *(const float2*)(from + c * 8 + 8 * kColumns);
          acc[m][4 * c] = top.x, acc[m][4 * c + 1] = top.y, acc[m][4 * c + 2] = bottom.x, acc[m][4 * c + 3] = bottom.y;
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kTiles; m++)
#pragma unroll
        for (int c = 0; c < kColumns / 2; c++) acc[m][c] = 0.f;
    }

    Ring<kStages> ring(barriers);
    // The products of 16 tokens are one or two wgmma groups, with fragments of phi of their own: one group runs while the next one's are formed.
    constexpr int kGroups = kHeadDim == 64 ? 2 : 1, kFirst = kGroups == 1 ? kTiles : (kTiles + 1) / 2;  // products of the first group
    uint32_t a[3 - kGroups][kTiles][4], xi[Group::kI][4], xj[Group::kJ][2];
    // Fragments of x of the stage's k-th 16 tokens. They are loaded before the products that come before theirs are issued.
    const auto load_x = [&](int k) {
      const uint32_t x = shared + ring.stage() * kStageBytes + k * 256;
#pragma unroll
      for (int i = 0; i < Group::kI; i++) load_matrices(xi[i], x + i_offset[i]);
#pragma unroll
      for (int j = 0; j < kPairs; j++) load_matrices(xj[2 * j], xj[2 * j + 1], x + j_offset[j]);
      if constexpr (Group::kJ % 2) load_matrices(xj[Group::kJ - 1], x + j_offset[kPairs]);
    };
    for_each_chunk(p, [&](int64_t n, int64_t, int count) {
      if (p.states) write_state<Group>(p, acc, group, n, warp, lane);
      const float across = p.chunk_decay[head * p.chunks + n];
#pragma unroll
      for (int m = 0; m < kTiles; m++)
#pragma unroll
        for (int c = 0; c < kColumns / 2; c++) acc[m][c] *= across;

      const int steps = count * p.group;
      if (steps > 0) {
        ring.wait_full();
        load_x(0);
      }
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        const CoreMatrices columns(shared + ring.stage() * kStageBytes + kXBytes, 128, 1024);
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++) {
#pragma unroll
          for (int group = 0; group < kGroups; group++) {
            const int first = group * kFirst, end = group == 0 ? kFirst : kTiles, turn = k * kGroups + group;
            uint32_t(&fragments)[kTiles][4] = a[turn % (3 - kGroups)];
            wgmma_wait<1>();  // the products that read these fragments are done
            if (turn == 1) ring.release(ring.previous(), step > 0);
#pragma unroll
            for (int m = first; m < end; m++)
#pragma unroll
              for (int r = 0; r < 4; r++) fragments[m][r] = Pair<T>::multiply(xj[Group::j_slot(m)][r / 2], xi[Group::i_slot(m)][r]);
            if (group == kGroups - 1 && k + 1 < kBlock / 16) load_x(k + 1);
            wgmma_fence();
#pragma unroll
            for (int m = first; m < end; m++) wgmma<T, true>(acc[m], fragments[m], columns.at(k * 256), true);
            wgmma_commit();
          }
        }
        ring.advance();
        if (step + 1 < steps) {
          ring.wait_full();
          load_x(0);
        }
      }
      wgmma_wait<0>();
      ring.release(ring.previous(), steps > 0);
    });

    float* out = p.segments > 1 ? p.locals + blockIdx.y * p.boundary_stride : p.final_state;
    if (out) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        float* to = out + (head * tiles + Group::tile(group, m)) * (kBlock * kColumns) + boundary_at;
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++) {
          float2 top = make_float2(acc[m][4 * c], acc[m][4 * c + 1]), bottom = make_float2(acc[m][4 * c + 2], acc[m][4 * c + 3]);
          if (c == kColumnGroups - 1) {
            const bool norm = lane % 4 == 0;
            top = make_float2(norm ? top.x + top.y : 0.f, 0.f), bottom = make_float2(norm ? bottom.x + bottom.y : 0.f, 0.f);
          }
          *(float2*)(to + c * 8) = top;
          *(float2*)(to + c * 8 + 8 * kColumns) = bottom;
        }
      }
    }
  }

  template <class Group>
  __device__ static void write_state(const ChunkStateParams& p, const float (&acc)[Group::kTiles][kColumns / 2], int group, int64_t n, int warp,
                                     int lane) {
#pragma unroll
    for (int m = 0; m < Group::kTiles; m++) {
      const int tile = Group::tile(group, m);
      const float weight = (tile_pair(tile, kHeadDim).distance ? 2.f : 1.f) * p.state_scale;
      // A warp holds two whole core matrices of each column group: 128 contiguous bytes per store.
      T* to = (T*)p.states + ((blockIdx.z * p.chunks + n) * phi_tiles(kHeadDim) + tile) * (int64_t)(kBlock * kColumns) + warp * 128 + lane * 2;
#pragma unroll
      for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float low = acc[m][4 * c + 2 * half] * weight, high = acc[m][4 * c + 2 * half + 1] * weight;
          if (c == kColumnGroups - 1) {
            const float total = lane % 4 == 0 ? low + high : 0.f;
            low = round_to<T>(total), high = total - low;
          }
          *(uint32_t*)(to + c * 512 + half * 64) = Pair<T>::pack(low, high);
        }
    }
  }
};

// Grid (kStateBlocks, segments, B * Hk).
template <int kHeadDim, typename T>
__global__ void __launch_bounds__(ChunkState<kHeadDim, T>::kThreads, 1) chunk_state_kernel(const __grid_constant__ ChunkStateParams p) {
  using Kernel = ChunkState<kHeadDim, T>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = shared_address(shared_memory), barriers = shared + Kernel::kStages * Kernel::kStageBytes;
  if (threadIdx.x == 0) {
    Ring<Kernel::kStages>::init(barriers, Kernel::kWarpgroups * 128);
    barrier_init_fence();
  }
  follow_earlier_kernels();
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kWarpgroups) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x % 128 == 0) Kernel::produce(p, shared, barriers);
  } else {
    take_registers<kConsumerRegisters<Kernel::kWarpgroups>>();
    const int group = kHeadDim == 64 ? blockIdx.x + kStateBlocks<64> * warpgroup : blockIdx.x * Kernel::kWarpgroups + warpgroup;
    const bool second_kind = kHeadDim == 64 ? warpgroup == 1 : kHeadDim == 128 && group >= 64;
    if (second_kind) {
      if constexpr (kHeadDim > 32) Kernel::template consume<TileGroup<kHeadDim, 1>>(p, group, shared, barriers);
    } else {
      Kernel::template consume<TileGroup<kHeadDim, 0>>(p, group, shared, barriers);
    }
  }
}

template <int kHeadDim, typename T>
int64_t chunk_state_workspace_of(const pt_problem& problem) {
  const int segments = choose_segments(problem, (int64_t)kStateBlocks<kHeadDim> * problem.batch * problem.key_heads);
  return segments > 1 ? segments * boundary_elements(problem) * 4 : 0;
}

template <int kHeadDim, typename T>
int launch_chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream) {
  using Kernel = ChunkState<kHeadDim, T>;
  const int segments = choose_segments(problem, (int64_t)kStateBlocks<kHeadDim> * problem.batch * problem.key_heads);
  float* const locals = (float*)params.workspace;
  const Gates gates = gates_of(problem, params.gates);
  const int64_t heads = (int64_t)problem.batch * problem.key_heads;
  ChunkStateParams p;
  p.x = params.x;
  p.u = params.u;
  p.chunk_decay = gates.chunk_decay;
  p.initial = params.initial;
  p.states = params.states;
  p.final_state = params.final_state;
  p.boundary_stride = boundary_elements(problem);
  p.blocks = padded_blocks(problem.seq_len);
  p.chunks = chunks(problem.seq_len, problem.chunk_size);
  p.blocks_per_chunk = problem.chunk_size / kBlock;
  p.group = params.reverse ? problem.query_heads / problem.key_heads : 1;
  p.segments = segments;
  p.locals = locals;
  p.reverse = params.reverse;
  p.wants_final = params.final_state != nullptr;
  p.state_scale = problem.state_scale;
  auto* kernel = chunk_state_kernel<kHeadDim, T>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  const dim3 grid(kStateBlocks<kHeadDim>, p.segments, (unsigned)heads);
  if (int status = launch("chunk_state", kernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p)) return status;
  return segments > 1 ? join_segments(problem, params, segments, locals, stream) : PT_OK;
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_STATE(head_dim, type, type_name)                                                                                 \
  namespace powertrain::sm90 {                                                                                                         \
  template int64_t chunk_state_workspace_of<head_dim, type>(const pt_problem&);                                                        \
  template int launch_chunk_state<head_dim, type>(const pt_problem&, const pt_chunk_state_params&, cudaStream_t);                       \
  static RegisterKernel registered({"chunk_state K=" #head_dim " " type_name, (const void*)chunk_state_kernel<head_dim, type>, 90,      \
                                    ChunkState<head_dim, type>::kThreads, ChunkState<head_dim, type>::kSharedBytes});                  \
  }
