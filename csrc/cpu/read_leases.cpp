// The read_leases operator: kept tokens and full ones of some KV heads, side by side.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cache_args.h"
#include "isa.h"
#include "tensors.h"

namespace mdkv {
namespace {

constexpr int64_t kGrainPages = 4;  // that a thread reads at least
constexpr int64_t kSourceFields = 5;

void set_block_table(const at::Tensor& block_table, DecodeArgs& args) {
  TORCH_CHECK(block_table.scalar_type() == at::kInt && block_table.dim() == 2 &&
                  (block_table.stride(1) == 1 || block_table.size(1) == 1),
              "block_table: expected int32 [rows, blocks], innermost contiguous, got ",
              block_table.scalar_type(), " ", block_table.sizes());
  args.block_table = block_table.const_data_ptr<int32_t>();
  args.block_table_stride = block_table.stride(0);
  args.num_rows = block_table.size(0);
  args.max_blocks = block_table.size(1);
}

// The lists of a lease that ends before block-table entry `end`; returns how many tokens they have.
int64_t read_lists(const DecodeArgs& args, int64_t end, Source& source) {
  const int64_t lease_pages = (end - source.first_block) * args.pages_per_block;
  TORCH_CHECK(
      !args.prompt_basis ||
          args.basis_first_page + args.pages_per_block * args.basis_pages_per_head <= lease_pages,
      "basis_first_page: the prompt basis of row ", source.row, " does not fit its lease of ",
      lease_pages, " pages");
  const int64_t head = int64_t{args.layer} * args.num_kv_heads + source.head;
  const int64_t bytes = args.num_formats * int64_t{sizeof(List)};
  // The page table never spans blocks, and a block's pages are contiguous.
  std::memcpy(source.lists, args.block(source.row, source.first_block) + head * bytes, bytes);
  int64_t tokens = 0;
  for (int f = 0; f < args.num_formats; ++f) {
    const List& list = source.lists[f];
    const int64_t pages = list.tokens < 0 ? -1 : args.formats[f].pages(list.tokens);
    TORCH_CHECK(pages >= 0 && (pages == 0 || list.first_page >= 0) &&
                    list.first_page + pages <= lease_pages,
                "kv_cache: the page table of row ", source.row, ", layer ", args.layer, ", head ",
                source.head, ", format ", f, " lists ", list.tokens, " tokens from page ",
                list.first_page, " of ", lease_pages);
    source.pages += pages;
    tokens += list.tokens;
  }
  return tokens;
}

Source read_source(const DecodeArgs& args, const int32_t* fields, int64_t target, int64_t rows) {
  Source source{};
  source.row = fields[0];
  source.head = fields[1];
  source.first_block = fields[2];
  source.full_tokens = fields[4];
  source.target = target;
  const int64_t end = fields[3];
  TORCH_CHECK(source.row >= 0 && source.row < args.num_rows, "sources: row ", source.row, " of ",
              args.num_rows);
  TORCH_CHECK(source.head >= 0 && source.head < args.num_kv_heads, "sources: head ", source.head,
              " of ", args.num_kv_heads);
  TORCH_CHECK(source.first_block >= 0 && source.first_block < end && end <= args.max_blocks,
              "sources: blocks ", source.first_block, " to ", end, " of ", args.max_blocks);
  const int32_t* blocks = args.block_table + source.row * args.block_table_stride;
  for (int64_t i = source.first_block; i < end; ++i) {
    TORCH_CHECK(blocks[i] >= 0 && blocks[i] < args.num_blocks, "block_table: row ", source.row,
                " names block ", blocks[i], " of ", args.num_blocks);
  }
  int64_t tokens = source.full_tokens;
  if (tokens == 0) {
    tokens = read_lists(args, end, source);
  } else {
    source.pages = args.full.pages(tokens);
    TORCH_CHECK(tokens > 0 && source.first_block + source.pages <= end, "sources: ", tokens,
                " tokens in blocks ", source.first_block, " to ", end);
  }
  TORCH_CHECK(target >= 0 && target + tokens <= rows, "targets: ", tokens, " tokens from row ",
              target, " of ", rows);
  return source;
}

char* rows_of(at::Tensor& rows, const char* name, const DecodeArgs& args) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == args.head_size && rows.is_contiguous(), name,
              ": expected contiguous [tokens, ", args.head_size, "], got ", rows.sizes());
  return static_cast<char*>(rows.data_ptr());
}

// Reads the listed pages of all sources, in parallel.
void run(const ReadArgs& args, const std::vector<Source>& sources) {
  std::vector<int64_t> starts = {0};
  for (const Source& source : sources) starts.push_back(starts.back() + source.pages);
  Carver counter(nullptr);
  ReadScratch::carve(args.cache, counter);
  at::parallel_for(0, starts.back(), kGrainPages, [&](int64_t begin, int64_t end) {
    const auto memory = std::make_unique<char[]>(counter.used() + 64);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    Carver carver(memory.get() + (round_up(address, 64) - address));
    ReadScratch scratch = ReadScratch::carve(args.cache, carver);
    size_t at = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++at) {
      const int64_t stop = std::min(end, starts[at + 1]);
      if (begin == stop) continue;
      machine_kernels().read_pages(args, sources[at], begin - starts[at], stop - starts[at],
                                   scratch);
      begin = stop;
    }
  });
}

// sources: int32 [sources, 5]: row of the block table, KV head, first block, the one behind the
// last, and full tokens (0: a lease). targets: int32 [sources], rows of keys and values where the
// sources' first tokens go. keys, values: [rows, head_size].
void read_leases(const at::Tensor& kv_cache, int64_t layer, int64_t num_kv_heads,
                 const at::Tensor& block_table, const at::Tensor& sources,
                 const at::Tensor& targets, const at::Tensor& formats, const at::Tensor& basis_k,
                 const at::Tensor& basis_v, const at::Tensor& hadamard, int64_t basis_first_page,
                 int64_t basis_pages_per_head, int64_t prompt_basis_rank, at::Tensor& keys,
                 at::Tensor& values) {
  ReadArgs args{};
  set_cache(kv_cache, layer, num_kv_heads, args.cache);
  set_block_table(block_table, args.cache);
  set_formats(formats, args.cache);
  set_basis(basis_k, basis_v, hadamard, basis_first_page, basis_pages_per_head, prompt_basis_rank,
            args.cache);
  args.keys = rows_of(keys, "keys", args.cache);
  args.values = rows_of(values, "values", args.cache);
  args.type = element_of(keys, "keys");
  TORCH_CHECK(values.sizes() == keys.sizes() && values.scalar_type() == keys.scalar_type(),
              "values: expected ", keys.scalar_type(), " ", keys.sizes(), ", got ",
              values.scalar_type(), " ", values.sizes());
  TORCH_CHECK(sources.scalar_type() == at::kInt && sources.dim() == 2 &&
                  sources.size(1) == kSourceFields && sources.is_contiguous(),
              "sources: expected contiguous int32 [sources, ", kSourceFields, "], got ",
              sources.scalar_type(), " ", sources.sizes());
  const int64_t count = sources.size(0);
  TORCH_CHECK(targets.scalar_type() == at::kInt && targets.dim() == 1 && targets.size(0) == count &&
                  targets.is_contiguous(),
              "targets: expected contiguous int32 [", count, "], got ", targets.scalar_type(), " ",
              targets.sizes());
  std::vector<Source> read;
  read.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    read.push_back(read_source(args.cache, sources.const_data_ptr<int32_t>() + kSourceFields * i,
                               targets.const_data_ptr<int32_t>()[i], keys.size(0)));
  }
  run(args, read);
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("read_leases", &read_leases); }

}  // namespace mdkv
