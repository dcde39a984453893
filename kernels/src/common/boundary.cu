// pt_boundary: the public states (exact, upper triangular, weight sqrt(2) off the diagonal) to and from boundary states (tiles, no weights).
//
// With keys packed as ks k and values as vs v, a boundary state is ks^2 vs times the public one without its weight (its normaliser: ks^2
// times). The gradient with respect to a boundary state maps by the transpose: the same factors, the other way round, and the weight sqrt(2)
// because the readers of a boundary state count every pair of features twice.
#include "stages.h"

namespace powertrain {
namespace {

constexpr int kThreads = 128;
constexpr float kSqrt2 = 1.4142135623730951f;

// Row of the exact upper-triangular order for features a <= b.
__device__ __forceinline__ int64_t public_row(int a, int b, int head_dim) { return (int64_t)a * head_dim - (int64_t)a * (a - 1) / 2 + b - a; }

__device__ __forceinline__ void features_of_row(int tile, int row, int head_dim, int& i, int& j) {
  const TilePair pair = tile_pair(tile, head_dim);
  i = pair.i_block * 8 + row / 8, j = pair.j_block * 8 + row % 8;
}

// One thread block per row of a tile.
__global__ void __launch_bounds__(kThreads) convert(pt_boundary_params a, int head_dim, int tiles) {
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
  const float norm = ks * ks, value = norm * vs;
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

}  // namespace
}  // namespace powertrain

using namespace powertrain;

extern "C" int pt_boundary(const pt_problem* problem, const pt_boundary_params* params, void* stream) {
  if (int status = validate(problem)) return status;
  if (!params || !params->state || !params->sum_of_keys || !params->boundary)
    return fail(PT_INVALID, "pt_boundary: state, sum_of_keys and boundary must not be null");
  const int tiles = phi_tiles(problem->head_dim);
  const int64_t rows = (int64_t)problem->batch * problem->key_heads * tiles * kBlock;
  convert<<<(unsigned)rows, kThreads, 0, (cudaStream_t)stream>>>(*params, problem->head_dim, tiles);
  return check_cuda(cudaGetLastError(), "pt_boundary");
}
