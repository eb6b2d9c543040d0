// Decode attention over mixed-dimension pages on NVIDIA GPUs: the C interface of libmdkv_cuda.
//
// Raw pointers, sizes and a stream: no torch, so one library serves every torch. Nothing here
// synchronises or reads device memory from the host, so calls can be captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/page_format.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MDKV_CUDA_ABI 4
#define MDKV_MAX_FORMATS 16

enum mdkv_element { MDKV_FLOAT32 = 0, MDKV_FLOAT16 = 1, MDKV_BFLOAT16 = 2 };

// A model's cache. Formats are in the page table's order; behind them is the tail's.
typedef struct {
  int32_t element;  // mdkv_element of the cache: float16 or bfloat16
  int32_t head_size;
  int32_t block_size;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t group;  // query heads per KV head
  int32_t num_formats;
  int32_t basis_rank;        // directions of the basis, calibrated or the prompt's; 0 for none
  int32_t prompt_basis;      // 1 where the basis lies in the lease
  int32_t basis_first_page;  // of a lease, where its bases start
  int32_t basis_pages;       // pages of one head's bases
  int32_t max_leases;        // of a request; 1 with prompt bases
  mdkv_page_format formats[MDKV_MAX_FORMATS + 1];
} mdkv_shape;

// How the kernel runs on one device; from shapes alone.
typedef struct {
  int32_t warps;         // that share the pages of a batch, all resident at once
  int32_t stages;        // pages in flight or in use per warp
  int32_t shared_bytes;  // of shared memory per warp
} mdkv_plan;

// One call. Strides are in elements, pointers are the device's.
typedef struct {
  const void* query;  // [queries, q_heads, head_size], last dimension contiguous
  int64_t query_stride;
  int64_t query_head_stride;
  int32_t query_element;  // mdkv_element, of the output too
  int32_t queries;
  const void* kv_cache;  // [blocks, layers * kv_heads, block_size, 2 * head_size], 16-byte aligned
  int32_t layer;
  float scale;
  const int32_t* block_table;  // [rows, blocks]
  int64_t table_stride;
  const int32_t* query_rows;  // [queries]
  const int32_t* lengths;     // [queries]; 0 for padding
  const int32_t* leases;      // [rows, max_leases, 2]: where each begins and ends; 0, 0 for none
  const float* basis_keys;    // [kv_heads, basis_rank, head_size] of the layer, if calibrated
  const float* basis_values;
  void* output;  // as query
  int64_t output_stride;
  int64_t output_head_stride;
  float* lse;       // [queries, q_heads], natural logarithm; may be null
  void* recent;     // [queries, q_heads, head_size], written: the queries as they are; may be null
  void* workspace;  // 16-byte aligned; need not be cleared
} mdkv_call;

// Every function returns 0, or another number after which mdkv_cuda_error says why.
const char* mdkv_cuda_error(void);

// MDKV_CUDA_ABI of the library.
int mdkv_cuda_abi(void);

// Fill in a plan for the current device. Refuses shapes that are not built.
int mdkv_cuda_make_plan(const mdkv_shape* shape, mdkv_plan* plan);

// Bytes that a workspace needs for batches of up to max_queries queries.
int mdkv_cuda_workspace_bytes(const mdkv_shape* shape, const mdkv_plan* plan, int32_t max_queries,
                              size_t* bytes);

// Attention of single-token queries over leases and full-dimension tokens. Nothing is checked on
// the device: ids and lengths have to be right. `stream` is a cudaStream_t.
int mdkv_cuda_mixed_decode(const mdkv_shape* shape, const mdkv_plan* plan, const mdkv_call* call,
                           void* stream);

#ifdef __cplusplus
}
#endif
