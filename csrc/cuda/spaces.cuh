// Between the model's space and those of the formats: Hadamard transform and principal bases.
#pragma once

#include "args.cuh"
#include "scalars.cuh"

namespace mdkv {

// Where a unit's first lease is, if it has one; where prompts have bases, it has no other.
struct Lease {
  const int32_t* blocks;
  int first_block;
  bool exists;
};

MDKV_DEVICE Lease lease_of(const DecodeArgs& args, int unit) {
  const int32_t* record = args.records + int64_t{unit} * args.record_words;
  return {blocks_of(args, record[kRow]), record[kFirstBlock], record[kLeases] > 0};
}

// A direction of a head's basis.
struct BasisRow {
  const void* dims;
  int element;
};

// One of a head's basis of keys (side 0) or values (side 1). Without a lease, a prompt's basis is
// looked up nowhere: `dims` is null.
MDKV_DEVICE BasisRow basis_row(const DecodeArgs& args, const Lease& lease, int kv_head, int side,
                               int direction) {
  if (!args.prompt_basis) {
    const float* basis = side ? args.call.basis_values : args.call.basis_keys;
    return {basis + (int64_t{kv_head} * args.basis_rank + direction) * args.head_size,
            MDKV_FLOAT32};
  }
  if (!lease.exists) return {nullptr, MDKV_FLOAT32};
  // A page is a whole number of rows, so no row crosses pages.
  const int row_bytes = 2 * args.head_size;
  const int rows_per_page = static_cast<int>(args.page_bytes / row_bytes);
  const int row = side * args.basis_rank + direction;
  const int head = args.call.layer * args.num_kv_heads + kv_head;
  const int page = args.basis_first_page + head * args.basis_pages + row / rows_per_page;
  return {lease_page(args, lease.blocks, lease.first_block, page) + row % rows_per_page * row_bytes,
          args.element};
}

// Multiplies a vector of floats in shared memory by core.basis.hadamard, which is its own inverse:
// a Sylvester matrix on every block of the largest power of two that divides the size. One warp.
MDKV_DEVICE void hadamard(uint32_t vector, int size, int lane) {
  const int block = size & -size;
  float norm = 1;
  for (int half = 1; half < block; half *= 2) {
    norm *= 0.70710678118654752f;
    for (int i = lane; i < size / 2; i += 32) {
      const int low = i / half * 2 * half + i % half;
      const uint32_t a_at = vector + 4 * low, b_at = a_at + 4 * half;
      const float a = as_float(load_shared32(a_at)), b = as_float(load_shared32(b_at));
      store_shared32(a_at, as_bits(a + b));
      store_shared32(b_at, as_bits(a - b));
    }
    sync_warp();
  }
  for (int d = lane; d < size; d += 32) {
    const float x = as_float(load_shared32(vector + 4 * d));
    store_shared32(vector + 4 * d, as_bits(x * norm));
  }
  sync_warp();
}

}  // namespace mdkv
