// linear on tiles: while a block is multiplied, the results of the one before it are finished, some
// in each pause. Vector units and tiles work side by side.
#pragma once

#include "linear_kernel.h"
#include "tile_gelu.h"
#include "tile_product.h"

namespace sbert_fast::cpu::SBF_ISA {

/// The results of a block: sums that are complete, and where they go.
template <class Out>
struct BlockResults {
  const float* sums = nullptr;  // [rows][kBlockColumns]
  int64_t rows = 0, columns = 0;
  const float* bias = nullptr;
  Out* out = nullptr;
  int64_t out_stride = 0;
  const float* row_scales = nullptr;  // of int32 sums
  const float* headers[2] = {};       // of both strips
};

SBF_INLINE const float* header_of(const float* const (&headers)[2], int64_t column) {
  return headers[column / kStripColumns] + column % kStripColumns;
}

/// Columns of results in a block of sums; where they are gated, it holds one strip of each half.
constexpr int64_t result_columns(bool gated) { return gated ? kStripColumns : kBlockColumns; }

/// Finishes the results of a whole block, row by row.
template <class T, class Out, bool kGated, class Activate, bool kHasBias>
class WholeRows {
  static constexpr bool kInt8 = sizeof(T) == 1;

 public:
  WholeRows(const BlockResults<Out>& block, Activate activate)
      : activate_(activate),
        sums_(block.sums),
        out_(block.out),
        row_scales_(block.row_scales),
        headers_{block.headers[0], block.headers[1]},
        rows_(block.rows),
        stride_(block.out_stride) {
    SBF_UNROLL for (int v = 0; v < kVecs; ++v) {
      bias_[v] = kHasBias ? VecF::load(block.bias + v * VecF::N) : VecF::zero();
    }
  }

  bool done() const { return rows_ == 0; }

  SBF_INLINE void next() {
    if (rows_ == 0) return;
    --rows_;
    if constexpr (kGated) {
      SBF_UNROLL for (int v = 0; v < kVecs / 2; ++v) {
        const VecF gate = value(v + kVecs / 2);
        store_rounded<Out>(out_ + v * VecF::N, activate_(value(v)) * gate);
      }
    } else {
      SBF_UNROLL for (int v = 0; v < kVecs; v += 2) {
        store_rounded<Out>(out_ + v * VecF::N, activate_(value(v)), activate_(value(v + 1)));
      }
    }
    // What the block after this one will store, as a rule.
    __builtin_prefetch(out_ + result_columns(kGated), 1, 2);
    sums_ += kBlockColumns;
    out_ += stride_;
    if constexpr (kInt8) row_scales_ += 2;
  }

 private:
  static constexpr int kVecs = kBlockColumns / VecF::N;

  SBF_INLINE VecF value(int v) const {
    const VecF sum = VecF::load(sums_ + v * VecF::N);
    if constexpr (kInt8) {
      const float* const header = header_of(headers_, v * VecF::N);
      return from_int8(sum, row_scales_, header, bias_[v]);
    }
    return kHasBias ? sum + bias_[v] : sum;
  }

  const Activate activate_;
  const float* sums_;
  Out* out_;
  const float *row_scales_, *headers_[2];
  int64_t rows_;
  const int64_t stride_;
  VecF bias_[kVecs];
};

/// Weights that are used on all rows of an item before the next ones.
constexpr int64_t kLinearGroupBytes = 192 << 10;

template <class T, class Out, bool kGated, class Activate>
class TileLinear {
 public:
  TileLinear(const LinearParams& params, Activate activate)
      : p_(params), product_(params, kLinearGroupBytes, params.K), activate_(activate) {}
  ~TileLinear() { finish(); }

  void run(int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
    const int64_t strips = 2 * divide_up(p_.N, result_columns(kGated));
    product_.for_each_block(row, row_end, panel * kStripsPerPanel,
                            smaller_of(panel_end * kStripsPerPanel, strips),
                            [this](const Block& block) { run(block); });
  }

 private:
  static constexpr int64_t kColumns = result_columns(kGated);

  __attribute__((noinline)) void run(const Block& block) {
    if (pending_.columns != kColumns) {
      finish();
      product_.run(block, sums_, kBlockColumns, [] {});
    } else if (pending_.bias != nullptr) {
      multiply<true>(block);
    } else {
      multiply<false>(block);
    }
    const int64_t column = block.strip / 2 * kColumns;
    pending_.sums = sums_;
    pending_.rows = block.rows;
    pending_.columns = smaller_of(kColumns, p_.N - column);
    pending_.bias = p_.bias == nullptr ? nullptr : p_.bias + block.strip * kStripColumns;
    pending_.out = static_cast<Out*>(p_.out) + block.row * p_.N + column;
    pending_.out_stride = p_.N;
    if constexpr (sizeof(T) == 1) {
      pending_.row_scales = p_.row_scales + 2 * block.row;
      for (int i = 0; i < 2; ++i) pending_.headers[i] = product_.header(block.strip + i);
    }
  }

  template <bool kHasBias>
  SBF_INLINE void multiply(const Block& block) {
    WholeRows<T, Out, kGated, Activate, kHasBias> rows(pending_, activate_);
    if (product_.pauses() >= kBlockRows) {
      product_.run(block, sums_, kBlockColumns, [&] { rows.next(); });
    } else {
      while (!rows.done()) rows.next();
      product_.run(block, sums_, kBlockColumns, [] {});
    }
  }

  void finish() {
    const float* bias = pending_.bias;
    if constexpr (sizeof(T) == 1) {
      scale_pending();
      bias = nullptr;
    }
    for (int64_t r = 0; r < pending_.rows; ++r) {
      const float* const sums = pending_.sums + r * kBlockColumns;
      Out* const out = pending_.out + r * pending_.out_stride;
      if constexpr (kGated) {
        finish_gate(sums, sums + kStripColumns, pending_.columns, bias, activate_, out);
      } else {
        finish_row(sums, pending_.columns, bias, activate_, out);
      }
    }
  }

  void scale_pending() {
    for (int64_t c = 0; c < kBlockColumns && pending_.rows > 0; c += VecF::N) {
      const float* const header = header_of(pending_.headers, c);
      const VecF bias = load_bias(pending_.bias, c, kGated ? kBlockColumns : pending_.columns);
      for (int64_t r = 0; r < pending_.rows; ++r) {
        float* const at = sums_ + r * kBlockColumns + c;
        from_int8(VecF::load(at), pending_.row_scales + 2 * r, header, bias).store(at);
      }
    }
  }

  const LinearParams& p_;
  BlockProduct<T> product_;
  const Activate activate_;
  BlockResults<Out> pending_;
  // All are read before the next ones are stored; a second buffer would leave the L1 cache between.
  alignas(64) float sums_[kBlockRows * kBlockColumns];
};

template <class T, class Out, bool kGated, class Activate>
void tile_linear_items(const LinearParams& p, int64_t begin, int64_t end, Activate activate) {
  const int64_t panels = panel_count(p.N, kGated);
  const int64_t across = divide_up(panels, p.item_panels);
  TileLinear<T, Out, kGated, Activate> tiles(p, activate);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / across * p.item_rows, panel = item % across * p.item_panels;
    tiles.run(row, smaller_of(row + p.item_rows, p.T), panel,
              smaller_of(panel + p.item_panels, panels));
  }
}

template <class T, class Out>
void tile_linear(const LinearParams& p, int64_t begin, int64_t end) {
  if constexpr (!kIsSplit<T>) {
    if (!fits_tiles<T>(p)) return linear<T, Out>(p, begin, end);
  }
  using ErfGelu = TileGelu<Out, ErfTail<Out>, kErfTails>;
  using TanhGelu = TileGelu<Out, TanhTail<Out>, kTanhTails>;
  if constexpr (sizeof(T) == sizeof(bf16) && sizeof(Out) == sizeof(float)) {
    tile_linear_items<T, Out, false>(p, begin, end, Identity());  // for linear_norm
  } else {
    with_activation<Out, ErfGelu, TanhGelu>(p.activation, [&](auto f) {
      if (p.gated) return tile_linear_items<T, Out, true>(p, begin, end, f);
      tile_linear_items<T, Out, false>(p, begin, end, f);
    });
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
