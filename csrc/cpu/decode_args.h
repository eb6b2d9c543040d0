// What a mixed_decode call asks for, in plain pointers.
//
// Everything here is shared by the scheduler (compiled once) and the kernels (compiled once per
// instruction set). An inline function compiled with AVX-512 in one file could be the copy that the
// linker keeps for all: so the kernels' files include no torch or standard-library code, and what
// they share is always inlined.
#pragma once

#include <cstdint>

#include "../common/page_format.h"

#define MDKV_INLINE inline __attribute__((always_inline))

namespace mdkv {

enum class Element : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int kMaxFormats = 16;

// Rows of floats in scratch memory are padded to the widest vector of any instruction set.
constexpr int kLanes = 16;

// Kernels load whole vectors and whole groups of four rows, and so may touch bytes past the end of
// a page, whose values are never used. This bounds how far: four rows of 512 bytes and a vector.
constexpr int64_t kOverread = 2304;

MDKV_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

MDKV_INLINE int64_t element_bytes(Element type) { return type == Element::kFloat32 ? 4 : 2; }

// A page format as the kernels read it.
struct Format : mdkv_page_format {
  MDKV_INLINE bool slots() const { return kind == MDKV_SLOTS; }
  MDKV_INLINE bool codes() const { return kind == MDKV_CODES; }
  MDKV_INLINE float zero() const { return 0.5f * zero_halves; }
  MDKV_INLINE int64_t key_row_bytes() const { return int64_t{tokens_per_page} * bits / 8; }
  MDKV_INLINE int64_t value_row_bytes() const { return int64_t{rank} * bits / 8; }
  MDKV_INLINE int64_t pages(int64_t tokens) const {
    return (tokens + tokens_per_page - 1) / tokens_per_page;
  }
};

// Rows of query or output: [queries, q_heads, head_size], innermost contiguous. Strides in bytes.
struct RowsView {
  char* data;
  Element type;
  int64_t query_stride;
  int64_t head_stride;

  MDKV_INLINE char* row(int64_t query, int64_t head) const {
    return data + query * query_stride + head * head_stride;
  }
};

struct DecodeArgs {
  RowsView query;
  RowsView output;
  float* lse;  // [queries, q_heads] or null
  int64_t num_queries;

  const uint8_t* kv_cache;  // [blocks, layers * kv_heads] pages
  const uint8_t* kv_cache_end;
  Element cache_type;
  int64_t num_blocks;
  int64_t pages_per_block;
  int64_t page_bytes;
  int32_t block_size;
  int32_t head_size;
  int32_t num_kv_heads;
  int32_t group;  // query heads per KV head
  int32_t layer;

  const int32_t* block_table;  // [rows, max_blocks]
  int64_t block_table_stride;
  int64_t num_rows;
  int64_t max_blocks;
  const int32_t* query_rows;  // [queries]
  const int32_t* lengths;     // [queries]
  const int32_t* leases;      // [rows, max_leases, 2]: first block, and the one behind the last
  int64_t max_leases;

  Format formats[kMaxFormats];
  int32_t num_formats;
  Format full;  // of the tail

  const float* basis_k;  // [kv_heads, basis_rank, head_size]
  const float* basis_v;
  const float* hadamard;  // [head_size, head_size]
  int32_t basis_rank;
  bool prompt_basis;  // the basis lies in the only lease, not in basis_k and basis_v
  int64_t basis_first_page;
  int64_t basis_pages_per_head;
  bool uses_basis;     // some format's rotation
  bool uses_hadamard;  // some format's rotation

  float scale;

  MDKV_INLINE const uint8_t* block(int64_t row, int64_t index) const {
    return kv_cache + block_table[row * block_table_stride + index] * pages_per_block * page_bytes;
  }
  MDKV_INLINE int64_t padded_head() const { return round_up(head_size, kLanes); }
  MDKV_INLINE int64_t padded_rank() const { return round_up(basis_rank, kLanes); }
};

struct List {
  int32_t tokens;
  int32_t first_page;
};

// The work of one (query, KV head): the pages of its lists, format by format and of each format
// lease by lease, then its tail's.
struct Unit {
  int64_t query;
  int64_t row;
  int32_t head;
  int32_t length;  // keys visible, counted from position 0
  int32_t num_leases;
  int32_t tail_block;
  const int32_t* leases;            // of its row
  const List* lists;                // [formats, leases]
  int64_t list_pages[kMaxFormats];  // of each format, in all leases
  int64_t pages;                    // of all lists and the tail
};

// Pages [begin, end) of a unit; no unit where there are none.
struct PageRun {
  const Unit* unit;
  int64_t begin, end;
};

}  // namespace mdkv
