#include "chunk_scan.cuh"

PT_SM80_CHUNK_SCAN(__nv_bfloat16, bf16, 32)
