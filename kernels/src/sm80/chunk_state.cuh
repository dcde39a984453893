// chunk_state on mma.sync: S_{n+1} = chunk_decay_n S_n + sum_t phi(x_t)^T u_t (u carries the decay), the states entering (reverse: leaving) each chunk.
//
// One warp owns one phi tile (64 rows; for head dim 128 half of its columns) of one chunk. It sums its chunk from zero in registers, then waits
// for the running state of its predecessor in time, writes that as the chunk's 16-bit state, and passes decay * state + sum on in fp32. Work is
// handed out by a ticket in the order of time, so a predecessor is always running or done, and the sums do not depend on who was faster: the
// result is the same bits every time. Nothing waits during the arithmetic, so all chunks run at once.
#pragma once
#include <type_traits>

#include "ptx.cuh"
#include "launch.cuh"

namespace powertrain::sm80 {

template <int D>
struct ChunkStateConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kParts = D == 128 ? 2 : 1;       // 17 column groups would be 272 accumulators a thread
  static constexpr int kGroups = D == 128 ? 9 : D / 8 + 1;  // column groups of a warp (the second part of 128 has one less)
  static constexpr int kTiles = phi_tiles(D);
  static constexpr int kTasks = kTiles * kParts;        // warps for one chunk
  static constexpr int kBlocksPerChunk = (kTasks + kWarps - 1) / kWarps;
  static constexpr int kFeatureBytes = feature_block_elements(D) * 2;
  static constexpr int kValueBytes = value_block_elements(D) * 2;
  static constexpr int kStageBytes = kFeatureBytes + kValueBytes;
  static constexpr int kStages = D == 128 ? 2 : 3;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kRunningElements = 4 * kGroups * 4 * 32;  // fp32 of one task
};

struct ChunkStateArguments {
  const void *x, *u;
  Gates gates;
  const float* initial;
  void* states;
  float* final_state;
  float* running;          // (B Hk, tasks, kRunningElements)
  int32_t* done;           // (B Hk, tasks): chunks passed on
  int32_t* ticket;
  int64_t blocks, chunk_count;
  int batch_heads, group;  // B Hk; query heads of a key head where x is q
  int blocks_per_chunk;
  float state_scale;
};

// Element (m, n, i) of the accumulators: row m * 16 + g + 8 * (i / 2), column n * 8 + 2 * t + i % 2.
template <typename T, int D, bool kReverse>
__global__ void __launch_bounds__(ChunkStateConfig<D>::kThreads, 1) chunk_state_kernel(const ChunkStateArguments a) {
  using Config = ChunkStateConfig<D>;
  using N = Numeric<T>;
  follow_earlier_kernels();
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int32_t my_ticket;
  if (threadIdx.x == 0) my_ticket = atomicAdd(a.ticket, 1);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chains = a.batch_heads * Config::kBlocksPerChunk;
  const int64_t step = my_ticket / chains;  // chunks of the scan before this one
  const int chain = my_ticket % chains;
  const int64_t bh = chain / Config::kBlocksPerChunk, n = kReverse ? a.chunk_count - 1 - step : step;
  const int task = chain % Config::kBlocksPerChunk * Config::kWarps + warp;
  const bool active = task < Config::kTasks;
  const int tile = active ? task / Config::kParts : 0, part = task % Config::kParts;
  const int first_group = part * Config::kGroups;
  const int groups = min(Config::kGroups, D / 8 + 1 - first_group);
  const TilePair pair = tile_pair(tile, D);
  const bool last_of_scan = step == a.chunk_count - 1;
  const bool sums = !last_of_scan || a.final_state;  // nobody reads what the last chunk would pass on

  float acc[4][Config::kGroups][4];
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int c = 0; c < Config::kGroups; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[m][c][i] = 0.f;

  if (sums) {
    const int64_t first_block = n * a.blocks_per_chunk;
    const int blocks = (int)min((int64_t)a.blocks_per_chunk, a.blocks - first_block), iterations = blocks * a.group;
    const uint32_t base = shared_address(shared);
    const auto load = [&](int iteration) {
      if (iteration < iterations) {
        const int head = iteration / blocks, block = iteration % blocks;
        const int64_t source = (bh * a.group + head) * a.blocks + first_block + block;
        const uint32_t to = base + iteration % Config::kStages * Config::kStageBytes;
        copy_async<Config::kThreads>(to, (const T*)a.x + source * feature_block_elements(D), Config::kFeatureBytes);
        copy_async<Config::kThreads>(to + Config::kFeatureBytes, (const T*)a.u + source * value_block_elements(D), Config::kValueBytes);
      }
      cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; s++) load(s);
    for (int iteration = 0; iteration < iterations; iteration++) {
      cp_async_wait<Config::kStages - 2>();
      __syncthreads();
      load(iteration + Config::kStages - 1);
      const int stage = iteration % Config::kStages * Config::kStageBytes;
      const uint32_t x = base + stage, u = x + Config::kFeatureBytes;
      if (active) {
#pragma unroll 1
        for (int k = 0; k < kBlock / 16; k++) {
          // Core matrices (J, 2k), (J, 2k + 1), (I, 2k), (I, 2k + 1): rows are features, columns tokens.
          uint32_t f[4];
          const int block = lane < 16 ? pair.j_block : pair.i_block;
          ldmatrix4(f, x + (block * 8 + 2 * k + lane / 8 % 2) * 128 + lane % 8 * 16);
          uint32_t phi[4][4];
#pragma unroll
          for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
              phi[m][r] = N::mul(f[0], __shfl_sync(~0u, f[2], (2 * m + r) * 4 + t));
              phi[m][2 + r] = N::mul(f[1], __shfl_sync(~0u, f[3], (2 * m + r) * 4 + t));
            }
          }
#pragma unroll
          for (int c = 0; c < Config::kGroups; c += 2) {
            // Core matrices (group c, 2k), (c, 2k + 1), (c + 1, 2k), (c + 1, 2k + 1): rows are tokens, columns those of u.
            uint32_t b[4];
            const int group = first_group + min(c + lane / 16, groups - 1);
            ldmatrix4_trans(b, u + (group * 8 + 2 * k + lane / 8 % 2) * 128 + lane % 8 * 16);
#pragma unroll
            for (int m = 0; m < 4; m++) {
              mma<T>(acc[m][c], phi[m], b[0], b[1]);
              if (c + 1 < Config::kGroups) mma<T>(acc[m][c + 1], phi[m], b[2], b[3]);
            }
          }
        }
      }
    }
    cp_async_wait<0>();
  }
  if (!active) return;

  float* running = a.running + (bh * Config::kTasks + task) * Config::kRunningElements;
  int32_t* done = a.done + bh * Config::kTasks + task;
  const float* initial = a.initial ? a.initial + (bh * Config::kTiles + tile) * kBlock * (D + kNormColumns) : nullptr;
  float* final_state = a.final_state ? a.final_state + (bh * Config::kTiles + tile) * kBlock * (D + kNormColumns) : nullptr;
  uint32_t* states = a.states ? (uint32_t*)a.states + ((bh * a.chunk_count + n) * Config::kTiles + tile) * (state_tile_elements(D) / 2) : nullptr;
  const float chunk_decay = a.gates.chunk_decay[bh * a.chunk_count + n];
  const float weight = (pair.distance == 0 ? 1.f : 2.f) * a.state_scale;

  if (step > 0) {
    if (lane == 0) {
      while (load_acquire(done) < step) {
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int m = 0; m < 4; m++) {
#pragma unroll
    for (int c = 0; c < Config::kGroups; c++) {
      if (c >= groups) continue;
      const int group = first_group + c, column = group * 8 + 2 * t;
      float before[4] = {0.f, 0.f, 0.f, 0.f};
      if (step > 0) {
        const float4 v = load_past_l1((const float4*)running + (m * Config::kGroups + c) * 32 + lane);
        before[0] = v.x, before[1] = v.y, before[2] = v.z, before[3] = v.w;
      } else if (initial) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float2 v = *(const float2*)(initial + (int64_t)(m * 16 + r * 8 + g) * (D + kNormColumns) + column);
          before[2 * r] = v.x, before[2 * r + 1] = v.y;
        }
      }
      if (states) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          uint32_t word = N::pack(before[2 * r] * weight, before[2 * r + 1] * weight);
          if (group == D / 8) {
            // The normaliser came in one column (v') or two (dn'): its sum, as hi and lo.
            const float norm = (before[2 * r] + before[2 * r + 1]) * weight, high = N::low(N::pack(norm, 0.f));
            word = t == 0 ? N::pack(high, norm - high) : 0u;
          }
          states[(group * 8 + 2 * m + r) * 32 + lane] = word;
        }
      }
      float after[4];
#pragma unroll
      for (int i = 0; i < 4; i++) after[i] = chunk_decay * before[i] + acc[m][c][i];
      if (!last_of_scan) {
        store_past_l1((float4*)running + (m * Config::kGroups + c) * 32 + lane, make_float4(after[0], after[1], after[2], after[3]));
      } else if (final_state) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float2 v = make_float2(after[2 * r], after[2 * r + 1]);
          if (group == D / 8) v = make_float2(t == 0 ? v.x + v.y : 0.f, 0.f);
          *(float2*)(final_state + (int64_t)(m * 16 + r * 8 + g) * (D + kNormColumns) + column) = v;
        }
      }
    }
  }
  if (!last_of_scan) {
    __threadfence();
    __syncwarp();
    if (lane == 0) store_release(done, (int32_t)step + 1);
  }
}

// Ticket and counters first (they must be zero), then the running states.
template <int D>
int64_t chunk_state_counters(const pt_problem& p) {
  return ceil_div((1 + (int64_t)p.batch * p.key_heads * ChunkStateConfig<D>::kTasks) * 4, 256) * 256;
}
template <int D>
int64_t chunk_state_workspace_bytes(const pt_problem& p) {
  return chunk_state_counters<D>(p) + (int64_t)p.batch * p.key_heads * ChunkStateConfig<D>::kTasks * ChunkStateConfig<D>::kRunningElements * 4;
}

template <typename T, int D>
int run_chunk_state(const pt_problem& p, const pt_chunk_state_params& s, cudaStream_t stream) {
  using Config = ChunkStateConfig<D>;
  ChunkStateArguments a;
  a.x = s.x, a.u = s.u, a.gates = gates_of(p, s.gates), a.initial = s.initial, a.states = s.states, a.final_state = s.final_state;
  a.ticket = (int32_t*)s.workspace, a.done = a.ticket + 1;
  a.running = (float*)((char*)s.workspace + chunk_state_counters<D>(p));
  a.blocks = padded_blocks(p.seq_len), a.chunk_count = chunks(p.seq_len, p.chunk_size);
  a.batch_heads = p.batch * p.key_heads, a.group = s.reverse ? p.query_heads / p.key_heads : 1;
  a.blocks_per_chunk = p.chunk_size / kBlock, a.state_scale = p.state_scale;
  const int64_t grid = a.chunk_count * a.batch_heads * Config::kBlocksPerChunk;
  if (grid > INT32_MAX) return fail(PT_UNSUPPORTED, "chunk_state: %lld chunks of %d heads are too many", (long long)a.chunk_count, a.batch_heads);
  if (int status = check_cuda(cudaMemsetAsync(s.workspace, 0, chunk_state_counters<D>(p), stream), "cudaMemsetAsync")) return status;
  const auto kernel = s.reverse ? chunk_state_kernel<T, D, true> : chunk_state_kernel<T, D, false>;
  if (int status = allow_shared_memory((const void*)kernel, Config::kSharedBytes)) return status;
  return launch("chunk_state", kernel, (unsigned)grid, Config::kThreads, Config::kSharedBytes, stream, a);
}

// One configuration is one translation unit, so that a build uses every core.
#define PT_SM80_CHUNK_STATE(T, name, D)                                                                                                    \
  namespace powertrain::sm80 {                                                                                                             \
  static const RegisterKernel forward_##D##_##name({"sm80 chunk_state " #D " " #name, (const void*)chunk_state_kernel<T, D, false>, 80,    \
                                                    ChunkStateConfig<D>::kThreads, ChunkStateConfig<D>::kSharedBytes});                    \
  static const RegisterKernel reverse_##D##_##name({"sm80 chunk_state reverse " #D " " #name,                                              \
                                                    (const void*)chunk_state_kernel<T, D, true>, 80, ChunkStateConfig<D>::kThreads,        \
                                                    ChunkStateConfig<D>::kSharedBytes});                                                   \
  int chunk_state_##D##_##name(const pt_problem& p, const pt_chunk_state_params& s, cudaStream_t stream) {                                 \
    return run_chunk_state<T, D>(p, s, stream);                                                                                            \
  }                                                                                                                                        \
  }

}  // namespace powertrain::sm80
