// The round_trip operator: keys as their codes will be read back, and the values' errors.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "compress_tensors.h"
#include "isa.h"

namespace mdkv {
namespace {

constexpr int64_t kChunk = 64;  // tokens of one head that a thread takes at a time

// keys, values: float32 [heads, span, rank], innermost contiguous. Returns keys as read back, the
// same shape, and the squared error of each value, [heads, span].
std::tuple<at::Tensor, at::Tensor> round_trip(const at::Tensor& keys, const at::Tensor& values,
                                              int64_t bits) {
  check_float_rows(keys, "keys");
  check_float_rows(values, "values");
  TORCH_CHECK(values.sizes() == keys.sizes(), "values: expected ", keys.sizes(), ", got ",
              values.sizes());
  TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, "bits: expected 8, 4 or 2, got ", bits);
  const int64_t heads = keys.size(0), span = keys.size(1), rank = keys.size(2);
  at::Tensor read = at::empty({heads, span, rank}, keys.options());
  at::Tensor error = at::empty({heads, span}, keys.options());
  const int64_t chunks = (span + kChunk - 1) / kChunk;
  at::parallel_for(0, heads * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / chunks, first = item % chunks * kChunk;
      ReadBack rows{};
      rows.count = std::min(kChunk, span - first);
      rows.rank = static_cast<int>(rank);
      rows.bits = static_cast<int>(bits);
      rows.rows = float_row(keys, head, first);
      rows.stride = keys.stride(1);
      rows.read = read.data_ptr<float>() + (head * span + first) * rank;
      machine_kernels().read_back(rows);
      rows.rows = float_row(values, head, first);
      rows.stride = values.stride(1);
      rows.read = nullptr;
      rows.error = error.data_ptr<float>() + head * span + first;
      machine_kernels().read_back(rows);
    }
  });
  return {read, error};
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("round_trip", &round_trip); }

}  // namespace mdkv
