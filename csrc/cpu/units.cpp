#include "units.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace mdkv {
namespace {

void check_blocks(const DecodeArgs& args, int64_t row, int64_t begin, int64_t end) {
  TORCH_CHECK(end <= args.max_blocks, "block_table: row ", row, " has ", args.max_blocks,
              " entries, but its length and leases take ", end);
  const int32_t* entries = args.block_table + row * args.block_table_stride;
  uint32_t largest = 0;  // negative ids wrap around and are caught as well
  for (int64_t i = begin; i < end; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(entries[i]));
  }
  TORCH_CHECK(begin >= end || largest < args.num_blocks, "block_table: row ", row, " names block ",
              static_cast<int32_t>(largest), " of ", args.num_blocks);
}

// Finds the leases of a unit's row.
void read_leases(const DecodeArgs& args, Unit& unit) {
  unit.leases = args.leases + unit.row * args.max_leases * 2;
  for (; unit.num_leases < args.max_leases; ++unit.num_leases) {
    const int32_t first = unit.leases[2 * unit.num_leases];
    const int32_t end = unit.leases[2 * unit.num_leases + 1];
    if (first == 0 && end == 0) break;
    TORCH_CHECK(first >= unit.tail_block && first < end, "leases: row ", unit.row, " has (", first,
                ", ", end, ") behind block ", unit.tail_block);
    check_blocks(args, unit.row, first, end);
    unit.tail_block = end;
  }
}

// Reads the lists of a unit's head in one lease into `lists`, [formats, leases].
void read_lists(const DecodeArgs& args, Unit& unit, int32_t lease, List* lists) {
  const int64_t first_block = unit.leases[2 * lease];
  const int64_t lease_pages = (unit.leases[2 * lease + 1] - first_block) * args.pages_per_block;
  const int64_t head = int64_t{args.layer} * args.num_kv_heads + unit.head;
  TORCH_CHECK(
      !args.prompt_basis ||
          args.basis_first_page + args.pages_per_block * args.basis_pages_per_head <= lease_pages,
      "basis_first_page: the prompt basis of row ", unit.row, " does not fit its lease of ",
      lease_pages, " pages");
  // The page table never spans blocks, and a block's pages are contiguous.
  const uint8_t* table = args.block(unit.row, first_block);
  for (int f = 0; f < args.num_formats; ++f) {
    List list;
    std::memcpy(&list, table + (head * args.num_formats + f) * sizeof(List), sizeof(List));
    const int64_t pages = list.tokens < 0 ? -1 : args.formats[f].pages(list.tokens);
    TORCH_CHECK(pages >= 0 && (pages == 0 || list.first_page >= 0) &&
                    list.first_page + pages <= lease_pages,
                "kv_cache: the page table of row ", unit.row, ", lease ", lease, ", layer ",
                args.layer, ", head ", unit.head, ", format ", f, " lists ", list.tokens,
                " tokens from page ", list.first_page, " of ", lease_pages);
    lists[f * unit.num_leases + lease] = list;
    unit.list_pages[f] += pages;
    unit.pages += pages;
  }
}

}  // namespace

Units read_units(const DecodeArgs& args) {
  Units units;
  units.all.reserve(args.num_queries * args.num_kv_heads);
  for (int64_t query = 0; query < args.num_queries; ++query) {
    Unit unit{};
    unit.query = query;
    unit.length = args.lengths[query];
    int64_t tail_blocks = 0;
    if (unit.length > 0) {
      unit.row = args.query_rows[query];
      TORCH_CHECK(unit.row >= 0 && unit.row < args.num_rows, "query_rows: query ", query,
                  " names row ", unit.row, " of ", args.num_rows);
      read_leases(args, unit);
      const int64_t blocks = (int64_t{unit.length} + args.block_size - 1) / args.block_size;
      tail_blocks = std::max<int64_t>(blocks - unit.tail_block, 0);
      check_blocks(args, unit.row, unit.tail_block, blocks);
    }
    const int64_t lists = int64_t{args.num_formats} * unit.num_leases;
    for (int32_t head = 0; head < args.num_kv_heads; ++head) {
      units.all.push_back(unit);
      Unit& made = units.all.back();
      made.head = head;
      made.pages = tail_blocks;
      units.lists.resize(units.lists.size() + lists);
      for (int32_t lease = 0; lease < unit.num_leases; ++lease) {
        read_lists(args, made, lease, units.lists.data() + units.lists.size() - lists);
      }
    }
  }
  const List* lists = units.lists.data();
  for (Unit& unit : units.all) {
    unit.lists = lists;
    lists += int64_t{args.num_formats} * unit.num_leases;
  }
  return units;
}

}  // namespace mdkv
