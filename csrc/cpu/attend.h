// Attends over a run of a unit's pages, tile by tile.
#pragma once

#include "element_pages.h"
#include "lease.h"
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
  Attention(const DecodeArgs& args, const Unit& unit, const Prepared& prepared,
            TileScratch& scratch, Partial& partial)
      : args_(args), unit_(unit), prepared_(prepared), scratch_(scratch), partial_(partial) {}

  // Pages [begin, end) of the unit: its lists' pages in order, then its tail's.
  void run(int64_t begin, int64_t end) {
    for (int f = 0; f < args_.num_formats && unit_.tail_block > 0; ++f) {
      const Format& format = args_.formats[f];
      const List& list = unit_.lists[f];
      const int64_t pages = format.pages(list.tokens);
      attend_pages(format, f, begin < 0 ? 0 : begin, end < pages ? end : pages, list.tokens,
                   [&](int64_t page) { return lease_page(args_, unit_, list.first_page + page); });
      begin -= pages;
      end -= pages;
    }
    const int64_t tail_tokens = unit_.length - int64_t{unit_.tail_block} * args_.block_size;
    attend_pages(args_.full, 0, begin < 0 ? 0 : begin, end, tail_tokens,
                 [&](int64_t page) { return tail_page(args_, unit_, unit_.tail_block + page); });
  }

 private:
  // Pages [begin, end) of a list of `tokens` tokens.
  template <typename PageAt>
  MDKV_INLINE void attend_pages(const Format& format, int index, int64_t begin, int64_t end,
                                int64_t tokens, PageAt page_at) {
    if (begin >= end) return;
    const bool slots = format.rotation == Rotation::kIdentity;
    const int capacity = format.tokens_per_page;
    const int run = slots && capacity > kFullRun ? kFullRun : capacity;
    const int64_t slot_bytes = 2 * args_.head_size * int64_t{sizeof(E)};
    tile_.reset(run, run < capacity ? run * slot_bytes : args_.page_bytes);
    copies_ = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rest = tokens - i * capacity;
      const int count = static_cast<int>(rest < capacity ? rest : capacity);
      if (copies_ == TileScratch::copies_needed(args_)) process(format, index);
      const uint8_t* page = readable(page_at(i));
      for (int t = 0; t < count; t += run) {
        tile_.push(page + t * slot_bytes, count - t < run ? count - t : run);
        if (tile_.full()) process_tile(format, index);
      }
    }
    process(format, index);
  }

  // Pages whose end kernels cannot over-read, because the arena ends there, are copied.
  MDKV_INLINE const uint8_t* readable(const uint8_t* page) {
    if (__builtin_expect(page + args_.page_bytes + kOverread <= args_.arena_end, 1)) return page;
    uint8_t* copy = scratch_.copies + copies_++ * TileScratch::copy_bytes(args_);
    __builtin_memcpy(copy, page, args_.page_bytes);
    __builtin_memset(copy + args_.page_bytes, 0, kOverread);
    return copy;
  }

  void process(const Format& format, int index) {
    if (tile_.num_pages > 0) process_tile(format, index);
    copies_ = 0;
  }

  void process_tile(const Format& format, int index) {
    const int space = static_cast<int>(format.rotation);
    const SpaceQuery& query = prepared_.spaces[space];
    float* out = partial_.out[space];
    const int64_t width = partial_.width[space];
    if (format.codes) {
      const float* zero_dot = prepared_.zero_dot + index * args_.group;
      if (format.bits == 8) attend_codes<8>(format, query, zero_dot, out, width);
      if (format.bits == 4) attend_codes<4>(format, query, zero_dot, out, width);
      if (format.bits == 2) attend_codes<2>(format, query, zero_dot, out, width);
    } else {
      attend_elements(format, query, out, width);
    }
    tile_.num_pages = 0;
  }

  void attend_elements(const Format& format, const SpaceQuery& query, float* out, int64_t width) {
    const bool slots = format.rotation == Rotation::kIdentity;
    if (slots) {
      score_full<E>(args_, tile_, query, scratch_);
    } else {
      score_rows<Elements<E>>(args_, format, tile_, query, nullptr, scratch_);
    }
    weigh();
    const int64_t row = format.rank * int64_t{sizeof(E)};
    add_values<Elements<E>>(tile_, slots ? row : format.section_bytes, slots ? 2 * row : row,
                            format.rank, args_.group, false, scratch_, out, width);
  }

  template <int kBits>
  void attend_codes(const Format& format, const SpaceQuery& query, const float* zero_dot,
                    float* out, int64_t width) {
    const int64_t scales = 2 * format.section_bytes + 2 * int64_t{format.tokens_per_page};
#ifdef MDKV_VNNI
    score_codes<kBits>(args_, format, tile_, query, zero_dot, scratch_);
    weigh();
    apply_value_scales(tile_, scales, args_.group, scratch_);
    add_code_values<kBits>(args_, format, tile_, scratch_, out, width);
#else
    score_rows<Codes<kBits>>(args_, format, tile_, query, zero_dot, scratch_);
    weigh();
    apply_value_scales(tile_, scales, args_.group, scratch_);
    sum_weights(tile_, format.zero(), args_.group, scratch_);
    add_values<Codes<kBits>>(tile_, format.section_bytes, int64_t{format.rank} * kBits / 8,
                             format.rank, args_.group, true, scratch_, out, width);
#endif
  }

  void weigh() {
    mask_scores(tile_, args_.group, scratch_);
    softmax_step(tile_, args_.group, scratch_, partial_);
  }

  const DecodeArgs& args_;
  const Unit& unit_;
  const Prepared& prepared_;
  TileScratch& scratch_;
  Partial& partial_;
  Tile tile_;
  int64_t copies_ = 0;
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
