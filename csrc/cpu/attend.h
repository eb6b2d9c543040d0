// Attends over a run of a unit's pages, tile by tile.
#pragma once

#include "element_pages.h"
#include "page_stream.h"
#include "softmax.h"
#ifdef MDKV_VNNI
#include "code_pages_vnni.h"
#endif

namespace mdkv {
namespace MDKV_ISA {
namespace {

template <typename E>
class Attention {
 public:
  Attention(const DecodeArgs& args, const Prepared& prepared, TileScratch& scratch,
            Partial& partial)
      : args_(args), prepared_(prepared), scratch_(scratch), partial_(partial) {}

  void run(const PageRun& pages, const PageRun& next) {
    PageStream stream(args_, pages);
    Tile tiles[2];
    tiles[0].copies = scratch_.copies;
    tiles[1].copies =
        scratch_.copies + TileScratch::copies_needed(args_) * TileScratch::copy_bytes(args_);
    stream.fill(tiles[0]);
    for (int current = 0; tiles[current].num_pages > 0; current ^= 1) {
      Tile& ahead = tiles[current ^ 1];
      stream.fill(ahead);
      const bool last = ahead.num_pages == 0;
      if (last && next.unit != nullptr) PageStream(args_, next).fill(ahead);
      Prefetcher prefetcher(ahead.page, ahead.bytes, ahead.num_pages);
      process(tiles[current], prefetcher);
      prefetcher.rest();
      if (last) return;
    }
  }

 private:
  void process(const Tile& tile, Prefetcher& prefetcher) {
    const Format& format = *tile.format;
    const int space = format.rotation;
    const SpaceQuery& query = prepared_.spaces[space];
    float* out = partial_.out[space];
    const int64_t width = partial_.width[space];
    if (format.codes()) {
      const float* zero_dot = prepared_.zero_dot + tile.index * args_.group;
      if (format.bits == 8) attend_codes<8>(tile, query, zero_dot, out, width, prefetcher);
      if (format.bits == 4) attend_codes<4>(tile, query, zero_dot, out, width, prefetcher);
      if (format.bits == 2) attend_codes<2>(tile, query, zero_dot, out, width, prefetcher);
    } else {
      attend_elements(tile, query, out, width, prefetcher);
    }
  }

  void attend_elements(const Tile& tile, const SpaceQuery& query, float* out, int64_t width,
                       Prefetcher& prefetcher) {
    const Format& format = *tile.format;
    if (format.slots()) {
      score_full<E>(args_, tile, query, scratch_, prefetcher);
    } else {
      score_rows<Elements<E>>(args_, tile, query, nullptr, scratch_, prefetcher);
    }
    softmax(tile, -1);
    const int64_t row = format.value_row_bytes();
    add_values<Elements<E>>(tile, format.values_offset, format.slots() ? 2 * row : row, format.rank,
                            args_.group, false, scratch_, out, width, prefetcher);
  }

  template <int kBits>
  void attend_codes(const Tile& tile, const SpaceQuery& query, const float* zero_dot, float* out,
                    int64_t width, Prefetcher& prefetcher) {
    const Format& format = *tile.format;
    const int64_t scales = format.scales_offset + 2 * int64_t{format.tokens_per_page};
#ifdef MDKV_VNNI
    score_codes<kBits>(args_, tile, query, zero_dot, scratch_, prefetcher);
    softmax(tile, scales);
    add_code_values<kBits>(args_, tile, scratch_, out, width, prefetcher);
#else
    score_rows<Codes<kBits>>(args_, tile, query, zero_dot, scratch_, prefetcher);
    softmax(tile, scales);
    sum_weights(tile, format.zero(), args_.group, scratch_);
    add_values<Codes<kBits>>(tile, format.values_offset, format.value_row_bytes(), format.rank,
                             args_.group, true, scratch_, out, width, prefetcher);
#endif
  }

  void softmax(const Tile& tile, int64_t scales_offset) {
    mask_scores(tile, args_.group, scratch_);
    raise_maximum(tile, args_.group, scratch_, partial_);
    weigh(tile, scales_offset, args_.group, scratch_, partial_);
  }

  const DecodeArgs& args_;
  const Prepared& prepared_;
  TileScratch& scratch_;
  Partial& partial_;
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
