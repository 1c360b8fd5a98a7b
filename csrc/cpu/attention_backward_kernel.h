// The gradient of varlen_attention, one (sequence, head of keys) per work item.
//
// A work item goes through its heads of queries in turn, and through the queries of each kLanes at
// a time, all keys that one of them sees at once:
//
//   pack      q, k, v and d_out, normed and rotated as in attention_kernel.h
//   scores    keys x queries, a lane is a query, as in attention_kernel.h; and their softmax
//   gradient  d_scores = weights (d_weights - sum of weights d_weights), d_weights = v d_out, and 0
//             where dropout has dropped the weight
//   products  d_q, d_k and d_v, of register tiles
//   unpack    d_q and d_k back through rotation and norm
//
// Nothing is kept of the forward pass: the scores are computed again. Everything is fp32, but for
// the sums of the gradients of the bias, which have a term for every pair of tokens, and of norms;
// and a sum has an order that depends on nothing but the sequence. Scratch grows with the sequence.
#pragma once

#include "attention_dropout.h"
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

// The gradient of what rotate_row rotates, in place of that of its result.
SBF_INLINE void rotate_back(float* row, int64_t D, Rotary rotary) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += VecF::N) {
    const int n = static_cast<int>(smaller(VecF::N, half - d));
    const VecF x1 = load_dims(row, d, half), x2 = load_dims(row + half, d, half);
    const VecF c = load_dims(rotary.cos, d, half), s = load_dims(rotary.sin, d, half);
    fma(x1, c, x2 * s).store_partial(row + d, n);
    fma(x2, c, VecF::zero() - x1 * s).store_partial(row + half + d, n);
  }
}

// The gradient of the `row` that norm_row norms, in place of that of its result; that of the
// weight, times `factor`, is added to `d_weight`.
template <class T>
SBF_INLINE void norm_back(const T* row, int64_t D, HeadNorm norm, float factor, float* grad,
                          double* d_weight) {
  const VecF inverse = inverse_rms(row, D, norm.eps);
  float of_weight[kMaxHeadDim];
  VecF along = VecF::zero();
  for (int64_t d = 0; d < D; d += VecF::N) {
    const VecF normed = load_dims(row, d, D) * inverse, upstream = load_dims(grad, d, D);
    (upstream * normed * VecF::set1(factor)).store(of_weight + d);
    along = fma(upstream * load_dims(norm.weight, d, D), normed, along);
  }
  const VecF slope = VecF::set1(reduce_add(along) / static_cast<float>(D));
  for (int64_t d = 0; d < D; d += VecF::N) {
    const VecF normed = load_dims(row, d, D) * inverse;
    const VecF u = load_dims(grad, d, D) * load_dims(norm.weight, d, D);
    ((u - normed * slope) * inverse)
        .store_partial(grad + d, static_cast<int>(smaller(VecF::N, D - d)));
  }
  for (int64_t d = 0; d < D; ++d) d_weight[d] += static_cast<double>(of_weight[d]);
}

// One head of keys and values of one sequence, and all heads of queries that read it, in their
// order.
template <class T>
class HeadGradient {
 public:
  HeadGradient(const AttentionBackwardParams& params, int64_t sequence, int64_t kv_head)
      : params_(params),
        p_(params.forward),
        sequence_(sequence),
        group_(p_.H / p_.kv_heads),
        first_head_(kv_head * group_),
        dropout_(p_.dropout, first_head_, p_.cu_seqlens[sequence]),
        D_(p_.D),
        row_(round_up(D_, kLanes)) {
    enter(first_head_);
    const int64_t L = h_.length;
    if (params.d_norms != nullptr) {
      d_query_norm_ = params.d_norms + (sequence * p_.kv_heads + kv_head) * 2 * D_;
      d_key_norm_ = d_query_norm_ + D_;
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
    const int64_t L = h_.length;
    for (int64_t i = 0; i < L * row_; i += VecF::N) {
      VecF::zero().store(d_k_ + i);
      VecF::zero().store(d_v_ + i);
    }
    pack_rows<Fp32>(h_.k, h_.stride, L, D_, key_norm(), h_.rotary_at(0), k_, row_);
    pack_rows<Fp32>(h_.v, h_.stride, L, D_, {}, {}, v_, row_);
    for (int64_t i = 0; i < group_; ++i) {
      enter(first_head_ + i);
      for (int64_t first = 0; first < L; first += kLanes) {
        block(first, smaller(kLanes, L - first));
      }
    }
    unpack(d_k_, h_.k, L, 0, key_norm(), d_key_norm_);
    store(d_k_, L, p_.scale, gradient_of(h_.k));
    store(d_v_, L, p_.dropout.scale, gradient_of(h_.v));
  }

 private:
  HeadNorm query_norm() const { return {p_.query_norm, p_.norm_eps}; }
  HeadNorm key_norm() const { return {p_.key_norm, p_.norm_eps}; }

  // A head of queries.
  void enter(int64_t head) {
    h_ = HeadRows<T>(p_, sequence_, head);
    const int64_t first = p_.cu_seqlens[sequence_];
    dropout_ = DropoutMask(p_.dropout, head, first);
    grad_ = static_cast<const T*>(params_.grad) + (first * p_.H + head) * D_;
    if (params_.d_bias != nullptr) {
      d_bias_ = params_.d_bias + (sequence_ * p_.H + head) * (2 * p_.R + 1) + p_.R;
    }
  }

  // Where the gradient of a row of qkv goes.
  T* gradient_of(const T* row) const {
    return static_cast<T*>(params_.d_qkv) + (row - static_cast<const T*>(p_.qkv));
  }

  // Queries [first, first + queries).
  void block(int64_t first, int64_t queries) {
    const int64_t vecs = ceil_div(queries, VecF::N);
    const T *const q = h_.q + first * h_.stride, *const grad = grad_ + first * h_.out_stride;
    pack_rows<Fp32>(q, h_.stride, queries, D_, query_norm(), h_.rotary_at(first), q_, row_);
    pack_rows<Fp32>(grad, h_.out_stride, queries, D_, {}, {}, out_, row_);
    transpose_rows(q_, row_, queries, round_up(D_, 4), q_columns_);
    transpose_rows(out_, row_, queries, round_up(D_, 4), out_columns_);

    // The keys that are seen; runs of products start where they would with all keys.
    const int64_t last = smaller(h_.length, first + queries + h_.after);
    const int64_t key = larger(0, first - h_.before) / ProductTile::kRun * ProductTile::kRun;
    const int64_t keys = last - key, at = key * row_;

    softmax_of(first, vecs, key, keys);
    if (dropout_.drops()) dropout_.mark(weights_, first, queries, key, keys);
    multiply({v_ + at, row_, 1, out_columns_, kLanes, D_, d_scores_, kLanes, false}, keys,
             vecs * VecF::N);
    for (int64_t lane = 0; lane < queries; lane += VecF::N) differentiate(lane, keys);
    if (d_bias_ != nullptr) add_terms(key - first, queries, keys);

    multiply({weights_, kLanes, 1, out_, row_, queries, d_v_ + at, row_, true}, keys, D_);
    multiply({d_scores_, kLanes, 1, q_, row_, queries, d_k_ + at, row_, true}, keys, D_);
    multiply({d_scores_, 1, kLanes, k_ + at, row_, keys, sums_, row_, false}, queries, D_);
    unpack(sums_, q, queries, first, query_norm(), d_query_norm_);
    store(sums_, queries, p_.scale, gradient_of(q));
  }

  // The weights of queries from `first` on for `keys` from `key` on, each to be divided by its sum.
  void softmax_of(int64_t first, int64_t vecs, int64_t key, int64_t keys) {
    // Of the queries' i and the keys' k: terms_[i - k + keys - 1].
    for (int64_t x = 0; x < keys + kLanes; ++x) terms_[x] = h_.term(key + keys - 1 - x - first);
    for (int lane = 0; lane < kLanes; lane += VecF::N) {
      VecF::set1(kLowest).store(maxima_ + lane);
      VecF::set1(kLowest).store(lowest_ + lane);
      VecF::zero().store(totals_ + lane);
    }
    for_each_tile(keys, [&](int64_t k, int64_t rows) {
      const ScoreTile<Fp32> tile{
          k_ + (key + k) * row_, row_,    q_columns_, D_, weights_ + k * kLanes, maxima_,
          terms_ + keys - 1 - k, p_.scale};
      run_tile(tile, rows, vecs);
    });
    float decay[kLanes];
    softmax_tile<Fp32>(vecs, weights_, keys, lowest_, maxima_, totals_, decay, VecF::set1(kLog2e));
  }

  // Some queries: weights divided by their sums, zeros where they are dropped, and d_scores in the
  // place of d_weights.
  void differentiate(int64_t lane, int64_t keys) {
    const VecF factor = VecF::set1(1.0f) / VecF::load(totals_ + lane);
    const VecF scale = VecF::set1(p_.dropout.scale), zero = VecF::zero();
    VecF centre = VecF::zero();
    for (int64_t i = lane; i < keys * kLanes; i += kLanes) {
      const VecF weight = VecF::load(weights_ + i) * factor;
      weight.store(weights_ + i);
      const VecF d_weight = select_lt(weight, zero, zero, VecF::load(d_scores_ + i) * scale);
      d_weight.store(d_scores_ + i);
      centre = fma(weight, d_weight, centre);
    }
    for (int64_t i = lane; i < keys * kLanes; i += kLanes) {
      const VecF weight = VecF::load(weights_ + i);
      (abs(weight) * (VecF::load(d_scores_ + i) - centre)).store(d_scores_ + i);
      select_lt(weight, zero, zero, weight).store(weights_ + i);
    }
  }

  // The gradient of the bias: sums by distance; the first key is `ahead` of the first query.
  void add_terms(int64_t ahead, int64_t queries, int64_t keys) {
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t distance = larger(-p_.R, smaller(p_.R, ahead + key - i));
        d_bias_[distance] += d_scores_[key * kLanes + i];
      }
    }
  }

  // The gradients of the rows `from`, those of tokens from `first` on, in place of those of what
  // was packed; both are still to be scaled.
  void unpack(float* rows, const T* from, int64_t count, int64_t first, HeadNorm norm,
              double* d_weight) const {
    for (int64_t i = 0; i < count; ++i) {
      float* row = rows + i * row_;
      const Rotary rotary = h_.rotary_at(first + i);
      if (rotary.cos != nullptr) rotate_back(row, D_, rotary);
      if (norm.weight == nullptr) continue;
      norm_back(from + i * h_.stride, D_, norm, p_.scale, row, d_weight);
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

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  int64_t sequence_;
  int64_t group_, first_head_;  // of queries
  HeadRows<T> h_;               // of the head of queries that is entered
  DropoutMask dropout_;         // of that head
  int64_t D_;
  int64_t row_;  // elements of a row in scratch
  const T* grad_ = nullptr;
  double* d_bias_ = nullptr;                                // of a key at its query, or null
  double *d_query_norm_ = nullptr, *d_key_norm_ = nullptr;  // [D], or null
  float *k_, *v_, *d_k_, *d_v_;                             // [L][row_]
  float *q_, *out_, *sums_, *q_columns_, *out_columns_;     // [kLanes][row_]; columns: transposed
  float *weights_, *d_scores_;                              // [L][kLanes]
  float* terms_;                                            // by distance, see softmax_of
  float maxima_[kLanes], lowest_[kLanes], totals_[kLanes];  // [query]
};

/// Items are sequence * kv_heads + head.
template <class T>
void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end) {
  const int64_t heads = params.forward.kv_heads;
  for (int64_t item = begin; item < end; ++item) {
    HeadGradient<T>(params, item / heads, item % heads).run();
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
