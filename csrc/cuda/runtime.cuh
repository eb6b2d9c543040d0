// What the host asks of the CUDA runtime. Functions return nullptr, or why not.
#pragma once

#include "args.cuh"

namespace mdkv {

using Kernel = void (*)(DecodeArgs);

#ifndef MDKV_ON_HOST
inline const char* reason(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* launch(Kernel kernel, int blocks, int threads, int shared_bytes, void* stream,
                          DecodeArgs args) {
  void* arguments[] = {&args};
  return reason(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads),
                                 arguments, shared_bytes, static_cast<cudaStream_t>(stream)));
}

// Bytes of shared memory that a block may have on the current device.
inline const char* shared_limit(int& bytes) {
  int device = 0;
  if (const char* why = reason(cudaGetDevice(&device))) return why;
  return reason(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Lets launches of a kernel have so much shared memory. It holds for all of them, whatever their
// shape, so it is the most that the device gives.
inline const char* allow_shared(Kernel kernel, int bytes) {
  return reason(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Blocks of one warp with so much shared memory that are resident at once.
inline const char* resident_warps(Kernel kernel, int shared_bytes, int& warps) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, multiprocessors = 0, blocks = 0;
  if (const char* why = reason(cudaGetDevice(&device))) return why;
  if (const char* why = reason(
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))) {
    return why;
  }
  if (const char* why = reason(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, 32, shared_bytes))) {
    return why;
  }
  warps = blocks * multiprocessors;
  return nullptr;
}
#endif

}  // namespace mdkv
