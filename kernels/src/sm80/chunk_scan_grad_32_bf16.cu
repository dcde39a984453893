#include "chunk_scan_grad.cuh"

PT_SM80_CHUNK_SCAN_GRAD(__nv_bfloat16, bf16, 32)
