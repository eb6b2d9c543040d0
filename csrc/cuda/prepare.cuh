// The first kernel: a unit's queries in every space, its record, and its pages' weight. Also
// keeps the queries as they are, for callers that ask for it.
#pragma once

#include "leases.cuh"
#include "scalars.cuh"
#include "spaces.cuh"

namespace mdkv {

// The lengths of a unit's lists and where their pages are. One warp per list looks up its own.
MDKV_DEVICE void write_record(const DecodeArgs& args, int unit, int query, int kv_head,
                              uint32_t scratch) {
  const int warps = num_threads() / 32, lane = thread_index() % 32;
  const mdkv_call& call = args.call;
  const int length = call.lengths[query];
  // The row of padding may be anything.
  const int row = length > 0 ? call.query_rows[query] : 0;
  const int32_t* leases = call.leases + int64_t{row} * args.max_leases * 2;
  const int most = length > 0 ? args.max_leases : 0;
  const int32_t* blocks = blocks_of(args, row);
  int32_t* record = args.records + int64_t{unit} * args.record_words;
  const int tail = args.num_lists - 1;
  const int64_t head = int64_t{call.layer} * args.num_kv_heads + kv_head;
  for (int list = thread_index() / 32; list < args.num_lists; list += warps) {
    const List* of = list < tail ? &args.lists[list] : nullptr;
    Extent* extents = of ? extents_of(args, unit, list) : nullptr;
    const Leases found =
        read_leases(args, leases, most, blocks, of, head * tail + list, extents, lane);
    int pages = found.pages;
    if (list == tail) {
      const int full = length - found.end_block * args.block_size;
      const int tokens = full > 0 ? full : 0;
      pages = pages_of(args.lists[tail], tokens);
      if (lane == 0) {
        record[kRow] = row;
        record[kLeases] = found.count;
        record[kFirstBlock] = found.count > 0 ? leases[0] : 0;
        record[kTailBlock] = found.end_block;
        record[kTailTokens] = tokens;
      }
    }
    if (lane == 0) {
      record[kFirstList + list] = pages;
      store_shared32(scratch + 4 * list, static_cast<uint32_t>(pages * args.lists[list].weight));
    }
  }
  sync_block();
  if (thread_index() == 0) {
    uint32_t weight = 0;
    for (int i = 0; i < args.num_lists; ++i) weight += load_shared32(scratch + 4 * i);
    args.unit_weight[unit] = static_cast<int32_t>(weight);
  }
}

constexpr int kPrepareThreads = 128;
// Of a multiprocessor: more would be bought with registers that the compiler then spills.
constexpr int kPrepareBlocks = 8;

// Grid: units. Shared memory: a vector of head_size floats per warp, and a word per list.
__global__ void __launch_bounds__(kPrepareThreads, kPrepareBlocks)
    prepare_units(const __grid_constant__ DecodeArgs args) {
  const int unit = block_index();
  const UnitPlace place = place_of(args, unit);
  const int warps = num_threads() / 32, warp = thread_index() / 32, lane = thread_index() % 32;
  const uint32_t vector = shared_begin() + warp * args.head_size * 4;
  write_record(args, unit, place.query, place.kv_head, shared_begin() + warps * args.head_size * 4);
  sync_block();
  const Lease lease = lease_of(args, unit);
  const int width = basis_width(args);
  for (int head = warp; head < place.heads; head += warps) {
    uint16_t* to = args.queries + (int64_t{unit} * kHeads + head) * args.query_width;
    const int query_head = place.first_head + head;
    const int64_t from =
        place.query * args.call.query_stride + query_head * args.call.query_head_stride;
    const int64_t kept =
        (int64_t{place.query} * args.num_kv_heads * args.group + query_head) * args.head_size;
    for (int d = lane; d < args.head_size; d += 32) {
      const float x = load_element(args.call.query, args.call.query_element, from + d);
      if (args.call.recent != nullptr) {
        store_element(args.call.recent, args.call.query_element, kept + d, x);
      }
      store_shared32(vector + 4 * d, as_bits(x));
      to[d] = element_bits(x, args.element);
    }
    sync_warp();
    if (args.uses_basis) {
      for (int r = lane; r < args.basis_rank; r += 32) {
        const BasisRow row = basis_row(args, lease, place.kv_head, 0, r);
        float sum = 0;
        for (int d = 0; d < args.head_size && row.dims; ++d) {
          sum += load_element(row.dims, row.element, d) * as_float(load_shared32(vector + 4 * d));
        }
        to[args.head_size + r] = element_bits(sum, args.element);
        to[args.head_size + width + r] = element_bits(sum, MDKV_FLOAT16);
      }
    }
    if (args.uses_hadamard) {
      sync_warp();  // the transform is in place
      hadamard(vector, args.head_size, lane);
      for (int d = lane; d < args.head_size; d += 32) {
        const float x = as_float(load_shared32(vector + 4 * d));
        to[args.head_size + 2 * width + d] = element_bits(x, MDKV_FLOAT16);
      }
    }
    sync_warp();
  }
}

}  // namespace mdkv
