// chunk_scan_grad on Hopper: dq (reverse: dk), the gradient of n' . (phi(x) S) and of the attention within the chunk with respect to x.
//
// The state's part comes first, by outer products where the head is narrow and the type has the range for them, else by contraction.
#pragma once
#include "state_contraction.cuh"
#include "state_outer.cuh"

namespace powertrain::sm90 {

struct ChunkScanGradParams : ScanParams {
  const void* rows_u;  // packed dn'; reverse: v'
  const float *x_scale, *value_scale, *dn_scale, *row_scale;
  float *dots, *state_dots;  // (B, H, Tp), the latter in reverse alone; or null
};

template <int kHeadDim, typename T, bool kReverse>
struct ChunkScanGrad : GradShape<kHeadDim> {
  using Shape = GradShape<kHeadDim>;
  using Shape::kFeatureBlocks, Shape::kM, Shape::kPhiTiles, Shape::kRowBlocks, Shape::kRowBytes, Shape::kUBytes, Shape::kWarpgroups, Shape::kXBytes;
  using typename Shape::Columns;
  using Rows = GradRows<kHeadDim, T>;
  // In fp16, x u may lie below the type's range where dn' is small.
  static constexpr bool kOuter = kHeadDim == 32 && std::is_same_v<T, __nv_bfloat16>;
  using State = std::conditional_t<kOuter, StateOuter<kHeadDim, T>, StateContraction<kHeadDim, T>>;
  static constexpr int kStages = State::kStages, kStageBytes = State::kStageBytes;
  static constexpr int kRowBuffers = State::kRowBuffers;  // with two, the next row tile's rows load early
  using Walk = ColumnWalk<kHeadDim < 128, false, kHeadDim < 128>;
  static_assert(Columns::kBytes <= kStageBytes, "a stage holds a part of the state or one block of columns");
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
      produce_columns<kHeadDim, T>(p, tile, ring, at.stages, kStageBytes);
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
    __device__ __forceinline__ void weigh_scores(Weights& ds, const float (&row_decay)[2], float between, const Columns& columns) const {
      weigh<T>(ds, d[0], d[1], {2.f * (row_decay[0] * between), 2.f * (row_decay[1] * between)}, columns.decays() + 8 * (rows.lane % 4));
    }
    // acc[m] += dS x, under way when it returns.
    __device__ __forceinline__ void multiply_scores(int m, const Weights& ds, uint32_t x) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; k++) wgmma<T, false>(rows.acc[m], ds[k], CoreMatrices(x, 128, 1024).at(k * 256), true);
      wgmma_commit();
    }

    __device__ __forceinline__ void load_decays(float (&decay)[kM][2], const float* from, const Tile& tile) const {
#pragma unroll
      for (int m = 0; m < kM; m++) load_row_decays(decay[m], from, p, tile, rows.block(m), rows.warp, rows.lane);
    }

    __device__ __forceinline__ void scan_columns(const Tile& tile, float first_across) {
      float row_decay[kM][2];
      load_decays(row_decay, p.row_block_decay, tile);
      RowOperands operands[kM];
      int blocks[kM];
#pragma unroll
      for (int m = 0; m < kM; m++) rows.load_x(operands[m].x, m), rows.load_u(operands[m].u, m), blocks[m] = rows.block(m);
      Walk::template walk<kHeadDim, kM, kRowBlocks>(
          p, tile, blocks, ring, stages, kStageBytes, first_across,
          [&](int m, bool diagonal, const Columns& columns, float between) {
            score(columns.x, operands[m]);
            Weights ds;
            if (diagonal) weigh_diagonal<T, kReverse, 2>(ds, d[0], d[1], columns, rows.warp, rows.lane);
            else weigh_scores(ds, row_decay[m], between, columns);
            multiply_scores(m, ds, columns.x);
            wgmma_wait<0>();
          },
          [&](int m, const Columns& columns, float between, auto) {
            score(columns.x, operands[m]);
            Weights ds;
            weigh_scores(ds, row_decay[m], between, columns);
            multiply_scores(m, ds, columns.x);
            wgmma_wait<0>();
          });
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
      load_decays(chunk_decay, p.row_chunk_decay, tile);
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
  follow_earlier_kernels();
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
  ChunkScanGradParams p;
  set_scan_params(p, problem, params, kReverse ? params.dn : params.v, kReverse, Kernel::kRowBlocks);
  p.rows_u = kReverse ? params.v : params.dn;
  p.x_scale = params.x_scale, p.value_scale = params.value_scale, p.dn_scale = params.dn_scale, p.row_scale = params.row_scale;
  p.dots = params.dots;
  p.state_dots = params.dots ? params.dots + (int64_t)problem.batch * problem.key_heads * p.blocks * kBlock : nullptr;
  auto* kernel = chunk_scan_grad_kernel<kHeadDim, T, kReverse>;
  if (int status = allow_shared_memory((const void*)kernel, Kernel::kSharedBytes)) return status;
  if (p.tiles == 0) return fail(PT_UNSUPPORTED, "%s: batch * heads * seq_len is too large for one launch", "chunk_scan_grad");
  return launch("chunk_scan_grad", kernel, p.grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
}

}  // namespace powertrain::sm90

#define PT_SM90_CHUNK_SCAN_GRAD(head_dim, type, type_name, reverse)                                                                   \
  namespace powertrain::sm90 {                                                                                                        \
  template int launch_chunk_scan_grad<head_dim, type, reverse>(const pt_problem&, const pt_chunk_scan_grad_params&, cudaStream_t);     \
  static RegisterKernel registered({"chunk_scan_grad K=" #head_dim " " type_name " reverse=" #reverse,                                \
                                    (const void*)chunk_scan_grad_kernel<head_dim, type, reverse>, 90,                                 \
                                    ChunkScanGrad<head_dim, type, reverse>::kThreads, ChunkScanGrad<head_dim, type, reverse>::kSharedBytes}); \
  }
