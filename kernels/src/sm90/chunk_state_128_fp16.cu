#include "chunk_state.cuh"
PT_SM90_CHUNK_STATE(128, __half, "fp16")
