#include "segment_state.cuh"

namespace powertrain::sm90 {
template int launch_segment_state<__nv_bfloat16>(const pt_problem&, const SegmentScan&, int, int, float*, cudaStream_t);

template <Packs kPacks>
static KernelEntry entry(const char* name) {
  using Kernel = SegmentState<__nv_bfloat16, kPacks>;
  return {name, (const void*)segment_state_kernel<__nv_bfloat16, kPacks>, 90, Kernel::kThreads, Kernel::kSharedBytes};
}
static RegisterKernel registered(entry<Packs::kNothing>("segment_state K=32 bf16")),
    packing_keys(entry<Packs::kKeys>("segment_state packing k, v K=32 bf16")), packing_gradients(entry<Packs::kGradients>("segment_state packing dn' K=32 bf16"));
}  // namespace powertrain::sm90
