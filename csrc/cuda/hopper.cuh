// What kernels ask of compute capability 9.0a beyond device.cuh: copies of whole boxes of a tensor
// by one thread, barriers that count their bytes, and matrix products of four warps.
//
// Sources that include this are called *_sm90.cu and compiled for that target alone.
#pragma once

#include "device.cuh"

#if !defined(__CUDACC__)
#include "emulated_hopper.h"
#else

#include <cuda.h>

namespace sbert_fast::cuda {

using TensorMap = CUtensorMap;
#define SBF_GRID_CONSTANT __grid_constant__

/// In shared memory: waits for a number of arrivals, and for the bytes that were announced.
using Barrier = uint64_t;

SBF_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// By one thread; barrier_init_done() and sync_block() must follow before others use it.
SBF_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
SBF_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SBF_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives, and announces bytes that load_box() will bring.
SBF_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits for the end of the phase of this parity: the first phase of a barrier has parity 0, and
/// waiting for parity 1 returns at once before it.
SBF_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra wait;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// Starts copying a box of a tensor of three dims, `c0` the innermost coordinate of its corner, to
/// shared memory, swizzled as the map says; its bytes count towards the barrier. By one thread.
SBF_DEVICE void load_box(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1,
                         int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier))
      : "memory");
}

/// Waits for the other threads, `threads` in all, that come to barrier `index`, 1 to 15.
SBF_DEVICE void sync_threads(int index, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
}
/// Makes what this thread wrote to shared memory visible to matrix products and copies.
SBF_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// More, or fewer, registers for all warps of a group of four.
template <int COUNT>
SBF_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
SBF_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/// Describes a matrix of 16-bit numbers in shared memory for multiply_*(): rows of `row_bytes`, 64
/// or 128, swizzled over as many bytes. Eight rows follow each other; blocks of more columns, where
/// the columns are the dim that is not summed over, are `block_bytes` apart.
SBF_DEVICE uint64_t matrix_descriptor(const void* shared, int row_bytes, int block_bytes) {
  const uint64_t swizzle = row_bytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(block_bytes >> 4) << 16 |
         static_cast<uint64_t>(8 * row_bytes >> 4) << 32 | swizzle << 62;
}
/// The descriptor of what lies `bytes` further.
SBF_DEVICE uint64_t descriptor_behind(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

/// Orders the registers of earlier instructions before the products that follow.
SBF_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes a group of products.
SBF_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most the last `Pending` groups are under way.
template <int Pending>
SBF_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Keeps what is done with products behind the wait for them.
template <int N>
SBF_DEVICE void products_settle(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

#define SBF_D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SBF_D16(d, i) SBF_D4(d, i), SBF_D4(d, i + 1), SBF_D4(d, i + 2), SBF_D4(d, i + 3)
#define SBF_LIST_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SBF_LIST_32                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SBF_LIST_64                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

/// d [64, 64] = a b^T, or that added to d: sixteen columns of a [64, 16] and b [64, 16], both
/// described in shared memory. Of a warp w of the four, rows 16w .. 16w + 15, in the layout of
/// mma_16x8x16() for each eight columns.
template <class T>
SBF_DEVICE void multiply_described(float (&d)[8][4], uint64_t a, uint64_t b, bool add);
#define SBF_MULTIPLY_DESCRIBED(T, type)                                                       \
  template <>                                                                                 \
  SBF_DEVICE void multiply_described<T>(float (&d)[8][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile(                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " SBF_LIST_32           \
        ", %32, %33, p, 1, 1, 0, 0;\n}"                                                       \
        : SBF_D16(d, 0), SBF_D16(d, 4)                                                        \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                        \
  }
SBF_MULTIPLY_DESCRIBED(Half, "f16")
SBF_MULTIPLY_DESCRIBED(BFloat16, "bf16")

/// d [64, 8 * TILES] += a b: a [64, 16] in registers, sixteen rows a warp in the layout of
/// mma_16x8x16(), b [16, 8 * TILES] described in shared memory, its rows those that are summed
/// over.
template <class T, int TILES>
struct MultiplyHeld;
#define SBF_MULTIPLY_HELD(T, type, TILES, n, list, a0, a1, a2, a3, b0, ...)                \
  template <>                                                                              \
  struct MultiplyHeld<T, TILES> {                                                          \
    static SBF_DEVICE void run(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " list \
                   ", {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b0 ", 1, 1, 1, 1;"          \
                   : __VA_ARGS__                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                  \
    }                                                                                      \
  };
#define SBF_MULTIPLY_HELD_TYPE(T, type)                                                           \
  SBF_MULTIPLY_HELD(T, type, 4, "32", SBF_LIST_16, "16", "17", "18", "19", "20", SBF_D16(d, 0))   \
  SBF_MULTIPLY_HELD(T, type, 8, "64", SBF_LIST_32, "32", "33", "34", "35", "36", SBF_D16(d, 0),   \
                    SBF_D16(d, 4))                                                                \
  SBF_MULTIPLY_HELD(T, type, 16, "128", SBF_LIST_64, "64", "65", "66", "67", "68", SBF_D16(d, 0), \
                    SBF_D16(d, 4), SBF_D16(d, 8), SBF_D16(d, 12))
SBF_MULTIPLY_HELD_TYPE(Half, "f16")
SBF_MULTIPLY_HELD_TYPE(BFloat16, "bf16")
#undef SBF_D4
#undef SBF_D16
#undef SBF_LIST_16
#undef SBF_LIST_32
#undef SBF_LIST_64
#undef SBF_MULTIPLY_DESCRIBED
#undef SBF_MULTIPLY_HELD
#undef SBF_MULTIPLY_HELD_TYPE

}  // namespace sbert_fast::cuda

#endif
