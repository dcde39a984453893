#include "chunk_scan_grad.cuh"
PT_SM90_CHUNK_SCAN_GRAD(128, __half, "fp16", true)
