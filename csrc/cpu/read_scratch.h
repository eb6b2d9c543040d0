// Scratch memory of reading pages back.
#pragma once

#include "decode_scratch.h"
#include "read_args.h"

namespace mdkv {

// What one thread needs.
struct ReadScratch {
  float* matrix;  // [rank, padded_head]: directions of a space
  float* basis;   // [rank, head_size]: the prompt basis as floats
  float* rows;    // one side of a page, unpacked
  float* out;     // [4, padded_head]: tokens in the model's space
  uint8_t* copy;  // a page that is too near the end of the cache to be over-read

  // Floats from one unpacked row to the next: dimensions of keys (side 0), tokens of values. A
  // row's last vector may end behind it.
  MDKV_INLINE static int64_t stride(const Format& format, int side) {
    return round_up(side ? format.rank : format.tokens_per_page, kLanes) + kLanes;
  }

  MDKV_INLINE static ReadScratch carve(const DecodeArgs& args, Carver& carver) {
    int64_t rows = 0;
    for (int f = 0; f < args.num_formats; ++f) {
      const Format& format = args.formats[f];
      const int64_t keys = format.rank * stride(format, 0);
      const int64_t values = format.tokens_per_page * stride(format, 1);
      rows = keys > rows ? keys : rows;
      rows = values > rows ? values : rows;
    }
    ReadScratch scratch;
    scratch.matrix = carver.take<float>(args.head_size * args.padded_head());
    scratch.basis = carver.take<float>(
        args.prompt_basis ? int64_t{args.basis_rank} * args.head_size + kLanes : 0);
    scratch.rows = carver.take<float>(rows);
    scratch.out = carver.take<float>(4 * args.padded_head());
    scratch.copy = carver.take<uint8_t>(args.page_bytes + kOverread);
    return scratch;
  }
};

}  // namespace mdkv
