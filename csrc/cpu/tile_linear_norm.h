// linear_norm on tiles: while some rows are multiplied, those before them are normalised.
#pragma once

#include "linear_norm_kernel.h"
#include "tile_linear.h"

namespace sbert_fast::cpu::SBF_ISA {

/// LayerNorm of rows of sums, a row in three parts.
class RowsNorm {
 public:
  static constexpr int64_t kParts = 3;

  RowsNorm(const AddNormParams& norm, const float* bias, int64_t stride)
      : p_(norm), bias_(bias), stride_(stride) {}

  /// Goes on to the rows [row, row + rows), whose sums begin at `sums`.
  void start(int64_t row, int64_t rows, float* sums) {
    sums_ = sums;
    row_ = row;
    left_ = kParts * rows;
  }

  SBF_INLINE void next() {
    if (left_ == 0) return;
    const SummedRow summed{sums_};
    switch (left_-- % kParts) {
      case 0:
        mean_ = sum_up();
        break;
      case 2:
        rstd_ = inverse_deviation(summed, mean_, p_.E, p_.eps);
        break;
      default:
        store_normalized(summed, mean_, rstd_, p_.weight, p_.ln_bias, p_.E,
                         static_cast<bf16*>(p_.out) + row_ * p_.E);
        sums_ += stride_;
        ++row_;
    }
  }

  void finish() {
    while (left_ > 0) next();
  }

 private:
  // Adds bias and residual to the sums; the mean.
  float sum_up() { return bias_ != nullptr ? sum_up<true>() : sum_up<false>(); }
  template <bool kHasBias>
  float sum_up() {
    const auto* residual = static_cast<const bf16*>(p_.residual) + row_ * p_.E;
    const AddRow<float, bf16, kHasBias, true> row{sums_, bias_, residual};
    float* const to = sums_;
    return sum_row(
               row, p_.E, [](VecF v) { return v; }, [to](int64_t e, VecF v) { v.store(to + e); }) /
           static_cast<float>(p_.E);
  }

  const AddNormParams& p_;
  const float* const bias_;
  const int64_t stride_;
  float* sums_ = nullptr;
  int64_t row_ = 0, left_ = 0;
  float mean_ = 0.0f, rstd_ = 0.0f;
};

/// Weights that are used on all rows of an item before the next ones.
constexpr int64_t kNormGroupBytes = 768 << 10;

class TileLinearNorm {
 public:
  explicit TileLinearNorm(const LinearNormParams& p)
      : product_(p.linear, kNormGroupBytes),
        strips_(divide_up(p.linear.N, kStripColumns)),
        stride_(p.scratch_stride),
        norm_(p.norm, p.linear.bias, stride_),
        scratch_(p.scratch) {}

  void run(int64_t row, int64_t row_end) {
    // A row is complete after its part of the last group, and normalised before the next one is.
    const int64_t blocks = divide_up(strips_, 2);
    const int64_t last_group = (blocks - 1) / product_.group() * product_.group();
    norm_pace_ = (blocks - last_group) * product_.pauses();
    product_.for_each_block(row, row_end, 0, strips_, [&](const Block& block) {
      float* const sums = scratch_ + (block.row - row) * stride_;
      multiply(block, sums + block.strip * kStripColumns);
      if (block.strip + 2 < strips_) return;
      norm_.finish();
      norm_.start(block.row, block.rows, sums);
    });
    norm_.finish();
  }

 private:
  __attribute__((noinline)) void multiply(const Block& block, float* sums) {
    product_.run(block, sums, stride_, [&] {
      for (due_ += RowsNorm::kParts * kBlockRows; due_ >= norm_pace_; due_ -= norm_pace_) {
        norm_.next();
      }
    });
  }

  BlockProduct product_;
  const int64_t strips_, stride_;
  RowsNorm norm_;
  float* const scratch_;
  int64_t norm_pace_ = 0;  // pauses in which the parts of a block of rows are normalised
  int64_t due_ = 0;
};

inline void tile_linear_norm(const LinearNormParams& p, int64_t begin, int64_t end) {
  if (!fits_tiles(p.linear)) return linear_norm<bf16>(p, begin, end);
  TileLinearNorm tiles(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item * p.linear.item_rows;
    tiles.run(row, smaller_of(row + p.linear.item_rows, p.linear.T));
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
