#include "segment_state.cuh"

namespace powertrain::sm90 {
template int launch_segment_state<__nv_bfloat16>(const pt_problem&, const SegmentScan&, int, int, float*, cudaStream_t);
static RegisterKernel registered({"segment_state K=32 bf16", (const void*)segment_state_kernel<__nv_bfloat16>, 90, SegmentState<__nv_bfloat16>::kThreads,
                                  SegmentState<__nv_bfloat16>::kSharedBytes});
}  // namespace powertrain::sm90
