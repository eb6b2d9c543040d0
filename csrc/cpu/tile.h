// A tile: pages of one list that share a softmax step.
#pragma once

#include "decode_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

struct Tile {
  const uint8_t* page[kTilePages];
  int count[kTilePages];  // tokens in each page, at least 1
  int num_pages = 0;
  int64_t stride = 0;  // weights of page i start at i * stride
  int limit = 0;       // pages it may hold

  MDKV_INLINE void reset(int64_t tokens_per_page, int64_t page_bytes) {
    num_pages = 0;
    stride = round_up(tokens_per_page, kLanes);
    int64_t pages = kTileTokens / stride;
    if (pages > kTileBytes / page_bytes) pages = kTileBytes / page_bytes;
    limit = static_cast<int>(pages < 1 ? 1 : pages > kTilePages ? kTilePages : pages);
  }
  MDKV_INLINE void push(const uint8_t* data, int tokens) {
    page[num_pages] = data;
    count[num_pages++] = tokens;
  }
  MDKV_INLINE bool full() const { return num_pages == limit; }
  MDKV_INLINE int64_t padded_tokens() const { return num_pages * stride; }
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
