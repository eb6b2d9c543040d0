// The wrappers of csrc/cuda/ptx.cuh on a CPU, so that tests can run the kernels without a GPU.
//
// The threads of a block are fibers; what a warp does together waits until all 32 threads have
// come to it. Products are exact but for one rounding. What would be undefined on a GPU stops the
// run with a message: threads of a warp that part ways, addresses out of shared memory or the
// kv_cache, misaligned ones. Shared memory starts out as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define MDKV_DEVICE inline
#define MDKV_BOTH inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace mdkv {

int thread_index();
int num_threads();
int block_index();

void sync_block();
void sync_warp();

inline uint32_t shared_begin() { return 0; }
uint32_t load_shared32(uint32_t at);
uint32_t load_shared16(uint32_t at);
void store_shared32(uint32_t at, uint32_t word);

inline int opaque(int x) { return x; }

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

void copy_async(uint32_t to, const uint8_t* from);
void commit_copies();
void wait_copies(int pending);

void load_matrices(uint32_t (&m)[4], uint32_t row);
void load_matrices_transposed(uint32_t (&m)[4], uint32_t row);
uint32_t transpose_matrix(uint32_t m);
void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t pool = uint64_t{high} << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    chosen |= static_cast<uint32_t>(pool >> (select >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return chosen;
}

inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift % 32);
}

uint32_t pack_float16x2(float low, float high);
uint32_t pack_bfloat16x2(float low, float high);
float float_of_float16(uint32_t bits);
inline uint32_t multiply_float16x2(uint32_t a, uint32_t b) {
  return pack_float16x2(float_of_float16(a) * float_of_float16(b),
                        float_of_float16(a >> 16) * float_of_float16(b >> 16));
}

// A GPU's flushes to zero what is not normal.
inline float exp2_approximate(float x) { return x < -126 ? 0 : std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }

uint32_t shuffle(uint32_t x, int lane);
uint32_t shuffle_xor(uint32_t x, int mask);
uint32_t ballot(bool vote);
inline int first_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }

struct DecodeArgs;
using Kernel = void (*)(DecodeArgs);
const char* launch(Kernel kernel, int blocks, int threads, int shared_bytes, void* stream,
                   const DecodeArgs& args);
const char* shared_limit(int& bytes);
const char* allow_shared(Kernel kernel, int bytes);
const char* resident_warps(Kernel kernel, int shared_bytes, int& warps);

}  // namespace mdkv
