// pt_cross_entropy: the losses of rows of logits, and in place of the logits the gradients of the losses.
//
// Meant to be bound by bytes, and not yet timed alone: a row is read from device memory once, a second time from L2 if it is still there, and written
// once. One thread block per row; few large blocks where rows are long, so that the rows in flight fit L2.
#include <float.h>

#include "numeric.cuh"
#include "launch.cuh"

namespace powertrain {
namespace {

constexpr int kMostThreads = 1024, kFewThreads = 256, kLongRow = 16384;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct MaxAndSum {
  float max, sum;  // sum of exp(x - max)
};

__device__ __forceinline__ MaxAndSum join(MaxAndSum a, MaxAndSum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * exp2f((a.max - max) * kLog2E) + b.sum * exp2f((b.max - max) * kLog2E)};
}

// All threads get the joined result.
__device__ __forceinline__ MaxAndSum join_block(MaxAndSum mine, MaxAndSum* partial) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const MaxAndSum other = {__shfl_xor_sync(~0u, mine.max, mask), __shfl_xor_sync(~0u, mine.sum, mask)};
    mine = join(mine, other);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  MaxAndSum all = partial[0];
  for (int warp = 1; warp < (int)blockDim.x / 32; warp++) all = join(all, partial[warp]);
  return all;
}

// Calls `word(first element, 8 of them)` or `single(element)` for every element of a row, 16 bytes at a time wherever rows allow it.
template <typename T, typename Word, typename Single>
__device__ __forceinline__ void for_row(T* row, int64_t columns, Word word, Single single) {
  const int64_t before = min(columns, (int64_t)((16 - (uintptr_t)row % 16) % 16 / sizeof(T)));
  const int64_t words = (columns - before) / 8, after = before + 8 * words;
  for (int64_t i = threadIdx.x; i < before; i += blockDim.x) single(i);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) word(before + 8 * i);
  for (int64_t i = after + threadIdx.x; i < columns; i += blockDim.x) single(i);
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads) cross_entropy(pt_cross_entropy_params a) {
  follow_earlier_kernels();
  __shared__ MaxAndSum partial[kMostThreads / 32];
  using N = Numeric<T>;
  const int64_t index = blockIdx.x, label = a.labels[index], columns = a.columns;
  T* row = (T*)a.logits + index * a.row_stride;
  const bool counts = label != a.ignore_index;
  if (!counts) {
    if (threadIdx.x == 0) {
      if (a.losses) a.losses[index] = 0.f;
      if (a.log_sum_exp && !a.has_log_sum_exp) a.log_sum_exp[index] = 0.f;
    }
    if (a.write_gradients)
      for_row(row, columns, [&](int64_t i) { *(uint4*)(row + i) = make_uint4(0, 0, 0, 0); }, [&](int64_t i) { row[i] = N::from_float(0.f); });
    return;
  }
  float lse;
  if (a.has_log_sum_exp) {
    lse = a.log_sum_exp[index];
  } else {
    MaxAndSum mine = {-FLT_MAX, 0.f};
    for_row(
        row, columns,
        [&](int64_t i) {
          const uint4 w = *(const uint4*)(row + i);
          const float x[8] = {N::low(w.x), N::high(w.x), N::low(w.y), N::high(w.y), N::low(w.z), N::high(w.z), N::low(w.w), N::high(w.w)};
          float max = mine.max, sum = 0.f;
#pragma unroll
          for (int e = 0; e < 8; e++) max = fmaxf(max, x[e]);
#pragma unroll
          for (int e = 0; e < 8; e++) sum += exp2f((x[e] - max) * kLog2E);
          mine = {max, mine.sum * exp2f((mine.max - max) * kLog2E) + sum};
        },
        [&](int64_t i) { mine = join(mine, {N::to_float(row[i]), 1.f}); });
    const MaxAndSum all = join_block(mine, partial);
    lse = all.max + log2f(all.sum) * kLn2;
  }
  const bool known = label >= 0 && label < columns;  // a label beyond the row: NaN, which nobody can miss
  if (threadIdx.x == 0) {
    if (a.losses) a.losses[index] = known ? lse - N::to_float(row[label]) : NAN;
    if (a.log_sum_exp && !a.has_log_sum_exp) a.log_sum_exp[index] = lse;
  }
  if (!a.write_gradients) return;
  __syncthreads();  // the loss has read its logit
  const float factor = !known ? NAN : a.factors ? a.factors[index] : 1.f;
  auto gradient = [&](float x, int64_t i) { return (exp2f((x - lse) * kLog2E) - (i == label ? 1.f : 0.f)) * factor; };
  for_row(
      row, columns,
      [&](int64_t i) {
        uint4 w = *(const uint4*)(row + i);
        w.x = N::pack(gradient(N::low(w.x), i + 0), gradient(N::high(w.x), i + 1));
        w.y = N::pack(gradient(N::low(w.y), i + 2), gradient(N::high(w.y), i + 3));
        w.z = N::pack(gradient(N::low(w.z), i + 4), gradient(N::high(w.z), i + 5));
        w.w = N::pack(gradient(N::low(w.w), i + 6), gradient(N::high(w.w), i + 7));
        *(uint4*)(row + i) = w;
      },
      [&](int64_t i) { row[i] = N::from_float(gradient(N::to_float(row[i]), i)); });
}

}  // namespace
}  // namespace powertrain

using namespace powertrain;

extern "C" int pt_cross_entropy(const pt_cross_entropy_params* params, void* stream) {
  if (!params || !params->logits || !params->labels) return fail(PT_INVALID, "pt_cross_entropy: logits or labels are null");
  const pt_cross_entropy_params& a = *params;
  if (a.dtype != PT_BF16 && a.dtype != PT_FP16) return fail(PT_UNSUPPORTED, "dtype %d: bf16 (0) and fp16 (1) are supported", a.dtype);
  if (a.rows < 0 || a.rows > 0x7fffffff || a.columns < 1 || a.row_stride < a.columns)
    return fail(PT_INVALID, "rows %lld, columns %lld, row_stride %lld: 0 to 2^31 - 1 rows, at least 1 column, row_stride at least columns", (long long)a.rows,
                (long long)a.columns, (long long)a.row_stride);
  if (a.has_log_sum_exp && !a.log_sum_exp) return fail(PT_INVALID, "pt_cross_entropy: log_sum_exp is null");
  if (a.rows == 0) return PT_OK;
  const unsigned threads = a.columns >= kLongRow ? kMostThreads : kFewThreads;
  const auto kernel = a.dtype == PT_BF16 ? cross_entropy<__nv_bfloat16> : cross_entropy<__half>;
  return launch("cross_entropy", kernel, (unsigned)a.rows, threads, 0, (cudaStream_t)stream, a);
}
