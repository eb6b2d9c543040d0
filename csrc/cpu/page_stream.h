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
    if (unit_.num_leases > 0) {
      enter_list();
    } else {
      enter_tail();
    }
  }

  // Replaces the tile's pages by the next ones; leaves it empty at the end. Its pages are of one
  // format, in any leases.
  void fill(Tile& tile) {
    tile.num_pages = 0;
    while (page_ >= stop_) {
      if (!next()) return;
    }
    const int index = format_;
    const Format& format = current_format();
    const int capacity = format.tokens_per_page;
    // Pages of slots can be cut anywhere, and are where they would be larger than a tile.
    const bool slots = format.slots();
    const int run = slots && capacity > kFullRun ? kFullRun : capacity;
    const int64_t token_bytes = args_.page_bytes / args_.block_size;
    const int64_t page_bytes = slots ? run * token_bytes : format.used_bytes;
    tile.begin(format, index, run, page_bytes);
    do {
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
    } while (!tile.full() && lease_ + 1 < unit_.num_leases && next());
  }

 private:
  // Goes to the next list, or from the last to the tail; false behind that.
  bool next() {
    if (format_ == args_.num_formats) return false;
    before_ += pages_;
    if (++lease_ == unit_.num_leases) {
      lease_ = 0;
      ++format_;
    }
    if (format_ < args_.num_formats) {
      enter_list();
    } else {
      enter_tail();
    }
    return true;
  }

  void enter_list() {
    const List& list = unit_.lists[format_ * unit_.num_leases + lease_];
    tokens_ = list.tokens;
    first_page_ = list.first_page;
    first_block_ = unit_.leases[2 * lease_];
    pages_ = current_format().pages(tokens_);
    set_stop();
  }

  void enter_tail() {
    format_ = args_.num_formats;
    lease_ = unit_.num_leases;
    tokens_ = unit_.length - int64_t{unit_.tail_block} * args_.block_size;
    first_block_ = unit_.tail_block;
    pages_ = end_ - before_;
    set_stop();
  }

  void set_stop() {
    page_ = begin_ > before_ ? begin_ - before_ : 0;
    stop_ = end_ - before_ < pages_ ? end_ - before_ : pages_;
  }

  MDKV_INLINE const Format& current_format() const {
    return format_ == args_.num_formats ? args_.full : args_.formats[format_];
  }
  MDKV_INLINE const uint8_t* page_at(int64_t page) const {
    return format_ == args_.num_formats
               ? tail_page(args_, unit_, first_block_ + page)
               : lease_page(args_, unit_.row, first_block_, first_page_ + page);
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
  // The list that pages are taken of; the tail is the last format.
  int format_ = 0, lease_ = 0;
  int64_t before_ = 0;  // pages before it
  int64_t pages_ = 0;   // that it has
  int64_t tokens_ = 0;  // that it has
  int64_t first_block_ = 0, first_page_ = 0;
  int64_t page_ = 0, stop_ = 0;
  int offset_ = 0;  // tokens already taken of the page
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
