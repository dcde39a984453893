#include "query_scan.cuh"

namespace powertrain::sm90 {
template int launch_query_scan<__nv_bfloat16>(const pt_problem&, const pt_query_scan_params&, cudaStream_t);
static RegisterKernel registered({"query_scan K=32 bf16", (const void*)query_scan_kernel<__nv_bfloat16>, 90, QueryScan<__nv_bfloat16>::kThreads,
                                  QueryScan<__nv_bfloat16>::kSharedBytes});
}  // namespace powertrain::sm90
