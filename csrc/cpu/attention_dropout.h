// Dropout of attention weights: which of them stay.
//
// Four keys of a row share a counter of Philox4x32-10 (Salmon et al., SC 2011), which the seed is
// the key of: (key / 4, packed row of the query, head, 0). Each has a word of the result, and is
// dropped where that is below the threshold. So a weight stays or goes by these alone, whatever the
// instruction set, tiles and threads.
#pragma once

#include "attention_pack.h"
#include "kernels.h"

namespace sbert_fast::cpu::SBF_ISA {

class DropoutMask {
 public:
  DropoutMask(const Dropout& dropout, int64_t head, int64_t first_row)
      : threshold_(dropout.threshold),
        seed_{static_cast<uint32_t>(dropout.seed), static_cast<uint32_t>(dropout.seed >> 32)},
        head_(static_cast<uint32_t>(head)),
        row_(static_cast<uint32_t>(first_row)) {}

  bool drops() const { return threshold_ != 0; }

  // Zeros in weights[slots][kLanes] of `queries` from `query` on, rounded up to vectors, and
  // `count` keys from `key` on, both counted from the start of the sequence; `key` is even.
  template <class Operand>
  SBF_INLINE void drop(float* weights, int64_t query, int64_t queries, int64_t key,
                       int64_t count) const {
    constexpr int kPerSlot = Operand::kValuesPerSlot;
    for_each_group(query, queries, key, count, [&](const Words& kept, int64_t from, int64_t to) {
      for (int64_t k = from; k < to; k += kPerSlot) {
        const uint32_t* first = kept.of[k % kKeys];
        const uint32_t* second = kPerSlot == 2 ? kept.of[k % kKeys + 1] : first;
        change(weights + (k - key) / kPerSlot * kLanes, queries, [&](uint32_t bits, int64_t lane) {
          return bits & ((first[lane] & 0xffffu) | (second[lane] & 0xffff0000u));
        });
      }
    });
  }

  // The same weights in fp32, but those that are dropped get a minus instead.
  SBF_INLINE void mark(float* weights, int64_t query, int64_t queries, int64_t key,
                       int64_t count) const {
    for_each_group(query, queries, key, count, [&](const Words& kept, int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) {
        const uint32_t* words = kept.of[k % kKeys];
        change(weights + (k - key) * kLanes, queries,
               [&](uint32_t bits, int64_t lane) { return bits | (~words[lane] & 0x80000000u); });
      }
    });
  }

 private:
  static constexpr int kKeys = 4, kRounds = 10;

  struct alignas(64) Words {
    uint32_t of[kKeys][kLanes];  // all bits, or none
  };

  template <class Change>
  static SBF_INLINE void change(float* row, int64_t queries, const Change& change) {
    for (int64_t at = 0; at < queries; at += VecF::N) {
      uint32_t bits[VecF::N];
      __builtin_memcpy(bits, row + at, sizeof(bits));
      for (int lane = 0; lane < VecF::N; ++lane) bits[lane] = change(bits[lane], at + lane);
      __builtin_memcpy(row + at, bits, sizeof(bits));
    }
  }

  // Calls body(kept, from, to) for the keys [from, to) of each counter.
  template <class Body>
  SBF_INLINE void for_each_group(int64_t query, int64_t queries, int64_t key, int64_t count,
                                 const Body& body) const {
    Words kept;
    for (int64_t group = key / kKeys * kKeys; group < key + count; group += kKeys) {
      fill(static_cast<uint32_t>(group / kKeys), row_ + static_cast<uint32_t>(query), queries,
           kept);
      body(kept, larger(key, group), smaller(key + count, group + kKeys));
    }
  }

  // The words of even and of odd queries are computed apart, each in 64 bits: products need them
  // so, and nothing reads the upper halves.
  __attribute__((noinline)) void fill(uint32_t group, uint32_t row, int64_t queries,
                                      Words& kept) const {
    constexpr int kPairs = sizeof(VecW) / sizeof(uint64_t);
    typedef uint32_t Lanes __attribute__((vector_size(sizeof(VecW))));
    VecW evens{};
    for (int i = 0; i < kPairs; ++i) evens[i] = 2 * i;
    for (int64_t lane = 0; lane < queries; lane += 2 * kPairs) {
      const VecW rows = evens + (row + static_cast<uint32_t>(lane));
      const Counters even = philox(group, rows), odd = philox(group, rows + 1);
      SBF_UNROLL for (int k = 0; k < kKeys; ++k) {
        const Lanes words = (Lanes)((even.x[k] & 0xffffffffu) | (odd.x[k] << 32));
        const Lanes stay = (Lanes)(words >= threshold_);
        __builtin_memcpy(kept.of[k] + lane, &stay, sizeof(stay));
      }
    }
  }

  struct Counters {
    VecW x[kKeys];
  };

  SBF_INLINE Counters philox(uint32_t group, VecW rows) const {
    VecW x0 = VecW{} + group, x1 = rows, x2 = VecW{} + head_, x3{};
    uint32_t low = seed_[0], high = seed_[1];
    SBF_UNROLL for (int round = 0; round < kRounds; ++round) {
      const VecW a = multiply_words(x0, 0xd2511f53), b = multiply_words(x2, 0xcd9e8d57);
      x0 = (b >> 32) ^ x1 ^ low, x1 = b;
      x2 = (a >> 32) ^ x3 ^ high, x3 = a;
      low += 0x9e3779b9;
      high += 0xbb67ae85;
    }
    return {{x0, x1, x2, x3}};
  }

  uint32_t threshold_, seed_[2], head_, row_;
};

}  // namespace sbert_fast::cpu::SBF_ISA
