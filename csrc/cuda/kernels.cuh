// The attending kernels by head size; see attend.cu.
#pragma once

#include "runtime.cuh"

namespace mdkv {

template <int D>
Kernel attend_kernel();

template <>
Kernel attend_kernel<64>();
template <>
Kernel attend_kernel<80>();
template <>
Kernel attend_kernel<96>();
template <>
Kernel attend_kernel<128>();
template <>
Kernel attend_kernel<256>();

inline Kernel attend_kernel(int head_size) {
  switch (head_size) {
    case 64:
      return attend_kernel<64>();
    case 80:
      return attend_kernel<80>();
    case 96:
      return attend_kernel<96>();
    case 128:
      return attend_kernel<128>();
    default:
      return attend_kernel<256>();
  }
}

}  // namespace mdkv
