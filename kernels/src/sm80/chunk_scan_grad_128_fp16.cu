#include "chunk_scan_grad.cuh"

PT_SM80_CHUNK_SCAN_GRAD(__half, fp16, 128)
