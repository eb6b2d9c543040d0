// Vectors as their codes will be read back; mdkv_vllm/core/quantize.py is the specification.
#pragma once

#include "kernels.h"
#include "quantize.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

template <int kBits>
MDKV_INLINE void read_back_rows(const ReadBack& args) {
  for (int64_t t = 0; t < args.count; ++t) {
    const float* row = args.rows + t * args.stride;
    const float scale = scale_of<kBits>(row, args.rank);
    const Vec step = max(set1(scale), set1(1e-30f));
    Vec squares = set1(0.0f);
    for (int d = 0; d < args.rank; d += kWidth) {
      const Vec x = load_row(row, d, args.rank);
      const Vec read = mul(centred_codes<kBits>(x, step), set1(scale));
      const int left = args.rank - d;
      if (args.read != nullptr) {
        float* out = args.read + t * args.rank + d;
        left < kWidth ? store_first(out, read, left) : store(out, read);
      }
      Vec error = sub(x, read);
      if (left < kWidth) error = blend_first(error, set1(0.0f), left);
      squares = fma(error, error, squares);
    }
    if (args.error != nullptr) args.error[t] = reduce_add(squares);
  }
}

void read_back(const ReadBack& args) {
  if (args.bits == 8) read_back_rows<8>(args);
  if (args.bits == 4) read_back_rows<4>(args);
  if (args.bits == 2) read_back_rows<2>(args);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
