// The state that each time segment leaves by itself, for query_scan and key_grads (K = 32 in bf16), whose segments it enters: chunk_state without states,
// with these differences. Each of two warpgroups keeps the whole state (state_tiles.cuh) and takes every other block of tokens, so that fragments of x are
// loaded once for all tiles; and u gets its decays on the way, from assisting warps of the producing warpgroup, so that nobody writes them before. Blocks go
// from the segment's end to its beginning: their decays to its end are a running product, and the accumulators are never multiplied.
//
// Since it is bound by its products and pt_pack and pt_pack_grad by bytes, it packs on the way where it can (Packs, row_packs.cuh).
#pragma once
#include "row_packs.cuh"
#include "state_tiles.cuh"

namespace powertrain::sm90 {

template <typename T>
struct SegmentStateParams : SegmentParams {  // decays: to the end of their chunk; in reverse from its start
  const float* chunk_decay;  // (B, Hk, N)
  float* out;                // (segments, boundary)
  bool reverse;
  // With Packs.
  Strided<T> k, v, dy, y;
  const float* normalizer;
  T *packed_x, *packed_u;
  int64_t seq_len;
  int key_heads;
};

template <typename T, Packs kPacks>
struct SegmentState : StateTiles<T> {
  using Tiles = StateTiles<T>;
  using Rows = RowPacks<T>;
  using Params = SegmentStateParams<T>;
  using Tiles::kColumnGroups, Tiles::kColumns, Tiles::kHeadDim, Tiles::kInputBytes, Tiles::kPhiTiles, Tiles::kRowBytes, Tiles::kUBytes, Tiles::kValueBytes,
      Tiles::kXBytes;
  using Accumulators = typename Tiles::template Accumulators<2, 1>;
  static constexpr bool kKeys = kPacks == Packs::kKeys, kGradients = kPacks == Packs::kGradients;
  static constexpr int kUpdaters = 2, kAssistants = 3, kThreads = (kUpdaters + 1) * 128;
  // Registers: at most 3 * 168, the cap of a block of 384 threads.
  static constexpr int kProducing = 40, kUpdating = 232;
  static_assert(kProducing + kUpdaters * kUpdating <= 3 * 168);
  // The buffers, of gradients with y and d, in which the second warpgroup leaves its part at the end; then barriers: of the buffers, of u as it was loaded,
  // and of the warpgroups.
  static constexpr int kBuffers = kGradients ? 8 : 16, kYAt = kInputBytes, kNormalizerAt = kYAt + kValueBytes;
  static constexpr int kBufferBytes = kGradients ? kNormalizerAt + kBlock * 4 : kInputBytes;
  static constexpr int kBarriers = kBuffers * kBufferBytes, kLoaded = kBarriers + 16 * kBuffers, kMeeting = kLoaded + 8 * kBuffers;
  static constexpr int kSharedBytes = kMeeting + 8;
  static_assert((kPhiTiles + 1) * kHeadDim / 2 * 128 * 4 <= kBarriers && kSharedBytes <= 227 * 1024 && kBufferBytes % 128 == 0);

  __device__ static void init(uint32_t shared) {
    Ring<kBuffers>::init(shared + kBarriers, 128, 32);
    constexpr int kLoaders = kPacks == Packs::kNothing ? 1 : Rows::kCopiers;
    for (int i = 0; i < kBuffers; i++) barrier_init(shared + kLoaded + 8 * i, kLoaders);
    barrier_init(shared + kMeeting, kUpdaters * 128);
  }

  __device__ static __forceinline__ bool reverse(const Params& p) { return kPacks == Packs::kNothing ? p.reverse : kGradients; }
  // The blocks of this thread block's segment, `index` counted from its end.
  struct Blocks : SegmentBlocks {
    const bool reverse;
    __device__ explicit Blocks(const Params& p) : SegmentBlocks(p, SegmentState::reverse(p)), reverse(SegmentState::reverse(p)) {}
    __device__ __forceinline__ int count() const { return end - first; }
    __device__ __forceinline__ int operator[](int index) const { return reverse ? first + index : end - 1 - index; }
  };
  // The g-th head of x and u of this thread block's key head, or its g-th query head, among all.
  __device__ static __forceinline__ int64_t block_of(const Params& p, int heads, int g, int block) {
    return (int64_t)(opaque(blockIdx.y) * heads + g) * p.blocks + block;
  }

  // The first thread of the producing warpgroup; with Packs, its warp.
  __device__ static void produce(const Params& p, uint32_t shared) {
    Ring<kBuffers> inputs(shared + kBarriers);
    const Blocks blocks(p);
    const int batch = blockIdx.y / p.key_heads, head = blockIdx.y % p.key_heads, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < blocks.count(); i++) {
      const int block = blocks[i];
      const int64_t token = (int64_t)block * kBlock;
#pragma unroll 1
      for (int g = 0; g < p.group; g++, inputs.advance()) {
        inputs.wait_empty();
        const uint32_t to = shared + inputs.stage() * kBufferBytes, loaded = shared + kLoaded + 8 * inputs.stage();
        if constexpr (kPacks == Packs::kNothing) {
          Tiles::load_inputs(p, to, g, block, loaded);
        } else {
          const int count = Rows::existing(p.seq_len, block);
          if (lane == 0) {
            barrier_expect(loaded, (kGradients ? kXBytes : 0) + kBlock * 4);
            if (kGradients) bulk_load(to, (const T*)p.x + block_of(p, p.group, g, block) * feature_block_elements(kHeadDim), kXBytes, loaded);
            bulk_load(to + kXBytes + kUBytes, p.decays + block_of(p, 1, 0, block) * kBlock, kBlock * 4, loaded);
          }
          if constexpr (kKeys) {
            Rows::copy_rows(to, p.k.row(batch, token, head), p.k.stride_t, count);
            Rows::copy_rows(to + kXBytes, p.v.row(batch, token, head), p.v.stride_t, count);
          } else {
            const int query_head = head * p.group + g;
            Rows::copy_rows(to + kXBytes, p.dy.row(batch, token, query_head), p.dy.stride_t, count);
            Rows::copy_rows(to + kYAt, p.y.row(batch, token, query_head), p.y.stride_t, count);
            const float* const d = p.normalizer + ((int64_t)blockIdx.y * p.group + g) * p.seq_len + token;
#pragma unroll
            for (int t = lane; t < kBlock; t += 32) copy_4(to + kNormalizerAt + t * 4, d + t, t < count);
          }
          barrier_arrive_after_copies(loaded);
        }
      }
    }
    if constexpr (kPacks != Packs::kNothing) wait_for_copies();
  }

  // v' of a block of rows, packed; and where products read it, decayed.
  __device__ static __forceinline__ void pack_values(uint32_t at, T* packed, float across, int count, int lane) {
    const uint32_t decays = at + kXBytes + kUBytes;
    const float2 by = load_shared_float2(decays + lane * 8);
    Tiles::set_norm(at, lane, 2 * lane < count ? 2.f * across * by.x : 0.f, 2 * lane + 1 < count ? 2.f * across * by.y : 0.f);
    Rows::pack_values(at + kXBytes, packed, count, lane,
                      [&](uint4 values, int token) { return scaled<T>(values, across * load_shared_float(decays + token * 4)); });
  }
  // dn' of a block of rows of dy and y, packed and decayed. Lanes have one of four column groups of eight tokens, so that their rows are in different banks.
  __device__ static __forceinline__ void pack_gradients(uint32_t at, T* packed, float across, int lane) {
    const int column_group = lane / 8;
    uint32_t copied = at + kXBytes + Rows::copied_at(lane % 8, column_group), to = at + kXBytes + lane * kRowBytes, token_at = at + lane % 8 * 4;
    packed += value_index(column_group * 8, lane % 8);
#pragma unroll 1
    for (int half = 0; half < 2; half++, copied += 4 * Rows::kTokensBytes, to += 4 * Rows::kTokensBytes, token_at += 128, packed += 32 * 8) {
      float dot[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 dy = load_shared_16(copied + i * Rows::kTokensBytes), y = load_shared_16(copied + kYAt - kXBytes + i * Rows::kTokensBytes);
        const GradRow<T, true> row(dy, y, load_shared_float(token_at + kNormalizerAt + i * 32), 1.f);
        dot[i] = row.dot;
        __syncwarp();
        store8(packed + i * 64, row.row());
        store_shared_16(to + i * Rows::kTokensBytes,
                        scaled<T>(row.row(), across * load_shared_float(token_at + kXBytes + kUBytes + i * 32)));
      }
      // Sums over the column groups, each of them where token 8 i + lane % 8 is the lane's: with i % 2, and then i / 2 that of the group.
      const auto halve = [&](int i, int other, int by, bool upper) {
        const float sent = upper ? dot[i] : dot[other], kept = upper ? dot[other] : dot[i];
        return kept + __shfl_xor_sync(~0u, sent, by);
      };
      dot[0] = halve(0, 1, 8, column_group % 2), dot[2] = halve(2, 3, 8, column_group % 2);
      const uint32_t last = high_and_low<T>(-halve(0, 2, 16, column_group / 2));
      const int token = 32 * half + lane;
      store8(packed + value_index(kHeadDim, lane) - value_index(column_group * 8, lane % 8), make_uint4(last, 0, 0, 0));
      // Of what is packed, as where it was packed before.
      const float by = 2.f * across * load_shared_float(at + kXBytes + kUBytes + token * 4);
      const uint32_t decayed = high_and_low<T>(by * (Numeric<T>::low(last) + Numeric<T>::high(last)));
      store_shared_2(at + Tiles::kNormHigh + token * 2, (uint16_t)decayed), store_shared_2(at + Tiles::kNormLow + token * 2, (uint16_t)(decayed >> 16));
    }
  }

  // One of the assisting warps, which take blocks in turn: each of their steps waits for shared memory.
  __device__ static void assist(const Params& p, uint32_t shared, int assistant) {
    Ring<kBuffers> inputs(shared + kBarriers);
    const Blocks blocks(p);
    const int of_block = p.group, direction = blocks.reverse ? 1 : -1;
    const auto lane = [] { return opaque(threadIdx.x) % 32; };
    const auto decay_of = [&](int chunk) { return p.chunk_decay[(int64_t)opaque(blockIdx.y) * p.chunks + chunk]; };
    int chunk = blocks[0] / p.blocks_per_chunk;
    float across = 1.f, of_chunk = decay_of(chunk);  // from the end of the block's chunk to the segment's, and across that chunk
#pragma unroll 1
    for (int turn = assistant; turn < blocks.count() * of_block; turn += kAssistants) {
      const int g = turn % of_block, block = blocks[turn / of_block];
      for (const int its = block / p.blocks_per_chunk; chunk != its; of_chunk = decay_of(chunk)) across *= of_chunk, chunk += direction;
      inputs.count = turn;
      // Another one has waited for the stage's last use: until that is released, the parity could mean the one before it.
      inputs.wait_empty();
      barrier_wait(shared + kLoaded + 8 * inputs.stage(), inputs.phase());
      const uint32_t at = shared + inputs.stage() * kBufferBytes;
      if constexpr (kPacks == Packs::kNothing) {
        Tiles::template decay_inputs<32>(at, across, lane());
      } else {
        T* const values = p.packed_u + block_of(p, p.group, g, block) * value_block_elements(kHeadDim);
        if constexpr (kKeys) {
          Rows::template pack_features<4>(at, p.packed_x + block_of(p, 1, 0, block) * feature_block_elements(kHeadDim), lane());
          pack_values(at, values, across, Rows::existing(p.seq_len, block), lane());
        } else {
          pack_gradients(at, values, across, lane());
        }
        fence_async_shared();
      }
      barrier_arrive(inputs.full_barrier());
    }
  }

  __device__ static void update(const Params& p, uint32_t shared) {
    Ring<kBuffers> inputs(shared + kBarriers);
    constexpr int64_t kHead = kPhiTiles * kBlock * kColumns;
    Accumulators state;
    state.enter(nullptr);
    const uint32_t end = __shfl_sync(0xffffffffu, p.group * Blocks(p).count(), 0);  // as in uniform_warp
#pragma unroll 1
    for (inputs.count = uniform_warp() / 4; inputs.count < end; inputs.count += kUpdaters) {
      inputs.wait_full();
      state.add(shared + inputs.stage() * kBufferBytes, kKeys ? Rows::kCores : kPackedCores, kPacks == Packs::kNothing ? kPackedCores : Rows::kCores);
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
template <typename T, Packs kPacks>
__global__ void __launch_bounds__(SegmentState<T, kPacks>::kThreads, 1) segment_state_kernel(const __grid_constant__ SegmentStateParams<T> p) {
  using Kernel = SegmentState<T, kPacks>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    Kernel::init(shared);
    barrier_init_fence();
  }
  follow_earlier_kernels();
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kUpdaters) {
    give_registers<Kernel::kProducing>();
    const int warp = uniform_warp() % 4;
    if (kPacks == Packs::kNothing ? threadIdx.x % 128 == 0 : warp == 0) Kernel::produce(p, shared);
    else if (warp >= 4 - Kernel::kAssistants) Kernel::assist(p, shared, warp - (4 - Kernel::kAssistants));
  } else {
    take_registers<Kernel::kUpdating>();
    Kernel::update(p, shared);
  }
}

// Of the first `count` segments, each from zero: out (segments, boundary); of all where it packs, which the last one's tokens need, too. Of scan, initial
// and final_state do not count.
template <typename T>
int launch_segment_state(const pt_problem& problem, const SegmentScan& scan, int segments, int count, float* out, cudaStream_t stream) {
  const Gates gates = gates_of(problem, scan.gates);
  SegmentStateParams<T> p = {};
  set_segment_params(p, problem, segments, scan.reverse);
  p.x = scan.x, p.u = scan.u, p.decays = scan.reverse ? gates.chunk_in : gates.chunk_out;
  p.chunk_decay = gates.chunk_decay, p.out = out, p.reverse = scan.reverse;
  p.seq_len = problem.seq_len, p.key_heads = problem.key_heads;
  const auto start = [&](auto packs) {
    using Kernel = SegmentState<T, packs.value>;
    auto* kernel = segment_state_kernel<T, packs.value>;
    if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
    const dim3 grid((unsigned)(packs.value == Packs::kNothing ? count : segments), (unsigned)(problem.batch * problem.key_heads));
    return launch("segment_state", kernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  };
  if (scan.inputs) {
    p.k = strided<T>(scan.inputs->unpacked_k), p.v = strided<T>(scan.inputs->unpacked_v);
    p.packed_x = (T*)scan.inputs->k, p.packed_u = (T*)scan.inputs->v;
    return start(std::integral_constant<Packs, Packs::kKeys>());
  }
  if (scan.gradients) {
    p.dy = strided<T>(scan.gradients->dy), p.y = strided<T>(scan.gradients->y), p.normalizer = scan.gradients->normalizer;
    p.packed_u = (T*)scan.gradients->dn;
    return start(std::integral_constant<Packs, Packs::kGradients>());
  }
  return start(std::integral_constant<Packs, Packs::kNothing>());
}

}  // namespace powertrain::sm90
