// Kernels for any processor.
#define MDKV_ISA portable

#include "vec_portable.h"

// After the vectors.
#include "kernels_impl.h"

namespace mdkv {

const Kernels* portable_kernels() {
  static constexpr Kernels kernels = {"portable",          portable::prepare,    portable::attend,
                                      portable::finish,    portable::read_pages, portable::convert,
                                      portable::pack_list, portable::read_back,  portable::row_sums,
                                      portable::token_sums};
  return &kernels;
}

}  // namespace mdkv
