// The device functions of csrc/cuda/device.cuh on a CPU, under the same names.
//
// Where a function needs the whole warp or block, the threads really meet; whoever does not come is
// reported. Variables that are SBF_SHARED take `alignas` in front.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "emulated_fibers.h"
#include "emulated_launch.h"
#include "emulated_matrices.h"
#include "emulated_memory.h"
#include "emulated_numbers.h"

#define SBF_DEVICE inline
#define SBF_KERNEL(threads, blocks) static void
// Thread-local variables of a library lie side by side, so that all of them can be poisoned.
#define SBF_SHARED static thread_local

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace sbert_fast::cuda {

using Stream = void*;
using emulation::Location;

inline int thread_index() { return emulation::running.thread; }
inline int block_threads() { return emulation::running.threads; }
inline int block_index() { return static_cast<int>(emulation::running.block); }
inline int num_blocks() { return static_cast<int>(emulation::running.blocks); }

inline void sync_warp(Location at = Location::current()) {
  emulation::meet_warp({"sync_warp", at}, nullptr, [](emulation::Operands) {});
}
inline void sync_block(Location at = Location::current()) {
  emulation::meet_block({"sync_block", at});
}

namespace emulation {

template <class T>
struct Shuffled {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a GPU shuffles 32 or 64 bits");
  T value;
  int source;  // a lane
  T result;
};

template <class T>
T shuffle_from(const Site& site, T value, int source) {
  Shuffled<T> operand = {value, source, value};
  meet_warp(site, &operand, [](Operands operands) {
    for (void* lane : operands) {
      auto& own = *static_cast<Shuffled<T>*>(lane);
      own.result = static_cast<const Shuffled<T>*>(operands[own.source])->value;
    }
  });
  return operand.result;
}

inline int own_lane_index() { return running.thread % kWarpThreads; }

}  // namespace emulation

template <class T>
T shuffle(T value, int lane, Location at = Location::current()) {
  return emulation::shuffle_from({"shuffle", at}, value, lane & 31);
}
template <class T>
T shuffle_xor(T value, int mask, Location at = Location::current()) {
  const int lane = emulation::own_lane_index() ^ (mask & 31);
  return emulation::shuffle_from({"shuffle_xor", at}, value, lane);
}
template <class T>
T shuffle_up(T value, int distance, Location at = Location::current()) {
  const int own = emulation::own_lane_index(), lane = own - (distance & 31);
  return emulation::shuffle_from({"shuffle_up", at}, value, lane < 0 ? own : lane);
}
inline uint32_t ballot(bool predicate, Location at = Location::current()) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } vote = {predicate, 0};
  emulation::meet_warp({"ballot", at}, &vote, [](emulation::Operands operands) {
    uint32_t result = 0;
    for (int lane = 0; lane < emulation::kWarpThreads; ++lane) {
      if (static_cast<Vote*>(operands[lane])->predicate) result |= 1u << lane;
    }
    for (void* lane : operands) static_cast<Vote*>(lane)->result = result;
  });
  return vote.result;
}

/// The number of zero bits below the lowest one of `bits`, which has one.
inline int count_trailing_zeros(uint32_t bits) { return std::countr_zero(bits); }

inline unsigned char* shared_memory() { return emulation::dynamic_shared_memory(); }

/// Subnormal numbers are zero on either side, as on the GPU.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

/// The two numbers of a word, `x` from its low half.
template <class T>
float2 unpack(uint32_t word) {
  return {unpack_half<T>(word, 0), unpack_half<T>(word, 1)};
}

inline Vector load_16(const void* address) {
  emulation::require_aligned("load_16", address);
  emulation::require_not_shared("load_16", address);
  return *static_cast<const Vector*>(address);
}
inline void store_16(void* address, const Vector& v) {
  emulation::require_aligned("store_16", address);
  emulation::require_not_shared("store_16", address);
  *static_cast<Vector*>(address) = v;
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 Location at = Location::current()) {
  emulation::Product operand = {d, a, {b0, b1}};
  emulation::meet_warp({"mma_16x8x16", at}, &operand, emulation::multiply_fragments<T>);
}

inline uint32_t transpose_8x8(uint32_t row, Location at = Location::current()) {
  emulation::meet_warp({"transpose_8x8", at}, &row, emulation::transpose_fragments);
  return row;
}

inline Vector load_matrices_transposed(const void* row, Location at = Location::current()) {
  return emulation::load_column_fragments({"load_matrices_transposed", at}, row);
}

inline void copy_async_16(void* shared, const void* global, bool live) {
  emulation::require_aligned("copy_async_16", shared);
  emulation::require_shared("copy_async_16", shared, 16);
  emulation::require_aligned("copy_async_16", global);
  if (live) emulation::require_not_shared("copy_async_16", global);
  emulation::start_copy(shared, live ? global : nullptr);
}
inline void copy_async_commit() { emulation::close_copy_group(); }
template <int Pending>
void copy_async_wait() {
  emulation::finish_copies(Pending);
}

}  // namespace sbert_fast::cuda
