// The gradient of varlen_attention, one (sequence, head) per work item.
//
// A work item goes through its queries kLanes at a time, all keys of each at once:
//
//   scores    keys x queries, a lane is a query, as in attention_kernel.h; and their softmax
//   gradient  d_scores = weights (d_weights - sum of weights d_weights), d_weights = v d_out
//   products  d_q, d_k and d_v, of register tiles
//
// Nothing is kept of the forward pass: the scores are computed again. Everything is fp32, but for
// the sums of the gradient of the bias, which have a term for every pair of tokens; and a sum has
// an order that depends on nothing but the sequence. Scratch grows with the sequence.
#pragma once

#include "attention_head.h"
#include "attention_softmax.h"

namespace sbert_fast::cpu::SBF_ISA {

// to[r][:] = (adds ? to : 0) + sum over steps of a[r * a_row + s * a_step] * b[s * b_step + :].
struct ProductTile {
  static constexpr int64_t kRun = 32;  // as in ValueTile

  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step, steps;
  float* to;
  int64_t to_row;
  bool adds;

  template <int ROWS, int VECS>
  __attribute__((noinline)) void run() const {
    for (int64_t from = 0; from < steps; from += kRun) {
      VecF acc[ROWS][VECS];
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        SBF_UNROLL for (int v = 0; v < VECS; ++v) acc[r][v] = VecF::zero();
      }
      accumulate<Fp32>(a + from * a_step, a_row, a_step, b + from * b_step,
                       smaller(kRun, steps - from), acc, b_step);
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        SBF_UNROLL for (int v = 0; v < VECS; ++v) {
          float* const at = to + r * to_row + v * VecF::N;
          if (from > 0 || adds) acc[r][v] = acc[r][v] + VecF::load(at);
          acc[r][v].store(at);
        }
      }
    }
  }
};

// The same for any number of rows and of columns, whole vectors of which are written.
SBF_INLINE void multiply(const ProductTile& product, int64_t rows, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t vecs = ceil_div(smaller(kLanes, columns - column), VecF::N);
    for_each_tile(rows, [&](int64_t row, int64_t some) {
      ProductTile tile = product;
      tile.a += row * product.a_row;
      tile.b += column;
      tile.to += row * product.to_row + column;
      run_tile(tile, some, vecs);
    });
  }
}

template <class T>
class HeadGradient {
 public:
  HeadGradient(const AttentionBackwardParams& params, int64_t sequence, int64_t head)
      : p_(params.forward),
        h_(params.forward, sequence, head),
        D_(p_.D),
        row_(round_up(D_, kLanes)) {
    const int64_t first = p_.cu_seqlens[sequence], L = h_.length;
    grad_ = static_cast<const T*>(params.grad) + (first * p_.H + head) * D_;
    d_q_ = static_cast<T*>(params.d_qkv) + first * h_.stride + head * D_;
    if (params.d_bias != nullptr) {
      d_bias_ = params.d_bias + (sequence * p_.H + head) * (2 * p_.R + 1) + p_.R;
    }
    float* at = params.scratch;
    const auto take = [&at](int64_t size) {
      float* const taken = at;
      at += size;
      return taken;
    };
    k_ = take(L * row_), v_ = take(L * row_);
    d_k_ = take(L * row_), d_v_ = take(L * row_);
    q_ = take(kLanes * row_), q_columns_ = take(kLanes * row_);
    out_ = take(kLanes * row_), out_columns_ = take(kLanes * row_);
    sums_ = take(kLanes * row_);
    weights_ = take(L * kLanes), d_scores_ = take(L * kLanes);
    terms_ = take(L + kLanes);
  }

  /// Elements of scratch for sequences of up to `length` tokens.
  static constexpr int64_t scratch_size(int64_t length, int64_t D) {
    const int64_t row = round_up(D, kLanes);
    return length * (4 * row + 2 * kLanes + 1) + kLanes * (5 * row + 1);
  }

  void run() {
    const int64_t L = h_.length, H = p_.H;
    for (int64_t i = 0; i < L; ++i) {
      pack_row(Fp32{}, h_.k + i * h_.stride, D_, k_ + i * row_);
      pack_row(Fp32{}, h_.v + i * h_.stride, D_, v_ + i * row_);
    }
    for (int64_t first = 0; first < L; first += kLanes) block(first, smaller(kLanes, L - first));
    store(d_k_, L, p_.scale, d_q_ + H * D_);
    store(d_v_, L, 1.0f, d_q_ + 2 * H * D_);
  }

 private:
  // Queries [first, first + queries).
  void block(int64_t first, int64_t queries) {
    const int64_t L = h_.length, vecs = ceil_div(queries, VecF::N);
    for (int64_t i = 0; i < queries; ++i) {
      pack_row(Fp32{}, h_.q + (first + i) * h_.stride, D_, q_ + i * row_);
      pack_row(Fp32{}, grad_ + (first + i) * h_.out_stride, D_, out_ + i * row_);
    }
    transpose_rows(q_, row_, queries, round_up(D_, 4), q_columns_);
    transpose_rows(out_, row_, queries, round_up(D_, 4), out_columns_);

    softmax_of(first, vecs);
    multiply({v_, row_, 1, out_columns_, kLanes, D_, d_scores_, kLanes, false}, L, vecs * VecF::N);
    for (int64_t lane = 0; lane < queries; lane += VecF::N) differentiate(lane);
    if (d_bias_ != nullptr) add_terms(first, queries);

    multiply({weights_, kLanes, 1, out_, row_, queries, d_v_, row_, first > 0}, L, D_);
    multiply({d_scores_, kLanes, 1, q_, row_, queries, d_k_, row_, first > 0}, L, D_);
    multiply({d_scores_, 1, kLanes, k_, row_, L, sums_, row_, false}, queries, D_);
    store(sums_, queries, p_.scale, d_q_ + first * h_.stride);
  }

  // The weights of the queries, each to be divided by its sum.
  void softmax_of(int64_t first, int64_t vecs) {
    const int64_t L = h_.length;
    // Of query i and key k of the sequence: terms_[i - first - k + L - 1].
    for (int64_t x = 0; x < L + kLanes; ++x) terms_[x] = h_.term(L - 1 - x - first);
    for (int lane = 0; lane < kLanes; lane += VecF::N) {
      VecF::set1(kLowest).store(maxima_ + lane);
      VecF::set1(kLowest).store(lowest_ + lane);
      VecF::zero().store(totals_ + lane);
    }
    for_each_tile(L, [&](int64_t key, int64_t rows) {
      const ScoreTile<Fp32> tile{k_ + key * row_,         row_,    q_columns_,           D_,
                                 weights_ + key * kLanes, maxima_, terms_ + L - 1 - key, p_.scale};
      run_tile(tile, rows, vecs);
    });
    float decay[kLanes];
    softmax_tile<Fp32>(vecs, weights_, L, lowest_, maxima_, totals_, decay, VecF::set1(kLog2e));
  }

  // Some queries: weights divided by their sums, and d_scores in the place of d_weights.
  void differentiate(int64_t lane) {
    const VecF factor = VecF::set1(1.0f) / VecF::load(totals_ + lane);
    VecF centre = VecF::zero();
    for (int64_t i = lane; i < h_.length * kLanes; i += kLanes) {
      const VecF weight = VecF::load(weights_ + i) * factor;
      weight.store(weights_ + i);
      centre = fma(weight, VecF::load(d_scores_ + i), centre);
    }
    for (int64_t i = lane; i < h_.length * kLanes; i += kLanes) {
      const VecF difference = VecF::load(d_scores_ + i) - centre;
      (VecF::load(weights_ + i) * difference).store(d_scores_ + i);
    }
  }

  // The gradient of the bias: sums by distance.
  void add_terms(int64_t first, int64_t queries) {
    for (int64_t key = 0; key < h_.length; ++key) {
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t ahead = larger(-p_.R, smaller(p_.R, key - first - i));
        d_bias_[ahead] += d_scores_[key * kLanes + i];
      }
    }
  }

  void store(const float* rows, int64_t count, float factor, T* to) const {
    const VecF times = VecF::set1(factor);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < D_; d += VecF::N) {
        const int n = static_cast<int>(smaller(VecF::N, D_ - d));
        store_as_partial<T>(to + i * h_.stride + d, VecF::load(rows + i * row_ + d) * times, n);
      }
    }
  }

  const AttentionParams& p_;
  const HeadRows<T> h_;
  int64_t D_;
  int64_t row_;  // elements of a row in scratch
  const T* grad_;
  T* d_q_;
  double* d_bias_ = nullptr;                                // of a key at its query, or null
  float *k_, *v_, *d_k_, *d_v_;                             // [L][row_]
  float *q_, *out_, *sums_, *q_columns_, *out_columns_;     // [kLanes][row_]; columns: transposed
  float *weights_, *d_scores_;                              // [L][kLanes]
  float* terms_;                                            // by distance, see softmax_of
  float maxima_[kLanes], lowest_[kLanes], totals_[kLanes];  // [query]
};

/// Items are sequence * H + head.
template <class T>
void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    HeadGradient<T>(params, item / params.forward.H, item % params.forward.H).run();
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
