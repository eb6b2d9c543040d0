// Walks a run of a unit's pages, its lists' in order and then its tail's, and groups them into
// tiles.
#pragma once

#include "lease.h"
#include "tile.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

class PageStream {
 public:
  PageStream(const DecodeArgs& args, const PageRun& run)
      : args_(args), unit_(*run.unit), begin_(run.begin), end_(run.end) {
    enter(unit_.tail_block > 0 ? 0 : args.num_formats);
  }

  // Replaces the tile's pages by the next ones; leaves it empty at the end.
  void fill(Tile& tile) {
    tile.num_pages = 0;
    while (page_ >= stop_) {
      if (segment_ == args_.num_formats) return;
      enter(segment_ + 1);
    }
    const Format& format = segment_format();
    const int capacity = format.tokens_per_page;
    // Pages of slots can be cut anywhere, and are where they would be larger than a tile.
    const bool slots = format.slots();
    const int run = slots && capacity > kFullRun ? kFullRun : capacity;
    const int64_t token_bytes = args_.page_bytes / args_.block_size;
    const int64_t page_bytes = slots ? run * token_bytes : format.used_bytes;
    tile.begin(format, segment_, run, page_bytes);
    for (const uint8_t* page = nullptr; page_ < stop_ && !tile.full();) {
      if (page == nullptr && (page = readable(page_at(page_), tile)) == nullptr) return;
      const int64_t rest = tokens_ - page_ * capacity;
      const int count = static_cast<int>(rest < capacity ? rest : capacity) - offset_;
      const int taken = count < run ? count : run;
      tile.push(page + offset_ * token_bytes, slots ? taken * token_bytes : page_bytes, taken);
      offset_ += taken;
      if (taken == count) {
        ++page_;
        offset_ = 0;
        page = nullptr;
      }
    }
  }

 private:
  // Lists are segments 0 .. formats - 1, the tail is the last.
  void enter(int segment) {
    if (segment > 0 && unit_.tail_block > 0) before_ += pages_;
    segment_ = segment;
    const bool tail = segment == args_.num_formats;
    tokens_ = tail ? unit_.length - int64_t{unit_.tail_block} * args_.block_size
                   : unit_.lists[segment].tokens;
    pages_ = tail ? end_ - before_ : segment_format().pages(tokens_);
    page_ = begin_ > before_ ? begin_ - before_ : 0;
    stop_ = end_ - before_ < pages_ ? end_ - before_ : pages_;
  }

  MDKV_INLINE const Format& segment_format() const {
    return segment_ == args_.num_formats ? args_.full : args_.formats[segment_];
  }
  MDKV_INLINE const uint8_t* page_at(int64_t page) const {
    return segment_ == args_.num_formats
               ? tail_page(args_, unit_, unit_.tail_block + page)
               : lease_page(args_, unit_, unit_.lists[segment_].first_page + page);
  }

  // Pages whose end kernels cannot over-read, because the cache ends there, are copied. Null
  // where the tile has no room for another copy.
  MDKV_INLINE const uint8_t* readable(const uint8_t* page, Tile& tile) const {
    if (__builtin_expect(page + args_.page_bytes + kOverread <= args_.kv_cache_end, 1)) return page;
    if (tile.num_copies == TileScratch::copies_needed(args_)) return nullptr;
    uint8_t* copy = tile.copies + tile.num_copies++ * TileScratch::copy_bytes(args_);
    __builtin_memcpy(copy, page, args_.page_bytes);
    __builtin_memset(copy + args_.page_bytes, 0, kOverread);
    return copy;
  }

  const DecodeArgs& args_;
  const Unit& unit_;
  int64_t begin_, end_;
  int segment_ = 0;
  int64_t before_ = 0;  // pages of the segments before
  int64_t pages_ = 0;   // of the segment
  int64_t tokens_ = 0;  // of the segment
  int64_t page_ = 0, stop_ = 0;
  int offset_ = 0;  // tokens already taken of the page
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
