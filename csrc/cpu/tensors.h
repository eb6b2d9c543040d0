// Checks that several operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include "decode_args.h"

namespace mdkv {

inline Element element_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", type);
  }
}

inline Element element_of(const at::Tensor& tensor, const char* name) {
  return element_of(tensor.scalar_type(), name);
}

}  // namespace mdkv
