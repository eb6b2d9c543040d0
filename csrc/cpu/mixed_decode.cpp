// The mixed_decode operator: checks its arguments and runs the machine's kernels.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "formats.h"
#include "isa.h"
#include "schedule.h"
#include "tensors.h"

namespace mdkv {
namespace {

void check_int32(const at::Tensor& tensor, const char* name, int64_t dims) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt && tensor.dim() == dims, name,
              ": expected int32 of ", dims, " dimensions, got ", tensor.scalar_type(), " ",
              tensor.sizes());
  TORCH_CHECK(dims == 0 || tensor.size(0) == 0 || tensor.stride(-1) == 1 || tensor.size(-1) == 1,
              name, ": the last dimension must be contiguous");
}

RowsView rows_view(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 3, name, ": expected [queries, q_heads, head_size], got ",
              tensor.sizes());
  TORCH_CHECK(tensor.stride(2) == 1, name, ": the last dimension must be contiguous");
  const int64_t item = tensor.element_size();
  return {static_cast<char*>(tensor.data_ptr()), element_of(tensor, name), tensor.stride(0) * item,
          tensor.stride(1) * item};
}

// The last of the formats is the tail's.
void set_formats(const at::Tensor& formats, DecodeArgs& args) {
  args.num_formats = static_cast<int32_t>(count_formats(formats)) - 1;
  TORCH_CHECK(args.num_formats >= 0 && args.num_formats <= kMaxFormats, "formats: at most ",
              kMaxFormats, " and the tail's, got ", args.num_formats + 1);
  for (int f = 0; f <= args.num_formats; ++f) {
    const Format format = read_format(formats, f, args.cache_type, args.page_bytes);
    TORCH_CHECK(format.rank <= args.head_size, "formats: rank ", format.rank, " of format ", f);
    TORCH_CHECK(!format.slots() ||
                    (format.rank == args.head_size && format.tokens_per_page == args.block_size),
                "formats: format ", f, " is unrotated, but not the cache's own slots");
    TORCH_CHECK(format.rotation != MDKV_HADAMARD || format.rank == args.head_size, "formats: rank ",
                format.rank, " of the Hadamard format ", f);
    args.uses_basis |= format.rotation == MDKV_BASIS;
    args.uses_hadamard |= format.rotation == MDKV_HADAMARD;
    (f < args.num_formats ? args.formats[f] : args.full) = format;
  }
  TORCH_CHECK(args.full.slots(), "formats: the last one is the tail's, and must be of slots");
}

void set_basis(const at::Tensor& basis_k, const at::Tensor& basis_v, const at::Tensor& hadamard,
               int64_t first_page, int64_t pages_per_head, int64_t prompt_rank, DecodeArgs& args) {
  const auto check = [&](const at::Tensor& basis, const char* name) {
    TORCH_CHECK(basis.scalar_type() == at::kFloat && basis.is_contiguous() && basis.dim() == 3 &&
                    basis.size(0) == args.num_kv_heads && basis.size(2) == args.head_size,
                name, ": expected contiguous float32 [", args.num_kv_heads, ", rank, ",
                args.head_size, "], got ", basis.scalar_type(), " ", basis.sizes());
    return basis.const_data_ptr<float>();
  };
  args.prompt_basis = prompt_rank > 0;
  if (args.prompt_basis) {
    args.basis_rank = static_cast<int32_t>(prompt_rank);
    args.basis_first_page = first_page;
    args.basis_pages_per_head = pages_per_head;
    const int64_t bytes = 2 * prompt_rank * args.head_size * element_bytes(args.cache_type);
    TORCH_CHECK(args.max_leases == 1, "leases: ", args.max_leases,
                " per row; a prompt's own basis allows one, because a query is rotated once");
    TORCH_CHECK(first_page >= 0 && pages_per_head * args.page_bytes >= bytes,
                "basis_pages_per_head: ", pages_per_head, " pages do not hold rank ", prompt_rank);
  } else if (args.uses_basis) {
    args.basis_k = check(basis_k, "basis_k");
    args.basis_v = check(basis_v, "basis_v");
    TORCH_CHECK(basis_k.size(1) == basis_v.size(1), "basis_v: rank ", basis_v.size(1),
                ", but basis_k has ", basis_k.size(1));
    args.basis_rank = static_cast<int32_t>(basis_k.size(1));
  }
  for (int f = 0; f < args.num_formats; ++f) {
    const Format& format = args.formats[f];
    TORCH_CHECK(format.rotation != MDKV_BASIS || format.rank <= args.basis_rank, "formats: rank ",
                format.rank, " of format ", f, " exceeds the basis' ", args.basis_rank);
  }
  if (args.uses_hadamard) {
    TORCH_CHECK(hadamard.scalar_type() == at::kFloat && hadamard.is_contiguous() &&
                    hadamard.dim() == 2 && hadamard.size(0) == args.head_size &&
                    hadamard.size(1) == args.head_size,
                "hadamard: expected contiguous float32 [", args.head_size, ", ", args.head_size,
                "], got ", hadamard.scalar_type(), " ", hadamard.sizes());
    args.hadamard = hadamard.const_data_ptr<float>();
  }
}

void set_cache(const at::Tensor& kv_cache, int64_t layer, int64_t num_kv_heads, DecodeArgs& args) {
  TORCH_CHECK(
      kv_cache.dim() == 4 && kv_cache.is_contiguous(),
      "kv_cache: expected contiguous [blocks, layers * kv_heads, block_size, 2 * head_size], "
      "got ",
      kv_cache.sizes(), " with strides ", kv_cache.strides());
  TORCH_CHECK(num_kv_heads > 0 && kv_cache.size(1) % num_kv_heads == 0,
              "num_kv_heads: ", num_kv_heads, " does not divide the cache's ", kv_cache.size(1),
              " pages per block");
  TORCH_CHECK(layer >= 0 && (layer + 1) * num_kv_heads <= kv_cache.size(1), "layer: ", layer,
              " of ", kv_cache.size(1) / num_kv_heads);
  const int64_t head_size = kv_cache.size(3) / 2;
  TORCH_CHECK(kv_cache.size(3) % 16 == 0 && head_size <= 512, "kv_cache: head size ", head_size,
              "; expected a multiple of 8 up to 512");
  args.cache_type = element_of(kv_cache, "kv_cache");
  args.num_blocks = kv_cache.size(0);
  args.pages_per_block = kv_cache.size(1);
  args.block_size = static_cast<int32_t>(kv_cache.size(2));
  args.head_size = static_cast<int32_t>(head_size);
  args.page_bytes = kv_cache.size(2) * kv_cache.size(3) * kv_cache.element_size();
  args.kv_cache = static_cast<const uint8_t*>(kv_cache.const_data_ptr());
  args.kv_cache_end = args.kv_cache + kv_cache.nbytes();
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.layer = static_cast<int32_t>(layer);
}

void set_requests(const at::Tensor& block_table, const at::Tensor& query_rows,
                  const at::Tensor& lengths, const at::Tensor& leases, DecodeArgs& args) {
  check_int32(block_table, "block_table", 2);
  check_int32(query_rows, "query_rows", 1);
  check_int32(lengths, "lengths", 1);
  check_int32(leases, "leases", 3);
  TORCH_CHECK(query_rows.size(0) == args.num_queries, "query_rows: expected [", args.num_queries,
              "], got ", query_rows.sizes());
  TORCH_CHECK(lengths.size(0) == args.num_queries, "lengths: expected [", args.num_queries,
              "], got ", lengths.sizes());
  args.num_rows = block_table.size(0);
  TORCH_CHECK(leases.size(0) >= args.num_rows && leases.size(1) > 0 && leases.size(2) == 2 &&
                  leases.is_contiguous(),
              "leases: expected contiguous [", args.num_rows, ", max_leases, 2], got ",
              leases.sizes());
  args.max_blocks = block_table.size(1);
  args.block_table = block_table.const_data_ptr<int32_t>();
  args.block_table_stride = block_table.stride(0);
  args.query_rows = query_rows.const_data_ptr<int32_t>();
  args.lengths = lengths.const_data_ptr<int32_t>();
  args.leases = leases.const_data_ptr<int32_t>();
  args.max_leases = leases.size(1);
}

void mixed_decode(const at::Tensor& query, const at::Tensor& kv_cache, int64_t layer,
                  int64_t num_kv_heads, const at::Tensor& block_table, const at::Tensor& query_rows,
                  const at::Tensor& lengths, const at::Tensor& leases, const at::Tensor& formats,
                  const at::Tensor& basis_k, const at::Tensor& basis_v, const at::Tensor& hadamard,
                  int64_t basis_first_page, int64_t basis_pages_per_head, int64_t prompt_basis_rank,
                  double scale, at::Tensor& output, const std::optional<at::Tensor>& lse) {
  DecodeArgs args{};
  set_cache(kv_cache, layer, num_kv_heads, args);
  args.query = rows_view(query, "query");
  args.output = rows_view(output, "output");
  TORCH_CHECK(query.size(2) == args.head_size && query.size(1) % num_kv_heads == 0,
              "query: ", query.sizes(), " does not fit ", num_kv_heads, " KV heads of size ",
              args.head_size);
  TORCH_CHECK(output.sizes() == query.sizes(), "output: expected ", query.sizes(), ", got ",
              output.sizes());
  args.num_queries = query.size(0);
  args.group = static_cast<int32_t>(query.size(1) / num_kv_heads);
  args.scale = static_cast<float>(scale);
  set_requests(block_table, query_rows, lengths, leases, args);
  set_formats(formats, args);
  set_basis(basis_k, basis_v, hadamard, basis_first_page, basis_pages_per_head, prompt_basis_rank,
            args);
  if (lse.has_value()) {
    TORCH_CHECK(lse->scalar_type() == at::kFloat && lse->is_contiguous() && lse->dim() == 2 &&
                    lse->size(0) == query.size(0) && lse->size(1) == query.size(1),
                "lse: expected contiguous float32 [", query.size(0), ", ", query.size(1), "], got ",
                lse->scalar_type(), " ", lse->sizes());
    args.lse = lse->data_ptr<float>();
  }
  run_decode(args, machine_kernels());
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("mixed_decode", &mixed_decode); }

}  // namespace mdkv
