// What operators over leases are told of the cache, of page formats and of bases, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include "decode_args.h"

namespace mdkv {

// kv_cache: [blocks, layers * kv_heads, block_size, 2 * head_size].
void set_cache(const at::Tensor& kv_cache, int64_t layer, int64_t num_kv_heads, DecodeArgs& args);

// After the cache. formats: rows of int32, see csrc/common/page_format.h; the last is the tail's.
void set_formats(const at::Tensor& formats, DecodeArgs& args);

// After the formats. basis_k, basis_v: float32 [kv_heads, rank, head_size], read where a format
// uses a basis and prompt_rank is 0. hadamard: float32 [head_size, head_size].
void set_basis(const at::Tensor& basis_k, const at::Tensor& basis_v, const at::Tensor& hadamard,
               int64_t first_page, int64_t pages_per_head, int64_t prompt_rank, DecodeArgs& args);

}  // namespace mdkv
