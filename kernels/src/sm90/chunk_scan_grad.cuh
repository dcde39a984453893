// chunk_scan_grad on Hopper: dq (reverse: dk), the gradient of n' . (phi(x) S) and of the attention within the chunk with respect to x.
//
// The state's part comes first, by outer products where the head is narrow and the type has the range for them, else by contraction.
#pragma once
#include "../common/numeric.cuh"
#include "state_contraction.cuh"
#include "state_outer.cuh"

namespace powertrain::sm90 {

struct ChunkScanGradParams : ScanShape {
  const void *rows_x, *rows_u, *columns_x, *columns_u;  // packed q, dn', k, v'; reverse: k, v', q, dn'
  const void* states;
  const float* row_chunk_decay;     // (B, Hk, Tp): chunk_in; reverse: chunk_out
  const float* row_block_decay;     // block_in; reverse: block_out
  const float* column_block_decay;  // block_out; reverse: block_in
  const float *log2_decay, *block_decay;
  const int32_t* document_start;
  void* out;
  int64_t out_stride_b, out_stride_t, out_stride_h;
  const float *x_scale, *value_scale, *dn_scale, *row_scale;
  float *dots, *state_dots;  // (B, H, Tp), the latter in reverse alone; or null
  float inverse_state_scale;
};

template <int kHeadDim, typename T, bool kReverse>
struct ChunkScanGrad : GradShape<kHeadDim> {
  using Shape = GradShape<kHeadDim>;
  using Shape::kFeatureBlocks, Shape::kM, Shape::kPhiTiles, Shape::kRowBlocks, Shape::kRowBytes, Shape::kUBytes, Shape::kVectorBytes, Shape::kWarpgroups,
      Shape::kXBytes;
  using Rows = GradRows<kHeadDim, T>;
  // In fp16, x u may lie below the type's range where dn' is small.
  static constexpr bool kOuter = kHeadDim == 32 && std::is_same_v<T, __nv_bfloat16>;
  using State = std::conditional_t<kOuter, StateOuter<kHeadDim, T>, StateContraction<kHeadDim, T>>;
  static constexpr int kStages = State::kStages, kStageBytes = State::kStageBytes;
  static constexpr int kRowBuffers = State::kRowBuffers;  // with two, the next row tile's rows load early
  // Where registers allow it, columns apart from the rows go without branches.
  static constexpr bool kApart = kHeadDim < 128;
  static_assert(Shape::kColumnBytes <= kStageBytes, "a stage holds a part of the state or one block of columns");
  static constexpr int kSharedBytes =
      kRowBuffers * kRowBytes + State::kMemoryBytes + kStages * kStageBytes + State::kPadBytes + 16 * (kStages + kRowBuffers + State::kBarriers);
  static_assert(kSharedBytes <= 227 * 1024 && State::kProducing + kWarpgroups * State::kConsuming <= (kWarpgroups + 1) * 168);

  using Tile = ScanTile<kReverse, kRowBlocks>;

  // Where things are in shared memory.
  struct Layout {
    uint32_t rows, memory, stages, ring_barriers, row_barriers, state_barriers;
    __device__ Layout(uint32_t start)
        : rows(start),
          memory(rows + kRowBuffers * kRowBytes),
          stages(memory + State::kMemoryBytes),
          ring_barriers(stages + kStages * kStageBytes + State::kPadBytes),
          row_barriers(ring_barriers + 16 * kStages),
          state_barriers(row_barriers + 16 * kRowBuffers) {}
  };

  __device__ static __forceinline__ const T* state_of(const ChunkScanGradParams& p, const Tile& tile) {
    return (const T*)p.states + ((int64_t)tile.key_head * p.chunks + tile.chunk) * kPhiTiles * state_tile_elements(kHeadDim);
  }

  __device__ static void produce(const ChunkScanGradParams& p, const Layout& at) {
    Ring<kStages> ring(at.ring_barriers);
    Ring<kRowBuffers> row_ring(at.row_barriers);
    typename State::Producer state(at.state_barriers);
#pragma unroll 1
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, row_ring.advance()) {
      const Tile tile(p, index);
      row_ring.wait_empty();
      barrier_expect(row_ring.full_barrier(), max(tile.row_blocks, 0) * (kXBytes + kUBytes));
      if (tile.row_blocks <= 0) continue;
      const int64_t row_at = (int64_t)tile.row_head * p.blocks + tile.row_block;
      const uint32_t rows = at.rows + row_ring.stage() * kRowBytes;
      bulk_load(rows, (const T*)p.rows_x + row_at * feature_block_elements(kHeadDim), tile.row_blocks * kXBytes, row_ring.full_barrier());
      bulk_load(rows + kRowBlocks * kXBytes, (const T*)p.rows_u + row_at * value_block_elements(kHeadDim), tile.row_blocks * kUBytes,
                row_ring.full_barrier());
      if (tile.has_state) state.produce(ring, at.stages, state_of(p, tile));
#pragma unroll 1
      for (int g = 0; g < Tile::column_heads(p); g++) {
        const int64_t head = tile.first_column_head + g, batch = tile.key_head / p.key_heads;
#pragma unroll 1
        for (int i = 0; i < tile.column_count; i++) {
          const int block = tile.column_block(i);
          const int64_t from = head * p.blocks + block;
          const uint32_t x = at.stages + ring.stage() * kStageBytes, u = x + kXBytes, vectors = u + kUBytes;
          ring.wait_empty();
          const uint32_t full = ring.full_barrier();
          barrier_expect(full, Shape::kColumnBytes);
          bulk_load(x, (const T*)p.columns_x + from * feature_block_elements(kHeadDim), kXBytes, full);
          bulk_load(u, (const T*)p.columns_u + from * value_block_elements(kHeadDim), kUBytes, full);
          const int64_t token = ((int64_t)tile.key_head * p.blocks + block) * kBlock;
          bulk_load(vectors, p.column_block_decay + token, kVectorBytes, full);
          bulk_load(vectors + kVectorBytes, p.log2_decay + token, kVectorBytes, full);
          bulk_load(vectors + 2 * kVectorBytes, p.document_start + (batch * p.blocks + block) * kBlock, kVectorBytes, full);
          ring.advance();
        }
      }
    }
  }

  // The producing warpgroup's other warps.
  __device__ static void assist(const ChunkScanGradParams& p, int warp, const Layout& at) {
    if constexpr (kOuter) {
      typename State::Assistant assistant(warp, at.stages, at.memory, at.ring_barriers, at.state_barriers);
#pragma unroll 1
      for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile tile(p, index);
        if (tile.row_blocks <= 0) continue;
        const int columns = Tile::column_heads(p) * tile.column_count;
        if (tile.has_state) assistant.assist(state_of(p, tile));
        assistant.ring.count += columns;
      }
    }
  }

  struct Consumer {
    const ChunkScanGradParams& p;
    Ring<kStages> ring;
    const uint32_t stages;
    float d[2][kBlock / 2];  // the scores and their gradient within the chunk
    Rows rows;
    typename State::Consumer state;

    __device__ Consumer(const ChunkScanGradParams& p, const Layout& at)
        : p(p), ring(at.ring_barriers), stages(at.stages), state(rows, at.memory, at.state_barriers) {}

    // x and u of a block of rows as A operands within the chunk. They stay in registers.
    struct RowOperands {
      typename Rows::XOperands x;
      typename Rows::UOperands u;
    };

    // d = x . columns and u . u_columns, done when it returns, and with them all products before.
    __device__ __forceinline__ void score(uint32_t x, const RowOperands& operands) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++) wgmma<T, true>(d[0], operands.x[k], CoreMatrices(x, 1024, 128).at(k * 2048), k > 0);
      Rows::multiply_values(d[1], operands.u, x + kXBytes);
      wgmma_commit();
      wgmma_wait<0>();
    }
    // ds = 2 s decay (u . u_columns) of different blocks.
    __device__ __forceinline__ void weigh_scores(Weights& ds, const float (&row_decay)[2], uint32_t column_decays) const {
      weigh<T>(ds, d[0], d[1], {2.f * row_decay[0], 2.f * row_decay[1]}, column_decays);
    }
    // acc[m] += dS x, under way when it returns.
    __device__ __forceinline__ void multiply_scores(int m, const Weights& ds, uint32_t x) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) wgmma<T, false>(rows.acc[m], ds[k], CoreMatrices(x, 128, 1024).at(k * 256), true);
      wgmma_commit();
    }

    // One block of columns against rows block m.
    __device__ __forceinline__ void attend(bool diagonal, int m, uint32_t x, const float (&row_decay)[2], const RowOperands& operands) {
      const uint32_t vectors = x + kXBytes + kUBytes, mine = vectors + 8 * (rows.lane % 4);
      score(x, operands);
      Weights ds;
      if (diagonal) {  // rows and columns are the same tokens
        float row_log2[2];
        int row_document[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t at = vectors + kVectorBytes + 4 * (16 * rows.warp + rows.lane / 4 + half * 8);
          row_log2[half] = load_shared_float(at), row_document[half] = __float_as_int(load_shared_float(at + kVectorBytes));
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float2 column_log2 = load_shared_float2(mine + kVectorBytes + c * 32);
          const float2 column_document = load_shared_float2(mine + 2 * kVectorBytes + c * 32);
          float value[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int row = 16 * rows.warp + rows.lane / 4 + e / 2 * 8, column = 8 * c + 2 * (rows.lane % 4) + e % 2;
            const float log2 = e % 2 ? column_log2.y : column_log2.x;
            const int document = __float_as_int(e % 2 ? column_document.y : column_document.x);
            const bool visible = (kReverse ? column >= row : column <= row) && document == row_document[e / 2];
            const float decay = exp2_fast(kReverse ? log2 - row_log2[e / 2] : row_log2[e / 2] - log2);
            value[e] = visible ? (2.f * d[0][4 * c + e]) * decay * d[1][4 * c + e] : 0.f;
          }
          ds[c / 2][c % 2 * 2] = Pair<T>::pack(value[0], value[1]);
          ds[c / 2][c % 2 * 2 + 1] = Pair<T>::pack(value[2], value[3]);
        }
      } else {
        weigh_scores(ds, row_decay, mine);
      }
      multiply_scores(m, ds, x);
      wgmma_wait<0>();
    }

    // Decays of this thread's rows. They are loaded long before they are needed.
    __device__ __forceinline__ void load_row_decays(float (&decay)[kM][2], const float* from, const Tile& tile) const {
#pragma unroll
      for (int m = 0; m < kM; m++) {
        const int64_t at = ((int64_t)tile.key_head * p.blocks + min(tile.row_block + rows.block(m), p.blocks - 1)) * kBlock + 16 * rows.warp + rows.lane / 4;
        decay[m][0] = from[at], decay[m][1] = from[at + 8];
      }
    }

    __device__ __forceinline__ void scan_columns(const Tile& tile, float first_across) {
      float row_decay[kM][2];
      load_row_decays(row_decay, p.row_block_decay, tile);
      RowOperands operands[kM];
#pragma unroll
      for (int m = 0; m < kM; m++) rows.load_x(operands[m].x, m), rows.load_u(operands[m].u, m);
#pragma unroll 1
      for (int g = 0; g < Tile::column_heads(p); g++) {
        float between[kM];  // decay across the blocks between these rows and the columns
#pragma unroll
        for (int m = 0; m < kM; m++) between[m] = 1.f;
        const float* const block_decay = p.block_decay + (int64_t)tile.key_head * p.blocks;
        const int end = tile.column_block(tile.column_count);
        // From here on the columns are all before (reverse: after) the rows.
        const int apart = kApart && tile.row_blocks == kRowBlocks ? tile.column_block(kRowBlocks) : end;
        float across = first_across, next;
#pragma unroll 1
        for (int column = tile.column_block(0); column != apart; column += Tile::kStep, across = next) {
          if constexpr (kApart) next = block_decay[column + Tile::kStep != end ? column + Tile::kStep : column];
          else across = next = block_decay[column];  // registers allow no more at K = 128
          ring.wait_full();
          const uint32_t x = stages + ring.stage() * kStageBytes;
#pragma unroll
          for (int m = 0; m < kM; m++) {
            const int mine = tile.row_block + rows.block(m);
            if (rows.block(m) >= tile.row_blocks) continue;
            const bool diagonal = column == mine;
            if (!diagonal && (kReverse ? column < mine : column > mine)) continue;
            if (diagonal || between[m] > 0.f) {
              const float decay[2] = {row_decay[m][0] * between[m], row_decay[m][1] * between[m]};
              attend(diagonal, m, x, decay, operands[m]);
            }
            if (!diagonal) between[m] *= across;
          }
          ring.release(ring.stage());
          ring.advance();
        }
        if constexpr (kApart) scan_columns_apart(tile, apart, end, across, row_decay, between, operands);
      }
    }

    // Columns that no row is among, without branches.
    __device__ __forceinline__ void scan_columns_apart(const Tile& tile, int column, int end, float across, const float (&row_decay)[kM][2],
                                                       float (&between)[kM], const RowOperands (&operands)[kM]) {
      const float* const block_decay = p.block_decay + (int64_t)tile.key_head * p.blocks;
#pragma unroll 1
      for (; column != end && fmaxf(between[0], between[kM - 1]) > 0.f; column += Tile::kStep, ring.advance()) {
        const float next = block_decay[column + Tile::kStep != end ? column + Tile::kStep : column];
        ring.wait_full();
        const uint32_t x = stages + ring.stage() * kStageBytes;
#pragma unroll
        for (int m = 0; m < kM; m++) {
          score(x, operands[m]);
          const float decay[2] = {row_decay[m][0] * between[m], row_decay[m][1] * between[m]};
          Weights ds;
          weigh_scores(ds, decay, x + kXBytes + kUBytes + 8 * (rows.lane % 4));
          multiply_scores(m, ds, x);
          wgmma_wait<0>();
          between[m] *= across;
        }
        ring.release(ring.stage());
        across = next;
      }
#pragma unroll 1
      for (; column != end; column += Tile::kStep, ring.advance()) {  // whatever comes has no weight
        ring.wait_full();
        ring.release(ring.stage());
      }
    }

    // (x . dx) / 2 of every row, from acc as it is; `zero` where there is nothing.
    __device__ __forceinline__ void write_dots(const Tile& tile, float* dots, bool zero) const {
#pragma unroll
      for (int m = 0; m < kM; m++) {
        if (rows.block(m) >= tile.row_blocks) continue;
        float dot[2] = {};
#pragma unroll
        for (int c = 0; c < kFeatureBlocks && !zero; c += 2) {
          uint32_t x[4];
          load_matrices_transposed(x, rows.x_at(m) + (((c + (rows.lane >> 4)) * 8 + 2 * rows.warp + (rows.lane >> 3 & 1)) * 64 + (rows.lane & 7) * 8) * 2);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float2 a = Pair<T>::unpack(x[half]), b = Pair<T>::unpack(x[half + 2]);
            const float* dx = rows.acc[m] + 4 * c + 2 * half;
            dot[half] += a.x * dx[0] + a.y * dx[1] + b.x * dx[4] + b.y * dx[5];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          dot[half] += __shfl_xor_sync(0xffffffffu, dot[half], 1);
          dot[half] += __shfl_xor_sync(0xffffffffu, dot[half], 2);
          const int64_t at = (int64_t)tile.row_head * p.blocks + tile.row_block + rows.block(m);
          if (rows.lane % 4 == 0) dots[at * kBlock + 16 * rows.warp + rows.lane / 4 + half * 8] = 0.5f * dot[half];
        }
      }
    }

    __device__ __forceinline__ void run(const Tile& tile) {
      float chunk_decay[kM][2];
      load_row_decays(chunk_decay, p.row_chunk_decay, tile);
      const float first_across = p.block_decay[(int64_t)tile.key_head * p.blocks + tile.column_block(0)];
      if (tile.has_state) {
        state.scan(rows, d, ring, stages);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int c = 0; c < kHeadDim / 2; c++) rows.acc[m][c] *= chunk_decay[m][c % 4 / 2] * p.inverse_state_scale;
      } else {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int c = 0; c < kHeadDim / 2; c++) rows.acc[m][c] = 0.f;
      }
      if (kReverse && p.state_dots) write_dots(tile, p.state_dots, !tile.has_state);
      scan_columns(tile, first_across);
      if (p.dots) write_dots(tile, p.dots, false);
    }

    __device__ __forceinline__ void store(const Tile& tile) {
      const int64_t batch = p.by_heads.quotient(tile.row_head), head = p.by_heads.remainder(tile.row_head);
      float factor = p.x_scale ? p.x_scale[tile.row_head] : 1.f;
      if (p.value_scale) factor /= p.value_scale[tile.key_head];
      if (p.dn_scale) factor /= p.dn_scale[tile.key_head];
#pragma unroll
      for (int m = 0; m < kM; m++) {
        if (rows.block(m) >= tile.row_blocks) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t token = (int64_t)(tile.row_block + rows.block(m)) * kBlock + 16 * rows.warp + rows.lane / 4 + half * 8;
          T* out = (T*)p.out + batch * p.out_stride_b + token * p.out_stride_t + head * p.out_stride_h;
          const float by = p.row_scale && token < p.seq_len ? factor * p.row_scale[tile.row_head * p.seq_len + token] : factor;
#pragma unroll
          for (int c = 0; c < kFeatureBlocks; c += 2) {
            const float* from = rows.acc[m] + 4 * c + 2 * half;
            store_two_groups(out + 8 * c, token < p.seq_len, rows.lane, from[0] * by, from[1] * by, from[4] * by, from[5] * by);
          }
        }
      }
    }
  };

  __device__ static void consume(const ChunkScanGradParams& p, const Layout& at) {
    Consumer consumer(p, at);
    Ring<kRowBuffers> row_ring(at.row_barriers);  // its counter is the turn
#pragma unroll 1
    for (; (int)(blockIdx.x + row_ring.count * gridDim.x) < p.tiles; row_ring.advance()) {
      const Tile tile(p, blockIdx.x + row_ring.count * gridDim.x);
      row_ring.wait_full();
      consumer.rows.select(at.rows + row_ring.stage() * kRowBytes);
      if (tile.row_blocks > 0) consumer.run(tile);
      row_ring.release(row_ring.stage());
      if (tile.row_blocks > 0) consumer.store(tile);
    }
  }
};

template <int kHeadDim, typename T, bool kReverse>
__global__ void __launch_bounds__(ChunkScanGrad<kHeadDim, T, kReverse>::kThreads, 1) chunk_scan_grad_kernel(const __grid_constant__ ChunkScanGradParams p) {
  using Kernel = ChunkScanGrad<kHeadDim, T, kReverse>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const typename Kernel::Layout at(shared_address(shared_memory));
  if (threadIdx.x == 0) {
    Ring<Kernel::kStages>::init(at.ring_barriers, Kernel::kWarpgroups * 128);
    Ring<Kernel::kRowBuffers>::init(at.row_barriers, Kernel::kWarpgroups * 128);
    Kernel::State::init(at.state_barriers);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x / 128 == Kernel::kWarpgroups) {
    give_registers<Kernel::State::kProducing>();
    const int warp = uniform_warp() % 4;
    if (threadIdx.x % 128 == 0) Kernel::produce(p, at);
    else if (warp > 0) Kernel::assist(p, warp - 1, at);
  } else {
    take_registers<Kernel::State::kConsuming>();
    Kernel::consume(p, at);
  }
}

template <int kHeadDim, typename T, bool kReverse>
int launch_chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream) {
  using Kernel = ChunkScanGrad<kHeadDim, T, kReverse>;
  const Gates gates = gates_of(problem, params.gates);
  ChunkScanGradParams p;
  static_cast<ScanShape&>(p) = scan_shape(problem, kReverse, Kernel::kRowBlocks, params.has_boundary);
  p.rows_x = kReverse ? params.k : params.q;
  p.rows_u = kReverse ? params.v : params.dn;
  p.columns_x = kReverse ? params.q : params.k;
  p.columns_u = kReverse ? params.dn : params.v;
  p.states = params.states;
  p.row_chunk_decay = kReverse ? gates.chunk_out : gates.chunk_in;
  p.row_block_decay = kReverse ? gates.block_out : gates.block_in;
  p.column_block_decay = kReverse ? gates.block_in : gates.block_out;
  p.log2_decay = gates.log2_decay;
  p.block_decay = gates.block_decay;
  p.document_start = gates.document_start;
  p.out = params.out.data;
  p.out_stride_b = params.out.stride_b, p.out_stride_t = params.out.stride_t, p.out_stride_h = params.out.stride_h;
  p.x_scale = params.x_scale, p.value_scale = params.value_scale, p.dn_scale = params.dn_scale, p.row_scale = params.row_scale;
  p.dots = params.dots;
  p.state_dots = params.dots ? params.dots + (int64_t)problem.batch * problem.key_heads * p.blocks * kBlock : nullptr;
  p.inverse_state_scale = 1.f / problem.state_scale;
  auto* kernel = chunk_scan_grad_kernel<kHeadDim, T, kReverse>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  if (p.tiles == 0) return fail(PT_UNSUPPORTED, "%s: batch * heads * seq_len is too large for one launch", "chunk_scan_grad");
  kernel<<<p.grid, Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p);
  return check_cuda(cudaGetLastError(), "chunk_scan_grad");
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_SCAN_GRAD(head_dim, type, type_name, reverse)                                                                   \
  namespace powertrain::sm90 {                                                                                                        \
  template int launch_chunk_scan_grad<head_dim, type, reverse>(const pt_problem&, const pt_chunk_scan_grad_params&, cudaStream_t);     \
  static RegisterKernel registered({"chunk_scan_grad K=" #head_dim " " type_name " reverse=" #reverse,                                \
                                    (const void*)chunk_scan_grad_kernel<head_dim, type, reverse>, 90,                                 \
                                    ChunkScanGrad<head_dim, type, reverse>::kThreads, ChunkScanGrad<head_dim, type, reverse>::kSharedBytes}); \
  }
