// What the kernels are told: a model's lists, a batch, and the workspace between the kernels.
#pragma once

#include "mdkv_cuda.h"
#include "ptx.cuh"

namespace mdkv {

constexpr int kMaxLists = MDKV_MAX_FORMATS + 1;  // the formats, then the tail

// Query heads of a tensor-core product's narrow side. A larger group takes several units.
constexpr int kHeads = 8;

constexpr int kChunk = 16;  // bytes of one asynchronous copy

// One list of a unit: a format, or the tail. Offsets are bytes of a page in shared memory.
struct List {
  int32_t kind;  // mdkv_kind
  int32_t rotation;
  int32_t rank;
  int32_t bits;
  int32_t tokens_per_page;
  int32_t weight;  // of a page among others, when work is shared
  int32_t run;     // the run of lists that it is summed in
  // Whether rows can be read by matrices, since they start at multiples of 16 bytes. Of codes,
  // those of values; keys are read otherwise anyway.
  int32_t aligned;
  int32_t key_row;    // bytes of a row of keys: a dimension's, or a slot
  int32_t value_row;  // bytes of a row of values: a token's, or a slot
  int32_t values_at;
  int32_t scales_at;
  // Copies: 16-byte chunks of a page with tokens; where its values start and end among them; and
  // by which bits of its number a chunk is moved among its neighbours, so that the rows of a
  // matrix lie in different banks (31 for none).
  int32_t chunks;
  int32_t first_value_chunk;
  int32_t last_value_chunk;
  int16_t key_swizzle;
  int16_t value_swizzle;
};
static_assert(sizeof(List) == 64, "lists are found by a shift");

// The code that stands for zero, which kernels are compiled for; formats are checked to have it.
MDKV_BOTH constexpr float code_zero(int bits) {
  return bits == 8 ? 128.0f : bits == 4 ? 7.5f : 1.5f;
}

// What 1 stands for in the accumulators of weighted codes.
constexpr float kCodeUnit = 1 << 20;

// Lists one after the other whose weighted values add up as they are: in one space, and in the
// same places of the accumulator.
struct Run {
  int32_t rotation;
  int32_t rank;
  int32_t fields;  // codes per byte; 0 where values are elements
  int32_t value_row;
  int32_t aligned;
  float unit;  // what 1 stands for in its accumulators
};

// The pages of a list that lie in one lease; pages and tokens are counted through all leases, as if
// all pages before were full.
struct alignas(16) Extent {
  int32_t end;          // page behind its last
  int32_t until;        // token behind its last
  int32_t origin;       // page of the lease that page 0 of the list would be
  int32_t first_block;  // of the lease, in the row of the block table
};

struct DecodeArgs {
  mdkv_call call;
  List lists[kMaxLists];
  Run runs[kMaxLists];
  int32_t num_lists;  // formats and tail
  int32_t num_runs;
  int32_t head_size;
  int32_t block_size;
  int32_t num_kv_heads;
  int32_t group;
  int32_t tiles;  // of heads, in a group
  int32_t units;
  int32_t rows;  // query heads of a unit at most
  int32_t pages_per_block;
  int64_t page_bytes;
  int32_t max_leases;  // of a row
  int32_t lease_step;  // the largest power of two below max_leases, or 0
  int32_t basis_rank;
  int32_t prompt_basis;
  int32_t basis_first_page;
  int32_t basis_pages;
  int32_t uses_basis;
  int32_t uses_hadamard;
  int32_t element;
  int32_t warps;
  int32_t stages;
  int32_t stage_bytes;
  int32_t min_share;  // weight that a warp takes at least
  float scale;        // of the scores, which are base-2 logarithms
  // Workspace, in this order.
  uint16_t* queries;     // [units, kHeads, query_width]
  int32_t query_width;   // see query_offset
  int32_t record_words;  // of a unit, see below
  int32_t* records;      // [units, record_words]
  Extent* extents;       // [units, formats, max_leases]; unset behind a row's last lease
  int32_t* unit_weight;  // [units], of its pages
  int32_t* unit_begin;   // [units], weight of all pages before a unit's; unset without pages
  int32_t* share;        // weight of a warp's pages, see Share
  float* part_out;       // [slots, rows, head_size]
  float* part_lse;       // [slots, rows]
};

// A unit is a query, a KV head and at most kHeads query heads of its group. Its record:
enum Record : int32_t {
  kRow = 0,         // of the block table
  kLeases = 1,      // how many there are
  kFirstBlock = 2,  // of the first lease, in that row
  kTailBlock = 3,
  kTailTokens = 4,
  kFirstList = 5,  // then the pages of every list, in all leases
};

// Where queries of a space and type start in a row of `queries`: the model's space in the cache's
// type, the basis in the cache's type, the basis in float16, the Hadamard space in float16.
MDKV_BOTH int basis_width(const DecodeArgs& args) { return (args.basis_rank + 7) / 8 * 8; }

MDKV_DEVICE int query_offset(const DecodeArgs& args, int rotation, bool codes) {
  if (rotation == MDKV_IDENTITY) return 0;
  const int basis = args.head_size + (codes ? basis_width(args) : 0);
  return rotation == MDKV_BASIS ? basis : args.head_size + 2 * basis_width(args);
}

// A unit's query, KV head and first query head.
struct UnitPlace {
  int query, kv_head, first_head, heads;
};

MDKV_DEVICE UnitPlace place_of(const DecodeArgs& args, int unit) {
  const int tile = unit % args.tiles;
  const int pair = unit / args.tiles;
  const int kv_head = pair % args.num_kv_heads;
  const int left = args.group - tile * kHeads;
  return {pair / args.num_kv_heads, kv_head, kv_head * args.group + tile * kHeads,
          left < kHeads ? left : kHeads};
}

// Parts of results are numbered by run and warp: from one part to the next of a unit either the
// run or the warp is another one, and neither ever goes back.
MDKV_DEVICE int64_t slot_of(const DecodeArgs& args, int unit, int run, int warp) {
  return int64_t{unit} * args.num_runs + run + warp;
}

// A list's extents, lease by lease.
MDKV_DEVICE Extent* extents_of(const DecodeArgs& args, int unit, int list) {
  return args.extents + (int64_t{unit} * (args.num_lists - 1) + list) * args.max_leases;
}

MDKV_DEVICE int pages_of(const List& list, int tokens) {
  return (tokens + list.tokens_per_page - 1) / list.tokens_per_page;
}

// Address of a lease's page; `blocks` is the request's row of the block table.
MDKV_DEVICE const uint8_t* lease_page(const DecodeArgs& args, const int32_t* blocks,
                                      int first_block, int page) {
  const int64_t block = blocks[first_block + page / args.pages_per_block];
  const int64_t number = block * args.pages_per_block + page % args.pages_per_block;
  return static_cast<const uint8_t*>(args.call.kv_cache) + number * args.page_bytes;
}

MDKV_DEVICE const int32_t* blocks_of(const DecodeArgs& args, int row) {
  return args.call.block_table + int64_t{row} * args.call.table_stride;
}

}  // namespace mdkv
