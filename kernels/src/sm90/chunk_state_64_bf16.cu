#include "chunk_state.cuh"
PT_SM90_CHUNK_STATE(64, __nv_bfloat16, "bf16")
