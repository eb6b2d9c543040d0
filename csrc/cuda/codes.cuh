// Attention over a page of integer codes.
//
// No code is multiplied by its scale. The scale of K multiplies the score, where the zero point
// leaves as well. That of V, 2 ** e * f with 1 <= f < 2, is split: e joins the score, which keeps
// the weights within float16 whatever the scales; f joins the weight. A scale below 2 ** -40 (of a
// vector of nothing, that is) leaves the score alone from there on: its token's weight would vanish
// among the others' otherwise, and it counts as much as theirs.
//
// A code becomes a float16 where it lies, by having nothing beside it: a subnormal number, the code
// times a power of two, which tensor cores take as it is. So one logical operation converts two
// codes. Of keys, the power joins the scale; values of all fields and formats add up, so theirs
// joins the weights. The zero point leaves with the products: of keys by the sum of a query, of
// values by the sum of the weights.
#pragma once

#include "pages.cuh"

namespace mdkv {

constexpr int kLeastExponent = -40;

// What a code of 1 is as a float16.
MDKV_BOTH constexpr float code_one(int bits, int field) {
  return static_cast<float>(1 << field * bits) / (1 << 24);
}

MDKV_BOTH constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

// Adds the sums of a product's right columns, whose rows are all alike.
MDKV_DEVICE void add_column_sums(float (&sums)[4], const uint32_t (&right)[2]) {
  constexpr uint32_t kOne = twice(0x3C00);
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
  multiply_float16(sums, ones, right);
}

// One code of the low or the high byte of each half of a word, as two float16.
template <int kBits, int kField, int kHigh>
MDKV_DEVICE uint32_t unpack(uint32_t word) {
  if (kBits == 8) return permute_bytes(word, 0, kHigh ? 0x4341 : 0x4240);
  constexpr uint32_t kMask = twice(((1u << kBits) - 1) << kField * kBits);
  return (kHigh ? word >> 8 : word) & kMask;
}

// Where four bytes start that may lie across two words: the first word, and the bits in front of
// them (modulo 32).
struct Bytes {
  uint32_t word, shift;
};

MDKV_DEVICE Bytes bytes_at(uint32_t at) { return {at & ~3u, at * 8}; }

// Four bytes `further` on, a multiple of 4: no shift is computed again.
MDKV_DEVICE uint32_t load_bytes(const Bytes& bytes, uint32_t further) {
  const uint32_t word = bytes.word + further;
  return funnel_right(load_shared32(word), load_shared32(word + 4), bytes.shift);
}

// Of four rows, four bytes each, to the words that ldmatrix would give: words[half][pair of rows],
// bytes 2 half and 2 half + 1 of two rows.
MDKV_DEVICE void pair_rows(uint32_t (&words)[2][2], const uint32_t (&rows)[4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    words[0][pair] = permute_bytes(rows[2 * pair], rows[2 * pair + 1], 0x5410);
    words[1][pair] = permute_bytes(rows[2 * pair], rows[2 * pair + 1], 0x7632);
  }
}

// A compile-time loop over the fields of a byte.
template <int kField, int kFields, typename Body>
MDKV_DEVICE void for_fields(Body&& body) {
  if constexpr (kField < kFields) {
    body(IntConstant<kField>{});
    for_fields<kField + 1, kFields>(body);
  }
}

// Queries of a format of codes. Its rows are read in four quarters, one per q, since rows next to
// each other start in the same banks; so 16 dimensions are four of every quarter.
template <int D>
MDKV_DEVICE void load_code_query(Query<D>& query, const uint16_t* from, int rank, bool exists,
                                 int lane) {
  const int quarter = rank / 4;
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_quarter = 4 * step + 2 * pair + i;
        if (exists && in_quarter < quarter) {
          word |= static_cast<uint32_t>(from[lane % 4 * quarter + in_quarter]) << (16 * i);
        }
      }
      query.words[step][pair] = word;
    }
    add_column_sums(sum, query.words[step]);
  }
  query.sum[0] = sum[0];
  query.sum[1] = sum[1];
}

// Scores of the tokens of kColumns byte columns: [field][half], see attend_codes.
template <int D, int kBits>
MDKV_DEVICE void score_codes(float (&scores)[8 / kBits][2][4], const Query<D>& query,
                             const Page& page, const List& list, int first) {
  constexpr int kFields = 8 / kBits;
  const int quarter = list.rank / 4;
  const int steps = (quarter + 3) / 4;
  const int key_row = opaque(list.key_row);
  const uint32_t column = page.at + first + page.lane / 4 * 4;
  Bytes bytes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bytes[i] = bytes_at(column + (page.lane % 4 * quarter + i) * key_row);
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    if (step >= steps) break;
    uint32_t rows[4], words[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_bytes(bytes[i], 4 * step * key_row);
    pair_rows(words, rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_fields<0, kFields>([&](auto field) {
        constexpr int kField = decltype(field)::value;
        const uint32_t left[4] = {
            unpack<kBits, kField, 0>(words[half][0]), unpack<kBits, kField, 1>(words[half][0]),
            unpack<kBits, kField, 0>(words[half][1]), unpack<kBits, kField, 1>(words[half][1])};
        multiply_float16(scores[kField][half], left, query.words[step]);
      });
    }
  }
}

// Weights for the codes of every field, whose products with them are in units of kCodeUnit.
template <int kBits>
MDKV_DEVICE void weigh_fields(uint32_t (&right)[8 / kBits][2], const uint32_t (&weights)[2]) {
  for_fields<0, 8 / kBits>([&](auto field) {
    constexpr int kField = decltype(field)::value;
    constexpr float kFactor = 1 / (kCodeUnit * code_one(kBits, kField));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      right[kField][i] = kFactor == 1
                             ? weights[i]
                             : multiply_float16x2(weights[i], pack_float16x2(kFactor, kFactor));
    }
  });
}

// Adds the weighted values of 16 tokens, of which this thread names rows for two matrices.
template <int D, int kBits>
MDKV_DEVICE void add_aligned_values(State<D>& state, const uint32_t (&weights)[2], const Page& page,
                                    const List& list, int token) {
  constexpr int kFields = 8 / kBits;
  constexpr int kPerField = (D / kFields + 15) / 16;
  const int chunks = list.value_row / kChunk;
  const uint32_t values = page.at + list.values_at;
  const int first = token * chunks;
  uint32_t right[kFields][2];
  weigh_fields<kBits>(right, weights);
#pragma unroll
  for (int chunk = 0; chunk < kPerField; chunk += 2) {
    if (chunk >= chunks) break;
    // Threads of the upper 16 name the next chunk, if there is one.
    const int next = chunk + 1 < chunks ? page.lane / 16 : 0;
    uint32_t words[4];
    load_matrices_transposed(words,
                             values + swizzled(first + chunk + next, list.value_swizzle) * kChunk);
#pragma unroll
    for (int beside = 0; beside < 2; ++beside) {
      if (chunk + beside >= kPerField || chunk + beside >= chunks) break;
      for_fields<0, kFields>([&](auto field) {
        constexpr int kField = decltype(field)::value;
        const uint32_t upper = words[2 * beside], lower = words[2 * beside + 1];
        const uint32_t left[4] = {unpack<kBits, kField, 0>(upper), unpack<kBits, kField, 1>(upper),
                                  unpack<kBits, kField, 0>(lower), unpack<kBits, kField, 1>(lower)};
        multiply_float16(state.values[kField * kPerField + chunk + beside], left, right[kField]);
      });
    }
  }
}

// The same for rows of values that start anywhere; this thread reads four tokens' rows.
template <int D, int kBits>
MDKV_DEVICE void add_values(State<D>& state, const uint32_t (&weights)[2], const Page& page,
                            const List& list, const int (&tokens)[4]) {
  constexpr int kFields = 8 / kBits;
  constexpr int kPerField = (D / kFields + 31) / 32 * 2;
  const int value_row = opaque(list.value_row);
  const uint32_t values = page.at + list.values_at + page.lane / 4 * 4;
  Bytes bytes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bytes[i] = bytes_at(values + tokens[i] * value_row);
  uint32_t right[kFields][2];
  weigh_fields<kBits>(right, weights);
#pragma unroll
  for (int first = 0; first < D / kFields; first += kColumns) {
    if (first >= list.value_row) break;
    uint32_t rows[4], words[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_bytes(bytes[i], first);
    pair_rows(words, rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_fields<0, kFields>([&](auto field) {
        constexpr int kField = decltype(field)::value;
        const uint32_t upper = words[half][0], lower = words[half][1];
        const uint32_t left[4] = {unpack<kBits, kField, 0>(upper), unpack<kBits, kField, 1>(upper),
                                  unpack<kBits, kField, 0>(lower), unpack<kBits, kField, 1>(lower)};
        multiply_float16(state.values[kField * kPerField + first / 16 + half], left, right[kField]);
      });
    }
  }
}

// The four tokens of a field that a thread has, one after the other: in byte columns 4 g and on,
// rows g and g + 8 of a product, then of the next. How many exist, and where their scales start.
// Scales of K that do not exist are read as well, and not used: they lie less than 64 bytes behind
// the page, in the warp's shared memory.
struct CodeTokens {
  int exist;
  uint32_t key_scales, value_scales;
};

MDKV_DEVICE CodeTokens code_tokens(const Page& page, const List& list, int first, int field) {
  const int column = first + page.lane / 4 * 4;
  const int token = field * list.key_row + column;
  const int in_row = list.key_row - column, in_page = page.tokens - token;
  const uint32_t scales = page.at + list.scales_at + 2 * token;
  return {in_row < in_page ? in_row : in_page, scales, scales + 2 * list.tokens_per_page};
}

// bfloat16 bits of a token's scale of V; 0 where it does not exist.
MDKV_DEVICE uint32_t value_scale(const CodeTokens& tokens, int i) {
  return i < tokens.exist ? load_shared16(tokens.value_scales + 2 * i) : 0;
}

// The part of a scale of V that joins the score, from its bfloat16 bits.
MDKV_DEVICE int value_exponent(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 7) - 127;
  return exponent > kLeastExponent ? exponent : kLeastExponent;
}

// Products of queries and codes to scores; raises the maxima.
template <int D, int kBits>
MDKV_DEVICE void finish_scores(State<D>& state, float (&scores)[8 / kBits][2][4],
                               const Query<D>& query, const Page& page, const List& list,
                               int first) {
  float highest[2] = {state.maximum[0], state.maximum[1]};
  for_fields<0, 8 / kBits>([&](auto constant) {
    constexpr int kField = decltype(constant)::value;
    constexpr float kOne = code_one(kBits, kField);
    const float scale = page.scale / kOne;
    const CodeTokens tokens = code_tokens(page, list, first, kField);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A bfloat16 is the upper half of a float.
      const float key_scale = as_float(load_shared16(tokens.key_scales + 2 * i) << 16) * scale;
      const int exponent = value_exponent(value_scale(tokens, i));
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        float& score = scores[kField][i / 2][i % 2 * 2 + head];
        const float centred = score - query.sum[head] * (code_zero(kBits) * kOne);
        score = i < tokens.exist ? centred * key_scale + static_cast<float>(exponent) : kNothing;
        highest[head] = fmaxf(highest[head], score);
      }
    }
  });
  raise_maximum(state, highest);
}

// Scores of the 16 tokens of a product to weights, as the right side of the product of values.
template <int D>
MDKV_DEVICE void weigh(State<D>& state, uint32_t (&weights)[2], const float (&scores)[4],
                       const Page& page, const List& list, int first, int product) {
  const CodeTokens tokens = code_tokens(page, list, first, product / 2);
  uint32_t packed[2];
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    // Read again rather than kept: registers are scarcer.
    const uint32_t bits = value_scale(tokens, product % 2 * 2 + lower);
    const float unscaled = as_float(static_cast<uint32_t>(127 - value_exponent(bits)) << 23);
    const float fraction = as_float(bits << 16) * unscaled;
    float weight[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      weight[head] = exp2_approximate(scores[2 * lower + head] - state.maximum[head]);
      state.weight[head] += weight[head] * unscaled;
      weight[head] *= fraction;
    }
    packed[lower] = pack_float16x2(weight[0], weight[1]);
  }
  turn_weights(weights, packed[0], packed[1]);
}

// Takes the zero point from what add_aligned_values or add_values has added, given the sums of its
// weights per head.
template <int D, int kBits>
MDKV_DEVICE void centre_values(State<D>& state, const float (&sums)[4], const List& list) {
  constexpr int kFields = 8 / kBits;
  constexpr int kAligned = (D / kFields + 15) / 16, kAny = (D / kFields + 31) / 32 * 2;
  constexpr float kZero = code_zero(kBits) / kCodeUnit;
  const float zero[2] = {sums[0] * kZero, sums[1] * kZero};
  for_fields<0, kFields>([&](auto constant) {
    constexpr int kField = decltype(constant)::value;
    if (list.aligned) {
      // A shorter list of the same run leaves the tiles behind its rows alone.
#pragma unroll
      for (int tile = 0; tile < kAligned; ++tile) {
        if (tile * kChunk >= list.value_row) break;
        subtract_from_tile(state, kField * kAligned + tile, zero);
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kAny; ++tile) {
        subtract_from_tile(state, kField * kAny + tile, zero);
      }
    }
  });
}

template <int D, int kBits>
MDKV_DEVICE void attend_codes(State<D>& state, const Query<D>& query, const Page& page,
                              const List& list) {
  constexpr int kProducts = 2 * (8 / kBits);
  const int last = list.tokens_per_page - 1;
  for (int first = 0; first < list.key_row && first < page.tokens; first += kColumns) {
    float scores[8 / kBits][2][4] = {};
    score_codes<D, kBits>(scores, query, page, list, first);
    finish_scores<D, kBits>(state, scores, query, page, list, first);
    uint32_t weights[kProducts][2];
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      weigh(state, weights[product], scores[product / 2][product % 2], page, list, first, product);
    }
    float sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      add_column_sums(sums, weights[product]);
    }
    // One copy of the code for all fields: its registers and its size would be too many.
    int start = first;
#pragma unroll 1
    for (int field = 0; field < 8 / kBits; ++field) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (list.aligned) {
          const int token = start + 2 * half + page.lane % 8 * 4 + page.lane / 8 % 2;
          add_aligned_values<D, kBits>(state, weights[half], page, list,
                                       token < last ? token : last);
        } else {
          int tokens[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = start + 2 * half + (page.lane % 4 * 2 + i % 2) * 4 + i / 2;
            tokens[i] = token < last ? token : last;
          }
          add_values<D, kBits>(state, weights[half], page, list, tokens);
        }
      }
      start += list.key_row;
      // The next field's move up: arrays in registers have no other index.
#pragma unroll
      for (int i = 0; i + 2 < kProducts; ++i) {
        weights[i][0] = weights[i + 2][0];
        weights[i][1] = weights[i + 2][1];
      }
    }
    centre_values<D, kBits>(state, sums, list);
  }
}

}  // namespace mdkv
