// The pack_layer operator: gathers and packs every list of a layer.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "compress_tensors.h"
#include "formats.h"
#include "isa.h"
#include "tensors.h"

namespace mdkv {
namespace {

struct FormatVectors {
  PackArgs args;
  at::Tensor keys, values;
};

struct PageOfTokens {
  int64_t format, head;
  int64_t begin, count;  // in the list of the head's tokens at this format
};

FormatVectors vectors_of(const at::Tensor& keys, const at::Tensor& values, const Format& format,
                         const at::Tensor& choice, Element element, int64_t page_bytes) {
  for (const at::Tensor* rows : {&keys, &values}) {
    check_float_rows(*rows, rows == &keys ? "keys" : "values");
    TORCH_CHECK(rows->size(0) == choice.size(0) && rows->size(1) == choice.size(1) &&
                    rows->size(2) == format.rank,
                "keys: shape ", rows->sizes(), " at rank ", format.rank, " for a choice of ",
                choice.sizes());
  }
  return {{format, element, page_bytes}, keys, values};
}

// keys, values: per format float32 [heads, span, rank] in its space. formats: see formats.h.
// choice: int64 [heads, span], a format or -1. pages: uint8 [pages, page_bytes]; the lists' pages
// are written by head, then format. Returns how many.
int64_t pack_layer(at::TensorList keys, at::TensorList values, const at::Tensor& formats,
                   const at::Tensor& choice, at::Tensor& pages, at::ScalarType element) {
  const int64_t num_formats = count_formats(formats);
  TORCH_CHECK(static_cast<int64_t>(keys.size()) == num_formats && values.size() == keys.size(),
              "keys: expected ", num_formats, " of keys and of values, got ", keys.size(), " and ",
              values.size());
  TORCH_CHECK(choice.scalar_type() == at::kLong && choice.dim() == 2 && choice.is_contiguous(),
              "choice: expected contiguous int64 [heads, span], got ", choice.scalar_type(), " ",
              choice.sizes());
  TORCH_CHECK(pages.scalar_type() == at::kByte && pages.dim() == 2 && pages.is_contiguous(),
              "pages: expected contiguous uint8 [pages, page_bytes], got ", pages.scalar_type(),
              " ", pages.sizes());
  std::vector<FormatVectors> vectors;
  int64_t most_scratch = 0;
  for (int64_t f = 0; f < num_formats; ++f) {
    const Format read = read_format(formats, f, element_of(element, "element"), pages.size(1));
    vectors.push_back(vectors_of(keys[f], values[f], read, choice, element_of(element, "element"),
                                 pages.size(1)));
    const Format& format = vectors.back().args.format;
    most_scratch = std::max<int64_t>(most_scratch, int64_t{format.rank} * format.tokens_per_page);
  }

  const int64_t heads = choice.size(0), span = choice.size(1);
  std::vector<std::vector<int32_t>> lists(heads * num_formats);
  for (int64_t i = 0; i < heads * span; ++i) {
    const int64_t format = choice.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(format >= -1 && format < num_formats, "choice: format ", format, " of ",
                num_formats);
    if (format >= 0) {
      lists[i / span * num_formats + format].push_back(static_cast<int32_t>(i % span));
    }
  }
  std::vector<PageOfTokens> work;
  for (int64_t i = 0; i < heads * num_formats; ++i) {
    const int64_t capacity = vectors[i % num_formats].args.format.tokens_per_page;
    const int64_t tokens = static_cast<int64_t>(lists[i].size());
    for (int64_t t = 0; t < tokens; t += capacity) {
      work.push_back({i % num_formats, i / num_formats, t, std::min(capacity, tokens - t)});
    }
  }
  const int64_t num_pages = static_cast<int64_t>(work.size());
  TORCH_CHECK(num_pages <= pages.size(0), "pages: ", pages.size(0), ", but the lists take ",
              num_pages);
  at::parallel_for(0, num_pages, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys_of_page(most_scratch), values_of_page(most_scratch);
    std::vector<uint8_t> codes(most_scratch);
    for (int64_t page = begin; page < end; ++page) {
      const PageOfTokens& item = work[page];
      const FormatVectors& from = vectors[item.format];
      const int64_t rank = from.args.format.rank;
      const int32_t* tokens = lists[item.head * num_formats + item.format].data() + item.begin;
      for (int64_t t = 0; t < item.count; ++t) {
        std::memcpy(&keys_of_page[t * rank], float_row(from.keys, item.head, tokens[t]), 4 * rank);
        std::memcpy(&values_of_page[t * rank], float_row(from.values, item.head, tokens[t]),
                    4 * rank);
      }
      machine_kernels().pack_list(from.args, keys_of_page.data(), values_of_page.data(), item.count,
                                  codes.data(), pages.data_ptr<uint8_t>() + page * pages.size(1));
    }
  });
  return num_pages;
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("pack_layer", &pack_layer); }

}  // namespace mdkv
