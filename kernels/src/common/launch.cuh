// Kernels that are started before the one before them in the stream has ended: on Hopper they are launched as soon as its last thread block is done, not
// when all that it wrote has arrived (programmatic dependent launch); after a kernel of others as early as that allows. Every kernel calls
// follow_earlier_kernels before it touches memory that others write or read, and is started by launch.
#pragma once
#include "stages.h"

namespace powertrain {

// In every thread, once: earlier kernels have ended and their writes are visible. Since every kernel waits here, that holds for all before it.
__device__ __forceinline__ void follow_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = (size_t)shared_bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = starts_early() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here, and not by who asks next
  return check_cuda(error, name);
}

}  // namespace powertrain
