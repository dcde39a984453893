// key_grads on Hopper, for K = 32 in bf16: dv, dk and k . dk in one pass over a time segment from its end to its beginning. At this head dim the
// gradient of the state fits a multiprocessor, where it is added up and read without a way through device memory: chunk_state reverse, the join,
// chunk_scan reverse and chunk_scan_grad reverse in one kernel, with steps of 128 tokens in place of chunks.
//
// One warpgroup, the updating one, keeps the gradient E in fp32 accumulators, adds phi(q)^T dn' of a step, and leaves it in shared memory in 16 bits.
// Two scanning warpgroups, one for each 64-token block of the next step to the left, first form what attention within that step gives (dk is parked in
// shared memory between columns), then add what comes from E: dk by outer products (state_outer.cuh), dv from phi(k) E. Both products read one layout, E_abc for every ordered pair (a, b) of features: a slot for each b,
// with core matrices of eight a and eight columns c, which run along N for the outer products and along K for phi(k) E. The normaliser's column of E is
// a matrix of its own, Z = sum of decay n_i q_i q_i^T with n_i the last component of dn', kept twice as large.
// Of the producing warpgroup one thread copies for the scanning ones and one for the updating one; two warps multiply dn' by its decay on its way there.
#pragma once
#include "chunk_state.cuh"
#include "columns.cuh"
#include "grad_rows.cuh"

namespace powertrain::sm90 {

struct KeyGradsParams {
  const void *q, *k, *v, *dn;  // packed
  const float *block_in, *block_out, *log2_decay, *block_decay;
  const int32_t* document_start;
  const float* entering;  // (segments, boundary): E at the end of each, or null: one segment, zero
  void *dv, *dk, *grad_states;  // the last one, or null: E at the ends of chunks
  int64_t dv_stride_b, dv_stride_t, dv_stride_h, dk_stride_b, dk_stride_t, dk_stride_h;
  float *dots, *step_dots;  // (B, Hk, Tp), or null
  int64_t seq_len, boundary_stride;
  int blocks, chunks, blocks_per_chunk, segments, group, key_heads;
};

template <typename T>
struct KeyGrads {
  static constexpr int kHeadDim = 32, kFeatureBlocks = feature_blocks(kHeadDim), kPhiTiles = phi_tiles(kHeadDim), kHalf = kFeatureBlocks / 2;
  static constexpr int kColumns = kHeadDim + kNormColumns, kColumnGroups = kHeadDim / 8;
  static constexpr int kStep = kStepBlocks;  // one for each scanning warpgroup
  static constexpr int kScanners = kStep, kAssistants = 2, kThreads = (kScanners + 2) * 128;
  // Registers: at most 4 * 128, the cap of a block of 512 threads.
  static constexpr int kProducing = 40, kScanning = 128, kUpdating = 216;
  using Columns = ColumnBlock<kHeadDim>;

  // E in shared memory. The 16 bytes that pad a slot put the rows of mirrored pairs, which go to eight slots at once, into different banks.
  static constexpr int kRowBytes = 16, kCoreBytes = 8 * kRowBytes, kGroupBytes = kFeatureBlocks * kCoreBytes, kSlotBytes = kColumnGroups * kGroupBytes + 16;
  static constexpr int kNormBytes = kHeadDim * kHeadDim * 2;  // Z, hi and then lo
  static constexpr int kStateBytes = kHeadDim * kSlotBytes + 2 * kNormBytes, kStateBuffers = 2;
  // A block of rows: k and v without its ones. A block for the updating warpgroup: q, dn' and its decays; where dn' has its last component, the
  // assistants leave hi and lo of all tokens.
  static constexpr int kXBytes = Columns::kXBytes, kUBytes = Columns::kUBytes, kValueBytes = kHeadDim * kBlock * 2;
  static constexpr int kRowsBytes = kXBytes + kValueBytes, kRowBuffers = 2;
  static constexpr int kColumnBuffers = kStep;
  static constexpr int kQueryBytes = kXBytes + kUBytes + kBlock * 4, kQueryBuffers = 2;
  static constexpr int kParkedBytes = 128 * (kHeadDim / 2) * 4;  // dk of a scanning warpgroup
  static constexpr int kNormHigh = kXBytes + kValueBytes, kNormLow = kNormHigh + kBlock * 2;  // in a block of queries

  struct Layout {
    uint32_t states, rows, columns, queries, parked, state_barriers, row_barriers, column_barriers, query_barriers, loaded_barriers, end;
    __host__ __device__ constexpr Layout(uint32_t start)
        : states(start),
          rows(states + kStateBuffers * kStateBytes),
          columns(rows + kRowBuffers * kStep * kRowsBytes),
          queries(columns + kColumnBuffers * Columns::kBytes),
          parked(queries + kQueryBuffers * kQueryBytes),
          state_barriers(parked + kScanners * kParkedBytes),
          row_barriers(state_barriers + 16 * kStateBuffers),
          column_barriers(row_barriers + 16 * kRowBuffers),
          query_barriers(column_barriers + 16 * kColumnBuffers),
          loaded_barriers(query_barriers + 16 * kQueryBuffers),
          end(loaded_barriers + 8 * kQueryBuffers) {}
  };
  static constexpr int kSharedBytes = Layout(0).end;
  static_assert(kSharedBytes <= 227 * 1024 && kProducing + kScanners * kScanning + kUpdating <= 4 * 128);

  // A step of this thread block's segment: `count` blocks from `block` on. Steps run from the end of the sequence to its beginning.
  struct Step {
    int block, count;
    bool last;  // of the segment: the furthest to the left
    int chunk;  // that ends with the step, or -1
    // The block of the step that a scanning warpgroup takes, in turns: the first one also meets the second's columns.
    __device__ int block_of(int scanner) const { return (scanner + block / kStep) % kStep; }
  };
  template <typename Body>
  __device__ static __forceinline__ void for_each_step(const KeyGradsParams& p, Body body) {
    const int segment = blockIdx.x;
    const int first = (int)(p.chunks - segment_begin(p.chunks, p.segments, segment + 1)) * p.blocks_per_chunk;
    const int end = min((int)(p.chunks - segment_begin(p.chunks, p.segments, segment)) * p.blocks_per_chunk, p.blocks);
#pragma unroll 1
    for (int block = first + (end - first - 1) / kStep * kStep; block >= first; block -= kStep) {
      const int count = min(kStep, end - block), after = block + count;
      body(Step{block, count, block == first, after % p.blocks_per_chunk == 0 || after == p.blocks ? (after - 1) / p.blocks_per_chunk : -1});
    }
  }

  // A block of q and then dn', which both readers have one after the other.
  __device__ static __forceinline__ void load_queries(const KeyGradsParams& p, uint32_t to, int64_t block, uint32_t barrier) {
    bulk_load(to, (const T*)p.q + block * feature_block_elements(kHeadDim), kXBytes, barrier);
    bulk_load(to + kXBytes, (const T*)p.dn + block * value_block_elements(kHeadDim), kUBytes, barrier);
  }

  // What the scanning warpgroups read.
  __device__ static void produce(const KeyGradsParams& p, const Layout& at) {
    Ring<kRowBuffers> rows(at.row_barriers);
    Ring<kColumnBuffers> columns(at.column_barriers);
    const int64_t head = blockIdx.y, row_at = head * p.blocks, document_at = head / p.key_heads * p.blocks;
    for_each_step(p, [&](const Step& step) {
      rows.wait_empty();
      barrier_expect(rows.full_barrier(), step.count * kRowsBytes);
#pragma unroll 1
      for (int m = 0; m < step.count; m++) {
        const int64_t from = row_at + step.block + m;
        const uint32_t to = at.rows + (rows.stage() * kStep + m) * kRowsBytes;
        bulk_load(to, (const T*)p.k + from * feature_block_elements(kHeadDim), kXBytes, rows.full_barrier());
        bulk_load(to + kXBytes, (const T*)p.v + from * value_block_elements(kHeadDim), kValueBytes, rows.full_barrier());
      }
      rows.advance();
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int m = step.count - 1; m >= 0; m--) {
          const int64_t block = step.block + m, from = (head * p.group + g) * p.blocks + block, token = (row_at + block) * kBlock;
          const Columns to = {at.columns + columns.stage() * Columns::kBytes};
          columns.wait_empty();
          const uint32_t full = columns.full_barrier();
          barrier_expect(full, Columns::kBytes);
          load_queries(p, to.x, from, full);
          bulk_load(to.decays(), p.block_in + token, Columns::kVectorBytes, full);
          bulk_load(to.log2_decays(), p.log2_decay + token, Columns::kVectorBytes, full);
          bulk_load(to.documents(), p.document_start + (document_at + block) * kBlock, Columns::kVectorBytes, full);
          columns.advance();
        }
    });
  }

  // What the updating warpgroup reads, once the assistants have been there.
  __device__ static void produce_queries(const KeyGradsParams& p, const Layout& at) {
    Ring<kQueryBuffers> queries(at.query_barriers);
    const int64_t head = blockIdx.y;
    for_each_step(p, [&](const Step& step) {
      if (step.last) return;
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          const int64_t block = step.block + m, from = (head * p.group + g) * p.blocks + block;
          const uint32_t to = at.queries + queries.stage() * kQueryBytes, loaded = at.loaded_barriers + 8 * queries.stage();
          queries.wait_empty();
          barrier_expect(loaded, kQueryBytes);
          load_queries(p, to, from, loaded);
          bulk_load(to + kXBytes + kUBytes, p.block_in + (head * p.blocks + block) * kBlock, kBlock * 4, loaded);
          queries.advance();
        }
    });
  }

  // One of the assistants, the producing warpgroup's last warps: dn' times its decay from the step's start, its last component twice that.
  __device__ static void assist(const KeyGradsParams& p, const Layout& at) {
    Ring<kQueryBuffers> queries(at.query_barriers);
    const int thread = threadIdx.x % 128 - (4 - kAssistants) * 32;
    const float* const block_decay = p.block_decay + (int64_t)blockIdx.y * p.blocks;
    for_each_step(p, [&](const Step& step) {
      if (step.last) return;
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          const float before = m ? block_decay[step.block] : 1.f;
          barrier_wait(at.loaded_barriers + 8 * queries.stage(), queries.phase());
          const uint32_t block = at.queries + queries.stage() * kQueryBytes, u = block + kXBytes, decays = u + kUBytes;
          const uint32_t norm = u + (kColumnGroups * kBlock + 2 * (thread % 32)) * kRowBytes;
          float2 last[2];
          if (thread < 32) last[0] = Pair<T>::unpack(load_shared_4(norm)), last[1] = Pair<T>::unpack(load_shared_4(norm + kRowBytes));
          __syncwarp();
          if (thread < 32) {  // two tokens
            const float2 by = load_shared_float2(decays + thread * 8);
            const float first = 2.f * before * by.x * (last[0].x + last[0].y), second = 2.f * before * by.y * (last[1].x + last[1].y);
            const float first_high = round_to<T>(first), second_high = round_to<T>(second);
            store_shared_4(block + kNormHigh + thread * 4, Pair<T>::pack(first_high, second_high));
            store_shared_4(block + kNormLow + thread * 4, Pair<T>::pack(first - first_high, second - second_high));
          }
#pragma unroll 1
          for (int row = thread; row < kColumnGroups * kBlock; row += kAssistants * 32) {
            const float by = before * load_shared_float(decays + row % kBlock * 4);
            uint4 values = load_shared_16(u + row * kRowBytes);
            values.x = multiplied(values.x, by), values.y = multiplied(values.y, by);
            values.z = multiplied(values.z, by), values.w = multiplied(values.w, by);
            store_shared_16(u + row * kRowBytes, values);
          }
          fence_async_shared();
          barrier_arrive(queries.full_barrier());
          queries.advance();
        }
    });
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

  struct Updater {
    const KeyGradsParams& p;
    const Layout& at;
    const int lane, warp;
    Ring<kStateBuffers> states;
    Ring<kQueryBuffers> queries;
    // E of the tile of tile_of, and Z: rows are features, so two warps have nothing of it.
    float acc[kPhiTiles][kHeadDim / 2], z[kHeadDim / 2];

    __device__ Updater(const KeyGradsParams& p, const Layout& at)
        : p(p), at(at), lane(threadIdx.x % 32), warp(uniform_warp() % 4), states(at.state_barriers), queries(at.query_barriers) {}

    __device__ __forceinline__ bool has_norm() const { return warp < kHeadDim / 16; }
    // take(element of z, row of a boundary or a state, whether that is of a tile off the diagonal, and whether it stands for (b, a)): of this thread's Z_ab.
    template <typename F>
    __device__ __forceinline__ void for_each_norm(F take) const {
      const int lane = opaque(this->lane), warp = opaque(this->warp);
#pragma unroll
      for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int a_block = 2 * warp + e / 2, a = lane / 4, b = 2 * (lane % 4) + e % 2;
          bool swapped;
          const int tile = tile_of_pair(a_block, c, kHeadDim, swapped);
          take(4 * c + e, tile * kBlock + (swapped ? 8 * b + a : 8 * a + b), a_block != c, swapped);
        }
    }

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
      for (int c = 0; c < kHeadDim / 2; c++) z[c] = 0.f;
      if (has_norm() && entering) for_each_norm([&](int e, int row, bool, bool) { z[e] = 2.f * entering[row * kColumns + kHeadDim]; });
    }

    // Leaves E in shared memory, pair (a, b) and pair (b, a), and Z.
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
            if (distance) store_matrices(state + slot(j_block, row) + matrix * kGroupBytes + i_block * kCoreBytes + i * kRowBytes, values);
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

    // E at the end of a chunk, as chunk_state writes it, for state_flow.
    __device__ __forceinline__ void write_state(int chunk) const {
      T* const state = (T*)p.grad_states + ((int64_t)blockIdx.y * p.chunks + chunk) * kPhiTiles * state_tile_elements(kHeadDim);
#pragma unroll
      for (int i_block = 0; i_block < kFeatureBlocks; i_block++)
#pragma unroll
        for (int distance = 0; distance < tiles_of(i_block); distance++) {
          const int t = tile_of(i_block, distance);
          const float weight = distance ? 2.f : 1.f;
          T* const to = state + t * state_tile_elements(kHeadDim) + warp * 128 + lane * 2;
#pragma unroll
          for (int c = 0; c < kColumnGroups; c++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              *(uint32_t*)(to + c * 512 + half * 64) = Pair<T>::pack(weight * acc[t][4 * c + 2 * half], weight * acc[t][4 * c + 2 * half + 1]);
        }
      if (has_norm())
        for_each_norm([&](int e, int row, bool apart, bool swapped) {
          if (swapped) return;
          const float total = apart ? z[e] : 0.5f * z[e], high = round_to<T>(total);
          uint4* const to = (uint4*)(state + row / kBlock * state_tile_elements(kHeadDim) + state_index(row % kBlock, kHeadDim));
          *to = make_uint4(Pair<T>::pack(high, total - high), 0, 0, 0);
        });
    }

    // acc += phi(q)^T dn' and Z += (n q) q^T over the blocks of a step.
    __device__ __forceinline__ void update(int blocks) {
      // ldmatrix row addresses within a block of q (chunk_state.cuh): x_i of a feature, the same one for all rows, x_j of two blocks of features, and
      // a warp's rows of Z.
      const uint32_t i_offset = ((lane >> 4) * 64 + (2 * warp + (lane >> 3 & 1)) * 8) * 2;
      const uint32_t j_offset = (((lane >> 4) * 8 + (lane >> 3 & 1)) * 64 + (lane & 7) * 8) * 2;
      const uint32_t z_offset = ((2 * (warp % 2) + (lane >> 3 & 1)) * 512 + (lane >> 4) * 64 + (lane & 7) * 8) * 2;
#pragma unroll 1
      for (int block = 0; block < blocks; block++) {
        queries.wait_full();
        const uint32_t x = at.queries + queries.stage() * kQueryBytes;
        const CoreMatrices u(x + kXBytes, 128, 1024), features(x, 128, 1024);
        // Fragments are loaded while the products before theirs run: registers allow no second set of operands.
        uint32_t a[kHalf + 1][4], xi[4], xj[kFeatureBlocks][2];
        const auto load_xj = [&](int k) {
#pragma unroll
          for (int j = 0; j < kFeatureBlocks; j += 2) load_matrices(xj[j], xj[j + 1], x + k * 256 + j * 1024 + j_offset);
        };
        load_xj(0);
        load_matrices(xi, x + i_offset);
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++)
#pragma unroll
          for (int i_block = 0; i_block < kFeatureBlocks; i_block++) {
            wgmma_wait<0>();  // the products that read these operands are done
#pragma unroll
            for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
              for (int r = 0; r < 4; r++) a[distance][r] = Pair<T>::multiply(xj[j_block_of(i_block, distance)][r / 2], xi[r]);
            if (i_block >= kHalf) {  // one tile less, and Z: first lo, then hi
              load_matrices(xi, x + k * 256 + z_offset);
              const uint32_t norm = x + (i_block == kHalf ? kNormLow : kNormHigh) + (16 * k + 2 * (lane % 4)) * 2;
#pragma unroll
              for (int half = 0; half < 2; half++) {
                const uint32_t pair = load_shared_4(norm + half * 16);
                a[kHalf][2 * half] = Pair<T>::multiply(xi[2 * half], pair), a[kHalf][2 * half + 1] = Pair<T>::multiply(xi[2 * half + 1], pair);
              }
            }
            const int next = k * kFeatureBlocks + i_block + 1;
            if (next < kBlock / 16 * kFeatureBlocks) {
              if (next % kFeatureBlocks == 0) load_xj(k + 1);
              load_matrices(xi, x + next / kFeatureBlocks * 256 + next % kFeatureBlocks * 1024 + i_offset);
            }
            wgmma_fence();
#pragma unroll
            for (int distance = 0; distance < tiles_of(i_block); distance++) wgmma<T, true>(acc[tile_of(i_block, distance)], a[distance], u.at(k * 256), true);
            if (i_block >= kHalf) wgmma<T, false>(z, a[kHalf], features.at(k * 256), true);
            wgmma_commit();
          }
        wgmma_wait<0>();
        queries.release(queries.stage());
        queries.advance();
      }
    }

    __device__ void run() {
      const float* const block_decay = p.block_decay + (int64_t)blockIdx.y * p.blocks;
      enter();
      leave();
      for_each_step(p, [&](const Step& step) {
        if (p.grad_states && step.chunk >= 0) write_state(step.chunk);
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

  struct Scanner {
    const KeyGradsParams& p;
    const Layout& at;
    const int lane, warp, scanner;
    Ring<kStateBuffers> states;
    Ring<kRowBuffers> rows;
    Ring<kColumnBuffers> columns;
    float dk[kHeadDim / 2], dv[kHeadDim / 2];

    __device__ Scanner(const KeyGradsParams& p, const Layout& at, int scanner)
        : p(p), at(at), lane(threadIdx.x % 32), warp(uniform_warp() % 4), scanner(scanner), states(at.state_barriers), rows(at.row_barriers),
          columns(at.column_barriers) {}

    // A block's k and v as A operands.
    using Operands = RowOperands<kHeadDim>;
    __device__ __forceinline__ void load_keys(Operands& x, uint32_t k_at) const { load_features<kHeadDim>(x, k_at, warp, opaque(lane)); }
    __device__ __forceinline__ void load_values(Operands& u, uint32_t k_at) const { sm90::load_values<kHeadDim>(u, k_at + kXBytes, warp, opaque(lane)); }

    // The rows' decays to the end of their block.
    __device__ __forceinline__ void load_decays(float (&decay)[2], int block) const {
      const int lane = opaque(this->lane);
      const float* const from = p.block_out + ((int64_t)blockIdx.y * p.blocks + block) * kBlock + 16 * warp + lane / 4;
      decay[0] = from[0], decay[1] = from[8];
    }
    // dk += outer products x_b (2 v_c) times E_abc and Z x, dv += phi(x) E, where one factor of every product carries the decay to the end of the step.
    __device__ __forceinline__ void scan_state(uint32_t k_at, uint32_t state, int block, bool another) {
      const int lane = opaque(this->lane);
      Operands x, u;
      load_keys(x, k_at);
      load_values(u, k_at);
      float decay[2];
      load_decays(decay, block);
      const float after = another ? p.block_decay[(int64_t)blockIdx.y * p.blocks + block + 1] : 1.f;
      decay[0] *= after, decay[1] *= after;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++)
#pragma unroll
        for (int r = 0; r < 4; r++) x[k][r] = multiplied(x[k][r], decay[r % 2]), u[k][r] = multiplied(u[k][r], 2.f * decay[r % 2]);
      // x_i and x_{i+1} of a block I in both halves of a register, of both rows: a matrix is the eight tokens of one feature, again and again.
      uint32_t a[2][4][4], xi[4];
      const auto load_xi = [&](int i) { load_matrices_transposed(xi, k_at + ((i / 8 * 8 + 2 * warp + (lane >> 3 & 1)) * 64 + (i % 8 + (lane >> 4)) * 8) * 2); };
      load_xi(0);
#pragma unroll
      for (int i_block = 0; i_block < kFeatureBlocks; i_block++) {
        uint32_t xj[kHalf + 1][2];  // twice where one product stands for both (a, b) and (b, a)
#pragma unroll
        for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int j_block = j_block_of(i_block, distance);
            xj[distance][half] = x[j_block / 2][j_block % 2 * 2 + half];
            if (distance) xj[distance][half] = Pair<T>::add(xj[distance][half], xj[distance][half]);
          }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          wgmma_wait<1>();  // the products that read a[0] are done
#pragma unroll
          for (int s = 0; s < 4; s++)
#pragma unroll
            for (int r = 0; r < 4; r++) a[0][s][r] = Pair<T>::multiply(u[s % 2][r], xi[s / 2 * 2 + r % 2]);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < 4; s++)
            wgmma<T, false>(dk, a[0][s], CoreMatrices(state, kGroupBytes, kCoreBytes).at(slot(i_block, i + s / 2) + s % 2 * 2 * kGroupBytes), true);
          wgmma_commit();
          wgmma_wait<1>();
#pragma unroll
          for (int distance = 0; distance < tiles_of(i_block); distance++)
#pragma unroll
            for (int r = 0; r < 4; r++) a[1][distance][r] = Pair<T>::multiply(xj[distance][r % 2], xi[r]);
          if (8 * i_block + i + 2 < kHeadDim) load_xi(8 * i_block + i + 2);
          wgmma_fence();
#pragma unroll
          for (int distance = 0; distance < tiles_of(i_block); distance++)
            wgmma<T, true>(dv, a[1][distance], CoreMatrices(state, kSlotBytes, kGroupBytes).at(slot(i_block, i) + j_block_of(i_block, distance) * kCoreBytes), true);
          wgmma_commit();
        }
      }
      wgmma_fence();
#pragma unroll
      for (int low = 0; low < 2; low++)
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; k++)
          wgmma<T, false>(dk, x[k], CoreMatrices(state + kHeadDim * kSlotBytes + low * kNormBytes, kCoreBytes, kFeatureBlocks * kCoreBytes).at(k * 2 * kCoreBytes),
                          true);
      wgmma_commit();
      wgmma_wait<0>();
    }

    // A block of columns, the rows' own or the one after it: added to dv, and in place of dk, which registers do not hold beside the scores.
    __device__ __forceinline__ void attend(uint32_t k_at, const Columns& columns, bool diagonal, const float (&row_decay)[2], bool first) {
      float s[kBlock / 2], dw[kBlock / 2];  // the scores and their weights' gradient
      const int lane = opaque(this->lane);
      {
        Operands x, u;
        load_keys(x, k_at);
        load_values(u, k_at);
        const uint32_t one = lane % 4 == 0 ? Pair<T>::pack(1.f, 1.f) : 0, ones[4] = {one, one, 0, 0};  // of v', for hi and lo
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; k++) wgmma<T, true>(s, x[k], CoreMatrices(columns.x, 1024, 128).at(k * 2048), k > 0);
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; k++) wgmma<T, false>(dw, u[k], CoreMatrices(columns.u(), 1024, 128).at(k * 2048), k > 0);
        wgmma<T, false>(dw, ones, CoreMatrices(columns.u() + kColumnGroups * 1024, 0, 128).at(0), true);
        wgmma_commit();
        wgmma_wait<0>();
      }
      Weights weights, ds;
      if (diagonal) {
        float row_log2[2];
#pragma unroll
        for (int half = 0; half < 2; half++) row_log2[half] = load_shared_float(columns.log2_decays() + 4 * (16 * warp + lane / 4 + half * 8));
        const bool one_document = load_shared_4(columns.documents()) == load_shared_4(columns.documents() + 4 * (kBlock - 1));
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const int column = 8 * c + 2 * (lane % 4);
          const float2 log2 = load_shared_float2(columns.log2_decays() + 4 * column);
          float t[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float decay = exp2_fast((e % 2 ? log2.y : log2.x) - row_log2[e / 2]);
            t[e] = column + e % 2 >= 16 * warp + lane / 4 + e / 2 * 8 ? s[4 * c + e] * decay : 0.f;
          }
          if (!one_document) {
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (load_shared_4(columns.documents() + 4 * (column + e % 2)) != load_shared_4(columns.documents() + 4 * (16 * warp + lane / 4 + e / 2 * 8))) t[e] = 0.f;
          }
          weigh_both(weights, ds, c, t, s, dw);
        }
      } else {
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float2 decay = load_shared_float2(columns.decays() + 32 * c + 8 * (lane % 4));
          float t[4];
#pragma unroll
          for (int e = 0; e < 4; e++) t[e] = s[4 * c + e] * row_decay[e / 2] * (e % 2 ? decay.y : decay.x);
          weigh_both(weights, ds, c, t, s, dw);
        }
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) {
        wgmma<T, true>(dv, weights[k], CoreMatrices(columns.u(), 128, 1024).at(k * 256), k > 0 || !first);
        wgmma<T, false>(dk, ds[k], CoreMatrices(columns.x, 128, 1024).at(k * 256), k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
    }
    // s^2 and 2 s dW times the decays, where t is s times them, as A operands; what weigh and weigh_diagonal (columns.cuh) make of two products each.
    __device__ static __forceinline__ void weigh_both(Weights& weights, Weights& ds, int c, const float (&t)[4], const float (&s)[kBlock / 2],
                                                      const float (&dw)[kBlock / 2]) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        weights[c / 2][c % 2 * 2 + e / 2] = Pair<T>::pack(t[e] * s[4 * c + e], t[e + 1] * s[4 * c + e + 1]);
        ds[c / 2][c % 2 * 2 + e / 2] = Pair<T>::pack(2.f * t[e] * dw[4 * c + e], 2.f * t[e + 1] * dw[4 * c + e + 1]);
      }
    }

    // This thread's terms of x . dk of its two rows, from dk as it is.
    __device__ __forceinline__ void add_dots(float (&dot)[2], const Operands& x) const {
#pragma unroll
      for (int c = 0; c < kFeatureBlocks; c++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float2 k = Pair<T>::unpack(x[c / 2][c % 2 * 2 + half]);
          dot[half] = fmaf(k.x, dk[4 * c + 2 * half], fmaf(k.y, dk[4 * c + 2 * half + 1], dot[half]));
        }
    }

    __device__ __forceinline__ void store(int block, uint32_t k_at, const float (&before)[2]) const {
      Operands x;
      load_keys(x, k_at);
      const int lane = opaque(this->lane), of_all = opaque(blockIdx.y), batch = of_all / p.key_heads, head = of_all % p.key_heads;
      float dot[2] = {};
      add_dots(dot, x);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = 16 * warp + lane / 4 + half * 8;
        const int64_t token = (int64_t)block * kBlock + row;
        float of_state = dot[half] - before[half];
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          dot[half] += __shfl_xor_sync(0xffffffffu, dot[half], lanes);
          of_state += __shfl_xor_sync(0xffffffffu, of_state, lanes);
        }
        if (p.dots && lane % 4 == 0) {
          const int64_t at = ((int64_t)of_all * p.blocks + block) * kBlock + row;
          p.dots[at] = 0.5f * dot[half], p.step_dots[at] = 0.5f * of_state;
        }
        T* const to_dk = (T*)p.dk + batch * p.dk_stride_b + token * p.dk_stride_t + head * p.dk_stride_h;
        T* const to_dv = (T*)p.dv + batch * p.dv_stride_b + token * p.dv_stride_t + head * p.dv_stride_h;
#pragma unroll
        for (int c = 0; c < kFeatureBlocks; c += 2) {
          const float *from_k = dk + 4 * c + 2 * half, *from_v = dv + 4 * c + 2 * half;
          store_two_groups(to_dk + 8 * c, token < p.seq_len, lane, from_k[0], from_k[1], from_k[4], from_k[5]);
          store_two_groups(to_dv + 8 * c, token < p.seq_len, lane, from_v[0], from_v[1], from_v[4], from_v[5]);
        }
      }
    }

    // Attention within the step: columns of the block itself, and of the one after it.
    __device__ __forceinline__ void scan_columns(const Step& step, int m, uint32_t k_at) {
      const uint32_t parked = at.parked + scanner * kParkedBytes + (32 * warp + lane) * 16;
      float row_decay[2] = {};
      if (m < step.count) load_decays(row_decay, step.block + m);
#pragma unroll 1
      for (int g = 0; g < p.group; g++)
#pragma unroll 1
        for (int i = step.count - 1; i >= 0; i--) {
          columns.wait_full();
          if (i >= m) {
            const bool first = g == 0 && i == step.count - 1;
            attend(k_at, {at.columns + columns.stage() * Columns::kBytes}, i == m, row_decay, first);
            if (!first)
#pragma unroll
              for (int c = 0; c < kHeadDim / 2; c += 4) {
                const uint4 before = load_shared_16(parked + c * 512);
                dk[c] += __uint_as_float(before.x), dk[c + 1] += __uint_as_float(before.y);
                dk[c + 2] += __uint_as_float(before.z), dk[c + 3] += __uint_as_float(before.w);
              }
            if (i > m || g + 1 < p.group)
#pragma unroll
              for (int c = 0; c < kHeadDim / 2; c += 4)
                store_shared_16(parked + c * 512, make_uint4(__float_as_uint(dk[c]), __float_as_uint(dk[c + 1]), __float_as_uint(dk[c + 2]), __float_as_uint(dk[c + 3])));
          }
          columns.release(columns.stage());
          columns.advance();
        }
    }

    __device__ void run() {
      for_each_step(p, [&](const Step& step) {
        const int m = step.block_of(scanner), block = step.block + m;
        const bool mine = m < step.count;
        const uint32_t k_at = at.rows + (rows.stage() * kStep + m) * kRowsBytes;
        rows.wait_full();
        scan_columns(step, m, k_at);
        float before[2] = {};
        if (mine) {
          Operands x;
          load_keys(x, k_at);
          add_dots(before, x);
        }
        states.wait_full();
        if (mine) scan_state(k_at, at.states + states.stage() * kStateBytes, block, m + 1 < step.count);
        states.release(states.stage());
        states.advance();
        if (mine) store(block, k_at, before);
        rows.release(rows.stage());
        rows.advance();
      });
    }
  };
};

// Grid (segments, B * Hk).
template <typename T>
__global__ void __launch_bounds__(KeyGrads<T>::kThreads, 1) key_grads_kernel(const __grid_constant__ KeyGradsParams p) {
  using Kernel = KeyGrads<T>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const typename Kernel::Layout at(shared_address(shared_memory));
  if (threadIdx.x == 0) {
    Ring<Kernel::kStateBuffers>::init(at.state_barriers, Kernel::kScanners * 128, 128);
    Ring<Kernel::kRowBuffers>::init(at.row_barriers, Kernel::kScanners * 128);
    Ring<Kernel::kColumnBuffers>::init(at.column_barriers, Kernel::kScanners * 128);
    Ring<Kernel::kQueryBuffers>::init(at.query_barriers, 128, Kernel::kAssistants * 32);
    for (int i = 0; i < Kernel::kQueryBuffers; i++) barrier_init(at.loaded_barriers + 8 * i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = uniform_warp() / 4;
  if (warpgroup == Kernel::kScanners + 1) {
    give_registers<Kernel::kProducing>();
    const int warp = uniform_warp() % 4;
    if (threadIdx.x % 128 == 0) Kernel::produce(p, at);
    else if (threadIdx.x % 128 == 32) Kernel::produce_queries(p, at);
    else if (warp >= 4 - Kernel::kAssistants) Kernel::assist(p, at);
  } else if (warpgroup == Kernel::kScanners) {
    take_registers<Kernel::kUpdating>();
    typename Kernel::Updater(p, at).run();
  } else {
    give_registers<Kernel::kScanning>();
    typename Kernel::Scanner(p, at, warpgroup).run();
  }
}

template <typename T>
int launch_key_grads(const pt_problem& problem, const pt_key_grads_params& params, cudaStream_t stream) {
  using Kernel = KeyGrads<T>;
  const Gates gates = gates_of(problem, params.gates);
  const int segments = choose_entered_segments(problem);
  float* const entering = (float*)params.workspace;
  // With one segment, for the gradient of the initial state alone: the updating warpgroup stops a step before it has that.
  if (segments > 1 || params.final_state) {
    const pt_chunk_state_params own = {1, params.q, params.decayed_dn, params.gates, nullptr, nullptr, params.final_state, nullptr};
    if (int status = scan_segments<32, T>(problem, own, segments, entering, stream)) return status;
    if (segments > 1)
      if (int status = enter_segments(problem, own, segments, entering, stream)) return status;
  }
  KeyGradsParams p;
  p.q = params.q, p.k = params.k, p.v = params.v, p.dn = params.dn;
  p.block_in = gates.block_in, p.block_out = gates.block_out, p.log2_decay = gates.log2_decay, p.block_decay = gates.block_decay;
  p.document_start = gates.document_start;
  p.entering = segments > 1 ? entering : nullptr;
  p.dv = params.dv.data, p.dk = params.dk.data;
  p.dv_stride_b = params.dv.stride_b, p.dv_stride_t = params.dv.stride_t, p.dv_stride_h = params.dv.stride_h;
  p.dk_stride_b = params.dk.stride_b, p.dk_stride_t = params.dk.stride_t, p.dk_stride_h = params.dk.stride_h;
  p.grad_states = params.grad_states, p.dots = params.dots;
  p.step_dots = params.dots ? params.dots + (int64_t)problem.batch * problem.key_heads * padded_blocks(problem.seq_len) * kBlock : nullptr;
  p.seq_len = problem.seq_len, p.boundary_stride = boundary_elements(problem);
  p.blocks = (int)padded_blocks(problem.seq_len), p.chunks = (int)chunks(problem.seq_len, problem.chunk_size);
  p.blocks_per_chunk = problem.chunk_size / kBlock, p.segments = segments;
  p.group = problem.query_heads / problem.key_heads, p.key_heads = problem.key_heads;
  auto* kernel = key_grads_kernel<T>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  kernel<<<dim3((unsigned)segments, (unsigned)(problem.batch * problem.key_heads)), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p);
  return check_cuda(cudaGetLastError(), "key_grads");
}

}  // namespace powertrain::sm90
