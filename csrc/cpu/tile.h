// A tile: pages of one list that share a softmax step.
#pragma once

#include "decode_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

struct Tile {
  const Format* format;
  int index;  // of the format
  const uint8_t* page[kTilePages];
  int64_t bytes[kTilePages];  // used in each page
  int count[kTilePages];      // tokens in each page, at least 1
  int num_pages;
  int limit;       // pages it may hold
  int64_t stride;  // weights of page i start at i * stride
  uint8_t* copies;
  int num_copies;

  MDKV_INLINE void begin(const Format& of, int of_index, int64_t tokens_per_page,
                         int64_t page_bytes) {
    format = &of;
    index = of_index;
    num_pages = num_copies = 0;
    stride = round_up(tokens_per_page, kLanes);
    int64_t pages = kTileTokens / stride;
    if (pages > kTileBytes / page_bytes) pages = kTileBytes / page_bytes;
    limit = static_cast<int>(pages < 1 ? 1 : pages > kTilePages ? kTilePages : pages);
  }
  MDKV_INLINE void push(const uint8_t* data, int64_t used_bytes, int tokens) {
    page[num_pages] = data;
    bytes[num_pages] = used_bytes;
    count[num_pages++] = tokens;
  }
  MDKV_INLINE bool full() const { return num_pages == limit; }
  MDKV_INLINE int64_t padded_tokens() const { return num_pages * stride; }
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
