// Everything that is not plain C++: one wrapper per PTX instruction or intrinsic, none elsewhere.
//
// Shared memory is addressed by byte offsets of 32 bits. The tests compile the kernels as C++
// with wrappers of the same names that do the same on a CPU (tests/kernels/cuda_host).
#pragma once

#include <cstdint>

#ifdef MDKV_ON_HOST
#include "cuda_host.h"
#else
#include <cuda_runtime.h>

#define MDKV_DEVICE __device__ __forceinline__
#define MDKV_BOTH __host__ __device__ __forceinline__

namespace mdkv {

extern __shared__ __align__(128) uint8_t dynamic_shared[];

MDKV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MDKV_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
MDKV_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

MDKV_DEVICE void sync_block() { __syncthreads(); }
MDKV_DEVICE void sync_warp() { __syncwarp(); }

// Where dynamic shared memory starts.
MDKV_DEVICE uint32_t shared_begin() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

MDKV_DEVICE uint32_t load_shared32(uint32_t at) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(at));
  return word;
}

MDKV_DEVICE uint32_t load_shared16(uint32_t at) {
  uint16_t half;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(half) : "r"(at));
  return half;
}

MDKV_DEVICE void store_shared32(uint32_t at, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

// The same number, of which the compiler knows nothing: what follows from it is then computed where
// it is used, not kept in registers from before a loop.
MDKV_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

MDKV_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MDKV_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// 16 bytes from global to shared memory, past the registers and the L1 cache.
MDKV_DEVICE void copy_async(uint32_t to, const uint8_t* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}

// Closes a group of this thread's copies.
MDKV_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` (0 to 3) of this thread's newest groups are under way.
MDKV_DEVICE void wait_copies(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes. A
// thread gets elements 2 (l % 4) and the next of row l / 4 of each.
MDKV_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
}

// The same, transposed: column l / 4 of rows 2 (l % 4) and the next.
MDKV_DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
}

// Transposes an 8 x 8 matrix of 16-bit elements that lies in registers.
MDKV_DEVICE uint32_t transpose_matrix(uint32_t m) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
  return transposed;
}

// c += a b: a is 16 x 16, b 16 x 8, both of 16-bit elements; c is 16 x 8 of float.
MDKV_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

MDKV_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four of the eight bytes of high:low, each named by a digit of `select`.
MDKV_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t select) {
  return __byte_perm(low, high, select);
}

// The low word of high:low shifted right by `shift` % 32 bits.
MDKV_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

MDKV_DEVICE uint32_t pack_float16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

MDKV_DEVICE uint32_t multiply_float16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

MDKV_DEVICE uint32_t pack_bfloat16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

MDKV_DEVICE float float_of_float16(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

MDKV_DEVICE float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

MDKV_DEVICE float log2_approximate(float x) {
  float logarithm;
  asm("lg2.approx.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
}

MDKV_DEVICE float reciprocal_approximate(float x) {
  float reciprocal;
  asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

MDKV_DEVICE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
MDKV_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
MDKV_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
MDKV_DEVICE int first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

}  // namespace mdkv
#endif
