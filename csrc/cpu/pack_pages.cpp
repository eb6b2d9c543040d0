// The pack_pages operator: tokens of many lists into pages.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "formats.h"
#include "isa.h"
#include "tensors.h"

namespace mdkv {
namespace {

void check_vectors(const at::Tensor& vectors, const char* name, int64_t rank) {
  TORCH_CHECK(vectors.scalar_type() == at::kFloat && vectors.dim() == 3 &&
                  vectors.size(2) == rank && vectors.is_contiguous(),
              name, ": expected contiguous float32 [lists, tokens, ", rank, "], got ",
              vectors.scalar_type(), " ", vectors.sizes());
}

// keys, values: float32 [lists, max_tokens, rank]. counts: int32 [lists], tokens of each list.
// format: one row, see formats.h. pages: uint8 [pages of all lists, page_bytes], one list after the
// other.
void pack_pages(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& counts,
                const at::Tensor& format, at::Tensor& pages, at::ScalarType element) {
  TORCH_CHECK(pages.scalar_type() == at::kByte && pages.dim() == 2 && pages.is_contiguous(),
              "pages: expected contiguous uint8 [pages, page_bytes], got ", pages.scalar_type(),
              " ", pages.sizes());
  TORCH_CHECK(count_formats(format) == 1, "format: expected one, got ", format.sizes());
  const Element type = element_of(element, "element");
  const PackArgs args{read_format(format, 0, type, pages.size(1)), type, pages.size(1)};
  const int64_t rank = args.format.rank;
  check_vectors(keys, "keys", rank);
  check_vectors(values, "values", rank);
  TORCH_CHECK(values.sizes() == keys.sizes(), "values: expected ", keys.sizes(), ", got ",
              values.sizes());
  const int64_t lists = keys.size(0);
  TORCH_CHECK(counts.scalar_type() == at::kInt && counts.dim() == 1 && counts.size(0) == lists &&
                  counts.is_contiguous(),
              "counts: expected contiguous int32 [", lists, "], got ", counts.scalar_type(), " ",
              counts.sizes());
  const int32_t* tokens = counts.const_data_ptr<int32_t>();
  std::vector<int64_t> first_page(lists + 1, 0);
  for (int64_t i = 0; i < lists; ++i) {
    TORCH_CHECK(tokens[i] >= 0 && tokens[i] <= keys.size(1), "counts: list ", i, " has ", tokens[i],
                " tokens of ", keys.size(1));
    first_page[i + 1] = first_page[i] + args.format.pages(tokens[i]);
  }
  TORCH_CHECK(first_page[lists] <= pages.size(0), "pages: ", pages.size(0), ", but the lists take ",
              first_page[lists]);
  const int64_t list_size = keys.size(1) * rank;
  at::parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(args.format.tokens_per_page * rank);
    for (int64_t i = begin; i < end; ++i) {
      machine_kernels().pack_list(args, keys.const_data_ptr<float>() + i * list_size,
                                  values.const_data_ptr<float>() + i * list_size, tokens[i],
                                  scratch.data(),
                                  pages.data_ptr<uint8_t>() + first_page[i] * args.page_bytes);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("pack_pages", &pack_pages); }

}  // namespace mdkv
