// A model's lists as kernels know them, made on the host from shapes alone.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>

#include "pages.cuh"

namespace mdkv {

constexpr int kHeadSizes[] = {64, 80, 96, 128, 256};

// Bits by which to move chunks so that 8 rows, `distance` chunks apart, lie in as many banks as
// they can.
inline int best_swizzle(int distance) {
  int best = kNoSwizzle, most = 0;
  for (int by : {kNoSwizzle, 3, 4, 5, 6, 7, 8, 9}) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) banks |= 1u << (swizzled(row * distance, by) & 7);
    const int different = __builtin_popcount(banks);
    if (different > most) {
      most = different;
      best = by;
    }
  }
  return best;
}

// Of a page that takes a multiprocessor no longer than its bytes take to come.
constexpr int kPageWeight = 8;

// A warp's part costs some memory traffic beside its pages.
constexpr int kMinPages = 4;

// Instructions that a multiprocessor can issue while bytes come: 1,900 in the time of 8 KiB on an
// H200 (on an H100, whose memory is slower, 2,740). The fewest count: where memory is slower,
// formats differ less.
inline int issue_slots(int64_t bytes) { return static_cast<int>(bytes * 1900 / 8192); }

// Warp instructions of a full page: to within 5 % of those in the assembly for sm_90 and heads of
// 128, more roughly for rows that start anywhere, whose elements are read one by one.
inline int page_instructions(const List& list) {
  const int steps = (list.rank + 15) / 16;
  if (list.kind == MDKV_CODES) {
    const int columns = (list.key_row + kColumns - 1) / kColumns;
    const int fields = 8 / list.bits;
    return 300 + columns * (100 + 180 * fields + steps * (22 + 31 * fields));
  }
  return 250 + (list.tokens_per_page + 15) / 16 * (100 + steps * (list.aligned ? 22 : 350));
}

// The longer of the two counts: a page's bytes come while others are attended over.
inline int page_weight(const List& list, int64_t page_bytes) {
  const int slots = issue_slots(page_bytes), instructions = page_instructions(list);
  return instructions <= slots ? kPageWeight : (kPageWeight * instructions + slots / 2) / slots;
}

inline List slot_list(const mdkv_page_format& format) {
  List list = {};
  list.kind = MDKV_SLOTS;
  list.rotation = MDKV_IDENTITY;
  list.rank = format.rank;
  list.bits = format.bits;
  list.tokens_per_page = format.tokens_per_page;
  list.aligned = 1;
  list.key_row = list.value_row = 2 * format.values_offset;
  list.chunks = format.used_bytes / kChunk;
  list.first_value_chunk = list.last_value_chunk = list.chunks;
  list.key_swizzle = list.value_swizzle = best_swizzle(list.key_row / kChunk);
  return list;
}

inline List list_of(const mdkv_page_format& format) {
  if (format.kind == MDKV_SLOTS) return slot_list(format);
  List list = {};
  const bool codes = format.kind == MDKV_CODES;
  list.kind = format.kind;
  list.rotation = format.rotation;
  list.rank = format.rank;
  list.bits = format.bits;
  list.tokens_per_page = format.tokens_per_page;
  list.key_row = format.values_offset / format.rank;
  list.value_row = format.rank * format.bits / 8;
  list.aligned = list.value_row % kChunk == 0 && (codes || list.key_row % kChunk == 0);
  list.chunks = (format.used_bytes + kChunk - 1) / kChunk;
  list.key_swizzle = list.value_swizzle = kNoSwizzle;
  if (format.values_offset % kChunk != 0) {
    list.first_value_chunk = list.last_value_chunk = list.chunks;
    list.values_at = format.values_offset;
    list.scales_at = format.scales_offset;
    return list;
  }
  const auto whole_groups = [](int chunks) { return (chunks + 7) / 8 * 8; };
  const int chunks = format.values_offset / kChunk;
  list.first_value_chunk = chunks;
  list.last_value_chunk = 2 * chunks;
  list.values_at = whole_groups(chunks) * kChunk;
  list.scales_at = 2 * list.values_at;
  if (list.aligned && !codes) list.key_swizzle = best_swizzle(list.key_row / kChunk);
  // Rows of a matrix are one token apart, or four where tokens are codes.
  if (list.aligned) {
    list.value_swizzle = best_swizzle(list.value_row / kChunk * (codes ? 4 : 1));
  }
  return list;
}

// Where a list's weighted values are accumulated.
inline Run run_of(const mdkv_shape& shape, const List& list) {
  Run run = {list.rotation, list.rank, 0, list.value_row, 1, 1.0f};
  if (list.kind != MDKV_CODES) return run;
  run.fields = 8 / list.bits;
  run.unit = kCodeUnit;
  run.aligned = list.aligned;
  if (run.aligned && list.rank == shape.head_size && list.rank % (16 * run.fields) == 0) {
    // The fields of all bytes then lie one after the other, like whole bytes.
    run.fields = 1;
    run.value_row = list.rank;
  }
  return run;
}

// Whether two lists' values add up. Rows of codes must be equally long, unless what lies behind
// the shorter ones is not read: elements are masked, and whole matrices left out.
inline bool same_places(const Run& a, const Run& b) {
  const bool any_row = a.fields == 0 || (a.fields == 1 && a.aligned);
  return a.rotation == b.rotation && a.fields == b.fields && a.aligned == b.aligned &&
         (any_row || a.value_row == b.value_row);
}

// Why a shape is refused; empty if it is not.
inline std::string check_shape(const mdkv_shape& shape) {
  const auto number = [](int x) { return std::to_string(x); };
  if (shape.element != MDKV_FLOAT16 && shape.element != MDKV_BFLOAT16) {
    return "the cache's type must be float16 or bfloat16";
  }
  if (std::find(std::begin(kHeadSizes), std::end(kHeadSizes), shape.head_size) ==
      std::end(kHeadSizes)) {
    std::string built;
    for (int size : kHeadSizes) built += " " + number(size);
    return "head size " + number(shape.head_size) + " is not built; built are" + built;
  }
  if (shape.block_size < 1 || shape.num_layers < 1 || shape.num_kv_heads < 1 || shape.group < 1) {
    return "block size, layers, KV heads and group must be at least 1";
  }
  if (shape.max_leases < 1 || (shape.prompt_basis && shape.max_leases > 1)) {
    return number(shape.max_leases) + " leases; at least 1, and no more with prompts' own bases";
  }
  if (shape.num_formats < 0 || shape.num_formats > MDKV_MAX_FORMATS) {
    return number(shape.num_formats) + " formats; at most " + number(MDKV_MAX_FORMATS);
  }
  const int64_t page_bytes = int64_t{4} * shape.block_size * shape.head_size;
  for (int f = 0; f <= shape.num_formats; ++f) {
    const mdkv_page_format& format = shape.formats[f];
    const std::string name = "format " + number(f) + ": ";
    const bool codes = format.kind == MDKV_CODES, slots = format.kind == MDKV_SLOTS;
    if (!slots && !codes && format.kind != MDKV_ELEMENTS) {
      return name + "kind " + number(format.kind);
    }
    const bool takes =
        codes ? format.bits == 8 || format.bits == 4 || format.bits == 2 : format.bits == 16;
    if (!takes) return name + number(format.bits) + " bits";
    if (format.rank < 4 || format.rank % 4 != 0 || format.rank > shape.head_size) {
      return name + "rank " + number(format.rank);
    }
    const bool whole = format.rank == shape.head_size;
    const bool fits = format.rotation == MDKV_IDENTITY   ? slots && whole
                      : format.rotation == MDKV_HADAMARD ? codes && whole
                                                         : format.rotation == MDKV_BASIS && !slots;
    if (!fits) return name + "rotation " + number(format.rotation) + " of such elements";
    if (format.rotation == MDKV_BASIS && format.rank > shape.basis_rank) {
      return name + "rank " + number(format.rank) + " of a basis of " + number(shape.basis_rank);
    }
    const int per_byte = codes ? 8 / format.bits : 1;
    if (format.tokens_per_page < 1 || format.tokens_per_page % per_byte != 0 ||
        format.used_bytes > page_bytes || (slots && format.tokens_per_page != shape.block_size)) {
      return name + number(format.tokens_per_page) + " tokens in a page";
    }
    if (!mdkv_offsets_fit(&format) || (codes && format.zero_halves != 2 * code_zero(format.bits))) {
      return name + "offsets or zero point are not those of its rank and bits";
    }
  }
  if (shape.formats[shape.num_formats].kind != MDKV_SLOTS) {
    return "the last format is the tail's, and must be of slots";
  }
  return "";
}

// Everything but the call, the plan and the workspace.
inline DecodeArgs make_args(const mdkv_shape& shape) {
  DecodeArgs args = {};
  args.num_lists = shape.num_formats + 1;
  args.page_bytes = int64_t{4} * shape.block_size * shape.head_size;
  args.min_share = kMinPages * kPageWeight;
  for (int i = 0; i < args.num_lists; ++i) {
    List& list = args.lists[i];
    list = list_of(shape.formats[i]);
    list.weight = page_weight(list, args.page_bytes);
    args.min_share = std::max(args.min_share, list.weight);
    const Run run = run_of(shape, list);
    if (args.num_runs == 0 || !same_places(run, args.runs[args.num_runs - 1])) {
      args.runs[args.num_runs++] = run;
    }
    list.run = args.num_runs - 1;
    Run& joined = args.runs[list.run];
    joined.rank = std::max(joined.rank, run.rank);
    joined.value_row = std::max(joined.value_row, run.value_row);
    args.uses_basis |= list.rotation == MDKV_BASIS;
    args.uses_hadamard |= list.rotation == MDKV_HADAMARD;
  }
  args.head_size = shape.head_size;
  args.block_size = shape.block_size;
  args.num_kv_heads = shape.num_kv_heads;
  args.group = shape.group;
  args.tiles = (shape.group + kHeads - 1) / kHeads;
  args.rows = std::min(shape.group, kHeads);
  args.pages_per_block = shape.num_layers * shape.num_kv_heads;
  args.basis_rank = args.uses_basis ? shape.basis_rank : 0;
  args.prompt_basis = shape.prompt_basis;
  args.basis_first_page = shape.basis_first_page;
  args.basis_pages = shape.basis_pages;
  args.element = shape.element;
  args.stage_bytes = static_cast<int32_t>(args.page_bytes) + kPadding;
  args.query_width = 2 * args.head_size + 2 * basis_width(args);
  args.record_words = kFirstList + args.num_lists;
  args.max_leases = shape.max_leases;
  for (int step = 1; step < args.max_leases; step *= 2) args.lease_step = step;
  return args;
}

// Places the parts of the workspace from `base` on; returns the bytes that they take.
inline size_t place_workspace(DecodeArgs& args, uint8_t* base) {
  size_t used = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += (static_cast<size_t>(count) * sizeof(*pointer) + 255) / 256 * 256;
  };
  const int64_t units = args.units;
  const int64_t slots = units * args.num_runs + args.warps;
  place(args.queries, units * kHeads * args.query_width);
  place(args.records, units * args.record_words);
  place(args.extents, units * (args.num_lists - 1) * args.max_leases);
  place(args.unit_weight, units);
  place(args.unit_begin, units);
  place(args.share, 1);
  place(args.part_out, slots * args.rows * args.head_size);
  place(args.part_lse, slots * args.rows);
  return used;
}

}  // namespace mdkv
