// The third kernel: sums the parts of a query head by their log-sum-exp and brings the sums back
// to the model's space, once per space.
#pragma once

#include "args.cuh"
#include "scalars.cuh"
#include "spaces.cuh"

namespace mdkv {

// Slots of one run's parts: `count` from `first` on.
struct Parts {
  int64_t first;
  int count;
};

// Warps that attended over pages [begin, end) of all pages.
MDKV_DEVICE Parts parts_of(const DecodeArgs& args, int unit, int run, int begin, int end) {
  if (begin == end) return {0, 0};
  const int first = begin / *args.share, last = (end - 1) / *args.share;
  return {slot_of(args, unit, run, first), last - first + 1};
}

// Calls body(run, parts) for the runs of a unit.
template <typename Body>
MDKV_DEVICE void for_runs(const DecodeArgs& args, int unit, Body&& body) {
  const int32_t* record = args.records + int64_t{unit} * args.record_words;
  int begin = args.unit_begin[unit];
  for (int list = 0; list < args.num_lists;) {
    const int run = args.lists[list].run;
    int end = begin;
    for (; list < args.num_lists && args.lists[list].run == run; ++list) {
      end += pages_of(args.lists[list], record[kFirstList + 2 * list]);
    }
    body(run, parts_of(args, unit, run, begin, end));
    begin = end;
  }
}

constexpr int kMaxMergeThreads = 512;
constexpr float kNone = -INFINITY;

// Grid: query heads, unit by unit (rows of every unit). Threads: head_size times slices of parts.
// Shared memory: floats, three spaces of head_size for every slice, and a weight per slice.
__global__ void __launch_bounds__(kMaxMergeThreads, 2)
    merge_parts(const __grid_constant__ DecodeArgs args) {
  const int size = args.head_size;
  const int unit = block_index() / args.rows, row = block_index() % args.rows;
  const UnitPlace place = place_of(args, unit);
  if (row >= place.heads) return;
  const int query_head = place.first_head + row;
  const int dim = thread_index() % size, slice = thread_index() / size;
  const int slices = num_threads() / size;
  const uint32_t sums = shared_begin();
  const uint32_t weights = sums + 3 * slices * size * 4;
  const uint32_t mine = sums + thread_index() * 4;
  const int space = slices * size * 4;

  float top = kNone, weight = 0, sum[3] = {0, 0, 0};
  if (args.unit_pages[unit] > 0) {
    for_runs(args, unit, [&](int, Parts parts) {
      for (int i = 0; i < parts.count; ++i) {
        top = fmaxf(top, args.part_lse[(parts.first + i) * args.rows + row]);
      }
    });
    for_runs(args, unit, [&](int run, Parts parts) {
      const Run& of = args.runs[run];
      float run_sum = 0;
#pragma unroll 8
      for (int i = slice; i < parts.count; i += slices) {
        const int64_t at = (parts.first + i) * args.rows + row;
        const float share = exp2_approximate(args.part_lse[at] - top);
        weight += share;
        if (dim < of.rank) run_sum += share * args.part_out[at * size + dim];
      }
      // Indexed by constants, to stay in registers.
      if (of.rotation == MDKV_IDENTITY) sum[0] += run_sum;
      if (of.rotation == MDKV_BASIS) sum[1] += run_sum;
      if (of.rotation == MDKV_HADAMARD) sum[2] += run_sum;
    });
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) store_shared32(mine + i * space, as_bits(sum[i]));
  if (dim == 0) store_shared32(weights + 4 * slice, as_bits(weight));
  sync_block();
  // The first slice adds up the others.
  if (slice == 0) {
    for (int i = 0; i < 3; ++i) {
      float total = 0;
      for (int other = 0; other < slices; ++other) {
        total += as_float(load_shared32(mine + i * space + other * size * 4));
      }
      store_shared32(mine + i * space, as_bits(total));
    }
  }
  sync_block();
  if (args.uses_hadamard && thread_index() < 32) hadamard(sums + 2 * space, size, thread_index());
  sync_block();
  if (slice > 0) return;
  float total = 0, out = as_float(load_shared32(mine));
  for (int other = 0; other < slices; ++other) {
    total += as_float(load_shared32(weights + 4 * other));
  }
  if (args.uses_hadamard) out += as_float(load_shared32(mine + 2 * space));
  if (args.uses_basis) {
    const Lease lease = lease_of(args, unit);
    for (int r = 0; r < args.basis_rank; ++r) {
      const BasisRow basis = basis_row(args, lease, place.kv_head, 1, r);
      if (basis.dims == nullptr) break;
      out += as_float(load_shared32(sums + space + 4 * r)) *
             load_element(basis.dims, basis.element, dim);
    }
  }
  // A query that sees nothing has no weight and gets zeros.
  const mdkv_call& call = args.call;
  store_element(call.output, call.query_element,
                place.query * call.output_stride + query_head * call.output_head_stride + dim,
                total == 0 ? 0.0f : out * reciprocal_approximate(total));
  if (call.lse && dim == 0) {
    call.lse[int64_t{place.query} * args.num_kv_heads * args.group + query_head] =
        total == 0 ? kNone : (top + log2_approximate(total)) * 0.6931471805599453f;
  }
}

}  // namespace mdkv
