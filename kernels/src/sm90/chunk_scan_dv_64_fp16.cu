#include "chunk_scan.cuh"
PT_SM90_CHUNK_SCAN(64, __half, "fp16", true)
