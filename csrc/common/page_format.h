// One page format: how the tokens of one KV head lie in a page. Kernels are told all of it by
// PageFormat.descriptor() of mdkv_vllm/core/formats.py, which documents the bytes, and derive
// nothing of it again.
#pragma once

#include <stdint.h>

enum mdkv_kind {
  MDKV_SLOTS = 0,     // K and V token by token, as vLLM's own cache has them
  MDKV_ELEMENTS = 1,  // of the cache's type: K by dimension, V by token
  MDKV_CODES = 2      // integers with a scale per token: K by dimension, V by token, scales
};

// The space in which tokens are held.
enum mdkv_rotation { MDKV_IDENTITY = 0, MDKV_BASIS = 1, MDKV_HADAMARD = 2 };

// Offsets are in bytes from the start of a page; of slots, from the start of a token's.
typedef struct {
  int32_t kind;      // mdkv_kind
  int32_t rotation;  // mdkv_rotation
  int32_t rank;
  int32_t bits;  // of an element or a code
  int32_t tokens_per_page;
  int32_t values_offset;
  int32_t scales_offset;  // of K; those of V follow
  int32_t used_bytes;     // of a page
  int32_t zero_halves;    // twice the code that stands for zero
} mdkv_page_format;

#define MDKV_PAGE_FORMAT_FIELDS 9

// Whether the offsets are those of the rank, the bits and the tokens; for checks before kernels
// run.
static inline int mdkv_offsets_fit(const mdkv_page_format* format) {
  const int32_t section = format->rank * format->tokens_per_page * format->bits / 8;
  const int32_t first_value =
      format->kind == MDKV_SLOTS ? format->rank * format->bits / 8 : section;
  const int32_t scales = format->kind == MDKV_CODES ? 4 * format->tokens_per_page : 0;
  return format->values_offset == first_value && format->scales_offset == 2 * section &&
         format->used_bytes >= 2 * section + scales;
}
