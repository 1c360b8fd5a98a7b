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

  // Zeros in weights[slots][kLanes] of kLanes queries from `query` on and `count` keys from `key`
  // on, both counted from the start of the sequence; `key` is even.
  template <class Operand>
  SBF_INLINE void drop(float* weights, int64_t query, int64_t key, int64_t count) const {
    constexpr int kPerSlot = Operand::kValuesPerSlot;
    for_each_group(query, key, count, [&](const Words& kept, int64_t from, int64_t to) {
      for (int64_t k = from; k < to; k += kPerSlot) {
        const uint32_t* first = kept.of[k % kKeys];
        const uint32_t* second = kPerSlot == 2 ? kept.of[k % kKeys + 1] : first;
        change(weights + (k - key) / kPerSlot * kLanes, [&](uint32_t bits, int lane) {
          return bits & ((first[lane] & 0xffffu) | (second[lane] & 0xffff0000u));
        });
      }
    });
  }

  // The same weights in fp32, but those that are dropped get a minus instead.
  SBF_INLINE void mark(float* weights, int64_t query, int64_t key, int64_t count) const {
    for_each_group(query, key, count, [&](const Words& kept, int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) {
        const uint32_t* words = kept.of[k % kKeys];
        change(weights + (k - key) * kLanes,
               [&](uint32_t bits, int lane) { return bits | (~words[lane] & 0x80000000u); });
      }
    });
  }

 private:
  static constexpr int kKeys = 4, kRounds = 10;

  struct alignas(64) Words {
    uint32_t of[kKeys][kLanes];  // all bits, or none
  };

  template <class Change>
  static SBF_INLINE void change(float* row, const Change& change) {
    uint32_t bits[kLanes];
    __builtin_memcpy(bits, row, sizeof(bits));
    for (int lane = 0; lane < kLanes; ++lane) bits[lane] = change(bits[lane], lane);
    __builtin_memcpy(row, bits, sizeof(bits));
  }

  // Calls body(kept, from, to) for the keys [from, to) of each counter.
  template <class Body>
  SBF_INLINE void for_each_group(int64_t query, int64_t key, int64_t count,
                                 const Body& body) const {
    Words kept;
    for (int64_t group = key / kKeys * kKeys; group < key + count; group += kKeys) {
      fill(static_cast<uint32_t>(group / kKeys), row_ + static_cast<uint32_t>(query), kept);
      body(kept, larger(key, group), smaller(key + count, group + kKeys));
    }
  }

  __attribute__((noinline)) void fill(uint32_t group, uint32_t row, Words& kept) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t x0 = group, x1 = row + static_cast<uint32_t>(lane), x2 = head_, x3 = 0;
      uint32_t low = seed_[0], high = seed_[1];
      SBF_UNROLL for (int round = 0; round < kRounds; ++round) {
        const uint64_t a = uint64_t{0xd2511f53} * x0, b = uint64_t{0xcd9e8d57} * x2;
        x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ low;
        x1 = static_cast<uint32_t>(b);
        x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ high;
        x3 = static_cast<uint32_t>(a);
        low += 0x9e3779b9;
        high += 0xbb67ae85;
      }
      kept.of[0][lane] = keeps(x0), kept.of[1][lane] = keeps(x1);
      kept.of[2][lane] = keeps(x2), kept.of[3][lane] = keeps(x3);
    }
  }

  uint32_t keeps(uint32_t word) const { return word < threshold_ ? 0 : ~uint32_t{0}; }

  uint32_t threshold_, seed_[2], head_, row_;
};

}  // namespace sbert_fast::cpu::SBF_ISA
