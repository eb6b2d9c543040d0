// Attention over a page of elements: a lower rank in the cache's type, or full slots.
#pragma once

#include "pages.cuh"

namespace mdkv {

// How rows are read: slots, rows at multiples of 16 bytes, and rows anywhere.
enum Rows { kSlotRows, kWholeRows, kAnyRows };

template <int D>
MDKV_DEVICE void load_element_query(Query<D>& query, const uint16_t* from, int rank, bool exists,
                                    int lane) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      // Ranks are even, and so are the places of queries.
      const int dim = 16 * step + 8 * pair + lane % 4 * 2;
      query.words[step][pair] =
          exists && dim < rank ? *reinterpret_cast<const uint32_t*>(from + dim) : 0;
    }
  }
}

// Where a row's chunk of values is, or zeros for a token or for dimensions that do not exist: what
// lies there may be no number, and another list of the run may have them.
MDKV_DEVICE uint32_t value_chunk(const Page& page, const List& list, int token, int chunk) {
  const int chunks = list.value_row / kChunk;
  const int number = token * chunks + chunk;
  const uint32_t at = page.at + list.values_at + swizzled(number, list.value_swizzle) * kChunk;
  return token < page.tokens && chunk < chunks ? at : page.zeros;
}

// Left side of a product of keys: 16 tokens by 16 dimensions.
MDKV_DEVICE void load_slot_keys(uint32_t (&left)[4], const Page& page, const List& list, int token,
                                int dim) {
  const int row = token + page.lane / 8 % 2 * 8 + page.lane % 8;
  const int number = row * (list.key_row / kChunk) + dim / 8 + page.lane / 16;
  const uint32_t at = page.at + swizzled(number, list.key_swizzle) * kChunk;
  load_matrices(left, row < page.tokens ? at : page.zeros);
}

// The same of dimension-major keys. Dimensions beyond the rank are zero, since what lies there
// may be no number.
MDKV_DEVICE void load_keys(uint32_t (&left)[4], const Page& page, const List& list, int token,
                           int dim) {
  const int row = dim + page.lane / 16 * 8 + page.lane % 8;
  const int number = row * (list.key_row / kChunk) + token / 8 + page.lane / 8 % 2;
  const uint32_t at = page.at + swizzled(number, list.key_swizzle) * kChunk;
  load_matrices_transposed(left, row < list.rank ? at : page.zeros);
}

// Two elements that start anywhere, a row apart; zero where they do not exist.
MDKV_DEVICE uint32_t load_pair(uint32_t at, int row, bool first, bool second) {
  const uint32_t low = first ? load_shared16(at) : 0;
  const uint32_t high = second ? load_shared16(at + row) : 0;
  return low | high << 16;
}

// The same one by one, for rows that do not start at multiples of 16 bytes.
MDKV_DEVICE void load_keys_anyhow(uint32_t (&left)[4], const Page& page, const List& list,
                                  int token, int dim) {
  const int key_row = opaque(list.key_row);
  dim = opaque(dim);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = token + i % 2 * 8 + page.lane / 4;
    const int row = dim + i / 2 * 8 + page.lane % 4 * 2;
    const bool exists = column < page.tokens && row < list.rank;  // ranks are even
    left[i] = load_pair(page.at + row * key_row + 2 * column, key_row, exists, exists);
  }
}

// Left side of a product of values: 16 dimensions by 16 tokens. In slots, values are the
// dimensions behind those of keys.
MDKV_DEVICE void load_values(uint32_t (&left)[4], const Page& page, const List& list, int token,
                             int dim) {
  const int row = token + page.lane / 16 * 8 + page.lane % 8;
  load_matrices_transposed(left, value_chunk(page, list, row, dim / 8 + page.lane / 8 % 2));
}

MDKV_DEVICE void load_values_anyhow(uint32_t (&left)[4], const Page& page, const List& list,
                                    int token, int dim) {
  const int value_row = opaque(list.value_row);
  dim = opaque(dim);
  token = opaque(token);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = dim + i % 2 * 8 + page.lane / 4;
    const int row = token + i / 2 * 8 + page.lane % 4 * 2;
    const bool exists = column < list.rank;
    left[i] = load_pair(page.at + list.values_at + row * value_row + 2 * column, value_row,
                        exists && row < page.tokens, exists && row + 1 < page.tokens);
  }
}

// Row g (+ 8) of the product of keys is that token of 16.
template <int D, bool kBFloat16, Rows kRows>
MDKV_DEVICE void attend_elements(State<D>& state, const Query<D>& query, const Page& page,
                                 const List& list) {
  for (int first = 0; first < page.tokens; first += 16) {
    float scores[4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      if (16 * step >= list.rank) break;
      uint32_t left[4];
      if (kRows == kSlotRows) {
        load_slot_keys(left, page, list, first, 16 * step);
      } else if (kRows == kWholeRows) {
        load_keys(left, page, list, first, 16 * step);
      } else {
        load_keys_anyhow(left, page, list, first, 16 * step);
      }
      multiply<kBFloat16>(scores, left, query.words[step]);
    }
    float highest[2] = {state.maximum[0], state.maximum[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = first + i / 2 * 8 + page.lane / 4 < page.tokens;
      scores[i] = exists ? scores[i] * page.scale : kNothing;
      highest[i % 2] = fmaxf(highest[i % 2], scores[i]);
    }
    raise_maximum(state, highest);
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = exp2_approximate(scores[i] - state.maximum[i % 2]);
      state.weight[i % 2] += weight[i];
    }
    uint32_t weights[2];
    turn_weights(weights, pack<kBFloat16>(weight[0], weight[1]),
                 pack<kBFloat16>(weight[2], weight[3]));
#pragma unroll
    for (int tile = 0; tile < D / 16; ++tile) {
      if (16 * tile >= list.rank) break;
      uint32_t left[4];
      if (kRows != kAnyRows) {
        load_values(left, page, list, first, (kRows == kSlotRows ? D : 0) + 16 * tile);
      } else {
        load_values_anyhow(left, page, list, first, 16 * tile);
      }
      multiply<kBFloat16>(state.values[tile], left, weights);
    }
  }
}

}  // namespace mdkv
