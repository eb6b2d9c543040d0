// Kernels for x86 with AVX2, FMA and F16C.
#define MDKV_ISA avx2

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"

// After the vectors.
#include "kernels_impl.h"

namespace mdkv {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = {
      "avx2",        avx2::prepare,   avx2::attend,    avx2::finish,   avx2::read_pages,
      avx2::convert, avx2::pack_list, avx2::read_back, avx2::row_sums, avx2::token_sums};
  return &kernels;
}

}  // namespace mdkv
#else
#include "kernels.h"

namespace mdkv {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace mdkv
#endif
