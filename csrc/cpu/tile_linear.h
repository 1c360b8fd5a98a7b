// linear on tiles: while a block is multiplied, the results of the one before it are finished, some
// in each pause. Vector units and tiles work side by side.
#pragma once

#include "linear_kernel.h"
#include "tile_product.h"

namespace sbert_fast::cpu::SBF_ISA {

/// The results of a block: sums that are complete, and where they go.
template <class Out, class Activate>
struct BlockResults {
  Activate activate;
  const float* sums = nullptr;  // [rows][kBlockColumns]
  int64_t rows = 0, columns = 0;
  const float* bias = nullptr;
  Out* out = nullptr;
  int64_t out_stride = 0;

  SBF_INLINE void finish(int64_t count) {
    count = smaller_of(count, rows);
    if (count <= 0) return;
    for (int64_t r = 0; r < count; ++r) {
      if (columns == kBlockColumns && bias != nullptr) {
        finish_whole_row();
      } else {
        finish_row(sums, columns, bias, activate, out);
      }
      sums += kBlockColumns;
      out += out_stride;
    }
    rows -= count;
  }

  SBF_INLINE void finish_whole_row() {
    SBF_UNROLL for (int64_t c = 0; c < kBlockColumns; c += 2 * VecF::N) {
      const VecF first = VecF::load(sums + c) + VecF::load(bias + c);
      const VecF second = VecF::load(sums + c + VecF::N) + VecF::load(bias + c + VecF::N);
      store_rounded<Out>(out + c, activate(first), activate(second));
    }
  }
};

template <class Out, class Activate>
class TileLinear {
 public:
  TileLinear(const LinearParams& params, Activate activate)
      : p_(params), product_(params), pending_{activate} {}
  ~TileLinear() { pending_.finish(pending_.rows); }

  void run(int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
    const int64_t strips = divide_up(p_.N, kStripColumns);
    product_.for_each_block(row, row_end, panel * kStripsPerPanel,
                            smaller_of(panel_end * kStripsPerPanel, strips),
                            [this](const Block& block) { run(block); });
  }

 private:
  __attribute__((noinline)) void run(const Block& block) {
    BlockResults<Out, Activate> pending = pending_;
    const int64_t count = divide_up(pending.rows, product_.pauses());
    const int64_t column = block.strip * kStripColumns;
    Out* const out = static_cast<Out*>(p_.out) + block.row * p_.N + column;
    const Out* ahead = out;
    int64_t rows_ahead = block.rows;
    product_.run(block, sums_, kBlockColumns, [&] {
      if (rows_ahead > 0) {
        __builtin_prefetch(ahead, 1, 2);
        ahead += p_.N;
        --rows_ahead;
      }
      pending.finish(count);
    });
    pending_.sums = sums_;
    pending_.rows = block.rows;
    pending_.columns = smaller_of(kBlockColumns, p_.N - column);
    pending_.bias = p_.bias == nullptr ? nullptr : p_.bias + column;
    pending_.out = out;
    pending_.out_stride = p_.N;
  }

  const LinearParams& p_;
  BlockProduct product_;
  BlockResults<Out, Activate> pending_;
  // All are read before the next ones are stored; a second buffer would leave the L1 cache between.
  alignas(64) float sums_[kBlockRows * kBlockColumns];
};

template <class Out, class Activate>
void tile_linear_items(const LinearParams& p, int64_t begin, int64_t end, Activate activate) {
  const int64_t panels = divide_up(p.N, kPanelColumns);
  const int64_t across = divide_up(panels, p.item_panels);
  TileLinear<Out, Activate> tiles(p, activate);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / across * p.item_rows, panel = item % across * p.item_panels;
    tiles.run(row, smaller_of(row + p.item_rows, p.T), panel,
              smaller_of(panel + p.item_panels, panels));
  }
}

template <class Out>
void tile_linear(const LinearParams& p, int64_t begin, int64_t end) {
  if (!fits_tiles(p)) return linear<bf16, Out>(p, begin, end);
  switch (p.activation) {
    case Activation::kNone:
      return tile_linear_items<Out>(p, begin, end, [](VecF v) { return v; });
    case Activation::kGelu:
      return tile_linear_items<Out>(p, begin, end, [](VecF v) { return gelu<ErfTail<Out>>(v); });
    case Activation::kGeluTanh:
      return tile_linear_items<Out>(p, begin, end, [](VecF v) { return gelu<TanhTail<Out>>(v); });
    case Activation::kSilu:
      return;  // refused by the op
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
