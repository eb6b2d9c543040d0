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

// Of the warps that attended over the pages between two, given where the weights of these begin.
MDKV_DEVICE Parts parts_of(const DecodeArgs& args, int unit, int run, int begin, int last_begin) {
  const int first = begin / *args.share, last = last_begin / *args.share;
  return {slot_of(args, unit, run, first), last - first + 1};
}

// Calls body(run, parts) for the runs of a unit.
template <typename Body>
MDKV_DEVICE void for_runs(const DecodeArgs& args, int unit, Body&& body) {
  const int32_t* record = args.records + int64_t{unit} * args.record_words;
  int begin = args.unit_begin[unit];
  for (int list = 0; list < args.num_lists;) {
    const int run = args.lists[list].run;
    int end = begin, last = begin;  // where the last page begins
    for (; list < args.num_lists && args.lists[list].run == run; ++list) {
      const List& of = args.lists[list];
      const int pages = record[kFirstList + list];
      end += pages * of.weight;
      if (pages > 0) last = end - of.weight;
    }
    body(run, begin == end ? Parts{0, 0} : parts_of(args, unit, run, begin, last));
    begin = end;
  }
}

constexpr int kMaxMergeThreads = 512;
constexpr int kMergeParts = 8;  // that a thread loads before it computes with the first
constexpr float kNone = -INFINITY;

// The largest of all threads' numbers, found by the first warp: the last may not be whole.
// `scratch` has room for a float per thread.
MDKV_DEVICE float block_maximum(float x, uint32_t scratch) {
  store_shared32(scratch + 4 * thread_index(), as_bits(x));
  sync_block();
  if (thread_index() < 32) {
    for (int other = thread_index() + 32; other < num_threads(); other += 32) {
      x = fmaxf(x, as_float(load_shared32(scratch + 4 * other)));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      x = fmaxf(x, as_float(shuffle_xor(as_bits(x), mask)));
    }
    sync_warp();
    if (thread_index() == 0) store_shared32(scratch, as_bits(x));
  }
  sync_block();
  return as_float(load_shared32(scratch));
}

// A slice's share of a run's parts: adds their weights, and their weighted values in a dimension.
// The parts' loads come first, all of them, for none depends on another.
MDKV_DEVICE void add_parts(const DecodeArgs& args, const Parts& parts, int row, int dim, int rank,
                           int slice, int slices, float top, float& weight, float& sum) {
  const bool held = dim < rank;
  const float* all_lse = args.part_lse + parts.first * args.rows + row;
  const float* all_values =
      args.part_out + (parts.first * args.rows + row) * args.head_size + (held ? dim : 0);
  for (int begin = slice; begin < parts.count; begin += kMergeParts * slices) {
    float lse[kMergeParts], value[kMergeParts];
#pragma unroll
    for (int j = 0; j < kMergeParts; ++j) {
      const int i = begin + j * slices;
      const bool exists = i < parts.count;
      const int at = (exists ? i : begin) * args.rows;
      const float read = all_lse[at], out = all_values[at * args.head_size];
      lse[j] = exists ? read : kNone;
      value[j] = exists && held ? out : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kMergeParts; ++j) {
      const float share = exp2_approximate(lse[j] - top);
      weight += share;
      sum += share * value[j];
    }
  }
}

// Grid: query heads, unit by unit (rows of every unit). Threads: head_size times slices of parts.
// Shared memory: floats, three spaces of head_size for every slice, and a weight per slice.
__global__ void __launch_bounds__(kMaxMergeThreads)
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
  if (args.unit_weight[unit] > 0) {
    for_runs(args, unit, [&](int, Parts parts) {
      for (int i = thread_index(); i < parts.count; i += num_threads()) {
        top = fmaxf(top, args.part_lse[(parts.first + i) * args.rows + row]);
      }
    });
    top = block_maximum(top, sums);
    sync_block();  // the sums take its place
    for_runs(args, unit, [&](int run, Parts parts) {
      const Run& of = args.runs[run];
      float run_sum = 0;
      add_parts(args, parts, row, dim, of.rank, slice, slices, top, weight, run_sum);
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
