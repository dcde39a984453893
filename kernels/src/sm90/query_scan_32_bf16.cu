#include "query_scan.cuh"

namespace powertrain::sm90 {
template int launch_query_scan<__nv_bfloat16>(const pt_problem&, const pt_query_scan_params&, cudaStream_t);

template <Packs kPacks>
static KernelEntry entry(const char* name) {
  using Kernel = QueryScan<__nv_bfloat16, kPacks>;
  return {name, (const void*)query_scan_kernel<__nv_bfloat16, kPacks>, 90, Kernel::kThreads, Kernel::kSharedBytes};
}
static RegisterKernel registered(entry<Packs::kNothing>("query_scan K=32 bf16")), packing_queries(entry<Packs::kQueries>("query_scan packing q K=32 bf16")),
    packing_inputs(entry<Packs::kInputs>("query_scan packing q, k, v K=32 bf16"));
}  // namespace powertrain::sm90
