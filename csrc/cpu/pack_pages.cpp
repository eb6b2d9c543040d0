// The pack_pages operator: tokens of many lists into pages.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

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

Element element_of_type(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "element: expected float32, bfloat16 or float16, got ", type);
  return type == at::kFloat      ? Element::kFloat32
         : type == at::kBFloat16 ? Element::kBFloat16
                                 : Element::kFloat16;
}

// keys, values: float32 [lists, max_tokens, rank]. counts: int32 [lists], tokens of each list.
// pages: uint8 [pages of all lists, page_bytes], one list after the other.
void pack_pages(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& counts,
                int64_t rank, int64_t bits, int64_t tokens_per_page, at::Tensor& pages,
                at::ScalarType element, bool token_major) {
  check_vectors(keys, "keys", rank);
  check_vectors(values, "values", rank);
  TORCH_CHECK(values.sizes() == keys.sizes(), "values: expected ", keys.sizes(), ", got ",
              values.sizes());
  const int64_t lists = keys.size(0);
  TORCH_CHECK(counts.scalar_type() == at::kInt && counts.dim() == 1 && counts.size(0) == lists &&
                  counts.is_contiguous(),
              "counts: expected contiguous int32 [", lists, "], got ", counts.scalar_type(), " ",
              counts.sizes());
  TORCH_CHECK(pages.scalar_type() == at::kByte && pages.dim() == 2 && pages.is_contiguous(),
              "pages: expected contiguous uint8 [pages, page_bytes], got ", pages.scalar_type(),
              " ", pages.sizes());
  PackArgs args{};
  args.element = element_of_type(element);
  args.token_major = token_major;
  args.page_bytes = pages.size(1);
  const bool codes = bits == 8 || bits == 4 || bits == 2;
  TORCH_CHECK(codes ? !token_major : bits == 8 * element_bytes(args.element), "bits: ", bits,
              " in a format of ", element);
  TORCH_CHECK(rank > 0 && rank % 4 == 0, "rank: ", rank, " is not a multiple of 4");
  TORCH_CHECK(tokens_per_page > 0 && tokens_per_page * bits % 8 == 0,
              "tokens_per_page: ", tokens_per_page);
  args.format.rank = static_cast<int32_t>(rank);
  args.format.bits = static_cast<int32_t>(bits);
  args.format.tokens_per_page = static_cast<int32_t>(tokens_per_page);
  args.format.codes = codes;
  args.format.section_bytes = rank * tokens_per_page * bits / 8;
  TORCH_CHECK(2 * args.format.section_bytes + (codes ? 4 * tokens_per_page : 0) <= args.page_bytes,
              "tokens_per_page: ", tokens_per_page, " tokens do not fit a page of ",
              args.page_bytes);

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
    std::vector<uint8_t> scratch(tokens_per_page * rank);
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
