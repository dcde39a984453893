// Emulated twin of src/common/launch.cuh.
#pragma once
#include "stages.h"

namespace powertrain {

inline void follow_earlier_kernels() {}

template <typename... Parameters, typename... Arguments>
int launch(const char*, void (*kernel)(Parameters...), dim3 grid, unsigned threads, int shared_bytes, cudaStream_t, const Arguments&... arguments) {
  emulate::launch(grid, threads, shared_bytes, [&] { kernel((Parameters)arguments...); });
  return PT_OK;
}

}  // namespace powertrain
