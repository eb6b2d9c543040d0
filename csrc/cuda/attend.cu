// The attending kernels of one head size, MDKV_HEAD_SIZE; every head size is compiled on its own.
#include "attend.cuh"
#include "kernels.cuh"

namespace mdkv {

template <>
Kernel attend_kernel<MDKV_HEAD_SIZE>() {
  return attend_share<MDKV_HEAD_SIZE>;
}

}  // namespace mdkv
