// What is compiled for Hopper, and the way from a problem to its instantiation.
#include "../common/segments.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace powertrain::sm90 {

template <int kHeadDim, typename T>
int64_t chunk_state_workspace_of(const pt_problem& problem);
template <int kHeadDim, typename T>
int launch_chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream);
template <int kHeadDim, typename T, bool kReverse>
int launch_chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream);
template <int kHeadDim, typename T, bool kReverse>
int launch_chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream);

// Calls function<head_dim, dtype, ...>(...); `supports` lets only compiled configurations through.
#define PT_CASE(k, type, tag, function, arguments, ...) \
  if (problem.head_dim == k && problem.dtype == tag) return function<k, type __VA_OPT__(, ) __VA_ARGS__> arguments;
#define PT_DISPATCH(function, arguments, ...)                                                \
  PT_CASE(32, __nv_bfloat16, PT_BF16, function, arguments __VA_OPT__(, ) __VA_ARGS__)        \
  PT_CASE(64, __nv_bfloat16, PT_BF16, function, arguments __VA_OPT__(, ) __VA_ARGS__)        \
  PT_CASE(128, __nv_bfloat16, PT_BF16, function, arguments __VA_OPT__(, ) __VA_ARGS__)       \
  PT_CASE(32, __half, PT_FP16, function, arguments __VA_OPT__(, ) __VA_ARGS__)               \
  PT_CASE(64, __half, PT_FP16, function, arguments __VA_OPT__(, ) __VA_ARGS__)               \
  PT_CASE(128, __half, PT_FP16, function, arguments __VA_OPT__(, ) __VA_ARGS__)

bool supports(const pt_problem& problem, int stage) {
  return (problem.head_dim == 32 || problem.head_dim == 64 || problem.head_dim == 128) && (problem.dtype == PT_BF16 || problem.dtype == PT_FP16) &&
         stage >= PT_STAGE_CHUNK_STATE && stage <= PT_STAGE_CHUNK_SCAN_GRAD;
}

template <typename T>
int launch_query_scan(const pt_problem& problem, const pt_query_scan_params& params, cudaStream_t stream);
template <typename T>
int launch_key_grads(const pt_problem& problem, const pt_key_grads_params& params, cudaStream_t stream);

int64_t steps_workspace(const pt_problem& problem) {
  // Between the steps within a chunk the gates' gradient collects rounding: four are what was measured (docs/kernels.md, section 3).
  constexpr int kStep = kStepBlocks * kBlock, kMostSteps = 4;
  const bool steps = problem.chunk_size % kStep == 0 && problem.chunk_size <= kMostSteps * kStep;
  if (problem.head_dim != 32 || problem.dtype != PT_BF16 || problem.state_scale != 1.f || !steps || problem.chunk_size >= problem.seq_len) return 0;
  return choose_entered_segments(problem) * boundary_elements(problem) * 4;
}

bool has_segments(const pt_problem& problem, bool has_final_state) { return has_final_state || choose_entered_segments(problem) > 1; }

int query_scan(const pt_problem& problem, const pt_query_scan_params& params, cudaStream_t stream) {
  return launch_query_scan<__nv_bfloat16>(problem, params, stream);
}

int key_grads(const pt_problem& problem, const pt_key_grads_params& params, cudaStream_t stream) {
  return launch_key_grads<__nv_bfloat16>(problem, params, stream);
}

int64_t chunk_state_workspace(const pt_problem& problem) {
  PT_DISPATCH(chunk_state_workspace_of, (problem));
  return 0;
}

static int not_compiled(const pt_problem& problem, const char* stage) {
  return fail(PT_UNSUPPORTED, "%s: head_dim %d, dtype %d is not compiled for sm90", stage, problem.head_dim, problem.dtype);
}

int chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream) {
  PT_DISPATCH(launch_chunk_state, (problem, params, stream));
  return not_compiled(problem, "chunk_state");
}

int chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream) {
  if (params.reverse) {
    PT_DISPATCH(launch_chunk_scan, (problem, params, stream), true);
  } else {
    PT_DISPATCH(launch_chunk_scan, (problem, params, stream), false);
  }
  return not_compiled(problem, "chunk_scan");
}

int chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream) {
  if (params.reverse) {
    PT_DISPATCH(launch_chunk_scan_grad, (problem, params, stream), true);
  } else {
    PT_DISPATCH(launch_chunk_scan_grad, (problem, params, stream), false);
  }
  return not_compiled(problem, "chunk_scan_grad");
}

}  // namespace powertrain::sm90
