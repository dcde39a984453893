// Emulated twin of src/common/launch.cuh.
#pragma once
#include "stages.h"

namespace powertrain {

inline int64_t followed = 0;  // threads of the kernel that have called it
inline void follow_earlier_kernels() { followed++; }

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, int shared_bytes, cudaStream_t, const Arguments&... arguments) {
  followed = 0;
  emulate::launch(grid, threads, shared_bytes, [&] { kernel((Parameters)arguments...); });
  if (followed != (int64_t)grid.x * grid.y * grid.z * threads) emulate::fail("%s: a thread has not called follow_earlier_kernels once", name);
  return PT_OK;
}

}  // namespace powertrain
