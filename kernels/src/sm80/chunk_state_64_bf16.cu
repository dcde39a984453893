#include "chunk_state.cuh"

PT_SM80_CHUNK_STATE(__nv_bfloat16, bf16, 64)
