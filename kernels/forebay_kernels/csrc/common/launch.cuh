// How a kernel is started, with one spelling for nvcc and for the host shim.
#pragma once
#include "params.h"

#ifdef FOREBAY_HOST
#include "host/shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace forebay {

#ifdef FOREBAY_HOST

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           Arguments... arguments) {
  return host::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

#define FOREBAY_DYNAMIC_SHARED(name) unsigned char* name = ::forebay::host::dynamic_shared()

#else

inline int status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return FOREBAY_OK;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return FOREBAY_UNSUPPORTED;
    default:
      return FOREBAY_CUDA_ERROR + static_cast<int>(error);
  }
}

// Kernels that need more than 48 KiB of shared memory get their limit raised.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return status_of(error);
    }
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return status_of(cudaGetLastError());
}

#define FOREBAY_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#endif

}  // namespace forebay
