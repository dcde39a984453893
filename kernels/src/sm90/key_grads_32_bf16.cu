#include "key_grads.cuh"

namespace powertrain::sm90 {
template int launch_key_grads<__nv_bfloat16>(const pt_problem&, const pt_key_grads_params&, cudaStream_t);
static RegisterKernel registered({"key_grads K=32 bf16", (const void*)key_grads_kernel<__nv_bfloat16>, 90, KeyGrads<__nv_bfloat16>::kThreads,
                                  KeyGrads<__nv_bfloat16>::kSharedBytes});
}  // namespace powertrain::sm90
