// The online softmax that every format and the tail share.
//
// A warp's state is that of kHeads query heads over one run of lists. Products are transposed:
// tokens, then dimensions, are the tensor cores' 16 rows and heads their 8 columns. So thread
// (g, q) = (lane / 4, lane % 4) has tokens or dimensions g and g + 8 of heads 2q and 2q + 1.
#pragma once

#include "args.cuh"

namespace mdkv {

// Accumulators of 16 dimensions. Rows that are no multiple of 16 bytes are padded per field.
template <int D>
constexpr int kTiles = D / 16 > 8 ? D / 16 : 8;

// The maximum before the first token: finite, so that its difference to itself is 0.
constexpr float kLowest = -1e30f;

constexpr float kNothing = -INFINITY;

template <int D>
struct State {
  float maximum[2];  // of scores, per head of this thread; the same in all threads of a head
  float weight[2];   // sums of weights of this thread's tokens
  float values[kTiles<D>][4];
};

template <int D>
MDKV_DEVICE void reset(State<D>& state) {
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    state.maximum[head] = kLowest;
    state.weight[head] = 0;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles<D>; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.values[tile][i] = 0;
  }
}

template <int D>
MDKV_DEVICE void subtract_from_tile(State<D>& state, int tile, const float (&of_head)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) state.values[tile][i] -= of_head[i % 2];
}

// Raises the maxima to those of new scores: `highest` is the maximum so far or a score of this
// thread that is higher.
template <int D>
MDKV_DEVICE void raise_maximum(State<D>& state, const float (&highest)[2]) {
  float factor[2];
  bool raised = false;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float top = highest[head];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      top = fmaxf(top, as_float(shuffle_xor(as_bits(top), mask)));
    }
    raised = raised || top > state.maximum[head];
    factor[head] = exp2_approximate(state.maximum[head] - top);
    state.maximum[head] = top;
  }
  if (ballot(raised) == 0) return;
#pragma unroll
  for (int head = 0; head < 2; ++head) state.weight[head] *= factor[head];
#pragma unroll
  for (int tile = 0; tile < kTiles<D>; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.values[tile][i] *= factor[i % 2];
  }
}

// Dimension, in its space, of row g (+ 8 if `lower`) of an accumulator; -1 where there is none.
template <int D>
MDKV_DEVICE int dimension_of(const Run& run, int tile, int g, int lower) {
  if (run.fields == 0) {
    const int dim = 16 * tile + g + 8 * lower;
    return dim < run.rank ? dim : -1;
  }
  const int row = D / run.fields;  // the widest that there is
  const int per_field = run.aligned ? (row + 15) / 16 : (row + 31) / 32 * 2;
  const int field = tile / per_field, in_field = tile % per_field;
  const int byte = run.aligned ? 16 * in_field + 2 * g + lower
                               : 32 * (in_field / 2) + 4 * g + 2 * (in_field % 2) + lower;
  return field < run.fields && byte < run.value_row ? field * run.value_row + byte : -1;
}

// Writes a run's part, normalised, with the base-2 logarithm of its sum of weights.
template <int D>
MDKV_DEVICE void store_part(const DecodeArgs& args, State<D>& state, int unit, int run, int warp,
                            int lane) {
  const int64_t slot = slot_of(args, unit, run, warp);
  const int heads = place_of(args, unit).heads;
  float scale[2];
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float weight = state.weight[head];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) weight += as_float(shuffle_xor(as_bits(weight), mask));
    scale[head] = reciprocal_approximate(weight) * args.runs[run].unit;
    const int row = lane % 4 * 2 + head;
    if (lane < 4 && row < heads) {
      args.part_lse[slot * args.rows + row] = state.maximum[head] + log2_approximate(weight);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles<D>; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 2 + i % 2;
      const int dim = dimension_of<D>(args.runs[run], tile, lane / 4, i / 2);
      if (dim >= 0 && row < heads) {
        args.part_out[(slot * args.rows + row) * D + dim] = state.values[tile][i] * scale[i % 2];
      }
    }
  }
}

}  // namespace mdkv
