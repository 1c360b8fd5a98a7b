// The functions of csrc/cuda/hopper.cuh on a CPU.
//
// What is asynchronous happens as late as it may: a box arrives when somebody waits for its
// barrier, products are computed when their group is waited for.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "emulated_device.h"

#define SBF_GRID_CONSTANT

namespace sbert_fast::cuda {

/// A tensor of 16-bit numbers of three dims, innermost first, and the shape of its boxes.
struct TensorMap {
  const unsigned char* base;
  int64_t sizes[3];
  int64_t strides[3];  // in bytes
  int box[3];
  int swizzle;  // in bytes
};

using Barrier = uint64_t;

namespace emulation {

struct BarrierState {
  uint8_t arrivals;
  uint8_t missing;
  uint8_t parity;  // of the phase that has not ended
  uint8_t ready;
  int32_t bytes;  // announced, not yet there

  static BarrierState of(const Barrier* barrier) {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    if (state.ready != 1) fail("a barrier is used before it is initialised");
    return state;
  }
  void store(Barrier* barrier) {
    if (missing == 0 && bytes == 0) {
      parity ^= 1;
      missing = arrivals;
    }
    std::memcpy(barrier, this, sizeof(*this));
  }
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

struct Box {
  unsigned char* shared;
  TensorMap map;
  Barrier* barrier;
  int64_t corner[3];
};
inline std::vector<Box> boxes;

/// Where swizzles and descriptors count from.
inline unsigned char* shared_origin() {
  unsigned char* memory = dynamic_shared_memory();
  return memory - reinterpret_cast<uintptr_t>(memory) % 1024;
}
/// What lies at `offset` before the swizzle over rows of `row_bytes` is undone.
inline unsigned char* swizzled(int64_t offset, int row_bytes) {
  const int64_t turn = (offset >> 7) % (row_bytes / 16);
  return shared_origin() + (offset ^ turn << 4);
}

inline void deliver(const Box& box) {
  const TensorMap& map = box.map;
  const int row_bytes = map.box[0] * 2;
  const int64_t target = box.shared - shared_origin();
  for (int64_t i = 0; i < static_cast<int64_t>(map.box[1]) * map.box[2]; ++i) {
    const int64_t at[3] = {box.corner[0], box.corner[1] + i % map.box[1],
                           box.corner[2] + i / map.box[1]};
    const bool inside = at[1] < map.sizes[1] && at[2] < map.sizes[2];
    for (int column = 0; column < map.box[0]; ++column) {
      uint16_t value = 0;
      if (inside && at[0] + column < map.sizes[0]) {
        const int64_t offset =
            (at[0] + column) * map.strides[0] + at[1] * map.strides[1] + at[2] * map.strides[2];
        std::memcpy(&value, map.base + offset, sizeof(value));
      }
      std::memcpy(swizzled(target + i * row_bytes + column * 2, row_bytes), &value, sizeof(value));
    }
  }
  BarrierState state = BarrierState::of(box.barrier);
  state.bytes -= row_bytes * map.box[1] * map.box[2];
  state.store(box.barrier);
}

/// Brings the boxes that count towards a barrier.
inline void deliver_boxes(const Barrier* barrier) {
  const auto own = [&](const Box& box) { return box.barrier == barrier; };
  std::for_each(boxes.begin(), boxes.end(), [&](const Box& box) {
    if (own(box)) deliver(box);
  });
  std::erase_if(boxes, own);
}

}  // namespace emulation

inline void barrier_init(Barrier* barrier, int arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  std::erase_if(emulation::boxes, [&](const auto& box) { return box.barrier == barrier; });
  emulation::BarrierState{count, count, 0, 1, 0}.store(barrier);
}
inline void barrier_init_done() {}
inline void barrier_arrive(Barrier* barrier) {
  auto state = emulation::BarrierState::of(barrier);
  if (state.missing == 0) emulation::fail("more threads arrive at a barrier than it waits for");
  --state.missing;
  state.store(barrier);
}
inline void barrier_expect(Barrier* barrier, int bytes) {
  auto state = emulation::BarrierState::of(barrier);
  state.bytes += bytes;
  --state.missing;
  state.store(barrier);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity, Location at = Location::current()) {
  emulation::wait_until({"barrier_wait", at}, [&] {
    if (emulation::BarrierState::of(barrier).parity != parity) return true;
    emulation::deliver_boxes(barrier);
    return emulation::BarrierState::of(barrier).parity != parity;
  });
}

inline void load_box(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
  emulation::require_shared("load_box", shared, map.box[0] * map.box[1] * map.box[2] * 2);
  const auto* bytes = static_cast<unsigned char*>(shared);
  if ((bytes - emulation::shared_origin()) % (map.swizzle * 8) != 0) {
    emulation::fail("load_box: a swizzled box begins at a multiple of eight rows");
  }
  emulation::boxes.push_back({static_cast<unsigned char*>(shared), map, barrier, {c0, c1, c2}});
}

/// Of `threads` threads, in whole warps, whoever comes last lets the others go.
inline void sync_threads(int index, int threads, Location at = Location::current()) {
  struct Count {
    int64_t block = -1;
    int arrived = 0;
    int64_t rounds = 0;
  };
  static Count counts[16];
  Count& count = counts[index];
  if (count.block != emulation::running.block || count.arrived == 0) {
    count.block = emulation::running.block;
    count.arrived = 0;
  }
  const int64_t round = count.rounds;
  if (++count.arrived == threads) {
    count.arrived = 0;
    ++count.rounds;
    return;
  }
  emulation::wait_until({"sync_threads", at}, [&] { return count.rounds != round; });
}
inline void publish_shared() {}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

inline uint64_t matrix_descriptor(const void* shared, int row_bytes, int block_bytes) {
  const auto offset = static_cast<const unsigned char*>(shared) - emulation::shared_origin();
  const uint64_t swizzle = row_bytes == 128 ? 1 : 2;
  return static_cast<uint64_t>(offset >> 4) | static_cast<uint64_t>(block_bytes >> 4) << 16 |
         static_cast<uint64_t>(8 * row_bytes >> 4) << 32 | swizzle << 62;
}
inline uint64_t descriptor_behind(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

namespace emulation {

/// A matrix in shared memory as a descriptor tells it.
struct Described {
  int64_t start, block_bytes, group_bytes;
  int row_bytes;

  explicit Described(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        block_bytes((descriptor >> 16 & 0x3fff) << 4),
        group_bytes((descriptor >> 32 & 0x3fff) << 4),
        row_bytes(descriptor >> 62 == 1 ? 128 : 64) {}

  template <class T>
  float at(int64_t offset) const {
    uint16_t bits;
    std::memcpy(&bits, swizzled(start + offset, row_bytes), sizeof(bits));
    return unpack_half<T>(bits, 0);
  }
  /// Term k of row n, where rows of terms are stored.
  template <class T>
  float by_rows(int n, int k) const {
    return at<T>(n / 8 * group_bytes + n % 8 * row_bytes + k * 2);
  }
  /// Term k of column n, where a row has the columns of one term.
  template <class T>
  float by_columns(int n, int k) const {
    const int columns = row_bytes / 2;
    return at<T>(n / columns * block_bytes + k / 8 * group_bytes + k % 8 * row_bytes +
                 n % columns * 2);
  }
};

/// Products of one thread that were issued, not computed; they are of group `group`.
struct Issued {
  int64_t group;
  float* d;
  int tiles;
  bool held;
  bool add;
  bool is_half;
  uint64_t a, b;
  float rows[16][16];  // of the warp, where they are held in registers
};
struct Products {
  int64_t block = -1;
  int64_t closed = 0;
  std::vector<Issued> issued;
};
inline Products products_of[kMaxThreads];

inline Products& own_products() {
  Products& own = products_of[running.thread];
  if (own.block != running.block) own = {running.block, 0, {}};
  return own;
}

template <class T>
void compute(const Issued& x) {
  const int lane = running.thread % 32, warp = running.thread % 128 / 32;
  const Described a(x.a), b(x.b);
  for (int e = 0; e < 4 * x.tiles; ++e) {
    const int row = lane / 4 + e % 4 / 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
    float sum = x.add ? x.d[e] : 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float left = x.held ? x.rows[row][k] : a.by_rows<T>(16 * warp + row, k);
      sum += left * (x.held ? b.by_columns<T>(column, k) : b.by_rows<T>(column, k));
    }
    x.d[e] = sum;
  }
}

}  // namespace emulation

inline void products_begin() {}
inline void products_commit() { ++emulation::own_products().closed; }
template <int Pending>
void products_wait() {
  auto& own = emulation::own_products();
  const auto due = [&](const auto& x) { return x.group < own.closed - Pending; };
  for (const auto& x : own.issued) {
    if (!due(x)) continue;
    x.is_half ? emulation::compute<Half>(x) : emulation::compute<BFloat16>(x);
  }
  std::erase_if(own.issued, due);
}
template <int N>
void products_settle(float (&)[N][4]) {}

template <class T>
void multiply_described(float (&d)[8][4], uint64_t a, uint64_t b, bool add,
                        Location at = Location::current()) {
  emulation::meet_warp({"multiply_described", at}, nullptr, [](emulation::Operands) {});
  auto& own = emulation::own_products();
  own.issued.push_back({own.closed, &d[0][0], 8, false, add, std::is_same_v<T, Half>, a, b, {}});
}

template <class T, int TILES>
struct MultiplyHeld {
  static void run(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b,
                  Location at = Location::current()) {
    struct Operand {
      const uint32_t* a;
      float rows[16][16];
    } operand = {a, {}};
    emulation::meet_warp({"MultiplyHeld", at}, &operand, [](emulation::Operands operands) {
      float rows[16][16];
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t* own = static_cast<const Operand*>(operands[lane])->a;
        for (int i = 0; i < 8; ++i) {
          const int column = lane % 4 * 2 + i / 4 * 8 + i % 2;
          rows[lane / 4 + i / 2 % 2 * 8][column] = unpack_half<T>(own[i / 2], i % 2);
        }
      }
      for (void* lane : operands)
        std::memcpy(static_cast<Operand*>(lane)->rows, rows, sizeof(rows));
    });
    auto& own = emulation::own_products();
    own.issued.push_back(
        {own.closed, &d[0][0], TILES, true, true, std::is_same_v<T, Half>, 0, b, {}});
    std::memcpy(own.issued.back().rows, operand.rows, sizeof(operand.rows));
  }
};

}  // namespace sbert_fast::cuda
