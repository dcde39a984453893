#include "chunk_scan_grad.cuh"
PT_SM90_CHUNK_SCAN_GRAD(32, __nv_bfloat16, "bf16", false)
