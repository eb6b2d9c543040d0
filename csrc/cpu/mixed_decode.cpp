// The mixed_decode operator: checks its arguments and runs the machine's kernels.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cache_args.h"
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
  TORCH_CHECK(!args.prompt_basis || args.max_leases == 1, "leases: ", args.max_leases,
              " per row; a prompt's own basis allows one, because a query is rotated once");
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
