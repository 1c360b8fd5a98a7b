// varlen_attention: packed attention, one (sequence, head) per work item.
//
// A work item goes through its queries in blocks and, for each of them, through the keys in blocks:
//
//   pack       q transposed [slots][kLanes], so that a lane is a query; k and v as rows
//   scores     keys x queries, in register tiles, with their running maximum; where attention is
//              disentangled, also both x rows of tables of distances (attention_distance.h)
//   softmax    down the lanes: no reduction across a vector, no mask for the last keys; then some
//              weights are dropped (attention_dropout.h)
//   values     queries x dims, in register tiles; what was gathered before fades by `decay`
//
// Everything is fp32, except that on CPUs with bf16 dot products bf16 operands stay bf16 and
// weights are rounded to it; products, sums and softmax are fp32 there too. Blocks are counted from
// the start of the sequence and an element adds its terms in key order, so a row's bits depend on
// nothing but its sequence. Scratch is on the stack and its size does not depend on the sequence.
#pragma once

#include "attention_distance.h"
#include "attention_dropout.h"
#include "attention_head.h"
#include "attention_softmax.h"

namespace sbert_fast::cpu::SBF_ISA {

struct alignas(64) AttentionScratch {
  float queries[kPanel];                     // [tile][slots][kLanes]
  float keys[kPanel];                        // [key][slots]
  float values[kPanel];                      // [chunk][slots][kLanes]
  float out[kPanel];                         // [query][chunk * kLanes]
  float scores[kMaxHeadDim * kLanes];        // [key][kLanes]; and rows of queries to transpose
  float maxima[kMaxBlock], sums[kMaxBlock];  // [query]
  float previous[kLanes], decay[kLanes];     // [query of the tile]
  float terms[2 * kMaxBlock + kLanes];       // by distance, see fill_terms
  bool started[kMaxBlock / VecF::N];         // [tile]
};

// One head of one sequence; `panels` is null where there are no tables of distances.
template <class T>
class HeadAttention {
 public:
  HeadAttention(const AttentionParams& params, int64_t sequence, int64_t head,
                AttentionScratch& scratch, DistancePanels* panels)
      : p_(params),
        s_(scratch),
        panels_(panels),
        h_(params, sequence, head),
        dropout_(params.dropout, head, params.cu_seqlens[sequence]),
        D_(params.D) {
    position_keys_ = table_of(p_.position_keys, head);
    position_queries_ = table_of(p_.position_queries, head);
    has_terms_ = h_.has_terms() || !(p_.scale > 0.0f);

    slots_ = ceil_div(D_, Operand::kValuesPerSlot);
    chunks_ = ceil_div(D_, kLanes);
    row_ = chunks_ * kLanes;
    block_ = kMaxBlock;
    while (block_ * row_ > kPanel) block_ /= 2;
    panel_stride_ = 2 * block_ + kDistancePadding;
  }

  // Always inline, as HeadRows has it.
  SBF_INLINE void prefetch() const { h_.prefetch(smaller(h_.length, block_), D_); }

  void run() {
    for (int64_t q0 = 0; q0 < h_.length; q0 += block_) {
      attend(q0, smaller(block_, h_.length - q0));
    }
  }

 private:
  using Operand = typename OperandOf<T>::type;

  // The table [P, D] of a head, or null.
  const T* table_of(const void* tables, int64_t head) const {
    return tables == nullptr ? nullptr : static_cast<const T*>(tables) + head * p_.P * D_;
  }

  // Queries [q0, q0 + queries), one block.
  void attend(int64_t q0, int64_t queries) {
    pack_queries(q0, queries);
    for (int64_t i = 0; i < queries; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; lane += VecF::N) {
        VecF::set1(kLowest).store(s_.maxima + i + lane);
        VecF::zero().store(s_.sums + i + lane);
      }
      s_.started[i / kLanes] = false;
    }
    const int64_t last = smaller(h_.length, q0 + queries + h_.after);
    for (int64_t k0 = larger(0, q0 - h_.before) / block_ * block_; k0 < last; k0 += block_) {
      const int64_t keys = smaller(block_, last - k0);
      pack_keys(k0, keys);
      const int64_t first = q0 - (k0 + keys - 1), count = round_up(queries, kLanes) + keys;
      if (has_terms_) fill_terms(first, count);
      if (panels_ != nullptr) fill_panels(first, count);
      for (int64_t i = 0; i < queries; i += kLanes) {
        const int64_t some = smaller(kLanes, queries - i);
        // Only the keys that a query of the tile can see; the first one shares no slot with others.
        const int64_t from = larger(0, q0 + i - h_.before - k0) / 2 * 2;
        const int64_t to = smaller(keys, q0 + i + some + h_.after - k0);
        if (from < to) attend_tile(q0, k0, i, some, from, to, i + keys - 1 - from);
      }
    }
    store_rows(q0, queries);
  }

  // Queries [i, i + queries) of the block from q0 on, one tile, against the keys [from, to) of that
  // from k0 on. `x` is where the term and the column of the first query and key are, see
  // fill_terms.
  void attend_tile(int64_t q0, int64_t k0, int64_t i, int64_t queries, int64_t from, int64_t to,
                   int64_t x) {
    const int64_t vecs = ceil_div(queries, VecF::N), keys = to - from;
    float* maxima = s_.maxima + i;
    for (int lane = 0; lane < kLanes; lane += VecF::N) {
      VecF::load(maxima + lane).store(s_.previous + lane);
    }
    for_each_tile(keys, [&](int64_t key, int64_t rows) {
      const ScoreTile<Operand> tile{s_.keys + (from + key) * row_,
                                    row_,
                                    s_.queries + i * row_,
                                    slots_,
                                    s_.scores + key * kLanes,
                                    maxima,
                                    has_terms_ ? s_.terms + x - key : nullptr,
                                    p_.scale};
      if (panels_ == nullptr) return run_tile(tile, rows, vecs);
      run_tile(with_distances(tile, x - key), rows, vecs);
    });
    const VecF c = VecF::set1(has_terms_ ? kLog2e : p_.scale * kLog2e);
    softmax_tile<Operand>(vecs, s_.scores, keys, s_.previous, maxima, s_.sums + i, s_.decay, c);
    if (dropout_.drops()) {
      dropout_.template drop<Operand>(s_.scores, q0 + i, queries, k0 + from, keys);
    }

    constexpr int kPerSlot = Operand::kValuesPerSlot;
    bool& started = s_.started[i / kLanes];
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t dims = smaller(kLanes, D_ - chunk * kLanes);
      const float* values = s_.values + (chunk * block_ + from) / kPerSlot * kLanes;
      for_each_tile(queries, [&](int64_t query, int64_t rows) {
        run_tile(ValueTile<Operand>{s_.scores + query, values, ceil_div(keys, kPerSlot),
                                    s_.out + (i + query) * row_ + chunk * kLanes, row_,
                                    started ? s_.decay + query : nullptr},
                 rows, ceil_div(dims, VecF::N));
      });
    }
    started = true;
  }

  DistanceTile<Operand> with_distances(const ScoreTile<Operand>& tile, int64_t x) const {
    return {tile, position_keys_ == nullptr ? nullptr : panels_->position_keys + x,
            position_queries_ == nullptr ? nullptr : panels_->position_queries + x, panel_stride_};
  }

  void pack_queries(int64_t q0, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t some = smaller(kLanes, count - i);
      float* rows = s_.scores;  // free until the first tile
      pack_rows<Operand>(h_.q + (q0 + i) * h_.stride, h_.stride, some, D_,
                         {p_.query_norm, p_.norm_eps}, h_.rotary_at(q0 + i), rows, row_);
      transpose_rows(rows, row_, some, slots_, s_.queries + i * row_);
    }
  }

  void pack_keys(int64_t k0, int64_t count) {
    constexpr int kPerSlot = Operand::kValuesPerSlot;
    pack_rows<Operand>(h_.k + k0 * h_.stride, h_.stride, count, D_, {p_.key_norm, p_.norm_eps},
                       h_.rotary_at(k0), s_.keys, row_);
    for (int64_t key = 0; key < count; key += kPerSlot) {
      pack_values(Operand{}, h_.v + (k0 + key) * h_.stride, h_.stride, count - key, D_,
                  s_.values + key / kPerSlot * kLanes, block_ / kPerSlot * kLanes);
    }
  }

  // terms[x] is added to a score whose query is x + first positions after its key.
  void fill_terms(int64_t first, int64_t count) {
    for (int64_t x = 0; x < count; ++x) s_.terms[x] = h_.term(-(x + first));
  }

  // Columns of distances, counted as fill_terms counts; scores are free until the next tile.
  void fill_panels(int64_t first, int64_t count) {
    const auto pack = [&](const T* table, float* panel) {
      if (table == nullptr) return;
      const auto row_at = [&](int64_t x) {
        const int64_t ahead = larger(-p_.reach, smaller(p_.reach, -(x + first)));
        return table + p_.buckets[ahead + p_.reach] * D_;
      };
      pack_columns<Operand>(count, D_, slots_, row_at, s_.scores, row_, panel, panel_stride_);
    };
    pack(position_keys_, panels_->position_keys);
    pack(position_queries_, panels_->position_queries);
  }

  void store_rows(int64_t q0, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const VecF factor = VecF::set1(p_.dropout.scale * (1.0f / s_.sums[i]));
      const float* row = s_.out + i * row_;
      T* to = h_.out + (q0 + i) * h_.out_stride;
      int64_t d = 0;
      for (; d + VecF::N <= D_; d += VecF::N) store_as<T>(to + d, VecF::load(row + d) * factor);
      if (d == D_) continue;
      store_as_partial<T>(to + d, VecF::load(row + d) * factor, static_cast<int>(D_ - d));
    }
  }

  const AttentionParams& p_;
  AttentionScratch& s_;
  DistancePanels* panels_;
  const HeadRows<T> h_;
  const DropoutMask dropout_;
  const T *position_keys_, *position_queries_;  // of this head, or null
  int64_t D_;
  bool has_terms_;        // scores are scaled and get something added before the softmax
  int64_t slots_;         // of 32 bits that hold the D elements of a row
  int64_t chunks_;        // of kLanes elements that hold D
  int64_t row_;           // elements of these chunks
  int64_t block_;         // queries or keys
  int64_t panel_stride_;  // columns of a panel of distances
};

// The next item is on its way from memory while one is computed: its rows are short and far apart,
// which no hardware prefetcher follows.
template <class T>
SBF_INLINE void attend_items(const AttentionParams& params, int64_t begin, int64_t end,
                             AttentionScratch& scratch, DistancePanels* panels) {
  const auto at = [&](int64_t item) {
    return HeadAttention<T>(params, item / params.H, item % params.H, scratch, panels);
  };
  for (int64_t item = begin; item < end; ++item) {
    if (item + 1 < end) at(item + 1).prefetch();
    at(item).run();
  }
}

template <class T>
__attribute__((noinline)) void attend_by_distance(const AttentionParams& params, int64_t begin,
                                                  int64_t end) {
  AttentionScratch scratch;
  DistancePanels panels;
  attend_items<T>(params, begin, end, scratch, &panels);
}

/// Items are sequence * H + head.
template <class T>
void varlen_attention(const AttentionParams& params, int64_t begin, int64_t end) {
  if (params.buckets != nullptr) return attend_by_distance<T>(params, begin, end);
  AttentionScratch scratch;
  attend_items<T>(params, begin, end, scratch, nullptr);
}

}  // namespace sbert_fast::cpu::SBF_ISA
