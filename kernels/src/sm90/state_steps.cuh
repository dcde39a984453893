// A state that one thread block keeps through a time segment, in steps of 128 tokens: at K = 32 it fits a multiprocessor, where it is added up and read
// without a way through device memory.
//
// One warpgroup, the updating one, keeps it in fp32 accumulators (state_tiles.cuh), and before every step leaves it in shared memory in 16 bits for the
// warpgroups that scan the step: S_abc for ordered pairs (a, b) of features, a slot for each b, with core matrices of eight a and eight columns c, and Z.
// Of the producing warpgroup one thread copies what the updating one reads, and two warps assist: they multiply u by its decay on its way there, and write
// the states that others read from shared memory to the device's.
#pragma once
#include "columns.cuh"
#include "grad_rows.cuh"
#include "state_tiles.cuh"

namespace powertrain::sm90 {

struct StepsParams : SegmentParams {  // decays: to the end of their block; in reverse from its start
  const float* block_decay;
  const float* entering;  // (segments, boundary): the state that enters each; or null: there is one, and zero enters it
  void* states;           // or null: the state that enters every chunk, from its own end
};

template <typename T, bool kReverse>
struct StateSteps : StateTiles<T> {
  using Tiles = StateTiles<T>;
  using Tiles::j_block_of, Tiles::tile_of, Tiles::tiles_of;
  using Tiles::kColumnGroups, Tiles::kColumns, Tiles::kFeatureBlocks, Tiles::kHalf, Tiles::kHeadDim, Tiles::kInputBytes, Tiles::kPhiTiles, Tiles::kRowBytes;
  static constexpr int kStep = kStepBlocks, kAssistants = 2;
  static constexpr int kScanners = kStep, kThreads = (kScanners + 2) * 128;  // a scanning warpgroup for each block of a step

  // The state in shared memory. The 16 bytes that pad a slot put the rows of mirrored pairs, which go to eight slots at once, into different banks.
  static constexpr int kCoreBytes = 8 * kRowBytes, kGroupBytes = kFeatureBlocks * kCoreBytes, kSlotBytes = kColumnGroups * kGroupBytes + 16;
  static constexpr int kNormBytes = kHeadDim * kHeadDim * 2;  // Z, hi and then lo
  static constexpr int kStateBytes = kHeadDim * kSlotBytes + 2 * kNormBytes, kStateBuffers = 2;
  static constexpr int kInputBuffers = 2;

  // Where all that is in shared memory, with the barriers of the states, of the inputs, and of u as it was loaded.
  struct Memory {
    uint32_t states, inputs, state_barriers, input_barriers, loaded_barriers, end_of_steps;
    __host__ __device__ constexpr explicit Memory(uint32_t start)
        : states(start),
          inputs(states + kStateBuffers * kStateBytes),
          state_barriers(inputs + kInputBuffers * kInputBytes),
          input_barriers(state_barriers + 16 * kStateBuffers),
          loaded_barriers(input_barriers + 16 * kInputBuffers),
          end_of_steps((loaded_barriers + 8 * kInputBuffers + 127) / 128 * 128) {}
  };
  __device__ static void init(const Memory& at) {
    Ring<kStateBuffers>::init(at.state_barriers, (kScanners * 4 + kAssistants) * 32, 128);
    Ring<kInputBuffers>::init(at.input_barriers, 128, kAssistants * 32);
    for (int i = 0; i < kInputBuffers; i++) barrier_init(at.loaded_barriers + 8 * i, 1);
  }

  // A step of this thread block's segment: `count` blocks from `block` on. Steps begin at the row's start and run to its end, in reverse back again.
  struct Step {
    int block, count;
    bool last;  // of the segment
    int chunk;  // that the state enters with the step, or -1
    // The block of the step that a scanning warpgroup takes, in turns: one of them has more columns.
    __device__ int block_of(int scanner) const { return (scanner + block / kStep) % kStep; }
  };
  template <typename Body>
  __device__ static __forceinline__ void for_each_step(const StepsParams& p, Body body) {
    const SegmentBlocks segment(p, kReverse);
    const int first = segment.first, final = first + (segment.end - first - 1) / kStep * kStep;
    int chunk = (int)(kReverse ? p.chunks - 1 - segment.first_chunk : segment.first_chunk);  // the next one that the state enters
#pragma unroll 1
    for (int block = kReverse ? final : first; kReverse ? block >= first : block <= final; block += kReverse ? -kStep : kStep) {
      const int count = min(kStep, segment.end - block), after = block + count;
      const bool enters = kReverse ? after == min((chunk + 1) * p.blocks_per_chunk, p.blocks) : block == chunk * p.blocks_per_chunk;
      body(Step{block, count, block == (kReverse ? first : final), enters ? chunk : -1});
      if (enters) chunk += kReverse ? -1 : 1;
    }
  }

  // What the updating warpgroup reads, once the assistants have been there.
  __device__ static void produce_inputs(const StepsParams& p, const Memory& at) {
    Ring<kInputBuffers> inputs(at.input_barriers);
    for_each_step(p, [&](const Step& step) {
      if (step.last) return;
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          inputs.wait_empty();
          Tiles::load_inputs(p, at.inputs + inputs.stage() * kInputBytes, g, step.block + m, at.loaded_barriers + 8 * inputs.stage());
          inputs.advance();
        }
    });
  }

  // One of the assistants, the producing warpgroup's last warps: u times its decay across the step, its last component twice that; then the state that
  // enters a chunk, on its way to where others read it.
  __device__ static void assist(const StepsParams& p, const Memory& at) {
    Ring<kInputBuffers> inputs(at.input_barriers);
    Ring<kStateBuffers> states(at.state_barriers);
    const int thread = threadIdx.x % 128 - (4 - kAssistants) * 32;
    const float* const block_decay = p.block_decay + (int64_t)blockIdx.y * p.blocks;
    for_each_step(p, [&](const Step& step) {
#pragma unroll 1
      for (int g = 0; g < (step.last ? 0 : p.group); g++)
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          const float across = decay_across(block_decay, step, m);
          barrier_wait(at.loaded_barriers + 8 * inputs.stage(), inputs.phase());
          Tiles::template decay_inputs<kAssistants * 32>(at.inputs + inputs.stage() * kInputBytes, across, thread);
          barrier_arrive(inputs.full_barrier());
          inputs.advance();
        }
      pass_state(p, at, states, step.chunk, thread);
    });
  }
  // Of the m-th block of a step: the decay across the block, if any, that it has to cross to the step's end.
  __device__ static __forceinline__ float decay_across(const float* block_decay, const Step& step, int m) {
    const int other = kReverse ? m - 1 : m + 1;
    return other >= 0 && other < step.count ? block_decay[step.block + other] : 1.f;
  }
  // The assistants' arrivals are no more than a second lock: the updating warpgroup needs their next inputs before it leaves a state here.
  __device__ static __forceinline__ void pass_state(const StepsParams& p, const Memory& at, Ring<kStateBuffers>& states, int chunk, int thread) {
    states.wait_full();
    if (p.states && chunk >= 0) write_state(p, at.states + states.stage() * kStateBytes, chunk, thread);
    states.release(states.stage());
    states.advance();
  }
  // As chunk_state writes it. A thread has feature i of all I and j of all J: 16 bytes of every tile and column group.
  __device__ static __forceinline__ void write_state(const StepsParams& p, uint32_t state, int chunk, int thread) {
    static_assert(kAssistants * 32 == kBlock);
    thread = opaque(thread);  // what follows from it takes no registers elsewhere
    T* to = (T*)p.states + ((int64_t)blockIdx.y * p.chunks + chunk) * kPhiTiles * state_tile_elements(kHeadDim) + state_index(thread, 0);
#pragma unroll 1
    for (int t = 0; t < kPhiTiles; t++) {
      const TilePair pair = tile_pair(t, kHeadDim);
      uint32_t from = state + slot(pair.i_block, thread / 8) + pair.j_block * kCoreBytes + thread % 8 * kRowBytes;
      // Off the diagonal a state has the weight 2, which Z has everywhere.
      const uint32_t twice = pair.distance ? Pair<T>::pack(2.f, 2.f) : Pair<T>::pack(1.f, 1.f);
#pragma unroll 1
      for (int c = 0; c < kColumnGroups; c++, from += kGroupBytes, to += kBlock * 8) {
        const uint4 values = load_shared_16(from);
        *(uint4*)to = make_uint4(Pair<T>::multiply(values.x, twice), Pair<T>::multiply(values.y, twice), Pair<T>::multiply(values.z, twice),
                                 Pair<T>::multiply(values.w, twice));
      }
      // Z_ab and Z_ba are rounded each in its own way; readers take the two that a tile on the diagonal has for one number.
      const int i = thread / 8, j = thread % 8, row = pair.distance ? i : max(i, j), column = pair.distance ? j : min(i, j);
      const uint32_t norm = state + kHeadDim * kSlotBytes + (pair.i_block * kFeatureBlocks + pair.j_block) * kCoreBytes + row * kRowBytes + column * 2;
      const uint32_t high_and_low = load_shared_2(norm) | load_shared_2(norm + kNormBytes) << 16;
      *(uint4*)to = make_uint4(Pair<T>::multiply(high_and_low, pair.distance ? Pair<T>::pack(1.f, 1.f) : Pair<T>::pack(0.5f, 0.5f)), 0, 0, 0);
      to += kBlock * 8;
    }
  }
  __device__ static __forceinline__ uint32_t slot(int block, int feature) { return (8 * block + feature) * kSlotBytes; }

  // What a scanning warpgroup makes of the state: phi(x) S and x Z, where the rows' x are A operands. Of a block I, x_i and x_{i+1} for i = feature, each in
  // both halves of a register, of both rows: a matrix is the eight tokens of one feature, again and again.
  __device__ static __forceinline__ void load_pair(uint32_t (&xi)[4], uint32_t x_at, int feature, int warp, int lane, CoreStrides of_x = kPackedCores) {
    load_matrices_transposed(xi, x_at + feature / 8 * of_x.columns + (2 * warp + (lane >> 3 & 1)) * of_x.tokens + (feature % 8 + (lane >> 4)) * kRowBytes);
  }
  using PhiColumns = uint32_t[kHalf + 1][2];  // x_J of a block I's tiles, twice where one product stands for both (a, b) and (b, a)
  __device__ static __forceinline__ void set_phi_columns(PhiColumns& xj, const RowOperands<kHeadDim>& x, int i_block) {
#pragma unroll
    for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int j_block = j_block_of(i_block, distance);
        xj[distance][half] = x[j_block / 2][j_block % 2 * 2 + half];
        if (distance) xj[distance][half] = Pair<T>::add(xj[distance][half], xj[distance][half]);
      }
  }
  template <int kOperands>
  __device__ static __forceinline__ void set_phi(uint32_t (&a)[kOperands][4], const PhiColumns& xj, const uint32_t (&xi)[4], int i_block) {
#pragma unroll
    for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
      for (int r = 0; r < 4; r++) a[distance][r] = Pair<T>::multiply(xj[distance][r % 2], xi[r]);
  }
  // acc (+)= phi S of features i and i + 1 of block I.
  template <int kOperands>
  __device__ static __forceinline__ void multiply_phi(float (&acc)[kHeadDim / 2], const uint32_t (&a)[kOperands][4], uint32_t state, int i_block, int i,
                                                      bool accumulate) {
#pragma unroll
    for (int distance = 0; distance < tiles_of(i_block); distance++)
      wgmma<T, true>(acc, a[distance], CoreMatrices(state, kSlotBytes, kGroupBytes).at(slot(i_block, i) + j_block_of(i_block, distance) * kCoreBytes),
                     accumulate || distance > 0);
  }
  // acc (+)= x Z, hi and then lo.
  __device__ static __forceinline__ void multiply_norm(float (&acc)[kHeadDim / 2], const RowOperands<kHeadDim>& x, uint32_t state, bool accumulate) {
#pragma unroll
    for (int low = 0; low < 2; low++)
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++)
        wgmma<T, false>(acc, x[k], CoreMatrices(state + kHeadDim * kSlotBytes + low * kNormBytes, kCoreBytes, kFeatureBlocks * kCoreBytes).at(k * 2 * kCoreBytes),
                        accumulate || low + k > 0);
  }

  template <bool kMirrored, int kSets>
  struct Updater : Tiles::template Accumulators<kSets, kSets> {
    using Accumulators = typename Tiles::template Accumulators<kSets, kSets>;
    using Accumulators::acc, Accumulators::has_norm, Accumulators::lane, Accumulators::warp, Accumulators::z;
    const StepsParams& p;
    const Memory& at;
    Ring<kStateBuffers> states;
    Ring<kInputBuffers> inputs;

    __device__ Updater(const StepsParams& p, const Memory& at) : p(p), at(at), states(at.state_barriers), inputs(at.input_barriers) {}

    // Leaves the state in shared memory, the tiles' pairs (a, b) and if kMirrored (b, a), too, and Z.
    __device__ __forceinline__ void show() {
      states.wait_empty();
      const uint32_t state = at.states + states.stage() * kStateBytes;
      const int matrix = lane / 8, row = lane % 8;
#pragma unroll
      for (int i_block = 0; i_block < kFeatureBlocks; i_block++)
#pragma unroll
        for (int distance = 0; distance < tiles_of(i_block); distance++) {
          const int t = tile_of(i_block, distance), j_block = j_block_of(i_block, distance);
#pragma unroll
          for (int half = 0; half < 2; half++) {  // feature i of block I, all features of block J
            const int i = 2 * warp + half;
            uint32_t values[kColumnGroups];
#pragma unroll
            for (int c = 0; c < kColumnGroups; c++) values[c] = Pair<T>::pack(acc[t][4 * c + 2 * half], acc[t][4 * c + 2 * half + 1]);
            store_matrices(state + slot(i_block, i) + matrix * kGroupBytes + j_block * kCoreBytes + row * kRowBytes, values);
            if (kMirrored && distance) store_matrices(state + slot(j_block, row) + matrix * kGroupBytes + i_block * kCoreBytes + i * kRowBytes, values);
          }
        }
      if (has_norm()) {
        // Core matrices of eight rows a and eight columns b.
        const uint32_t norm = state + kHeadDim * kSlotBytes + 2 * warp * kFeatureBlocks * kCoreBytes + lane * 4;
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float first = z[4 * c + 2 * half], second = z[4 * c + 2 * half + 1], first_high = round_to<T>(first), second_high = round_to<T>(second);
            const uint32_t to = norm + (half * kFeatureBlocks + c) * kCoreBytes;
            store_shared_4(to, Pair<T>::pack(first_high, second_high));
            store_shared_4(to + kNormBytes, Pair<T>::pack(first - first_high, second - second_high));
          }
      }
      fence_async_shared();
      barrier_arrive(states.full_barrier());
      states.advance();
    }

    __device__ void run() {
      const float* const block_decay = p.block_decay + (int64_t)blockIdx.y * p.blocks;
      Accumulators::enter(p.entering ? p.entering + blockIdx.x * p.boundary_stride + (int64_t)blockIdx.y * kPhiTiles * kBlock * kColumns : nullptr);
      show();
      for_each_step(p, [&](const Step& step) {
        if (step.last) return;
        Accumulators::decay(block_decay[step.block] * (step.count > 1 ? block_decay[step.block + 1] : 1.f));
#pragma unroll 1
        for (int block = 0; block < p.group * step.count; block++) {
          inputs.wait_full();
          Accumulators::add(at.inputs + inputs.stage() * kInputBytes);
          inputs.release(inputs.stage());
          inputs.advance();
        }
        show();
      });
    }
  };
};

// The whole kernel; grid (segments, B * Hk). Scanning warpgroups first, then the updating one and the producing one.
template <class Kernel, class Params>
__device__ __forceinline__ void run_steps(const Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const typename Kernel::Layout at(shared_address(shared_memory));
  if (threadIdx.x == 0) {
    Kernel::init(at);
    Ring<Kernel::kRowBuffers>::init(at.row_barriers, Kernel::kScanners * 128, Kernel::kRowFillers);
    Ring<Kernel::kColumnBuffers>::init(at.column_barriers, Kernel::kScanners * 128 + Kernel::kColumnPackers, Kernel::kColumnFillers);
    barrier_init_fence();
  }
  follow_earlier_kernels();
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kScanners + 1) {
    give_registers<Kernel::kProducing>();
    Kernel::run_producing(p, at, uniform_warp() % 4);
  } else if (warpgroup == Kernel::kScanners) {
    take_registers<Kernel::kUpdating>();
    typename Kernel::Updater(p, at).run();
  } else {
    give_registers<Kernel::kScanning>();
    typename Kernel::Scanner(p, at, warpgroup).run();
  }
}

template <typename T>
int launch_segment_state(const pt_problem& problem, const SegmentScan& scan, int segments, int count, float* out, cudaStream_t stream);

// On the host: what enters each of the segments, in `workspace` (segments, boundary), from what each leaves by itself; and scan.final_state, a step
// before which the kernels stop. *entering is null where nothing enters the only segment.
template <typename T>
int find_entering(const pt_problem& problem, const SegmentScan& scan, int segments, void* workspace, const float** entering, cudaStream_t stream) {
  const bool found = has_segments(problem, scan.final_state);
  *entering = found ? (const float*)workspace : scan.initial;
  if (!found) return PT_OK;
  if (int status = launch_segment_state<T>(problem, scan, segments, scan.final_state ? segments : segments - 1, (float*)workspace, stream)) return status;
  return enter_segments(problem, scan, segments, (float*)workspace, stream);
}

}  // namespace powertrain::sm90
