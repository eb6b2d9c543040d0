// Kernels for x86 with AVX-512 VNNI and VBMI (Ice Lake, Zen 4 and later).
#define MDKV_ISA avx512
#define MDKV_VNNI

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "vec_avx512.h"

// After the vectors.
#include "kernels_impl.h"

namespace mdkv {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = {
      "avx512",        avx512::prepare,   avx512::attend,    avx512::finish,   avx512::read_pages,
      avx512::convert, avx512::pack_list, avx512::read_back, avx512::row_sums, avx512::token_sums};
  return &kernels;
}

}  // namespace mdkv
#else
#include "kernels.h"

namespace mdkv {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace mdkv
#endif
