// Checks and access that the operators of compression share.
#pragma once

#include <ATen/core/Tensor.h>

namespace mdkv {

inline void check_float_rows(const at::Tensor& rows, const char* name) {
  TORCH_CHECK(rows.scalar_type() == at::kFloat && rows.dim() == 3 &&
                  (rows.stride(2) == 1 || rows.size(2) <= 1),
              name, ": expected float32 [heads, tokens, rank], innermost contiguous, got ",
              rows.scalar_type(), " ", rows.sizes());
}

inline const float* float_row(const at::Tensor& rows, int64_t head, int64_t token) {
  return rows.const_data_ptr<float>() + head * rows.stride(0) + token * rows.stride(1);
}

}  // namespace mdkv
