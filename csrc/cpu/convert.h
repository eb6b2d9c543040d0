// Rows from one element type to another.
#pragma once

#include "decode_args.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

template <typename From, typename To>
inline void convert_elements(const void* from, void* to, int64_t count) {
  const From* source = static_cast<const From*>(from);
  To* target = static_cast<To*>(to);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_elements(target + i, load_elements(source + i));
  for (; i < count; ++i) target[i] = from_float<To>(to_float(source[i]));
}

template <typename From>
inline void convert_from(const void* from, Element to_type, void* to, int64_t count) {
  if (to_type == Element::kFloat32) convert_elements<From, float>(from, to, count);
  if (to_type == Element::kBFloat16) convert_elements<From, BFloat16>(from, to, count);
  if (to_type == Element::kFloat16) convert_elements<From, Half>(from, to, count);
}

// Rounds to nearest even.
inline void convert(const void* from, Element from_type, void* to, Element to_type, int64_t count) {
  if (from_type == to_type) {
    __builtin_memcpy(to, from, count * element_bytes(to_type));
  } else if (from_type == Element::kFloat32) {
    convert_from<float>(from, to_type, to, count);
  } else if (from_type == Element::kBFloat16) {
    convert_from<BFloat16>(from, to_type, to, count);
  } else {
    convert_from<Half>(from, to_type, to, count);
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
