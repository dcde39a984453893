// pt_pack, pt_pack_grad, pt_power_scale: tensors with strides into tiles, once, so that every later read is a contiguous copy.
#include "gates.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace powertrain {
namespace {

constexpr int kThreads = kGateThreads;

// Eight consecutive elements of a row.
template <typename T>
__device__ __forceinline__ uint4 load8(const T* p, bool vector) {
  if (vector) return *(const uint4*)p;
  uint16_t e[8];
#pragma unroll
  for (int i = 0; i < 8; i++) e[i] = ((const uint16_t*)p)[i];
  return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
}

// Blocks are taken heads first: in memory the heads of a token are neighbours.
struct BlockIndex {
  int b, h;
  int64_t block;
  __device__ BlockIndex(uint32_t index, uint32_t heads, uint32_t blocks) {  // 32 bits: a grid has no more, and they divide fast
    const uint32_t of_row = index / heads;
    h = (int)(index % heads), block = of_row % blocks, b = (int)(of_row / blocks);
  }
};

// Blocks that a thread block takes of q or k, so that each of its threads has four loads of 16 bytes in flight.
template <int D>
constexpr int kPacks = 128 / D;
// Bytes of a token in shared memory, and of a block. The pads keep ldmatrix free of bank conflicts, and stores of rows of several heads.
template <int D>
constexpr int kTileRow = D * 2 + 16;
template <int D>
constexpr int kTile = kBlock * kTileRow<D> + (D < 64 ? D * 2 : 0);

// Features: 64 tokens x D are transposed through `tiles`, shared memory. `scale`, per (b, h), or null. Blocks `first` to `first + kPacks`, of `total`.
template <typename T, int D>
__device__ void pack_features(const Strided<T>& x, uint32_t first, uint32_t total, int heads, int64_t blocks, int64_t seq_len, const float* scale,
                              T* packed, bool vector, uint8_t* tiles) {
  constexpr int kGroups = D / 8, kLoads = kPacks<D> * kBlock * kGroups / kThreads;
  const int count = (int)min(total - first, (uint32_t)kPacks<D>);
  // Every load is of the same block and columns: lanes go along rows of several heads, which are contiguous where heads are.
  const int group = threadIdx.x % kGroups, pack = threadIdx.x / kGroups % kPacks<D>, token = threadIdx.x / (kGroups * kPacks<D>);
  constexpr int kStep = kThreads / (kGroups * kPacks<D>);  // tokens between loads
  __shared__ int64_t packed_at[kPacks<D>];
  uint4 v[kLoads];
  {
    const BlockIndex at(first + min(pack, count - 1), heads, (uint32_t)blocks);
    if (group == 0 && token == 0) packed_at[pack] = (((int64_t)at.b * heads + at.h) * blocks + at.block) * feature_block_elements(D);
    const int existing = pack < count ? (int)min(seq_len - at.block * kBlock, (int64_t)kBlock) : 0;
    const T* from = x.row(at.b, at.block * kBlock + token, at.h) + group * 8;
#pragma unroll
    for (int l = 0; l < kLoads; l++, from += kStep * x.stride_t) {
      v[l] = make_uint4(0, 0, 0, 0);
      if (token + l * kStep < existing) v[l] = load8(from, vector);
    }
    const float by = scale ? scale[at.b * heads + at.h] : 1.f;
    if (scale)
#pragma unroll
      for (int l = 0; l < kLoads; l++) v[l] = scaled<T>(v[l], by);
  }
#pragma unroll
  for (int l = 0; l < kLoads; l++) *(uint4*)(tiles + pack * kTile<D> + (token + l * kStep) * kTileRow<D> + group * 16) = v[l];
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int core = warp * 4; core < kPacks<D> * D; core += kThreads / 8) {  // D / 8 feature groups x 8 token groups of each, four a time
    const int pack = core / D, feature_group = core % D / 8, token_group = core % 8 + lane / 8;
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(tiles + pack * kTile<D> + (token_group * 8 + lane % 8) * kTileRow<D> + feature_group * 16);
    uint32_t r[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
    if (pack >= count) continue;
    uint32_t* const out = (uint32_t*)(packed + packed_at[pack]) + core % D * 32 + lane;
#pragma unroll
    for (int i = 0; i < 4; i++) out[i * 32] = r[i];
  }
}

template <typename T>
struct PackArguments {
  Strided<T> q, k, v;
  bool vector_q, vector_k, vector_v;
  const float *query_scale, *key_scale, *value_scale;
  T *packed_q, *packed_k, *packed_v, *decayed_v;
  int query_heads, key_heads;
  int64_t seq_len, blocks, query_blocks, key_blocks;  // the last two of all (b, h)
  uint32_t query_grid, value_grid;                    // thread blocks of q and of v
  uint32_t value_blocks;                              // of 64 tokens of one (b, h) that a thread block of v takes
  GateInputs gate_inputs;
  Gates gates;
};

// Values, and their gates on the way; or the gates alone, where there is nowhere to put values. Lanes are two column groups of sixteen tokens: whole
// sectors are read and written.
template <typename T, int D>
__device__ void pack_values(const PackArguments<T>& a, uint32_t index, float* shared) {
  constexpr int kLoads = 4, kStep = kThreads * 8 / D;  // of a thread; tokens between them
  const uint32_t parts = ((uint32_t)a.blocks + a.value_blocks - 1) / a.value_blocks;
  const BlockIndex at(index, a.key_heads, parts);
  const int b = at.b, h = at.h, bh = b * a.key_heads + h;
  const uint32_t first = (uint32_t)at.block * a.value_blocks;
  const int count = min((uint32_t)a.blocks - first, a.value_blocks);
  float* const decay = shared;
  if (index == 0) clear_pads(a.gate_inputs, a.gates, a.key_blocks / a.blocks);
  form_gates(a.gate_inputs, a.gates, bh, b, h, first, count, decay, shared + kGateBlocks * kBlock);
  if (!a.packed_v) return;
  __syncthreads();
  const int existing = (int)min(a.seq_len - (int64_t)first * kBlock, (int64_t)count * kBlock);
  const int64_t out = ((int64_t)bh * a.blocks + first) * value_block_elements(D);
#pragma unroll 1
  for (int t = threadIdx.x; t < count * kBlock; t += kThreads) {  // the normaliser's columns
    const int64_t to = out + t / kBlock * value_block_elements(D) + value_index(D, t % kBlock);
    store8(a.packed_v + to, make_uint4(t < existing ? Numeric<T>::pack(1.f, 0.f) : 0, 0, 0, 0));
    if (a.decayed_v) store8(a.decayed_v + to, make_uint4(t < existing ? high_and_low<T>(decay[t]) : 0, 0, 0, 0));
  }
  const int column = (threadIdx.x / 16 % (D / 16) * 2 + threadIdx.x % 2) * 8, begin = threadIdx.x / D * 8 + threadIdx.x / 2 % 8;
  const T* from = a.v.row(b, (int64_t)first * kBlock + begin, h) + column;
#pragma unroll 1
  for (int token = begin; token < count * kBlock; token += kLoads * kStep) {
    uint4 v[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; l++, from += kStep * a.v.stride_t) {
      v[l] = make_uint4(0, 0, 0, 0);
      if (token + l * kStep < existing) v[l] = load8(from, a.vector_v);
      if (a.value_scale) v[l] = scaled<T>(v[l], a.value_scale[bh]);
    }
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = token + l * kStep;
      if (t >= count * kBlock) continue;
      const int64_t to = out + t / kBlock * value_block_elements(D) + value_index(column, t % kBlock);
      store8(a.packed_v + to, v[l]);
      if (a.decayed_v) store8(a.decayed_v + to, scaled<T>(v[l], decay[t]));
    }
  }
}

// Thread blocks that a multiprocessor is to hold at once; the most that registers allow without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PT_PACK_RESIDENT 5
#else
#define PT_PACK_RESIDENT 6
#endif

// Thread blocks of q, then of v, which take longest, then of k.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, PT_PACK_RESIDENT) pack_inputs(const __grid_constant__ PackArguments<T> a) {
  follow_earlier_kernels();
  __shared__ __align__(16) uint8_t shared[kPacks<D> * kTile<D>];
  const uint32_t index = blockIdx.x;
  if (index < a.query_grid)
    pack_features<T, D>(a.q, index * kPacks<D>, (uint32_t)a.query_blocks, a.query_heads, a.blocks, a.seq_len, a.query_scale, a.packed_q, a.vector_q, shared);
  else if (index < a.query_grid + a.value_grid)
    pack_values<T, D>(a, index - a.query_grid, (float*)shared);
  else
    pack_features<T, D>(a.k, (index - a.query_grid - a.value_grid) * kPacks<D>, (uint32_t)a.key_blocks, a.key_heads, a.blocks, a.seq_len, a.key_scale,
                        a.packed_k, a.vector_k, shared);
}

template <typename T, int D, bool kOnlyMaximum>
__global__ void __launch_bounds__(kThreads) pack_grad(Strided<T> dy, Strided<T> y, bool vector, const float* normalizer,
                                                      const float* value_scale, float* dn_scale, int query_heads, int key_heads,
                                                      int64_t seq_len, int64_t blocks, T* packed, const float* decay, T* decayed) {
  follow_earlier_kernels();
  constexpr int kLanes = D / 8, kRows = kThreads / kLanes;
  const BlockIndex at(blockIdx.x, query_heads, (uint32_t)blocks);
  const int group = at.h / (query_heads / key_heads), lane = threadIdx.x % kLanes;
  const float vs = value_scale ? value_scale[at.b * key_heads + group] : 1.f;
  const float scale = !kOnlyMaximum && dn_scale ? dn_scale[at.b * key_heads + group] : 1.f;
  const int64_t offset = (((int64_t)at.b * query_heads + at.h) * blocks + at.block) * value_block_elements(D);
  float largest = 0.f;
  for (int token = threadIdx.x / kLanes; token < kBlock; token += kRows) {
    const int64_t t = at.block * kBlock + token;
    uint4 a = make_uint4(0, 0, 0, 0), b = a;
    float d = 0.f;
    if (t < seq_len) {
      a = load8(dy.row(at.b, t, at.h) + lane * 8, vector);
      b = load8(y.row(at.b, t, at.h) + lane * 8, vector);
      d = normalizer[((int64_t)at.b * query_heads + at.h) * seq_len + t];
    }
    const GradRow<T, !kOnlyMaximum> row(a, b, d, scale);
    float last = row.dot;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) last += __shfl_xor_sync(~0u, last, step);
    last *= -vs;
    if (kOnlyMaximum) {
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(row.value[i]));
      largest = fmaxf(largest, fabsf(last));
    } else {
      const uint4 v = row.row();
      store8(packed + offset + value_index(lane * 8, token), v);
      if (lane == 0) store8(packed + offset + value_index(D, token), make_uint4(high_and_low<T>(last), 0, 0, 0));
      if (decayed) {
        const float by = decay[((int64_t)(at.b * key_heads + group) * blocks + at.block) * kBlock + token];
        store8(decayed + offset + value_index(lane * 8, token), scaled<T>(v, by));
        if (lane == 0) store8(decayed + offset + value_index(D, token), make_uint4(high_and_low<T>(last * by), 0, 0, 0));
      }
    }
  }
  if (kOnlyMaximum) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    // Non-negative floats order as their bits do, and a maximum does not depend on the order.
    if (threadIdx.x % 32 == 0) atomicMax((unsigned*)dn_scale + at.b * key_heads + group, __float_as_uint(largest));
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) largest_magnitude(Strided<T> x, int heads, int groups, int64_t seq_len, int64_t blocks,
                                                              float* scale, bool vector) {
  follow_earlier_kernels();
  const BlockIndex at(blockIdx.x, heads, (uint32_t)blocks);
  float largest = 0.f;
  for (int e = threadIdx.x; e < kBlock * D / 8; e += kThreads) {
    const int64_t t = at.block * kBlock + e / (D / 8);
    if (t >= seq_len) break;
    const uint4 v = load8(x.row(at.b, t, at.h) + e % (D / 8) * 8, vector);
    const uint32_t* w = &v.x;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fmaxf(fabsf(Numeric<T>::low(w[i])), fabsf(Numeric<T>::high(w[i]))));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  if (threadIdx.x % 32 == 0)
    atomicMax((unsigned*)scale + at.b * groups + at.h / (heads / groups), __float_as_uint(largest));
}

// Maxima into powers of two: largest * scale lies in (0.5, 1].
__global__ void maxima_to_scales(float* scale, int count) {
  follow_earlier_kernels();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float largest = scale[i];
  float result = 1.f;
  if (largest > 0.f && largest <= 3.0e38f) {
    int exponent;
    const float mantissa = frexpf(largest, &exponent);
    exponent = mantissa == 0.5f ? exponent - 1 : exponent;
    result = exp2f((float)-max(-126, min(126, exponent)));
  }
  scale[i] = result;
}

int finish_scales(float* scale, int count, cudaStream_t stream) {
  return launch("maxima_to_scales", maxima_to_scales, (count + 127) / 128, 128, 0, stream, scale, count);
}

// Exponents of the powers of two that rows are multiplied by (powertrain_kernels.h): the least, the largest that all rows may have (4 T of |phi| then
// fit beside what enters from outside), and the largest of all.
constexpr int kLeastRowScale = -6, kCommonRowScale = 1, kLargestRowScale = 7;
constexpr float kLongestRow = 128.f;  // sum of |q_i|: (q . k)^2 <= 2^14, as |k_i| <= 1
__device__ __forceinline__ float row_exponent(float d) {
  return d >= kSmallestNormalizer ? fmaxf(kLeastRowScale, rintf(-0.375f * log2f(d))) : 0.f;
}

// The largest exponent of every head's rows: the one that keeps the sum of squared scales, which bounds the sum of |phi(q)| over rows and with it the
// state's gradient, within `budget`. One thread block for each head.
constexpr int kLimitThreads = 1024;
__global__ void __launch_bounds__(kLimitThreads) limit_rows(const float* normalizer, int64_t seq_len, float budget, float* limit) {
  follow_earlier_kernels();
  constexpr int kLimits = kLargestRowScale - kCommonRowScale, kAhead = 4;
  __shared__ float sums[kLimitThreads / 32][kLimits];
  const float* const d = normalizer + blockIdx.x * seq_len;
  float sum[kLimits] = {};
  for (int64_t first = threadIdx.x; first < seq_len; first += kAhead * kLimitThreads) {
    float value[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; a++) value[a] = first + a * kLimitThreads < seq_len ? d[first + a * kLimitThreads] : 0.f;
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const float exponent = first + a * kLimitThreads < seq_len ? row_exponent(value[a]) : -64.f;
#pragma unroll
      for (int i = 0; i < kLimits; i++) sum[i] += exp2f(2.f * fminf(exponent, kCommonRowScale + 1 + i));
    }
  }
#pragma unroll
  for (int i = 0; i < kLimits; i++) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int largest = kCommonRowScale;
  for (int i = 0; i < kLimits; i++) {
    float total = 0.f;
    for (int w = 0; w < kLimitThreads / 32; w++) total += sums[w][i];
    if (total <= budget) largest = kCommonRowScale + 1 + i;
  }
  limit[blockIdx.x] = largest;
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) scale_rows(const T* packed, const float* normalizer, const float* limit, int64_t seq_len, int64_t blocks,
                                                       T* scaled_q, float* scaled_normalizer, float* row_scale) {
  follow_earlier_kernels();
  constexpr int kParts = kThreads / kBlock;
  __shared__ float scales[kBlock], lengths[kParts][kBlock];
  const int64_t head = blockIdx.x / blocks, first = blockIdx.x % blocks * kBlock, at = (int64_t)blockIdx.x * feature_block_elements(D);
  {
    const int token = threadIdx.x % kBlock, part = threadIdx.x / kBlock;
    float length = 0.f;
#pragma unroll 4
    for (int f = part; f < D; f += kParts) length += fabsf(Numeric<T>::to_float(packed[at + f / 8 * 512 + token / 8 * 64 + f % 8 * 8 + token % 8]));
    lengths[part][token] = length;
  }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    const int64_t token = first + threadIdx.x;
    float scale = 1.f;
    if (token < seq_len) {
      const float d = normalizer[head * seq_len + token];
      float length = 0.f;
#pragma unroll
      for (int part = 0; part < kParts; part++) length += lengths[part][threadIdx.x];
      scale = exp2f(fminf(fminf(limit[head], row_exponent(d)), floorf(log2f(kLongestRow / fmaxf(length, 1e-20f)))));
      scaled_normalizer[head * seq_len + token] = d * scale * scale;
      row_scale[head * seq_len + token] = scale;
    }
    scales[threadIdx.x] = scale;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kBlock * D / 8; e += kThreads) {  // eight tokens of one feature
    uint4 v = *(const uint4*)(packed + at + e * 8);
    const float* s = scales + e / 8 % 8 * 8;
    uint32_t* w = &v.x;
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = Numeric<T>::pack(Numeric<T>::low(w[i]) * s[2 * i], Numeric<T>::high(w[i]) * s[2 * i + 1]);
    *(uint4*)(scaled_q + at + e * 8) = v;
  }
}

template <typename T, int D>
int run_row_scale(const pt_problem& p, const pt_row_scale_params& a, cudaStream_t stream) {
  const int64_t blocks = padded_blocks(p.seq_len), heads = (int64_t)p.batch * p.query_heads;
  // The state's gradient, doubled off the diagonal, may reach 2^15 / state_scale, of which what enters from outside takes half (boundary.cu).
  const float budget = 0x1p13f / (p.state_scale * (p.query_heads / p.key_heads));
  if (int status = launch("pt_row_scale", limit_rows, (unsigned)heads, kLimitThreads, 0, stream, a.normalizer, p.seq_len, budget, a.row_limit)) return status;
  return launch("pt_row_scale", scale_rows<T, D>, (unsigned)(blocks * heads), kThreads, 0, stream, (const T*)a.packed_q, a.normalizer, a.row_limit, p.seq_len,
                blocks, (T*)a.scaled_q, a.scaled_normalizer, a.row_scale);
}

template <typename T, int D>
int run_pack(const pt_problem& p, const pt_pack_params& a, cudaStream_t stream) {
  const int64_t blocks = padded_blocks(p.seq_len);
  PackArguments<T> k;
  k.q = strided<T>(a.q), k.k = strided<T>(a.k), k.v = strided<T>(a.v);
  k.vector_q = vectorizable(a.q), k.vector_k = vectorizable(a.k), k.vector_v = vectorizable(a.v);
  k.query_scale = a.query_scale, k.key_scale = a.key_scale, k.value_scale = a.value_scale;
  k.packed_q = (T*)a.packed_q, k.packed_k = (T*)a.packed_k, k.packed_v = (T*)a.packed_v, k.decayed_v = (T*)a.decayed_v;
  k.query_heads = p.query_heads, k.key_heads = p.key_heads;
  k.seq_len = p.seq_len, k.blocks = blocks, k.query_blocks = blocks * p.batch * p.query_heads, k.key_blocks = blocks * p.batch * p.key_heads;
  if (k.query_blocks + 2 * k.key_blocks > INT32_MAX) return fail(PT_UNSUPPORTED, "pt_pack: batch * heads * seq_len is too large for one launch");
  k.gate_inputs = {a.log_G,          a.log_G_stride_b, a.log_G_stride_t, a.log_G_stride_h,
                   p.seq_len,        a.cu_seqlens,     a.num_cu_seqlens, (uint32_t)p.chunk_size / kBlock,
                   blocks,           chunks(p.seq_len, p.chunk_size)};
  k.gates = gates_of(p, a.gates);
  // The more blocks, the fewer times the gates of a chunk are summed; but a small problem is to fill the GPU.
  const int64_t rows = (int64_t)p.batch * p.key_heads, wanted = 2 * multiprocessors();
  k.value_blocks = kGateBlocks;
  while (k.value_blocks > (uint32_t)kPacks<D> && rows * ceil_div(blocks, k.value_blocks) < wanted) k.value_blocks /= 2;
  const auto feature_grid = [&](int64_t blocks) { return a.packed_v ? (uint32_t)ceil_div(blocks, kPacks<D>) : 0; };
  k.query_grid = feature_grid(k.query_blocks), k.value_grid = (uint32_t)(rows * ceil_div(blocks, k.value_blocks));
  const uint32_t grid = k.query_grid + k.value_grid + feature_grid(k.key_blocks);
  return launch("pt_pack", pack_inputs<T, D>, grid, kThreads, 0, stream, k);
}

template <typename T, int D>
int run_pack_grad(const pt_problem& p, const pt_pack_grad_params& a, cudaStream_t stream) {
  const int64_t blocks = padded_blocks(p.seq_len);
  const dim3 grid((unsigned)(blocks * p.batch * p.query_heads));
  const bool vector = vectorizable(a.dy) && vectorizable(a.y);
  auto launch_grad = [&](auto* kernel) {
    return launch("pt_pack_grad", kernel, grid, kThreads, 0, stream, strided<T>(a.dy), strided<T>(a.y), vector, a.normalizer, a.value_scale, a.dn_scale,
                  p.query_heads, p.key_heads, p.seq_len, blocks, (T*)a.packed_dn, a.decayed ? gates_of(p, a.gates).chunk_in : nullptr, (T*)a.decayed);
  };
  if (a.dn_scale) {
    const int count = p.batch * p.key_heads;
    if (int status = check_cuda(cudaMemsetAsync(a.dn_scale, 0, count * sizeof(float), stream), "cudaMemsetAsync")) return status;
    if (int status = launch_grad(pack_grad<T, D, true>)) return status;
    if (int status = finish_scales(a.dn_scale, count, stream)) return status;
    if (a.dfinal_state)
      if (int status = bound_grad_scale(p, a.dfinal_state, a.dfinal_sum_of_keys, a.value_scale, a.key_scale, a.dn_scale, stream)) return status;
  }
  return launch_grad(pack_grad<T, D, false>);
}

template <typename T, int D>
int run_power_scale(const pt_problem& p, const pt_power_scale_params& a, cudaStream_t stream) {
  const int64_t blocks = padded_blocks(p.seq_len);
  const int count = p.batch * a.groups;
  if (int status = check_cuda(cudaMemsetAsync(a.scale, 0, count * sizeof(float), stream), "cudaMemsetAsync")) return status;
  if (int status = launch("largest_magnitude", largest_magnitude<T, D>, (unsigned)(blocks * p.batch * a.heads), kThreads, 0, stream, strided<T>(a.x), a.heads,
                          a.groups, p.seq_len, blocks, a.scale, vectorizable(a.x)))
    return status;
  return finish_scales(a.scale, count, stream);
}

}  // namespace
}  // namespace powertrain

using namespace powertrain;

#define PT_REQUIRE(condition) \
  if (!(condition)) return fail(PT_INVALID, "%s: %s does not hold", __func__, #condition)

extern "C" {

int pt_power_scale(const pt_problem* problem, const pt_power_scale_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->x.data && params->scale && params->heads > 0 && params->groups > 0);
  PT_REQUIRE(params->heads % params->groups == 0);
  return with_type(*problem, [&](auto element, auto dim) {
    return run_power_scale<decltype(element), dim.value>(*problem, *params, (cudaStream_t)stream);
  });
}

int pt_row_scale(const pt_problem* problem, const pt_row_scale_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->packed_q && params->normalizer && params->scaled_q && params->scaled_normalizer && params->row_scale && params->row_limit);
  return with_type(*problem, [&](auto element, auto dim) {
    return run_row_scale<decltype(element), dim.value>(*problem, *params, (cudaStream_t)stream);
  });
}

int pt_pack(const pt_problem* problem, const pt_pack_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params);
  const bool packs = params->packed_q && params->packed_k && params->packed_v;
  PT_REQUIRE(packs ? params->q.data && params->k.data && params->v.data : !(params->packed_q || params->packed_k || params->packed_v || params->decayed_v));
  PT_REQUIRE(params->gates && (!params->cu_seqlens || params->num_cu_seqlens > 0));
  return with_type(*problem, [&](auto element, auto dim) {
    return run_pack<decltype(element), dim.value>(*problem, *params, (cudaStream_t)stream);
  });
}

int pt_pack_grad(const pt_problem* problem, const pt_pack_grad_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  PT_REQUIRE(params && params->dy.data && params->y.data && params->normalizer && params->packed_dn);
  PT_REQUIRE(!params->decayed || params->gates);
  PT_REQUIRE(!params->dfinal_state || !params->dn_scale || (params->dfinal_sum_of_keys && params->key_scale && params->value_scale));
  return with_type(*problem, [&](auto element, auto dim) {
    return run_pack_grad<decltype(element), dim.value>(*problem, *params, (cudaStream_t)stream);
  });
}

}  // extern "C"
