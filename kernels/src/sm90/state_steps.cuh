// A state that one thread block keeps through a time segment, in steps of 128 tokens: at K = 32 it fits a multiprocessor, where it is added up and read
// without a way through device memory. Forward it is S, the sum of phi(k)^T v', in reverse its gradient E, the sum of phi(q)^T dn'.
//
// One warpgroup, the updating one, keeps it in fp32 accumulators, and before every step leaves it in shared memory in 16 bits for the warpgroups that
// scan the step: S_abc for ordered pairs (a, b) of features, a slot for each b, with core matrices of eight a and eight columns c. The normaliser's
// column is a matrix of its own, Z = sum of decay n_i x_i x_i^T with n_i the last component of u, kept twice as large.
// Of the producing warpgroup one thread copies what the updating one reads, and two warps assist: they multiply u by its decay on its way there, and write
// the states that others read from shared memory to the device's.
#pragma once
#include "chunk_state.cuh"
#include "columns.cuh"
#include "grad_rows.cuh"

namespace powertrain::sm90 {

struct StepsParams {
  const void *x, *u;       // packed: k and v'; in reverse q and dn'
  const float* decays;     // of tokens, to the end of their block; in reverse from its start
  const float* block_decay;
  const float* entering;   // (segments, boundary): the state that enters each; or null: there is one, and zero enters it
  void* states;            // or null: the state that enters every chunk, from its own end
  int64_t boundary_stride;
  int blocks, chunks, blocks_per_chunk, segments, group;  // group: heads of x and u of a key head
};

template <typename T, bool kReverse>
struct StateSteps {
  static constexpr int kHeadDim = 32, kFeatureBlocks = feature_blocks(kHeadDim), kPhiTiles = phi_tiles(kHeadDim), kHalf = kFeatureBlocks / 2;
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kHeadDim / 8;
  static constexpr int kStep = kStepBlocks, kAssistants = 2;
  static constexpr int kScanners = kStep, kThreads = (kScanners + 2) * 128;  // a scanning warpgroup for each block of a step

  // The state in shared memory. The 16 bytes that pad a slot put the rows of mirrored pairs, which go to eight slots at once, into different banks.
  static constexpr int kRowBytes = 16, kCoreBytes = 8 * kRowBytes, kGroupBytes = kFeatureBlocks * kCoreBytes, kSlotBytes = kColumnGroups * kGroupBytes + 16;
  static constexpr int kNormBytes = kHeadDim * kHeadDim * 2;  // Z, hi and then lo
  static constexpr int kStateBytes = kHeadDim * kSlotBytes + 2 * kNormBytes, kStateBuffers = 2;
  // A block of x, u and u's decays; where u has its last component, the assistants leave hi and lo of all tokens.
  static constexpr int kXBytes = feature_block_elements(kHeadDim) * 2, kUBytes = value_block_elements(kHeadDim) * 2, kValueBytes = kHeadDim * kBlock * 2;
  static constexpr int kInputBytes = kXBytes + kUBytes + kBlock * 4, kInputBuffers = 2;
  static constexpr int kNormHigh = kXBytes + kValueBytes, kNormLow = kNormHigh + kBlock * 2;

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
    const int64_t begin = segment_begin(p.chunks, p.segments, blockIdx.x), end = segment_begin(p.chunks, p.segments, blockIdx.x + 1);
    const int first = (int)(kReverse ? p.chunks - end : begin) * p.blocks_per_chunk;
    const int after_all = min((int)(kReverse ? p.chunks - begin : end) * p.blocks_per_chunk, p.blocks);
    const int final = first + (after_all - first - 1) / kStep * kStep;
    int chunk = (int)(kReverse ? p.chunks - 1 - begin : begin);  // the next one that the state enters
#pragma unroll 1
    for (int block = kReverse ? final : first; kReverse ? block >= first : block <= final; block += kReverse ? -kStep : kStep) {
      const int count = min(kStep, after_all - block), after = block + count;
      const bool enters = kReverse ? after == min((chunk + 1) * p.blocks_per_chunk, p.blocks) : block == chunk * p.blocks_per_chunk;
      body(Step{block, count, block == (kReverse ? first : final), enters ? chunk : -1});
      if (enters) chunk += kReverse ? -1 : 1;
    }
  }

  // A block of x and then u, for both who read them.
  __device__ static __forceinline__ void load_block(const StepsParams& p, uint32_t to, int64_t block, uint32_t barrier) {
    bulk_load(to, (const T*)p.x + block * feature_block_elements(kHeadDim), kXBytes, barrier);
    bulk_load(to + kXBytes, (const T*)p.u + block * value_block_elements(kHeadDim), kUBytes, barrier);
  }

  // What the updating warpgroup reads, once the assistants have been there.
  __device__ static void produce_inputs(const StepsParams& p, const Memory& at) {
    Ring<kInputBuffers> inputs(at.input_barriers);
    const int64_t head = blockIdx.y;
    for_each_step(p, [&](const Step& step) {
      if (step.last) return;
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          const int64_t block = step.block + m, from = (head * p.group + g) * p.blocks + block;
          const uint32_t to = at.inputs + inputs.stage() * kInputBytes, loaded = at.loaded_barriers + 8 * inputs.stage();
          inputs.wait_empty();
          barrier_expect(loaded, kInputBytes);
          load_block(p, to, from, loaded);
          bulk_load(to + kXBytes + kUBytes, p.decays + (head * p.blocks + block) * kBlock, kBlock * 4, loaded);
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
          const int other = kReverse ? m - 1 : m + 1;  // the block, if any, that it has to cross
          const float across = other >= 0 && other < step.count ? block_decay[step.block + other] : 1.f;
          barrier_wait(at.loaded_barriers + 8 * inputs.stage(), inputs.phase());
          const uint32_t block = at.inputs + inputs.stage() * kInputBytes, u = block + kXBytes, decays = u + kUBytes;
          const uint32_t norm = u + (kColumnGroups * kBlock + 2 * (thread % 32)) * kRowBytes;
          float2 last[2];
          if (thread < 32) last[0] = Pair<T>::unpack(load_shared_4(norm)), last[1] = Pair<T>::unpack(load_shared_4(norm + kRowBytes));
          __syncwarp();
          if (thread < 32) {  // two tokens
            const float2 by = load_shared_float2(decays + thread * 8);
            const float first = 2.f * across * by.x * (last[0].x + last[0].y), second = 2.f * across * by.y * (last[1].x + last[1].y);
            const float first_high = round_to<T>(first), second_high = round_to<T>(second);
            store_shared_4(block + kNormHigh + thread * 4, Pair<T>::pack(first_high, second_high));
            store_shared_4(block + kNormLow + thread * 4, Pair<T>::pack(first - first_high, second - second_high));
          }
#pragma unroll 1
          for (int row = thread; row < kColumnGroups * kBlock; row += kAssistants * 32) {
            const float by = across * load_shared_float(decays + row % kBlock * 4);
            uint4 values = load_shared_16(u + row * kRowBytes);
            values.x = multiplied(values.x, by), values.y = multiplied(values.y, by);
            values.z = multiplied(values.z, by), values.w = multiplied(values.w, by);
            store_shared_16(u + row * kRowBytes, values);
          }
          fence_async_shared();
          barrier_arrive(inputs.full_barrier());
          inputs.advance();
        }
      // Their arrivals are no more than a second lock: the updating warpgroup needs their next inputs before it leaves a state here.
      states.wait_full();
      if (p.states && step.chunk >= 0) write_state(p, at.states + states.stage() * kStateBytes, step.chunk, thread);
      states.release(states.stage());
      states.advance();
    });
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
  __device__ static __forceinline__ uint32_t multiplied(uint32_t pair, float by) {
    const float2 both = Pair<T>::unpack(pair);
    return Pair<T>::pack(both.x * by, both.y * by);
  }

  __device__ static __forceinline__ uint32_t slot(int block, int feature) { return (8 * block + feature) * kSlotBytes; }
  // The phi tile of distance < 3 with I = i_block; there are three of i_block < 2, else two.
  __device__ static constexpr int tiles_of(int i_block) { return i_block < kHalf ? kHalf + 1 : kHalf; }
  __device__ static constexpr int tile_of(int i_block, int distance) {
    return distance < kHalf ? i_block * kHalf + distance : kFeatureBlocks * kHalf + i_block;
  }
  __device__ static constexpr int j_block_of(int i_block, int distance) { return (i_block + distance) % kFeatureBlocks; }

  // What a scanning warpgroup makes of the state: phi(x) S and x Z, where the rows' x are A operands. Of a block I, x_i and x_{i+1} for i = feature, each in
  // both halves of a register, of both rows: a matrix is the eight tokens of one feature, again and again.
  __device__ static __forceinline__ void load_pair(uint32_t (&xi)[4], uint32_t x_at, int feature, int warp, int lane) {
    load_matrices_transposed(xi, x_at + ((feature / 8 * 8 + 2 * warp + (lane >> 3 & 1)) * 64 + (feature % 8 + (lane >> 4)) * 8) * 2);
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
  struct Updater {
    const StepsParams& p;
    const Memory& at;
    const int lane, warp;
    Ring<kStateBuffers> states;
    Ring<kInputBuffers> inputs;
    // The state of the tile of tile_of, and Z: rows are features, so two warps have nothing of it.
    float acc[kPhiTiles][kHeadDim / 2], z[kHeadDim / 2];

    __device__ Updater(const StepsParams& p, const Memory& at)
        : p(p), at(at), lane(threadIdx.x % 32), warp(uniform_warp() % 4), states(at.state_barriers), inputs(at.input_barriers) {}

    __device__ __forceinline__ bool has_norm() const { return warp < kHeadDim / 16; }

    __device__ __forceinline__ void enter() {
      const float* const entering = p.entering ? p.entering + blockIdx.x * p.boundary_stride + (int64_t)blockIdx.y * kPhiTiles * kBlock * kColumns : nullptr;
#pragma unroll
      for (int t = 0; t < kPhiTiles; t++) {
        const float* const from = entering + (t * kBlock + 16 * warp + lane / 4) * kColumns + 2 * (lane % 4);
#pragma unroll
        for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float2 value = entering ? *(const float2*)(from + c * 8 + half * 8 * kColumns) : make_float2(0.f, 0.f);
            acc[t][4 * c + 2 * half] = value.x, acc[t][4 * c + 2 * half + 1] = value.y;
          }
      }
#pragma unroll
      for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {  // Z_ab
          z[4 * c + e] = 0.f;
          if (!has_norm() || !entering) continue;
          const int a_block = 2 * warp + e / 2, a = lane / 4, b = 2 * (lane % 4) + e % 2;
          bool swapped;
          const int tile = tile_of_pair(a_block, c, kHeadDim, swapped);
          z[4 * c + e] = 2.f * entering[(tile * kBlock + (swapped ? 8 * b + a : 8 * a + b)) * kColumns + kHeadDim];
        }
    }

    // Leaves the state in shared memory, the tiles' pairs (a, b) and if kMirrored (b, a), too, and Z.
    __device__ __forceinline__ void leave() {
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

    // acc += phi(x)^T u and Z += (n x) x^T over the blocks of a step.
    __device__ __forceinline__ void update(int blocks) {
      constexpr int kTurns = kBlock / 16 * kFeatureBlocks;  // groups of products
      // ldmatrix row addresses within a block of x (chunk_state.cuh): x_i of a feature, the same one for all rows, and x_j of two blocks of features. A
      // warp's rows of Z are two of these blocks.
      const uint32_t i_offset = ((lane >> 4) * 64 + (2 * warp + (lane >> 3 & 1)) * 8) * 2;
      const uint32_t j_offset = (((lane >> 4) * 8 + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2;
#pragma unroll 1
      for (int block = 0; block < blocks; block++) {
        inputs.wait_full();
        const uint32_t x = at.inputs + inputs.stage() * kInputBytes;
        const CoreMatrices u(x + kXBytes, 128, 1024), features(x, 128, 1024);
        // Fragments are loaded while products run, of the last group (kSets = 1) or of the last two.
        uint32_t sets[kSets][kHalf + 1][4], xi[kSets][4], xj[kSets][kFeatureBlocks][2];
        const auto load_xi = [&](int turn) { load_matrices(xi[turn % kSets], x + turn / kFeatureBlocks * 256 + turn % kFeatureBlocks * 1024 + i_offset); };
        const auto load_xj = [&](int k) {
#pragma unroll
          for (int j = 0; j < kFeatureBlocks; j += 2) load_matrices(xj[k % kSets][j], xj[k % kSets][j + 1], x + k * 256 + j * 1024 + j_offset);
        };
        load_xj(0);
#pragma unroll
        for (int turn = 0; turn < kSets; turn++) load_xi(turn);
#pragma unroll
        for (int turn = 0; turn < kTurns; turn++) {
          const int k = turn / kFeatureBlocks, i_block = turn % kFeatureBlocks;
          uint32_t(&a)[kHalf + 1][4] = sets[turn % kSets];
          uint32_t(&x_of)[kFeatureBlocks][2] = xj[k % kSets];
          uint32_t norm[2];  // two tokens' last components of u: lo, and with the next block hi
          if (i_block >= kHalf)
#pragma unroll
            for (int half = 0; half < 2; half++) norm[half] = load_shared_4(x + (i_block == kHalf ? kNormLow : kNormHigh) + (16 * k + 8 * half + 2 * (lane % 4)) * 2);
          wgmma_wait<kSets - 1>();  // the products that read these operands are done
#pragma unroll
          for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
            for (int r = 0; r < 4; r++) a[distance][r] = Pair<T>::multiply(x_of[j_block_of(i_block, distance)][r / 2], xi[turn % kSets][r]);
          if (i_block >= kHalf)  // one tile less, and Z
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
              for (int b = 0; b < 2; b++) a[kHalf][2 * half + b] = Pair<T>::multiply(warp % 2 ? x_of[2 + b][half] : x_of[b][half], norm[half]);
          if (turn + kSets < kTurns) load_xi(turn + kSets);
          if (turn % kFeatureBlocks == (kSets > 1 ? 1 : kFeatureBlocks - 1) && k + 1 < kBlock / 16) load_xj(k + 1);
          wgmma_fence();
#pragma unroll
          for (int distance = 0; distance < tiles_of(i_block); distance++) wgmma<T, true>(acc[tile_of(i_block, distance)], a[distance], u.at(k * 256), true);
          if (i_block >= kHalf) wgmma<T, false>(z, a[kHalf], features.at(k * 256), true);
          wgmma_commit();
        }
        wgmma_wait<0>();
        inputs.release(inputs.stage());
        inputs.advance();
      }
    }

    __device__ void run() {
      const float* const block_decay = p.block_decay + (int64_t)blockIdx.y * p.blocks;
      enter();
      leave();
      for_each_step(p, [&](const Step& step) {
        if (step.last) return;
        const float across = block_decay[step.block] * (step.count > 1 ? block_decay[step.block + 1] : 1.f);
#pragma unroll
        for (int c = 0; c < kHeadDim / 2; c++) {
          z[c] *= across;
#pragma unroll
          for (int t = 0; t < kPhiTiles; t++) acc[t][c] *= across;
        }
        update(p.group * step.count);
        leave();
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
    Ring<Kernel::kRowBuffers>::init(at.row_barriers, Kernel::kScanners * 128);
    Ring<Kernel::kColumnBuffers>::init(at.column_barriers, Kernel::kScanners * 128);
    barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kScanners + 1) {
    give_registers<Kernel::kProducing>();
    const int warp = uniform_warp() % 4;
    if (threadIdx.x % 128 == 0) Kernel::produce(p, at);
    else if (threadIdx.x % 128 == 32) Kernel::produce_inputs(p, at);
    else if (warp >= 4 - Kernel::kAssistants) Kernel::assist(p, at);
  } else if (warpgroup == Kernel::kScanners) {
    take_registers<Kernel::kUpdating>();
    typename Kernel::Updater(p, at).run();
  } else {
    give_registers<Kernel::kScanning>();
    typename Kernel::Scanner(p, at, warpgroup).run();
  }
}

// On the host: what enters each of the segments, in `workspace` (segments, boundary), from what each leaves by itself, as `own` says; and own.final_state,
// a step before which the kernels stop. *entering is null where nothing enters the only segment.
template <typename T>
int find_entering(const pt_problem& problem, pt_chunk_state_params own, int segments, void* workspace, const float** entering, cudaStream_t stream) {
  float* const locals = (float*)workspace;
  const float* const initial = own.initial;
  *entering = segments > 1 ? locals : initial;
  if (segments == 1 && !own.final_state) return PT_OK;
  if (segments > 1) own.initial = nullptr;
  if (int status = scan_segments<32, T>(problem, own, segments, locals, stream)) return status;
  own.initial = initial;
  return segments > 1 ? enter_segments(problem, own, segments, locals, stream) : PT_OK;
}

inline void set_steps_params(StepsParams& p, const pt_problem& problem, const Gates& gates, int segments, const float* entering) {
  p.block_decay = gates.block_decay, p.entering = entering, p.boundary_stride = boundary_elements(problem);
  p.blocks = (int)padded_blocks(problem.seq_len), p.chunks = (int)chunks(problem.seq_len, problem.chunk_size);
  p.blocks_per_chunk = problem.chunk_size / kBlock, p.segments = segments;
}

}  // namespace powertrain::sm90
