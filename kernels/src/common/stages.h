// What an architecture offers, and the helpers that every stage reports with. The public functions (dispatch.cu) validate and call these.
#pragma once
#include <cuda_runtime.h>

#include <initializer_list>

#include "layout.cuh"
#include "powertrain_kernels.h"

namespace powertrain {

int fail(pt_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));  // records pt_last_error, returns status
int check_cuda(cudaError_t error, const char* what);                                        // PT_OK or PT_CUDA_ERROR with its message
int validate(const pt_problem* problem);                                                    // PT_OK or what is wrong with it
int multiprocessors();                                                                      // of the current device; cached
bool starts_early();                                                                        // whether kernels may (launch.cuh)

// Lets one kernel use `bytes` of dynamic shared memory; once per device, then free.
int allow_shared_memory(const void* kernel, int bytes);

inline bool vectorizable(const pt_tensor& x) {  // rows of 16-byte loads
  return ((uintptr_t)x.data % 16 == 0) && x.stride_b % 8 == 0 && x.stride_t % 8 == 0 && x.stride_h % 8 == 0;
}
// Whether pt_query_scan, or in reverse pt_key_grads, where it takes the problem, packs these tensors itself.
bool packs_on_the_way(const pt_problem& problem, bool reverse, bool has_final_state, std::initializer_list<pt_tensor> tensors);

// fp16 with a state from outside: lowers key_scale (B, Hk) until the initial state fits in packed units, dn_scale (B, Hk) until the gradient of the
// final one does (boundary.cu).
int bound_key_scale(const pt_problem& problem, const float* state, const float* sum_of_keys, const float* value_scale, float* key_scale,
                    cudaStream_t stream);
int bound_grad_scale(const pt_problem& problem, const float* dstate, const float* dsum_of_keys, const float* value_scale, const float* key_scale,
                     float* dn_scale, cudaStream_t stream);

// Every kernel registers itself (a static object beside its instantiation), for pt_kernel_info.
struct KernelEntry {
  const char* name;
  const void* function;
  int arch, threads, dynamic_shared_bytes;
};
struct RegisterKernel {
  explicit RegisterKernel(const KernelEntry& entry);
};

#define PT_DECLARE_ARCH(arch_name)                                                                       \
  namespace arch_name {                                                                                  \
  bool supports(const pt_problem& problem, int stage);                                                   \
  int64_t chunk_state_workspace(const pt_problem& problem);                                              \
  int chunk_state(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream); \
  int chunk_scan(const pt_problem& problem, const pt_chunk_scan_params& params, cudaStream_t stream);   \
  int chunk_scan_grad(const pt_problem& problem, const pt_chunk_scan_grad_params& params, cudaStream_t stream); \
  }
// What only Hopper has.
namespace sm90 {
int64_t steps_workspace(const pt_problem& problem);  // 0 where pt_query_scan and pt_key_grads do not take the problem
bool has_segments(const pt_problem& problem, bool has_final_state);  // whether they first find what enters time segments, or leaves the last one
int query_scan(const pt_problem& problem, const pt_query_scan_params& params, cudaStream_t stream);
int key_grads(const pt_problem& problem, const pt_key_grads_params& params, cudaStream_t stream);
}  // namespace sm90
PT_DECLARE_ARCH(sm80)
PT_DECLARE_ARCH(sm90)
#undef PT_DECLARE_ARCH

}  // namespace powertrain
