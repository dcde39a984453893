// query_scan on Hopper, for K = 32 in bf16: y in one pass over a time segment, with the state S beside it (state_steps.cuh): chunk_state, the join and
// chunk_scan in one kernel, with steps of 128 tokens in place of chunks.
//
// Two scanning warpgroups, one for each 64-token block of a step, take phi(q) S and the normaliser's q^T Z q, times the decay from the step's start, and
// add the attention within the step. Several query heads of a key head take a step one after the other.
//
// What it reads first it packs on the way (Packs, row_packs.cuh): queries are copied as they lie in the tensors and packed by one warp, a step of one query
// head ahead of those who read them (kQueries); where one time segment is enough, columns, too, which the assistants pack, and what the updating warpgroup
// reads is made from there (kInputs).
#pragma once
#include "row_packs.cuh"
#include "state_steps.cuh"

namespace powertrain::sm90 {

template <typename T>
struct QueryScanParams : StepsParams {  // x: k, u: v'
  const void* q;                        // packed
  const float *block_in, *log2_decay;
  const int32_t* document_start;
  void* out;
  int64_t out_stride_b, out_stride_t, out_stride_h, seq_len;
  float* normalizer;
  int queries, key_heads;  // query heads of a key head
  // With Packs.
  Strided<T> unpacked_q, unpacked_k, unpacked_v;
  T *packed_q, *packed_k, *packed_v;
};

template <typename T, Packs kPacks>
struct QueryScan : StateSteps<T, false> {
  using Steps = StateSteps<T, false>;
  using Rows = RowPacks<T>;
  using Params = QueryScanParams<T>;
  using Steps::for_each_step, Steps::load_block, Steps::load_pair, Steps::multiply_norm, Steps::multiply_phi, Steps::set_phi,
      Steps::set_phi_columns;
  using Steps::kAssistants, Steps::kColumnGroups, Steps::kFeatureBlocks, Steps::kHalf, Steps::kHeadDim, Steps::kInputBuffers, Steps::kInputBytes,
      Steps::kRowBytes, Steps::kScanners, Steps::kStateBuffers, Steps::kStateBytes, Steps::kStep, Steps::kUBytes, Steps::kXBytes;
  using typename Steps::Memory, typename Steps::PhiColumns, typename Steps::Step;
  using Updater = typename Steps::template Updater<false, 2>;
  static constexpr bool kInputs = kPacks == Packs::kInputs, kQueries = kPacks != Packs::kNothing;  // are packed
  // Registers: at most 4 * 128, the cap of a block of 512 threads.
  static constexpr int kProducing = 40, kScanning = 112, kUpdating = 248;

  // A block of columns, and behind it its tokens' decays from its start, which rows of the same block have.
  using Columns = ColumnBlock<kHeadDim>;
  static constexpr int kColumnBytes = Columns::kBytes + Columns::kVectorBytes;
  __device__ static __forceinline__ uint32_t row_decays(const Columns& block) { return block.x + Columns::kBytes; }
  static constexpr int kRowBuffers = 2, kColumnBuffers = 2;  // of the blocks of a step
  // Where core matrices are that were packed here; v' has those of its ones behind each eight tokens'.
  static constexpr CoreStrides kQueryCores = kQueries ? Rows::kCores : kPackedCores, kKeyCores = kInputs ? Rows::kCores : kPackedCores;
  static constexpr CoreStrides kValueCores = kInputs ? CoreStrides{Rows::kCores.columns, (kColumnGroups + 1) * Rows::kCores.columns} : kPackedCores;

  struct Layout : Memory {
    uint32_t rows, columns, row_barriers, column_barriers, copied_columns, end;  // copied_columns: barriers of what is to be packed
    __host__ __device__ constexpr explicit Layout(uint32_t start)
        : Memory(start),
          rows(Memory::end_of_steps),
          columns(rows + kRowBuffers * kStep * kXBytes),
          row_barriers(columns + kColumnBuffers * kStep * kColumnBytes),
          column_barriers(row_barriers + 16 * kRowBuffers),
          copied_columns(column_barriers + 16 * kColumnBuffers),
          end(copied_columns + 8 * kColumnBuffers) {}
  };
  static constexpr int kSharedBytes = Layout(0).end;
  static_assert(kSharedBytes <= 227 * 1024 && kProducing + kScanners * kScanning + kUpdating <= 4 * 128);

  // A block's numbers of each token.
  __device__ static __forceinline__ void load_vectors(const Params& p, const Columns& to, int block, uint32_t barrier) {
    const int head = opaque(blockIdx.y);
    const int64_t from = (int64_t)(head * p.blocks + block) * kBlock;
    bulk_load(to.decays(), p.decays + from, Columns::kVectorBytes, barrier);
    bulk_load(to.log2_decays(), p.log2_decay + from, Columns::kVectorBytes, barrier);
    bulk_load(to.documents(), p.document_start + (int64_t)(head / p.key_heads * p.blocks + block) * kBlock, Columns::kVectorBytes, barrier);
    bulk_load(row_decays(to), p.block_in + from, Columns::kVectorBytes, barrier);
  }
  // What the scanning warpgroups read: by one thread, or by a warp, which copies what is to be packed as it lies in the tensors, and packs queries.
  __device__ static void produce(const Params& p, const Layout& at) {
    Ring<kRowBuffers> rows(at.row_barriers);
    Ring<kColumnBuffers> columns(at.column_barriers);
    const int batch = blockIdx.y / p.key_heads, head = blockIdx.y % p.key_heads;
    const bool first = !kQueries || threadIdx.x % 32 == 0;
    for_each_step(p, [&](const Step& step) {
      columns.wait_empty();
      const uint32_t full = kInputs ? at.copied_columns + 8 * columns.stage() : columns.full_barrier();
      if (first) {
        barrier_expect(full, step.count * (kInputs ? 4 * Columns::kVectorBytes : kColumnBytes));
#pragma unroll 1
        for (int m = 0; m < step.count; m++) {
          const Columns to = {at.columns + (columns.stage() * kStep + m) * kColumnBytes};
          if (!kInputs) load_block(p, to.x, (int64_t)blockIdx.y * p.blocks + step.block + m, full);
          load_vectors(p, to, step.block + m, full);
        }
      }
#pragma unroll 1
      for (int m = 0; m < (kInputs ? step.count : 0); m++) {
        const Columns to = {at.columns + (columns.stage() * kStep + m) * kColumnBytes};
        const int64_t token = (int64_t)(step.block + m) * kBlock;
        const int count = Rows::existing(p.seq_len, step.block + m);
        Rows::copy_rows(to.x, p.unpacked_k.row(batch, token, head), p.unpacked_k.stride_t, count);
        Rows::copy_rows(to.u(), p.unpacked_v.row(batch, token, head), p.unpacked_v.stride_t, count, kValueCores.tokens);
      }
      if constexpr (kInputs) barrier_arrive_after_copies(full);
      columns.advance();
#pragma unroll 1
      for (int g = 0; g < p.queries; g++, rows.advance()) {
        rows.wait_empty();
        if constexpr (kQueries) {
          const int64_t token = (int64_t)step.block * kBlock, index = ((int64_t)opaque(blockIdx.y) * p.queries + g) * p.blocks + step.block;
#pragma unroll 1
          for (int m = 0; m < step.count; m++)
            Rows::copy_rows(at.rows + (rows.stage() * kStep + m) * kXBytes, p.unpacked_q.row(batch, token + m * kBlock, head * p.queries + g),
                            p.unpacked_q.stride_t, Rows::existing(p.seq_len, step.block + m));
          wait_for_copies();
          __syncwarp();
#pragma unroll 1
          for (int m = 0; m < step.count; m++)
            Rows::template pack_features<4>(at.rows + (rows.stage() * kStep + m) * kXBytes, p.packed_q + (index + m) * feature_block_elements(kHeadDim),
                                            opaque(threadIdx.x) % 32);
          barrier_arrive(rows.full_barrier());
        } else {
          barrier_expect(rows.full_barrier(), step.count * kXBytes);
          const int64_t from = ((int64_t)blockIdx.y * p.queries + g) * p.blocks + step.block;
          bulk_load(at.rows + rows.stage() * kStep * kXBytes, (const T*)p.q + from * feature_block_elements(kHeadDim), step.count * kXBytes, rows.full_barrier());
        }
      }
    });
  }

  // Threads that fill a stage of rows or columns, and those that read a stage of columns before they are done with it, besides the scanning ones.
  static constexpr int kRowFillers = kQueries ? 32 : 1, kColumnFillers = kInputs ? kAssistants * 32 : 1, kColumnPackers = kInputs ? kAssistants * 32 : 0;
  __device__ static void init(const Layout& at) {
    Steps::init(at);
    for (int i = 0; i < kColumnBuffers; i++) barrier_init(at.copied_columns + 8 * i, Rows::kCopiers);
  }
  __device__ static void run_producing(const Params& p, const Layout& at, int warp) {
    if (warp == 0) {
      if (kQueries || threadIdx.x % 128 == 0) produce(p, at);
    } else if (warp == 1) {
      if (!kInputs && threadIdx.x % 128 == 32) Steps::produce_inputs(p, at);
    } else {
      if constexpr (kInputs) pack_and_assist(p, at);
      else Steps::assist(p, at);
    }
  }

  // By one of the assistants, with kInputs: the columns of the n-th step, of whose blocks each takes one.
  __device__ static __forceinline__ void pack_columns(const Params& p, const Layout& at, const Step& step, uint32_t n, int thread) {
    static_assert(kAssistants == kStep);
    Ring<kColumnBuffers> columns(at.column_barriers);
    columns.count = n;
    barrier_wait(at.copied_columns + 8 * columns.stage(), columns.phase());
    thread = opaque(thread);
    const int m = thread / 32, lane = thread % 32;
    if (m < step.count) {
      const Columns block = {at.columns + (columns.stage() * kStep + m) * kColumnBytes};
      const int64_t index = (int64_t)opaque(blockIdx.y) * p.blocks + step.block + m;
      const int count = Rows::existing(p.seq_len, step.block + m);
      Rows::template pack_features<2>(block.x, p.packed_k + index * feature_block_elements(kHeadDim), lane);
      Rows::pack_values(block.u(), p.packed_v + index * value_block_elements(kHeadDim), count, lane, [](uint4 values, int) { return values; }, kValueCores.tokens);
#pragma unroll
      for (int token = lane; token < kBlock; token += 32)
        store_shared_16(block.u() + kColumnGroups * kValueCores.columns + token / 8 * kValueCores.tokens + token % 8 * kRowBytes, Rows::ones(token < count));
      fence_async_shared();
    }
    barrier_arrive(columns.full_barrier());
  }
  // What the updating warpgroup reads of the n-th step, whole and not the last, from its columns.
  __device__ static __forceinline__ void make_inputs(const Params& p, const Layout& at, const Step& step, uint32_t n, int thread) {
    Ring<kInputBuffers> inputs(at.input_barriers);
    Ring<kColumnBuffers> columns(at.column_barriers);
    columns.count = n, inputs.count = n * kStep;
    columns.wait_full();  // the other assistant's part, too
#pragma unroll 1
    for (int m = 0; m < kStep; m++, inputs.advance()) {
      const Columns from = {at.columns + (columns.stage() * kStep + m) * kColumnBytes};
      const uint32_t to = at.inputs + inputs.stage() * kInputBytes;
      inputs.wait_empty();
      const uint32_t row = from.x + thread / 8 * kKeyCores.tokens + thread % 8 * kRowBytes;
      static_assert(kAssistants * 32 == kBlock);
#pragma unroll 2
      for (int c = 0; c < kColumnGroups; c++) store_shared_16(to + (c * kBlock + thread) * kRowBytes, load_shared_16(row + c * kKeyCores.columns));
      const float across = Steps::decay_across(p.block_decay + (int64_t)opaque(blockIdx.y) * p.blocks, step, m);
      Steps::template decay_values<kAssistants * 32>(to + kXBytes, from.u(), from.decays(), across, thread, kValueCores);
      barrier_arrive(inputs.full_barrier());
    }
    columns.release(columns.stage());
  }
  // One of the assistants: columns of the next step, after what the updating warpgroup reads of the one before it (see Steps::assist).
  __device__ static void pack_and_assist(const Params& p, const Layout& at) {
    const auto thread = [] { return opaque(threadIdx.x) % 128 - (4 - kAssistants) * 32; };
    int chunk = -1;  // that the state enters with the step before
    uint32_t n = 0;
    const auto pass_state = [&] {
      Ring<kStateBuffers> states(at.state_barriers);
      states.count = n - 1;
      Steps::pass_state(p, at, states, chunk, thread());
    };
    for_each_step(p, [&](const Step& next) {
      if (n > 0) make_inputs(p, at, {next.block - kStep, kStep, false, -1}, n - 1, thread());
      pack_columns(p, at, next, n, thread());
      if (n > 0) pass_state();
      chunk = next.chunk, n++;
    });
    pass_state();
  }

  struct Scanner {
    const Params& p;
    const Layout& at;
    const int lane, warp, scanner;
    Ring<kStateBuffers> states;
    Ring<kRowBuffers> rows;
    Ring<kColumnBuffers> columns;
    float acc[kHeadDim / 2 + 4], norm[2];  // y times d, and d; its part from the state apart, since products go on into acc

    __device__ Scanner(const Params& p, const Layout& at, int scanner)
        : p(p), at(at), lane(threadIdx.x % 32), warp(uniform_warp() % 4), scanner(scanner), states(at.state_barriers), rows(at.row_barriers),
          columns(at.column_barriers) {}

    using Operands = RowOperands<kHeadDim>;

    // acc = what the state gives the rows at `q_at`, their decays being from the step's start.
    __device__ __forceinline__ void scan_state(const Operands& x, uint32_t q_at, uint32_t state, int m, const Columns& own, const Columns& first) {
      float y[kHeadDim / 2], zx[kHeadDim / 2];
      uint32_t sets[2][kHalf + 1][4], pairs[2][4];
      const auto load_xi = [&](int i) { load_pair(pairs[i / 2 % 2], q_at, i, warp, lane, kQueryCores); };
      load_xi(0), load_xi(2);
#pragma unroll
      for (int i_block = 0; i_block < kFeatureBlocks; i_block++) {
        PhiColumns xj;
        set_phi_columns(xj, x, i_block);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          uint32_t(&a)[kHalf + 1][4] = sets[i / 2 % 2];
          wgmma_wait<1>();  // the products that read these operands are done
          set_phi(a, xj, pairs[i / 2 % 2], i_block);
          if (8 * i_block + i + 4 < kHeadDim) load_xi(8 * i_block + i + 4);
          wgmma_fence();
          multiply_phi(y, a, state, i_block, i, i_block + i > 0);
          wgmma_commit();
        }
      }
      float decay[2];
      const float before = m ? load_shared_float(row_decays(first) + 4 * (kBlock - 1)) : 1.f;
#pragma unroll
      for (int half = 0; half < 2; half++) decay[half] = before * load_shared_float(row_decays(own) + 4 * (16 * warp + lane / 4 + 8 * half));
      wgmma_fence();
      multiply_norm(zx, x, state, false);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < kHeadDim / 2; c++) acc[c] = y[c] * decay[c % 4 / 2];
#pragma unroll
      for (int c = kHeadDim / 2; c < kHeadDim / 2 + 4; c++) acc[c] = 0.f;
      // This lane's terms of d.
#pragma unroll
      for (int half = 0; half < 2; half++) {
        norm[half] = 0.f;
#pragma unroll
        for (int c = 0; c < kFeatureBlocks; c++) {
          const float2 q = Pair<T>::unpack(x[c / 2][c % 2 * 2 + half]);
          norm[half] = fmaf(q.x, zx[4 * c + 2 * half], fmaf(q.y, zx[4 * c + 2 * half + 1], norm[half]));
        }
        norm[half] *= 0.5f * decay[half];
      }
    }

    // The attention to a block of columns.
    __device__ __forceinline__ void attend(const Operands& x, const Columns& block, const Columns& own, bool diagonal) {
      float s[kBlock / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++) wgmma<T, true>(s, x[k], CoreMatrices(block.x, kKeyCores.columns, kKeyCores.tokens).at(k * 2 * kKeyCores.columns), k > 0);
      wgmma_commit();
      wgmma_wait<0>();
      Weights weights;
      if (diagonal) {
        weigh_diagonal<T, false, 1>(weights, s, s, block, warp, lane);
      } else {
        float row_decay[2];
#pragma unroll
        for (int half = 0; half < 2; half++) row_decay[half] = load_shared_float(row_decays(own) + 4 * (16 * warp + lane / 4 + 8 * half));
        weigh<T>(weights, s, s, row_decay, block.decays() + 8 * (lane % 4));
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) wgmma<T, true>(acc, weights[k], CoreMatrices(block.u(), kValueCores.tokens, kValueCores.columns).at(k * 2 * kValueCores.tokens), true);
      wgmma_commit();
      wgmma_wait<0>();
    }

    // The rows of block `m` of the step.
    __device__ __forceinline__ void scan(uint32_t q_at, uint32_t state, int m, const Columns& own, const Columns& first) {
      Operands x;
      load_features<kHeadDim>(x, q_at, warp, lane, kQueryCores);
      scan_state(x, q_at, state, m, own, first);
#pragma unroll 1
      for (int i = m; i >= 0; i--) attend(x, Columns{i ? own.x : first.x}, own, i == m);
    }

    __device__ __forceinline__ void store(int block, int g, T* out) const {
      float d[2];
#pragma unroll
      for (int half = 0; half < 2; half++) d[half] = norm[half] + acc[kHeadDim / 2 + 2 * half] + acc[kHeadDim / 2 + 2 * half + 1];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
        for (int half = 0; half < 2; half++) d[half] += __shfl_xor_sync(0xffffffffu, d[half], lanes);
      const int64_t token = (int64_t)block * kBlock + 16 * warp + lane / 4;
      T* to = out + token * p.out_stride_t + g * p.out_stride_h;
      float* const normalizer = p.normalizer + ((int64_t)blockIdx.y * p.queries + g) * p.seq_len + token;
#pragma unroll
      for (int half = 0; half < 2; half++, to += 8 * p.out_stride_t) {
        const bool exists = token + 8 * half < p.seq_len;
        const float factor = fabsf(d[half]) < kSmallestNormalizer ? 0.f : 1.f / d[half];
        if (lane % 4 == 0 && exists) normalizer[8 * half] = d[half];
#pragma unroll
        for (int c = 0; c < kFeatureBlocks; c += 2) {
          const float* from = acc + 4 * c + 2 * half;
          store_two_groups(to + 8 * c, exists, lane, from[0] * factor, from[1] * factor, from[4] * factor, from[5] * factor);
        }
      }
    }

    __device__ void run() {
      T* const out = (T*)p.out + blockIdx.y / p.key_heads * p.out_stride_b + blockIdx.y % p.key_heads * p.queries * p.out_stride_h;
      for_each_step(p, [&](const Step& step) {
        const int m = step.block_of(scanner);
        const auto block = [&](int i) { return Columns{at.columns + (columns.stage() * kStep + i) * kColumnBytes}; };
        columns.wait_full();
        states.wait_full();
#pragma unroll 1
        for (int g = 0; g < p.queries; g++) {
          rows.wait_full();
          if (m < step.count) {
            const uint32_t q_at = at.rows + (rows.stage() * kStep + m) * kXBytes;
            scan(q_at, at.states + states.stage() * kStateBytes, m, block(m), block(0));
          }
          rows.release(rows.stage());
          rows.advance();
          if (g + 1 == p.queries) {
            states.release(states.stage()), columns.release(columns.stage());
            states.advance(), columns.advance();
          }
          if (m < step.count) store(step.block + m, g, out);
        }
      });
    }
  };
};

template <typename T, Packs kPacks>
__global__ void __launch_bounds__(QueryScan<T, kPacks>::kThreads, 1) query_scan_kernel(const __grid_constant__ QueryScanParams<T> p) {
  run_steps<QueryScan<T, kPacks>>(p);
}

template <typename T>
int launch_query_scan(const pt_problem& problem, const pt_query_scan_params& params, cudaStream_t stream) {
  const Gates gates = gates_of(problem, params.gates);
  const int segments = choose_entered_segments(problem);
  const SegmentScan scan = {false, params.k, params.v, params.gates, params.initial, params.final_state, params.unpacked_k.data ? &params : nullptr, nullptr};
  const float* entering;
  if (int status = find_entering<T>(problem, scan, segments, params.workspace, &entering, stream)) return status;
  if (!params.out.data) return PT_OK;
  QueryScanParams<T> p = {};
  set_segment_params(p, problem, segments, false);
  p.block_decay = gates.block_decay, p.entering = entering;
  p.x = params.k, p.u = params.v, p.q = params.q;
  p.decays = gates.block_out, p.block_in = gates.block_in, p.log2_decay = gates.log2_decay, p.document_start = gates.document_start;
  p.out = params.out.data, p.out_stride_b = params.out.stride_b, p.out_stride_t = params.out.stride_t, p.out_stride_h = params.out.stride_h;
  p.normalizer = params.normalizer, p.states = params.states;
  p.seq_len = problem.seq_len, p.queries = problem.query_heads / problem.key_heads, p.key_heads = problem.key_heads;
  const auto start = [&](auto packs) {
    using Kernel = QueryScan<T, packs.value>;
    auto* kernel = query_scan_kernel<T, packs.value>;
    if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
    const dim3 grid((unsigned)segments, (unsigned)(problem.batch * problem.key_heads));
    return launch("query_scan", kernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  };
  if (!params.unpacked_q.data) return start(std::integral_constant<Packs, Packs::kNothing>());
  p.unpacked_q = strided<T>(params.unpacked_q), p.unpacked_k = strided<T>(params.unpacked_k), p.unpacked_v = strided<T>(params.unpacked_v);
  p.packed_q = (T*)params.q, p.packed_k = (T*)params.k, p.packed_v = (T*)params.v;
  if (has_segments(problem, params.final_state)) return start(std::integral_constant<Packs, Packs::kQueries>());
  return start(std::integral_constant<Packs, Packs::kInputs>());
}

}  // namespace powertrain::sm90
