// What the kernels ask of a GPU, each instruction under a name of its own.
//
// Kernels use these and plain C++, nothing else, so that they also run thread by thread on a CPU:
// without nvcc the same names come from tests/cuda_emulator. Every function that names a warp or a
// block must be reached by all of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

#if !defined(__CUDACC__)
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SBF_DEVICE __device__ __forceinline__
/// A kernel of at most `threads` a block, `blocks` of them on a multiprocessor at the least.
#define SBF_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define SBF_SHARED __shared__

namespace sbert_fast::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Stream = cudaStream_t;

struct alignas(16) Vector {
  uint32_t word[4];
};

SBF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SBF_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
SBF_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
SBF_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

SBF_DEVICE void sync_warp() { __syncwarp(); }
SBF_DEVICE void sync_block() { __syncthreads(); }

template <class T>
SBF_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
SBF_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
SBF_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
SBF_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

/// The number of zero bits below the lowest one of `bits`, which has one.
SBF_DEVICE int count_trailing_zeros(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

/// The block's dynamic shared memory, 128-byte aligned.
SBF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char sbf_shared_memory[];
  return sbf_shared_memory;
}

/// 2^x, two units in the last place; 0 for -infinity.
SBF_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 1 / x, one unit in the last place.
SBF_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SBF_DEVICE float rsqrt_approx(float x) { return rsqrtf(x); }
SBF_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SBF_DEVICE float infinity() { return __int_as_float(0x7f800000); }

/// Two numbers rounded to nearest even, `low` in the low half of the word.
template <class T>
SBF_DEVICE uint32_t pack(float low, float high);
template <>
SBF_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
SBF_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// The two numbers of a word, `x` from its low half.
template <class T>
SBF_DEVICE float2 unpack(uint32_t word);
template <>
SBF_DEVICE float2 unpack<Half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
SBF_DEVICE float2 unpack<BFloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

/// 16 bytes of memory that no thread writes during the kernel.
SBF_DEVICE Vector load_16(const void* address) {
  Vector v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(address));
  return v;
}
SBF_DEVICE void store_16(void* address, const Vector& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

/// d += a b on the tensor cores: a [16, 16] by rows, b [16, 8] by columns, d [16, 8] fp32.
///
/// Of lane l, with g = l / 4 and c = l % 4: a = {(g, 2c..), (g + 8, 2c..), (g, 2c + 8..),
/// (g + 8, 2c + 8..)} in (row, columns); b = {(2c.., g), (2c + 8.., g)} in (rows, column);
/// d = {(g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)}.
template <class T>
SBF_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SBF_DEVICE void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SBF_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The transpose of an 8 x 8 matrix of 16-bit numbers: lane l holds two neighbours of row l / 4.
SBF_DEVICE uint32_t transpose_8x8(uint32_t row) {
  uint32_t column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

/// Four 8 x 8 matrices of 16-bit numbers from shared memory, each transposed; lane l names row l %
/// 8 of matrix l / 8, 16 bytes, and gets in word m two neighbours of column l / 4 of matrix m.
SBF_DEVICE Vector load_matrices_transposed(const void* row) {
  Vector v;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

/// Start copying 16 bytes to shared memory; zeros, and nothing is read, where not `live`.
SBF_DEVICE void copy_async_16(void* shared, const void* global, bool live) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(live ? 16 : 0)
               : "memory");
}
/// Close a group of copies.
SBF_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Wait until at most the last `Pending` groups of this thread are under way.
template <int Pending>
SBF_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace sbert_fast::cuda

#endif
