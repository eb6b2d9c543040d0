// Full-dimension tokens into and out of one layer's view of the cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "isa.h"
#include "tensors.h"

namespace mdkv {
namespace {

// Bytes one thread should at least copy.
constexpr int64_t kGrainBytes = 16 * 1024;

// A layer's view [blocks, kv_heads, block_size, 2 * head_size]; strides in bytes.
struct LayerView {
  char* data;
  Element type;
  int64_t blocks, heads, block_size, head_size;
  int64_t block_stride, head_stride, slot_stride;

  explicit LayerView(const at::Tensor& cache) : type(element_of(cache, "kv_cache")) {
    TORCH_CHECK(
        cache.dim() == 4 && cache.stride(3) == 1 && cache.size(3) % 2 == 0,
        "kv_cache: expected [blocks, kv_heads, block_size, 2 * head_size] with a contiguous "
        "last dimension, got ",
        cache.sizes(), " with strides ", cache.strides());
    const int64_t item = cache.element_size();
    data = static_cast<char*>(cache.data_ptr());
    blocks = cache.size(0), heads = cache.size(1), block_size = cache.size(2);
    head_size = cache.size(3) / 2;
    block_stride = cache.stride(0) * item, head_stride = cache.stride(1) * item;
    slot_stride = cache.stride(2) * item;
  }
  char* slot(int64_t block, int64_t head, int64_t offset) const {
    return data + block * block_stride + head * head_stride + offset * slot_stride;
  }
};

int64_t grain(int64_t bytes_per_item) { return std::max<int64_t>(1, kGrainBytes / bytes_per_item); }

void check_rows(const at::Tensor& rows, const char* name, const LayerView& cache) {
  TORCH_CHECK(rows.dim() == 3 && rows.size(1) == cache.heads && rows.size(2) == cache.head_size &&
                  rows.stride(2) == 1,
              name, ": expected [tokens, ", cache.heads, ", ", cache.head_size,
              "] with a contiguous last dimension, got ", rows.sizes(), " with strides ",
              rows.strides());
}

// key, value: [tokens, kv_heads, head_size]. slot_mapping: int64 [tokens or more]; a negative slot
// skips its token.
void store_kv(const at::Tensor& key, const at::Tensor& value, at::Tensor& kv_cache,
              const at::Tensor& slot_mapping) {
  const LayerView cache(kv_cache);
  check_rows(key, "key", cache);
  check_rows(value, "value", cache);
  TORCH_CHECK(value.sizes() == key.sizes() && value.scalar_type() == key.scalar_type(),
              "value: expected ", key.scalar_type(), " ", key.sizes(), ", got ",
              value.scalar_type(), " ", value.sizes());
  TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && slot_mapping.dim() == 1 &&
                  slot_mapping.size(0) >= key.size(0) && slot_mapping.is_contiguous(),
              "slot_mapping: expected contiguous int64 [", key.size(0), " or more], got ",
              slot_mapping.scalar_type(), " ", slot_mapping.sizes());
  const Element type = element_of(key, "key");
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const int64_t tokens = key.size(0), limit = cache.blocks * cache.block_size;
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK(slots[t] < limit, "slot_mapping: slot ", slots[t], " of ", limit);
  }
  const auto convert = machine_kernels().convert;
  const int64_t half = cache.head_size * element_bytes(cache.type);
  const auto row = [](const at::Tensor& rows, int64_t token, int64_t head) {
    return static_cast<const char*>(rows.const_data_ptr()) +
           (token * rows.stride(0) + head * rows.stride(1)) * rows.element_size();
  };
  at::parallel_for(0, tokens, grain(2 * half * cache.heads), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      const int64_t block = slots[t] / cache.block_size, offset = slots[t] % cache.block_size;
      for (int64_t head = 0; head < cache.heads; ++head) {
        char* slot = cache.slot(block, head, offset);
        convert(row(key, t, head), type, slot, cache.type, cache.head_size);
        convert(row(value, t, head), type, slot + half, cache.type, cache.head_size);
      }
    }
  });
}

void check_gathered(const at::Tensor& rows, const char* name, int64_t tokens,
                    const LayerView& cache) {
  TORCH_CHECK(rows.dim() == 3 && rows.size(0) == cache.heads && rows.size(1) == tokens &&
                  rows.size(2) == cache.head_size && rows.stride(2) == 1,
              name, ": expected [", cache.heads, ", ", tokens, ", ", cache.head_size,
              "] with a contiguous last dimension, got ", rows.sizes(), " with strides ",
              rows.strides());
}

// Gathers the first num_tokens tokens of the listed blocks.
//
// block_ids: int32 or int64 [blocks]. keys, values: [kv_heads, num_tokens, head_size].
void load_kv(const at::Tensor& kv_cache, const at::Tensor& block_ids, int64_t num_tokens,
             at::Tensor& keys, at::Tensor& values) {
  const LayerView cache(kv_cache);
  const bool wide = block_ids.scalar_type() == at::kLong;
  TORCH_CHECK((wide || block_ids.scalar_type() == at::kInt) && block_ids.dim() == 1 &&
                  block_ids.is_contiguous(),
              "block_ids: expected contiguous int32 or int64 of one dimension, got ",
              block_ids.scalar_type(), " ", block_ids.sizes());
  const int64_t blocks = (num_tokens + cache.block_size - 1) / cache.block_size;
  TORCH_CHECK(num_tokens >= 0 && blocks <= block_ids.size(0), "num_tokens: ", num_tokens,
              " tokens do not lie in ", block_ids.size(0), " blocks of ", cache.block_size);
  check_gathered(keys, "keys", num_tokens, cache);
  check_gathered(values, "values", num_tokens, cache);
  const Element key_type = element_of(keys, "keys"), value_type = element_of(values, "values");
  const auto block_at = [&](int64_t i) {
    return wide ? block_ids.const_data_ptr<int64_t>()[i]
                : int64_t{block_ids.const_data_ptr<int32_t>()[i]};
  };
  for (int64_t i = 0; i < blocks; ++i) {
    TORCH_CHECK(block_at(i) >= 0 && block_at(i) < cache.blocks, "block_ids: block ", block_at(i),
                " of ", cache.blocks);
  }
  const auto convert = machine_kernels().convert;
  const int64_t half = cache.head_size * element_bytes(cache.type);
  const auto row = [](at::Tensor& rows, int64_t head, int64_t token) {
    return static_cast<char*>(rows.data_ptr()) +
           (head * rows.stride(0) + token * rows.stride(1)) * rows.element_size();
  };
  // Heads outermost: what a thread writes is contiguous.
  at::parallel_for(
      0, cache.heads * blocks, grain(2 * half * cache.block_size), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item / blocks, index = item % blocks, block = block_at(index);
          const int64_t first = index * cache.block_size;
          const int64_t count = std::min(cache.block_size, num_tokens - first);
          for (int64_t t = 0; t < count; ++t) {
            const char* slot = cache.slot(block, head, t);
            convert(slot, cache.type, row(keys, head, first + t), key_type, cache.head_size);
            convert(slot + half, cache.type, row(values, head, first + t), value_type,
                    cache.head_size);
          }
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) {
  m.impl("store_kv", &store_kv);
  m.impl("load_kv", &load_kv);
}

}  // namespace mdkv
