#include "chunk_scan.cuh"
PT_SM90_CHUNK_SCAN(128, __half, "fp16", false)
