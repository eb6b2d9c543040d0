#include "units.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace mdkv {
namespace {

void check_blocks(const DecodeArgs& args, int64_t row, int64_t begin, int64_t end) {
  TORCH_CHECK(begin >= 0 && end <= args.max_blocks, "block_table: row ", row, " has ",
              args.max_blocks, " entries, but its length and lease take ", end);
  const int32_t* entries = args.block_table + row * args.block_table_stride;
  uint32_t largest = 0;  // negative ids wrap around and are caught as well
  for (int64_t i = begin; i < end; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(entries[i]));
  }
  TORCH_CHECK(begin >= end || largest < args.num_blocks, "block_table: row ", row, " names block ",
              static_cast<int32_t>(largest), " of ", args.num_blocks);
}

void read_lists(const DecodeArgs& args, Unit& unit) {
  const int64_t lease_pages =
      int64_t{unit.tail_block - unit.first_lease_block} * args.pages_per_block;
  const int64_t head = int64_t{args.layer} * args.num_kv_heads + unit.head;
  const int64_t bytes = args.num_formats * int64_t{sizeof(List)};
  TORCH_CHECK(
      !args.prompt_basis ||
          args.basis_first_page + args.pages_per_block * args.basis_pages_per_head <= lease_pages,
      "basis_first_page: the prompt basis of row ", unit.row, " does not fit its lease of ",
      lease_pages, " pages");
  // The page table never spans blocks, and a block's pages are contiguous.
  std::memcpy(unit.lists, args.block(unit.row, unit.first_lease_block) + head * bytes, bytes);
  for (int f = 0; f < args.num_formats; ++f) {
    const List& list = unit.lists[f];
    const int64_t pages = list.tokens < 0 ? -1 : args.formats[f].pages(list.tokens);
    TORCH_CHECK(pages >= 0 && (pages == 0 || list.first_page >= 0) &&
                    list.first_page + pages <= lease_pages,
                "kv_cache: the page table of row ", unit.row, ", layer ", args.layer, ", head ",
                unit.head, ", format ", f, " lists ", list.tokens, " tokens from page ",
                list.first_page, " of ", lease_pages);
    unit.pages += pages;
  }
}

}  // namespace

std::vector<Unit> read_units(const DecodeArgs& args) {
  std::vector<Unit> units;
  units.reserve(args.num_queries * args.num_kv_heads);
  for (int64_t query = 0; query < args.num_queries; ++query) {
    Unit unit{};
    unit.query = query;
    unit.length = args.lengths[query];
    int64_t tail_blocks = 0;
    if (unit.length > 0) {
      const int64_t row = args.query_rows[query];
      TORCH_CHECK(row >= 0 && row < args.num_rows, "query_rows: query ", query, " names row ", row,
                  " of ", args.num_rows);
      unit.row = row;
      unit.first_lease_block = args.leases[2 * row];
      unit.tail_block = args.leases[2 * row + 1];
      const int64_t blocks = (int64_t{unit.length} + args.block_size - 1) / args.block_size;
      tail_blocks = std::max<int64_t>(blocks - unit.tail_block, 0);
      const bool leased = unit.tail_block > 0;
      TORCH_CHECK(
          !leased || (unit.first_lease_block >= 0 && unit.first_lease_block < unit.tail_block),
          "leases: row ", row, " is (", unit.first_lease_block, ", ", unit.tail_block, ")");
      check_blocks(args, row, leased ? unit.first_lease_block : 0,
                   std::max<int64_t>(blocks, unit.tail_block));
    }
    for (int32_t head = 0; head < args.num_kv_heads; ++head) {
      unit.head = head;
      unit.pages = tail_blocks;
      if (unit.tail_block > 0) read_lists(args, unit);
      units.push_back(unit);
    }
  }
  return units;
}

}  // namespace mdkv
