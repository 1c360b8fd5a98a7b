// linear_norm on tiles: while some rows are multiplied, those before them are normalised.
#pragma once

#include "linear_norm_kernel.h"
#include "tile_linear.h"

namespace sbert_fast::cpu::SBF_ISA {

/// LayerNorm of rows of sums in small steps, four rows side by side: one alone would wait for
/// its own sums. The bits are those of norm_row().
template <bool kHasBias>
class RowsNorm {
 public:
  RowsNorm(const AddNormParams& norm, const float* bias, int64_t stride)
      : p_(norm), bias_(bias), stride_(stride) {}

  /// Goes on to the rows [row, row + rows), whose sums begin at `sums`.
  void start(int64_t row, int64_t rows, float* sums) {
    sums_ = sums;
    residual_ = static_cast<const bf16*>(p_.residual) + row * p_.E;
    out_ = static_cast<bf16*>(p_.out) + row * p_.E;
    rows_ = rows;
    phase_ = Phase::kSum;
    column_ = 0;
    clear();
  }

  SBF_INLINE void next() {
    if (rows_ < kRows || p_.E % kStep != 0) return;
    if (phase_ == Phase::kSum) {
      sum_up();
    } else if (phase_ == Phase::kSquares) {
      sum_up_squares();
    } else {
      store();
    }
  }

  void finish() {
    while (rows_ >= kRows && p_.E % kStep == 0) next();
    for (; rows_ > 0; --rows_) {
      const AddRow<float, bf16, kHasBias, true> row{sums_, bias_, residual_};
      norm_row(row, p_.weight, p_.ln_bias, p_.E, p_.eps, false, out_);
      advance(1);
    }
  }

 private:
  enum class Phase { kSum, kSquares, kStore };
  static constexpr int kRows = 4, kVecs = 4;
  static constexpr int64_t kStep = kVecs * VecF::N;

  void clear() {
    SBF_UNROLL for (int r = 0; r < kRows; ++r) {
      SBF_UNROLL for (int i = 0; i < kVecs; ++i) totals_[r][i] = VecF::zero();
    }
  }

  void advance(int64_t rows) {
    sums_ += rows * stride_;
    residual_ += rows * p_.E;
    out_ += rows * p_.E;
  }

  /// Whether a phase is over: the step was the last one of the rows.
  SBF_INLINE bool goes_on() {
    column_ += kStep;
    if (column_ < p_.E) return true;
    column_ = 0;
    return false;
  }

  SBF_INLINE float mean_of_totals(int r) const {
    const VecF(&t)[kVecs] = totals_[r];
    return reduce_add((t[0] + t[1]) + (t[2] + t[3])) / static_cast<float>(p_.E);
  }

  // Adds bias and residual to the sums.
  SBF_INLINE void sum_up() {
    SBF_UNROLL for (int r = 0; r < kRows; ++r) {
      float* const sums = sums_ + r * stride_;
      const AddRow<float, bf16, kHasBias, true> row{sums, bias_, residual_ + r * p_.E};
      SBF_UNROLL for (int i = 0; i < kVecs; ++i) {
        const int64_t e = column_ + i * VecF::N;
        const VecF v = row.load(e);
        v.store(sums + e);
        totals_[r][i] = totals_[r][i] + v;
      }
    }
    if (goes_on()) return;
    phase_ = Phase::kSquares;
    SBF_UNROLL for (int r = 0; r < kRows; ++r) mean_[r] = mean_of_totals(r);
    clear();
  }

  SBF_INLINE void sum_up_squares() {
    SBF_UNROLL for (int r = 0; r < kRows; ++r) {
      const VecF mean = VecF::set1(mean_[r]);
      SBF_UNROLL for (int i = 0; i < kVecs; ++i) {
        const VecF v = VecF::load(sums_ + r * stride_ + column_ + i * VecF::N) - mean;
        totals_[r][i] = totals_[r][i] + v * v;
      }
    }
    if (goes_on()) return;
    phase_ = Phase::kStore;
    SBF_UNROLL for (int r = 0; r < kRows; ++r) {
      rstd_[r] = 1.0f / __builtin_sqrtf(mean_of_totals(r) + p_.eps);
    }
    clear();
  }

  SBF_INLINE void store() {
    SBF_UNROLL for (int r = 0; r < kRows; ++r) {
      SBF_UNROLL for (int i = 0; i < kVecs; i += 2) {
        const int64_t e = column_ + i * VecF::N;
        store_rounded<bf16>(out_ + r * p_.E + e, normalized(r, e), normalized(r, e + VecF::N));
      }
    }
    if (goes_on()) return;
    phase_ = Phase::kSum;
    rows_ -= kRows;
    advance(kRows);
  }

  SBF_INLINE VecF normalized(int r, int64_t e) const {
    const VecF v = VecF::load(sums_ + r * stride_ + e) - VecF::set1(mean_[r]);
    return fma(v * VecF::set1(rstd_[r]), VecF::load(p_.weight + e), VecF::load(p_.ln_bias + e));
  }

  const AddNormParams& p_;
  const float* const bias_;
  const int64_t stride_;
  float* sums_ = nullptr;
  const bf16* residual_ = nullptr;
  bf16* out_ = nullptr;
  int64_t rows_ = 0, column_ = 0;
  Phase phase_ = Phase::kSum;
  VecF totals_[kRows][kVecs];
  float mean_[kRows], rstd_[kRows];
};

/// Weights that are used on all rows of an item before the next ones: as a rule all there are, so
/// that rows are complete while they are in the cache.
constexpr int64_t kNormGroupBytes = 1280 << 10;

template <bool kHasBias>
class TileLinearNorm {
 public:
  explicit TileLinearNorm(const LinearNormParams& p)
      : product_(p.linear, kNormGroupBytes, kRunSteps),
        strips_(divide_up(p.linear.N, kStripColumns)),
        stride_(p.scratch_stride),
        norm_(p.norm, p.linear.bias, stride_),
        scratch_(p.scratch) {}

  void run(int64_t row, int64_t row_end) {
    // A row is complete after its part of the last group. Where that is the only one, the sums of
    // a block of rows take the place of those before the ones that are being normalised.
    const bool is_whole = divide_up(strips_, 2) <= product_.group();
    product_.for_each_block(row, row_end, 0, strips_, [&](const Block& block) {
      const int64_t at = block.row - row;
      float* const sums = scratch_ + (is_whole ? at % (2 * kBlockRows) : at) * stride_;
      multiply(block, sums + block.strip * kStripColumns);
      if (block.strip + 2 < strips_ || !product_.completes(block)) return;
      norm_.finish();
      norm_.start(block.row, block.rows, sums);
    });
    norm_.finish();
  }

 private:
  __attribute__((noinline)) void multiply(const Block& block, float* sums) {
    product_.run(block, sums, stride_, [&] { norm_.next(); });
  }

  BlockProduct<bf16> product_;
  const int64_t strips_, stride_;
  RowsNorm<kHasBias> norm_;
  float* const scratch_;
};

template <bool kHasBias>
void tile_linear_norm_items(const LinearNormParams& p, int64_t begin, int64_t end) {
  TileLinearNorm<kHasBias> tiles(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item * p.linear.item_rows;
    tiles.run(row, smaller_of(row + p.linear.item_rows, p.linear.T));
  }
}

inline void tile_linear_norm(const LinearNormParams& p, int64_t begin, int64_t end) {
  if (!fits_tiles<bf16>(p.linear)) return linear_norm<bf16>(p, begin, end);
  if (p.linear.bias != nullptr) return tile_linear_norm_items<true>(p, begin, end);
  tile_linear_norm_items<false>(p, begin, end);
}

}  // namespace sbert_fast::cpu::SBF_ISA
