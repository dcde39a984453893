#include "chunk_state.cuh"

PT_SM80_CHUNK_STATE(__half, fp16, 128)
