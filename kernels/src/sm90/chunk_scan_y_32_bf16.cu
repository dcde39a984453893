#include "chunk_scan.cuh"
PT_SM90_CHUNK_SCAN(32, __nv_bfloat16, "bf16", false)
