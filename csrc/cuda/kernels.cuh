// The attending kernels by head size; see attend.cu.
#pragma once

#include "runtime.cuh"

namespace mdkv {

template <int D>
Kernel attend_kernel(bool bfloat16);

template <>
Kernel attend_kernel<64>(bool bfloat16);
template <>
Kernel attend_kernel<80>(bool bfloat16);
template <>
Kernel attend_kernel<96>(bool bfloat16);
template <>
Kernel attend_kernel<128>(bool bfloat16);
template <>
Kernel attend_kernel<256>(bool bfloat16);

inline Kernel attend_kernel(int head_size, bool bfloat16) {
  switch (head_size) {
    case 64:
      return attend_kernel<64>(bfloat16);
    case 80:
      return attend_kernel<80>(bfloat16);
    case 96:
      return attend_kernel<96>(bfloat16);
    case 128:
      return attend_kernel<128>(bfloat16);
    default:
      return attend_kernel<256>(bfloat16);
  }
}

}  // namespace mdkv
