// Scratch memory of the decode kernel: who needs how much, and where each part lies.
#pragma once

#include "decode_args.h"

namespace mdkv {

// Hands out aligned pieces of a buffer; with a null buffer it only counts bytes.
class Carver {
 public:
  MDKV_INLINE explicit Carver(char* base) : base_(base) {}

  template <typename T>
  MDKV_INLINE T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  MDKV_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Queries of one KV head's group in one space. A code format is scored in integers: the query is
// then step * (256 * high + low).
struct SpaceQuery {
  float* exact;  // [group, width], scaled so that a score is a power of two's exponent
  int8_t* high;  // [group, width]
  int8_t* low;   // [group, width]
  float* step;   // [group]
  int64_t width;

  MDKV_INLINE void carve(Carver& carver, int64_t group, int64_t padded_width) {
    width = padded_width;
    exact = carver.take<float>(group * width);
    high = carver.take<int8_t>(group * width);
    low = carver.take<int8_t>(group * width);
    step = carver.take<float>(group);
  }
};

// Queries of one (query, KV head) in every space.
struct Prepared {
  SpaceQuery spaces[3];  // by mdkv_rotation
  float* zero_dot;       // [formats, group]: zero * sum of the query over the format's rank

  MDKV_INLINE static Prepared carve(const DecodeArgs& args, Carver& carver) {
    Prepared p;
    p.spaces[0].carve(carver, args.group, args.padded_head());
    p.spaces[1].carve(carver, args.group, args.uses_basis ? args.padded_rank() : 0);
    p.spaces[2].carve(carver, args.group, args.uses_hadamard ? args.padded_head() : 0);
    p.zero_dot = carver.take<float>(kMaxFormats * args.group);
    return p;
  }
};

// Softmax state of one part of a unit: out[space] holds sums weighted by exp2(score - max).
struct Partial {
  float* max;     // [group]
  float* sum;     // [group]
  float* out[3];  // by mdkv_rotation: [group, width]
  int64_t width[3];

  MDKV_INLINE static Partial carve(const DecodeArgs& args, Carver& carver) {
    Partial p;
    p.width[0] = args.padded_head();
    p.width[1] = args.uses_basis ? args.padded_rank() : 0;
    p.width[2] = args.uses_hadamard ? args.padded_head() : 0;
    p.max = carver.take<float>(args.group);
    p.sum = carver.take<float>(args.group);
    for (int space = 0; space < 3; ++space) {
      p.out[space] = carver.take<float>(args.group * p.width[space]);
    }
    return p;
  }
};

// Tiles: several pages of one list that share one softmax step.
constexpr int kTilePages = 16;
constexpr int kTileTokens = 128;
constexpr int64_t kTileBytes = 16384;
constexpr int kFullRun = 32;  // tokens of a full page taken as if they were a page

// What one thread needs to process a tile.
struct TileScratch {
  float* weights;     // [group, tokens]: scores, then softmax weights
  int8_t* high;       // [group, tokens]
  int8_t* low;        // [group, tokens]
  float* largest;     // [group]: of the weights
  float* step;        // [group]
  float* weight_sum;  // [group]
  float* basis;       // [rank, head_size]: the prompt basis as floats
  uint8_t* copies;    // two tiles' pages that are too near the end of the cache to be over-read
  int64_t tokens;

  MDKV_INLINE static TileScratch carve(const DecodeArgs& args, Carver& carver) {
    TileScratch s;
    s.tokens = round_up(kTileTokens, kLanes);
    for (int f = 0; f < args.num_formats; ++f) {
      const int64_t tokens = round_up(args.formats[f].tokens_per_page, kLanes);
      s.tokens = tokens > s.tokens ? tokens : s.tokens;
    }
    s.weights = carver.take<float>(args.group * s.tokens);
    s.high = carver.take<int8_t>(args.group * s.tokens);
    s.low = carver.take<int8_t>(args.group * s.tokens);
    s.largest = carver.take<float>(args.group);
    s.step = carver.take<float>(args.group);
    s.weight_sum = carver.take<float>(args.group);
    s.basis = carver.take<float>(
        args.prompt_basis ? int64_t{args.basis_rank} * args.head_size + kLanes : 0);
    s.copies = carver.take<uint8_t>(2 * copies_needed(args) * copy_bytes(args));
    return s;
  }
  MDKV_INLINE static int64_t copies_needed(const DecodeArgs& args) {
    return kOverread / args.page_bytes + 1;
  }
  MDKV_INLINE static int64_t copy_bytes(const DecodeArgs& args) {
    return round_up(args.page_bytes + kOverread, 64);
  }
};

}  // namespace mdkv
