#include "chunk_state.cuh"
PT_SM90_CHUNK_STATE(64, __half, "fp16")
