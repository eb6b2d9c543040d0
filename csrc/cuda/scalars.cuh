// Elements in memory: float32, float16 and bfloat16.
#pragma once

#include "mdkv_cuda.h"
#include "ptx.cuh"

namespace mdkv {

MDKV_DEVICE float float_of_bits(uint32_t bits, int element) {
  return element == MDKV_FLOAT16 ? float_of_float16(bits) : as_float(bits << 16);
}

// Nearest 16-bit element, to even between two.
MDKV_DEVICE uint16_t element_bits(float x, int element) {
  const uint32_t packed =
      element == MDKV_FLOAT16 ? pack_float16x2(x, 0.0f) : pack_bfloat16x2(x, 0.0f);
  return static_cast<uint16_t>(packed);
}

MDKV_DEVICE float load_element(const void* data, int element, int64_t at) {
  if (element == MDKV_FLOAT32) return static_cast<const float*>(data)[at];
  return float_of_bits(static_cast<const uint16_t*>(data)[at], element);
}

MDKV_DEVICE void store_element(void* data, int element, int64_t at, float x) {
  if (element == MDKV_FLOAT32) {
    static_cast<float*>(data)[at] = x;
  } else {
    static_cast<uint16_t*>(data)[at] = element_bits(x, element);
  }
}

}  // namespace mdkv
