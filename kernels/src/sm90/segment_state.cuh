// The state that each time segment leaves by itself, for query_scan and key_grads (K = 32 in bf16), whose segments it enters: chunk_state without states,
// with these differences. Each of two warpgroups keeps the whole state (state_tiles.cuh) and takes every other block of tokens, so that fragments of x are
// loaded once for all tiles; and u gets its decays on the way, from assisting warps of the producing warpgroup, so that nobody writes them before. Blocks go
// from the segment's end to its beginning: their decays to its end are a running product, and the accumulators are never multiplied.
#pragma once
#include "state_tiles.cuh"

namespace powertrain::sm90 {

struct SegmentStateParams : SegmentParams {  // decays: to the end of their chunk; in reverse from its start
  const float* chunk_decay;  // (B, Hk, N)
  float* out;                // (segments, boundary)
  bool reverse;
};

template <typename T>
struct SegmentState : StateTiles<T> {
  using Tiles = StateTiles<T>;
  using Tiles::kHeadDim, Tiles::kInputBytes, Tiles::kPhiTiles, Tiles::kColumns;
  using Accumulators = typename Tiles::template Accumulators<2, 1>;
  static constexpr int kUpdaters = 2, kAssistants = 3, kThreads = (kUpdaters + 1) * 128, kBuffers = 16;
  // Registers: at most 3 * 168, the cap of a block of 384 threads.
  static constexpr int kProducing = 40, kUpdating = 232;
  static_assert(kProducing + kUpdaters * kUpdating <= 3 * 168);
  // The buffers, in which the second warpgroup leaves its part at the end, then barriers: of the buffers, of u as it was loaded, and of the warpgroups.
  static constexpr int kBarriers = kBuffers * kInputBytes, kLoaded = kBarriers + 16 * kBuffers, kMeeting = kLoaded + 8 * kBuffers, kSharedBytes = kMeeting + 8;
  static_assert((kPhiTiles + 1) * kHeadDim / 2 * 128 * 4 <= kBarriers && kSharedBytes <= 227 * 1024);

  // The blocks of this thread block's segment, `index` counted from its end.
  struct Blocks : SegmentBlocks {
    bool reverse;
    __device__ explicit Blocks(const SegmentStateParams& p) : SegmentBlocks(p, p.reverse), reverse(p.reverse) {}
    __device__ __forceinline__ int count() const { return end - first; }
    __device__ __forceinline__ int operator[](int index) const { return reverse ? first + index : end - 1 - index; }
  };

  __device__ static void produce(const SegmentStateParams& p, uint32_t shared) {
    Ring<kBuffers> inputs(shared + kBarriers);
    const Blocks blocks(p);
#pragma unroll 1
    for (int i = 0; i < blocks.count(); i++)
#pragma unroll 1
      for (int g = 0; g < p.group; g++) {
        inputs.wait_empty();
        Tiles::load_inputs(p, shared + inputs.stage() * kInputBytes, g, blocks[i], shared + kLoaded + 8 * inputs.stage());
        inputs.advance();
      }
  }

  // One of the assisting warps, which take blocks in turn: each of their steps waits for shared memory.
  __device__ static void assist(const SegmentStateParams& p, uint32_t shared, int assistant) {
    Ring<kBuffers> inputs(shared + kBarriers);
    const Blocks blocks(p);
    const float* const chunk_decay = p.chunk_decay + (int64_t)blockIdx.y * p.chunks;
    int chunk = blocks[0] / p.blocks_per_chunk;
    float across = 1.f, of_chunk = chunk_decay[chunk];  // from the end of the block's chunk to the segment's, and across that chunk
    int turn = assistant;
#pragma unroll 1
    for (int i = 0; i < blocks.count(); i++) {
      if (const int its = blocks[i] / p.blocks_per_chunk; its != chunk) chunk = its, across *= of_chunk, of_chunk = chunk_decay[chunk];
#pragma unroll 1
      for (int g = 0; g < p.group; g++, inputs.advance()) {
        if (turn-- > 0) continue;
        turn = kAssistants - 1;
        // Another one has waited for the stage's last use: until that is released, the parity of `loaded` could mean the one before it.
        inputs.wait_empty();
        barrier_wait(shared + kLoaded + 8 * inputs.stage(), inputs.phase());
        Tiles::template decay_inputs<32, 2>(shared + inputs.stage() * kInputBytes, across, threadIdx.x % 32);
        barrier_arrive(inputs.full_barrier());
      }
    }
  }

  __device__ static void update(const SegmentStateParams& p, uint32_t shared) {
    Ring<kBuffers> inputs(shared + kBarriers);
    constexpr int64_t kHead = kPhiTiles * kBlock * kColumns;
    Accumulators state;
    state.enter(nullptr);
    const uint32_t end = __shfl_sync(0xffffffffu, p.group * Blocks(p).count(), 0);  // as in uniform_warp
#pragma unroll 1
    for (inputs.count = uniform_warp() / 4; inputs.count < end; inputs.count += kUpdaters) {
      inputs.wait_full();
      state.add(shared + inputs.stage() * kInputBytes);
      inputs.release(inputs.stage());
    }
    // Sums of the even blocks and of the odd ones.
    const int thread = opaque(threadIdx.x);
    const bool second = thread >= 128;
    const uint32_t part = shared + thread % 128 * 4;
    const auto meet = [&](int time) { barrier_arrive(shared + kMeeting), barrier_wait(shared + kMeeting, time); };
    meet(0);
    if (second) {
#pragma unroll
      for (int t = 0; t <= kPhiTiles; t++)
#pragma unroll
        for (int c = 0; c < kHeadDim / 2; c++)
          store_shared_4(part + (t * kHeadDim / 2 + c) * 512, __float_as_uint(t < kPhiTiles ? state.acc[t][c] : state.z[c]));
    }
    meet(1);
    if (second) return;
#pragma unroll
    for (int t = 0; t <= kPhiTiles; t++)
#pragma unroll
      for (int c = 0; c < kHeadDim / 2; c++) (t < kPhiTiles ? state.acc[t][c] : state.z[c]) += load_shared_float(part + (t * kHeadDim / 2 + c) * 512);
    state.leave(p.out + opaque(blockIdx.x) * p.boundary_stride + opaque(blockIdx.y) * kHead);
  }
};

// Grid (segments, B * Hk).
template <typename T>
__global__ void __launch_bounds__(SegmentState<T>::kThreads, 1) segment_state_kernel(const __grid_constant__ SegmentStateParams p) {
  using Kernel = SegmentState<T>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    Ring<Kernel::kBuffers>::init(shared + Kernel::kBarriers, 128, 32);
    for (int i = 0; i < Kernel::kBuffers; i++) barrier_init(shared + Kernel::kLoaded + 8 * i, 1);
    barrier_init(shared + Kernel::kMeeting, Kernel::kUpdaters * 128);
    barrier_init_fence();
  }
  follow_earlier_kernels();
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kUpdaters) {
    give_registers<Kernel::kProducing>();
    const int warp = uniform_warp() % 4;
    if (threadIdx.x % 128 == 0) Kernel::produce(p, shared);
    else if (warp >= 4 - Kernel::kAssistants) Kernel::assist(p, shared, warp - (4 - Kernel::kAssistants));
  } else {
    take_registers<Kernel::kUpdating>();
    Kernel::update(p, shared);
  }
}

// Of the first `count` segments, each from zero: out (segments, boundary). Of scan, initial and final_state do not count.
template <typename T>
int launch_segment_state(const pt_problem& problem, const SegmentScan& scan, int segments, int count, float* out, cudaStream_t stream) {
  using Kernel = SegmentState<T>;
  const Gates gates = gates_of(problem, scan.gates);
  SegmentStateParams p;
  set_segment_params(p, problem, segments, scan.reverse);
  p.x = scan.x, p.u = scan.u, p.decays = scan.reverse ? gates.chunk_in : gates.chunk_out;
  p.chunk_decay = gates.chunk_decay, p.out = out, p.reverse = scan.reverse;
  auto* kernel = segment_state_kernel<T>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  return launch("segment_state", kernel, dim3((unsigned)count, (unsigned)(problem.batch * problem.key_heads)), Kernel::kThreads, Kernel::kSharedBytes, stream, p);
}

}  // namespace powertrain::sm90
