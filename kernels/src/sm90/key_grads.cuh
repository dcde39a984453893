// key_grads on Hopper, for K = 32 in bf16: dv, dk and k . dk in one pass over a time segment from its end to its beginning, with the gradient E of the
// state beside it (state_steps.cuh): chunk_state reverse, the join, chunk_scan reverse and chunk_scan_grad reverse in one kernel, with steps of 128
// tokens in place of chunks.
//
// Two scanning warpgroups, one for each 64-token block of the next step to the left, first form what attention within that step gives (dk is parked in
// shared memory between columns), then add what comes from E: dk by outer products (state_outer.cuh), dv from phi(k) E. Both products read one layout,
// E_abc for every ordered pair (a, b), whose core matrices run along N for the outer products and along K for phi(k) E.
#pragma once
#include "state_steps.cuh"

namespace powertrain::sm90 {

struct KeyGradsParams : StepsParams {  // x: q, u: dn'
  const void *k, *v;                   // packed
  const float *block_out, *log2_decay;
  const int32_t* document_start;
  void *dv, *dk;
  int64_t dv_stride_b, dv_stride_t, dv_stride_h, dk_stride_b, dk_stride_t, dk_stride_h;
  float *dots, *step_dots;  // (B, Hk, Tp), or null
  int64_t seq_len;
  int key_heads;
};

template <typename T>
struct KeyGrads : StateSteps<T, true> {
  using Steps = StateSteps<T, true>;
  using Steps::for_each_step, Steps::load_block, Steps::load_pair, Steps::multiply_norm, Steps::multiply_phi, Steps::set_phi,
      Steps::set_phi_columns, Steps::slot;
  using Steps::kColumnGroups, Steps::kCoreBytes, Steps::kFeatureBlocks, Steps::kGroupBytes, Steps::kHeadDim, Steps::kScanners, Steps::kStateBuffers,
      Steps::kStateBytes, Steps::kStep, Steps::kValueBytes, Steps::kXBytes;
  using typename Steps::Memory, typename Steps::PhiColumns, typename Steps::Step;
  using Updater = typename Steps::template Updater<true, 1>;
  // Registers: at most 4 * 128, the cap of a block of 512 threads.
  static constexpr int kProducing = 40, kScanning = 128, kUpdating = 216;
  using Columns = ColumnBlock<kHeadDim>;

  static constexpr int kRowsBytes = kXBytes + kValueBytes, kRowBuffers = 2;  // a block of rows: k and v without its ones
  static constexpr int kColumnBuffers = kStep;
  static constexpr int kParkedBytes = 128 * (kHeadDim / 2) * 4;  // dk of a scanning warpgroup

  struct Layout : Memory {
    uint32_t rows, columns, parked, row_barriers, column_barriers, end;
    __host__ __device__ constexpr explicit Layout(uint32_t start)
        : Memory(start),
          rows(Memory::end_of_steps),
          columns(rows + kRowBuffers * kStep * kRowsBytes),
          parked(columns + kColumnBuffers * Columns::kBytes),
          row_barriers(parked + kScanners * kParkedBytes),
          column_barriers(row_barriers + 16 * kRowBuffers),
          end(column_barriers + 16 * kColumnBuffers) {}
  };
  static constexpr int kSharedBytes = Layout(0).end;
  static_assert(kSharedBytes <= 227 * 1024 && kProducing + kScanners * kScanning + kUpdating <= 4 * 128);

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
          load_block(p, to.x, from, full);
          bulk_load(to.decays(), p.decays + token, Columns::kVectorBytes, full);
          bulk_load(to.log2_decays(), p.log2_decay + token, Columns::kVectorBytes, full);
          bulk_load(to.documents(), p.document_start + (document_at + block) * kBlock, Columns::kVectorBytes, full);
          columns.advance();
        }
    });
  }

  static constexpr int kRowFillers = 1, kColumnFillers = 1, kColumnPackers = 0;  // threads
  __device__ static void run_producing(const KeyGradsParams& p, const Layout& at, int warp) {
    if (threadIdx.x % 128 == 0) produce(p, at);
    else if (threadIdx.x % 128 == 32) Steps::produce_inputs(p, at);
    else if (warp >= 2) Steps::assist(p, at);
  }

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
        for (int r = 0; r < 4; r++) x[k][r] = scaled<T>(x[k][r], decay[r % 2]), u[k][r] = scaled<T>(u[k][r], 2.f * decay[r % 2]);
      uint32_t a[2][4][4], pairs[2][4];
      const auto load_xi = [&](int i) { load_pair(pairs[i / 2 % 2], k_at, i, warp, lane); };
      load_xi(0), load_xi(2);
#pragma unroll
      for (int i_block = 0; i_block < kFeatureBlocks; i_block++) {
        PhiColumns xj;
        set_phi_columns(xj, x, i_block);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          uint32_t(&xi)[4] = pairs[i / 2 % 2];
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
          set_phi(a[1], xj, xi, i_block);
          if (8 * i_block + i + 4 < kHeadDim) load_xi(8 * i_block + i + 4);
          wgmma_fence();
          multiply_phi(dv, a[1], state, i_block, i, true);
          wgmma_commit();
        }
      }
      wgmma_fence();
      multiply_norm(dk, x, state, true);
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

template <typename T>
__global__ void __launch_bounds__(KeyGrads<T>::kThreads, 1) key_grads_kernel(const __grid_constant__ KeyGradsParams p) {
  run_steps<KeyGrads<T>>(p);
}

template <typename T>
int launch_key_grads(const pt_problem& problem, const pt_key_grads_params& params, cudaStream_t stream) {
  using Kernel = KeyGrads<T>;
  const Gates gates = gates_of(problem, params.gates);
  const int segments = choose_entered_segments(problem);
  const SegmentScan scan = {true, params.q, params.dn, params.gates, nullptr, params.final_state, nullptr, params.dy.data ? &params : nullptr};
  const float* entering;
  if (int status = find_entering<T>(problem, scan, segments, params.workspace, &entering, stream)) return status;
  if (!params.dk.data) return PT_OK;
  KeyGradsParams p;
  set_segment_params(p, problem, segments, true);
  p.block_decay = gates.block_decay, p.entering = entering;
  p.x = params.q, p.u = params.dn, p.k = params.k, p.v = params.v;
  p.decays = gates.block_in, p.block_out = gates.block_out, p.log2_decay = gates.log2_decay, p.document_start = gates.document_start;
  p.dv = params.dv.data, p.dk = params.dk.data;
  p.dv_stride_b = params.dv.stride_b, p.dv_stride_t = params.dv.stride_t, p.dv_stride_h = params.dv.stride_h;
  p.dk_stride_b = params.dk.stride_b, p.dk_stride_t = params.dk.stride_t, p.dk_stride_h = params.dk.stride_h;
  p.states = params.grad_states, p.dots = params.dots;
  p.step_dots = params.dots ? params.dots + (int64_t)problem.batch * problem.key_heads * padded_blocks(problem.seq_len) * kBlock : nullptr;
  p.seq_len = problem.seq_len, p.key_heads = problem.key_heads;
  auto* kernel = key_grads_kernel<T>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  return launch("key_grads", kernel, dim3((unsigned)segments, (unsigned)(problem.batch * problem.key_heads)), Kernel::kThreads, Kernel::kSharedBytes, stream, p);
}

}  // namespace powertrain::sm90
