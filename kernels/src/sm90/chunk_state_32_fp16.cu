#include "chunk_state.cuh"
PT_SM90_CHUNK_STATE(32, __half, "fp16")
