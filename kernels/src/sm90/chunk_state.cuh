// chunk_state on Hopper: S_n = chunk_decay S_{n-1} + phi(x)^T u at every chunk boundary, phi formed in registers.
//
// A warpgroup keeps kTiles phi tiles (64 x (V + 8) each) in fp32 accumulators for a whole time segment and streams x and u past them in blocks
// of 64 tokens. Rows of A are features and its columns time, so with x stored transposed the fragment of phi(i, j) is the fragment of x_j
// times a pair of x_i along time; ldmatrix with one row address for all eight rows delivers that pair to every thread.
// The decay to the chunk's end is multiplied into x_i in fp32, before its rounding to 16 bits.
#pragma once
#include "../common/segments.h"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace powertrain::sm90 {

template <int kHeadDim>
struct ChunkStateConfig;
// Accumulators take kTiles * (V + 8) / 2 registers a thread: 100, 144, 136. Stages fill shared memory up to about 140 KiB at least.
template <>
struct ChunkStateConfig<32> {
  static constexpr int kTiles = 5, kGroups = 2, kSharedGroups = 2, kStages = 16;
};
template <>
struct ChunkStateConfig<64> {
  static constexpr int kTiles = 4, kGroups = 9, kSharedGroups = 8, kStages = 8;
};
template <>
struct ChunkStateConfig<128> {
  static constexpr int kTiles = 2, kGroups = 68, kSharedGroups = 64, kStages = 4;
};

struct ChunkStateParams {
  const void* x;             // packed features
  const void* u;             // packed values
  const float* decay;        // (B, Hk, Tp) to (reverse: from) the chunk's end
  const float* chunk_decay;  // (B, Hk, N)
  const float* initial;      // boundary or null
  void* states;              // or null
  float* final_state;        // boundary or null; written here only if segments == 1
  float* locals;             // (segments, boundary) if segments > 1
  int64_t boundary_stride;
  int64_t blocks, chunks;
  int blocks_per_chunk, group, segments, reverse;  // group: heads of x and u per key head
  float state_scale;
};

template <int kHeadDim, typename T>
struct ChunkState {
  using Config = ChunkStateConfig<kHeadDim>;
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kColumns / 8;
  static constexpr int kTiles = Config::kTiles, kStages = Config::kStages;
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2;
  static constexpr int kStageBytes = kXBytes + kUBytes + kBlock * 4;
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * 128;  // the last warpgroup produces
  static constexpr int kSharedBytes = kStages * kStageBytes + 16 * kStages;
  static constexpr int kBlocksPerHead = (Config::kGroups + kWarpgroups - 1) / kWarpgroups;

  // Which phi tile is the m-th of a group. K = 32 takes (I, I), (I, I+1), (I+1, I+1), (I+1, I+2) and one at distance 2.
  __device__ static int tile_of(int group, int m) { return kHeadDim != 32 || m < 4 ? group * (kHeadDim == 32 ? 4 : kTiles) + m : 8 + group; }

  // Walks the chunks of this thread block's segment in scan order.
  template <typename Body>
  __device__ static void for_each_chunk(const ChunkStateParams& p, Body body) {
    const int segment = blockIdx.y;
    const int64_t end = segment_begin(p.chunks, p.segments, segment + 1);
#pragma unroll 1
    for (int64_t l = segment_begin(p.chunks, p.segments, segment); l < end; l++) {
      const int64_t n = p.reverse ? p.chunks - 1 - l : l;
      const int64_t first = n * p.blocks_per_chunk;
      body(n, first, (int)min((int64_t)p.blocks_per_chunk, p.blocks - first));
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
          bulk_load(at + kXBytes + kUBytes, p.decay + (head * p.blocks + first + b) * kBlock, kBlock * 4, full);
          ring.advance();
        }
      }
    });
  }

  // kShared: all tiles of the group have the same I (K = 32: two tiles each).
  template <bool kShared>
  __device__ static void consume(const ChunkStateParams& p, int group, uint32_t shared, uint32_t barriers) {
    constexpr int kI = kHeadDim == 32 ? 3 : (kShared ? 1 : kTiles), kJPairs = kHeadDim == 32 ? 2 : kTiles / 2;
    auto i_slot = [](int m) constexpr { return kHeadDim == 32 ? m / 2 : (kShared ? 0 : m); };
    auto j_slot = [](int m) constexpr { return kHeadDim == 32 && m >= 2 ? m - 1 : m; };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;

    // ldmatrix row addresses within a block of x. x_i: matrices (i even, odd) x (first, second 8 tokens), all rows the same one.
    // x_j: matrices (first, second 8 tokens) x (two blocks J), rows are the features of J.
    uint32_t i_offset[kI], j_offset[kJPairs];
#pragma unroll
    for (int a = 0; a < kI; a++) {
      const TilePair pair = tile_pair(tile_of(group, kHeadDim == 32 ? 2 * a : a), kHeadDim);
      i_offset[a] = ((pair.i_block * 8 + (lane >> 4)) * 64 + (2 * warp + (lane >> 3 & 1)) * 8) * 2;
    }
#pragma unroll
    for (int a = 0; a < kJPairs; a++) {
      const int slot = 2 * a + (lane >> 4);
      const TilePair pair = tile_pair(tile_of(group, kHeadDim == 32 && slot >= 2 ? slot + 1 : slot), kHeadDim);
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
        const float* from = p.initial + (head * tiles + tile_of(group, m)) * (kBlock * kColumns) + boundary_at;
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
    uint32_t a[2][kTiles][4];
    for_each_chunk(p, [&](int64_t n, int64_t, int count) {
      if (p.states) write_state(p, acc, group, n, warp, lane);
      const float across = p.chunk_decay[head * p.chunks + n];
#pragma unroll
      for (int m = 0; m < kTiles; m++)
#pragma unroll
        for (int c = 0; c < kColumns / 2; c++) acc[m][c] *= across;

      const int steps = count * p.group;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        ring.wait_full();
        const uint32_t x = shared + ring.stage() * kStageBytes, u = x + kXBytes, decay = u + kUBytes + 8 * (lane % 4);
        const CoreMatrices columns(u, 128, 1024);
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++) {
          wgmma_wait<1>();  // the products that read a[k % 2] are done
          if (k == 1 && step > 0 && lane == 0) ring.release(ring.previous());
          uint32_t xj[kJPairs][4];
#pragma unroll
          for (int s = 0; s < kJPairs; s++) load_matrices(xj[s], x + j_offset[s] + k * 256);
          const float2 early = load_shared_float2(decay + k * 64), late = load_shared_float2(decay + k * 64 + 32);
          uint32_t xi[4];
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
            if (m == 0 || i_slot(m) != i_slot(m - 1)) {
              load_matrices(xi, x + i_offset[i_slot(m)] + k * 256);
#pragma unroll
              for (int r = 0; r < 4; r++) {
                const float2 value = Pair<T>::unpack(xi[r]), by = r < 2 ? early : late;
                xi[r] = Pair<T>::pack(value.x * by.x, value.y * by.y);
              }
            }
            const uint32_t(&j)[4] = xj[j_slot(m) / 2];
            const int half = j_slot(m) % 2 * 2;
#pragma unroll
            for (int r = 0; r < 4; r++) a[k % 2][m][r] = Pair<T>::multiply(j[half + r / 2], xi[r]);
          }
          wgmma_fence();
#pragma unroll
          for (int m = 0; m < kTiles; m++) wgmma<T, true>(acc[m], a[k % 2][m], columns.at(k * 256), true);
          wgmma_commit();
        }
        ring.advance();
      }
      wgmma_wait<0>();
      if (lane == 0) ring.release(ring.previous());
    });

    float* out = p.segments > 1 ? p.locals + blockIdx.y * p.boundary_stride : p.final_state;
    if (out) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        float* to = out + (head * tiles + tile_of(group, m)) * (kBlock * kColumns) + boundary_at;
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

  __device__ static void write_state(const ChunkStateParams& p, const float (&acc)[kTiles][kColumns / 2], int group, int64_t n, int warp,
                                     int lane) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      const int tile = tile_of(group, m);
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

// Grid (groups / 2, segments, B * Hk).
template <int kHeadDim, typename T>
__global__ void __launch_bounds__(ChunkState<kHeadDim, T>::kThreads, 1) chunk_state_kernel(const __grid_constant__ ChunkStateParams p) {
  using Kernel = ChunkState<kHeadDim, T>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = shared_address(shared_memory), barriers = shared + Kernel::kStages * Kernel::kStageBytes;
  const int first_group = blockIdx.x * Kernel::kWarpgroups;
  const int active = min(Kernel::kWarpgroups, Kernel::Config::kGroups - first_group);
  if (threadIdx.x == 0) {
    Ring<Kernel::kStages>::init(barriers, active * 4);
    barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == Kernel::kWarpgroups) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x % 128 == 0) Kernel::produce(p, shared, barriers);
  } else {
    take_registers<kConsumerRegisters>();
    const int group = first_group + warpgroup;
    if (warpgroup >= active) return;
    if (group < Kernel::Config::kSharedGroups)
      Kernel::template consume<true>(p, group, shared, barriers);
    else if constexpr (Kernel::Config::kSharedGroups < Kernel::Config::kGroups)
      Kernel::template consume<false>(p, group, shared, barriers);
  }
}

template <int kHeadDim, typename T>
int64_t chunk_state_workspace_of(const pt_problem& problem) {
  const int segments = choose_segments(problem, (int64_t)ChunkState<kHeadDim, T>::kBlocksPerHead * problem.batch * problem.key_heads);
  return segments > 1 ? segments * boundary_elements(problem) * 4 : 0;
}

template <int kHeadDim, typename T>
int launch_chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream) {
  using Kernel = ChunkState<kHeadDim, T>;
  const Gates gates = gates_of(problem, params.gates);
  const int64_t heads = (int64_t)problem.batch * problem.key_heads;
  ChunkStateParams p;
  p.x = params.x;
  p.u = params.u;
  p.decay = params.reverse ? gates.chunk_in : gates.chunk_out;
  p.chunk_decay = gates.chunk_decay;
  p.initial = params.initial;
  p.states = params.states;
  p.final_state = params.final_state;
  p.boundary_stride = boundary_elements(problem);
  p.blocks = padded_blocks(problem.seq_len);
  p.chunks = chunks(problem.seq_len, problem.chunk_size);
  p.blocks_per_chunk = problem.chunk_size / kBlock;
  p.group = params.reverse ? problem.query_heads / problem.key_heads : 1;
  p.segments = choose_segments(problem, Kernel::kBlocksPerHead * heads);
  p.locals = (float*)params.workspace;
  p.reverse = params.reverse;
  p.state_scale = problem.state_scale;
  auto* kernel = chunk_state_kernel<kHeadDim, T>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  kernel<<<dim3(Kernel::kBlocksPerHead, p.segments, (unsigned)heads), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p);
  if (int status = check_cuda(cudaGetLastError(), "chunk_state")) return status;
  return p.segments > 1 ? join_segments(problem, params, p.segments, p.locals, stream) : PT_OK;
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_STATE(head_dim, type, type_name)                                                                                 \
  namespace powertrain::sm90 {                                                                                                         \
  template int64_t chunk_state_workspace_of<head_dim, type>(const pt_problem&);                                                        \
  template int launch_chunk_state<head_dim, type>(const pt_problem&, const pt_chunk_state_params&, cudaStream_t);                       \
  static RegisterKernel registered({"chunk_state K=" #head_dim " " type_name, (const void*)chunk_state_kernel<head_dim, type>, 90,      \
                                    ChunkState<head_dim, type>::kThreads, ChunkState<head_dim, type>::kSharedBytes});                  \
  }
