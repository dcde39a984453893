#include "chunk_scan.cuh"

PT_SM80_CHUNK_SCAN(__half, fp16, 32)
