// Software prefetching.
#pragma once

#include <cstdint>

#include "decode_args.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Fetches pages that are needed soon while others are worked on, a few lines at a time: hardware
// prefetchers stop at the end of a 4 KiB page, and a burst would fill the miss queue.
class Prefetcher {
 public:
  Prefetcher(const uint8_t* const* pages, const int64_t* bytes, int num_pages)
      : pages_(pages), bytes_(bytes), left_(num_pages) {}

  MDKV_INLINE void step(int lines) {
    for (int i = 0; i < lines; ++i) {
      if (line_ >= end_ && !advance()) return;
      __builtin_prefetch(line_);
      line_ += 64;
    }
  }
  MDKV_INLINE void rest() {
    while (line_ < end_ || advance()) step(1);
  }

 private:
  MDKV_INLINE bool advance() {
    if (left_ == 0) return false;
    --left_;
    line_ = *pages_++;
    end_ = line_ + *bytes_++;
    return true;
  }

  const uint8_t* const* pages_;
  const int64_t* bytes_;
  int left_;
  const uint8_t* line_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
