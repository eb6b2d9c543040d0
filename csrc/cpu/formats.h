// Page formats as operators are given them: rows of int32, see csrc/common/page_format.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "decode_args.h"

namespace mdkv {

// Checks that a tensor holds descriptors, and says how many.
inline int64_t count_formats(const at::Tensor& formats) {
  TORCH_CHECK(formats.scalar_type() == at::kInt && formats.dim() == 2 &&
                  formats.size(1) == MDKV_PAGE_FORMAT_FIELDS && formats.is_contiguous(),
              "formats: expected contiguous int32 [formats, ", MDKV_PAGE_FORMAT_FIELDS, "], got ",
              formats.scalar_type(), " ", formats.sizes());
  return formats.size(0);
}

// One of them, checked against the cache's element type and page size.
inline Format read_format(const at::Tensor& formats, int64_t index, Element element,
                          int64_t page_bytes) {
  static_assert(sizeof(mdkv_page_format) == 4 * MDKV_PAGE_FORMAT_FIELDS);
  Format format;
  std::memcpy(static_cast<mdkv_page_format*>(&format),
              formats.const_data_ptr<int32_t>() + MDKV_PAGE_FORMAT_FIELDS * index,
              sizeof(mdkv_page_format));
  TORCH_CHECK(format.kind >= MDKV_SLOTS && format.kind <= MDKV_CODES, "formats: kind ", format.kind,
              " of format ", index);
  TORCH_CHECK(format.rotation >= MDKV_IDENTITY && format.rotation <= MDKV_HADAMARD,
              "formats: rotation ", format.rotation, " of format ", index);
  TORCH_CHECK(format.slots() == (format.rotation == MDKV_IDENTITY), "formats: rotation ",
              format.rotation, " of format ", index, ", whose kind is ", format.kind);
  TORCH_CHECK(format.codes() ? format.bits == 8 || format.bits == 4 || format.bits == 2
                             : format.bits == 8 * element_bytes(element),
              "formats: ", format.bits, " bits of format ", index, " in a cache of ",
              8 * element_bytes(element));
  TORCH_CHECK(format.rank > 0 && format.rank % 4 == 0, "formats: rank ", format.rank, " of format ",
              index);
  TORCH_CHECK(format.tokens_per_page > 0 && format.tokens_per_page * format.bits % 8 == 0,
              "formats: tokens_per_page ", format.tokens_per_page, " of format ", index);
  TORCH_CHECK(format.used_bytes <= page_bytes, "formats: format ", index, " needs ",
              format.used_bytes, " bytes of a page of ", page_bytes);
  TORCH_CHECK(mdkv_offsets_fit(&format), "formats: the offsets of format ", index,
              " are not of its rank and bits");
  return format;
}

}  // namespace mdkv
