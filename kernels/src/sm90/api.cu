// What is compiled for Hopper, and the way from a problem to its instantiation.
#include "../common/stages.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace powertrain::sm90 {

template <int kHeadDim, typename T>
int64_t chunk_state_workspace_of(const pt_problem& problem);
template <int kHeadDim, typename T>
int launch_chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream);
template <int kHeadDim, typename T>
int launch_chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream);
template <int kHeadDim, typename T>
int launch_chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream);

// Calls function<head_dim, dtype>(...); `supports` has let only compiled configurations through.
#define PT_DISPATCH(function, problem, ...)                                                  \
  if (problem.dtype == PT_BF16 && problem.head_dim == 64) return function<64, __nv_bfloat16>(__VA_ARGS__)

bool supports(const pt_problem& problem, int stage) {
  return problem.dtype == PT_BF16 && problem.head_dim == 64 && stage <= PT_STAGE_CHUNK_STATE;
}

int64_t chunk_state_workspace(const pt_problem& problem) {
  PT_DISPATCH(chunk_state_workspace_of, problem, problem);
  return 0;
}
int chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream) {
  PT_DISPATCH(launch_chunk_state, problem, problem, params, stream);
  return fail(PT_UNSUPPORTED, "chunk_state: head_dim %d, dtype %d", problem.head_dim, problem.dtype);
}
int chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream) {
  return fail(PT_UNSUPPORTED, "chunk_scan: head_dim %d, dtype %d", problem.head_dim, problem.dtype);
}
int chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream) {
  return fail(PT_UNSUPPORTED, "chunk_scan_grad: head_dim %d, dtype %d", problem.head_dim, problem.dtype);
}

}  // namespace powertrain::sm90
