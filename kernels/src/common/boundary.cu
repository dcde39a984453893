// pt_boundary: the public states (exact, upper triangular, weight sqrt(2) off the diagonal) to and from boundary states (tiles, no weights).
//
// With keys packed as ks k and values as vs v, a boundary state is ks^2 vs times the public one without its weight (its normaliser: ks^2
// times). The gradient with respect to a boundary state maps by the transpose: the same factors, the other way round, and the weight sqrt(2)
// because the readers of a boundary state count every pair of features twice.
#include "launch.cuh"

namespace powertrain {
namespace {

constexpr int kThreads = 128, kBoundThreads = 1024;
constexpr float kSqrt2 = 1.4142135623730951f;

// Row of the exact upper-triangular order for features a <= b.
__device__ __forceinline__ int64_t public_row(int a, int b, int head_dim) { return (int64_t)a * head_dim - (int64_t)a * (a - 1) / 2 + b - a; }

__device__ __forceinline__ void features_of_row(int tile, int row, int head_dim, int& i, int& j) {
  const TilePair pair = tile_pair(tile, head_dim);
  i = pair.i_block * 8 + row / 8, j = pair.j_block * 8 + row % 8;
}

// One thread block per row of a tile.
__global__ void __launch_bounds__(kThreads) convert(pt_boundary_params a, int head_dim, int tiles) {
  follow_earlier_kernels();
  const int64_t rows = (int64_t)tiles * kBlock, bh = blockIdx.x / rows;
  const int tile = (int)(blockIdx.x % rows / kBlock), row = (int)(blockIdx.x % kBlock);
  int i, j;
  features_of_row(tile, row, head_dim, i, j);
  if (!a.to_boundary && tile_pair(tile, head_dim).distance == 0 && i > j) return;  // its twin (j, i) writes the same entry
  const int64_t features = (int64_t)head_dim * (head_dim + 1) / 2, at = bh * features + public_row(min(i, j), max(i, j), head_dim);
  float* state = a.state + at * head_dim;
  float* boundary = a.boundary + (int64_t)blockIdx.x * (head_dim + kNormColumns);
  const float ks = a.key_scale ? a.key_scale[bh] : 1.f, vs = a.value_scale ? a.value_scale[bh] : 1.f;
  const float weight = i == j ? 1.f : kSqrt2;
  // Gradients in packed units carry dn' times dn_scale against values times value_scale.
  const float units = a.dn_scale ? a.dn_scale[bh] * vs : 1.f;
  const float norm = ks * ks / units, value = norm * vs;
  if (a.to_boundary) {
    const float fv = (a.gradient ? 1.f / value : value) / weight, fn = (a.gradient ? 1.f / norm : norm) / weight;
    for (int c = threadIdx.x; c < head_dim + kNormColumns; c += kThreads)
      boundary[c] = c < head_dim ? state[c] * fv : c == head_dim ? a.sum_of_keys[at] * fn : 0.f;
  } else {
    const float fv = (a.gradient ? value : 1.f / value) * weight, fn = (a.gradient ? norm : 1.f / norm) * weight;
    for (int c = threadIdx.x; c < head_dim; c += kThreads) state[c] = boundary[c] * fv;
    if (threadIdx.x == 0) a.sum_of_keys[at] = boundary[head_dim] * fn;
  }
}

// fp16: lowers the scale of k (of dn', where a gradient is given) until a state from outside leaves headroom in packed units:
// key_scale^2 value_scale state, or dn_scale / key_scale^2 times the gradient (of sum_of_keys: times value_scale). One thread block per (b, h).
template <bool kGradient>
__global__ void __launch_bounds__(kBoundThreads) bound_scale(const float* state, const float* sum_of_keys, int64_t features, int head_dim,
                                                             float headroom, const float* value_scale, const float* key_scale, float* scale) {
  follow_earlier_kernels();
  __shared__ float partial[kBoundThreads / 32];
  const int64_t bh = blockIdx.x;
  const float vs = value_scale[bh], of_state = kGradient ? 1.f : vs, of_sum = kGradient ? vs : 1.f;
  float largest = 0.f;
  for (int64_t e = threadIdx.x; e < features * head_dim; e += kBoundThreads)
    largest = fmaxf(largest, fabsf(state[bh * features * head_dim + e]) * of_state);
  for (int64_t e = threadIdx.x; e < features; e += kBoundThreads) largest = fmaxf(largest, fabsf(sum_of_keys[bh * features + e]) * of_sum);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kBoundThreads / 32; w++) largest = fmaxf(largest, partial[w]);
    const float room = headroom / fmaxf(largest, 1e-30f);
    const float limit = kGradient ? exp2f(floorf(log2f(room * key_scale[bh] * key_scale[bh]))) : exp2f(floorf(0.5f * log2f(room)));
    scale[bh] = fminf(scale[bh], limit);
  }
}

}  // namespace

int bound_key_scale(const pt_problem& p, const float* state, const float* sum_of_keys, const float* value_scale, float* key_scale, cudaStream_t stream) {
  const int64_t features = (int64_t)p.head_dim * (p.head_dim + 1) / 2;
  return launch("bound_key_scale", bound_scale<false>, (unsigned)(p.batch * p.key_heads), kBoundThreads, 0, stream, state, sum_of_keys, features, p.head_dim,
                0x1p13f / p.state_scale, value_scale, nullptr, key_scale);
}

int bound_grad_scale(const pt_problem& p, const float* dstate, const float* dsum_of_keys, const float* value_scale, const float* key_scale,
                     float* dn_scale, cudaStream_t stream) {
  const int64_t features = (int64_t)p.head_dim * (p.head_dim + 1) / 2;
  return launch("bound_grad_scale", bound_scale<true>, (unsigned)(p.batch * p.key_heads), kBoundThreads, 0, stream, dstate, dsum_of_keys, features, p.head_dim,
                0x1p13f / p.state_scale, value_scale, key_scale, dn_scale);
}

}  // namespace powertrain

using namespace powertrain;

extern "C" int pt_boundary(const pt_problem* problem, const pt_boundary_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  if (!params || !params->state || !params->sum_of_keys || !params->boundary)
    return fail(PT_INVALID, "pt_boundary: state, sum_of_keys and boundary must not be null");
  const int tiles = phi_tiles(problem->head_dim);
  const int64_t rows = (int64_t)problem->batch * problem->key_heads * tiles * kBlock;
  return launch("pt_boundary", convert, (unsigned)rows, kThreads, 0, (cudaStream_t)stream, *params, problem->head_dim, tiles);
}
