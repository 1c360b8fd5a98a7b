// linear: activation(x @ weight.T + bias) on weights that lie in panels (kernels.h).
//
// A tile of the result keeps its sums in registers and takes one step along K after another, so a
// row depends on no other row and not on how many there are. The activation is applied while the
// sums of a block of rows are in the cache, and where a layer is gated, the product of its halves
// is taken there; linear_norm (ops_linear.cpp) adds the residual and normalises the rows of an item
// there, where there are items enough for all threads.
#pragma once

#include "activation_kernel.h"
#include "attention_tile.h"
#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

// Accumulators of a tile, rows times vectors; with the vectors of one step and a broadcast they
// must fit the registers. The fewer rows, the more often a tile reads the weights. Where that is
// more than an L2 cache can give, a block of rows shares one run (LinearOperand) of a panel, which
// stays in the L1 cache, before it goes on to the next one.
#if defined(__AVX512F__)
constexpr int kLinearRows = 8, kLinearVecs = 3;
constexpr int64_t kRowBlock = kLinearRows;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kLinearRows = 4, kLinearVecs = 3;
constexpr int64_t kRowBlock = 128;
#else
constexpr int kLinearRows = 4, kLinearVecs = 1;
constexpr int64_t kRowBlock = 128;
#endif
constexpr bool kSharesRuns = kRowBlock > kLinearRows;
static_assert(kPanelColumns % (kLinearVecs * VecF::N) == 0);

/// With their results, 128 rows fit an L2 cache beside the weights.
constexpr LinearItems kLinearItems{
    .row_step = 8, .least_rows = 128, .most_rows = 128, .panel_step = 1};

/// Weights that are used on all rows of an item before the next ones: half of a small L2 cache.
constexpr int64_t kPanelGroupBytes = 384 << 10;

// How x and the panels are read along K. A step is one value of each row and column. The error of a
// sum grows with its length, so it is cut into runs of steps, whose sums are added up.
template <class T>
struct LinearOperand {
  static constexpr int64_t kValuesPerStep = 1;
  static constexpr int64_t kHeader = 0;
  static constexpr int64_t kRun = 128;
  static constexpr int64_t kTogether = kPanelColumns;  // columns whose weights lie side by side
  static SBF_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return fma(a, b, c); }
};

// A step is a pair of values, which share a 32-bit lane. They carry errors larger than any sum's.
template <>
struct LinearOperand<bf16> {
  static constexpr int64_t kValuesPerStep = 2;
  static constexpr int64_t kHeader = 0;
  static constexpr int64_t kRun = 4096;
  static constexpr int64_t kTogether = kStripColumns;
  static SBF_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512BF16__)
    return dot_pairs(a, b, c);
#else
    return fma(second_of_pairs(a), second_of_pairs(b),
               fma(first_of_pairs(a), first_of_pairs(b), c));
#endif
  }
};

// A step is four values: bytes of x and signed bytes of the weights. Their products add up exactly
// to an int32 where K is below 2^16.
template <>
struct LinearOperand<int8_t> {
  static constexpr int64_t kValuesPerStep = 4;
  static constexpr int64_t kHeader = kInt8Header;
  static constexpr int64_t kRun = int64_t{1} << 40;
  static constexpr int64_t kTogether = kStripColumns;
  static SBF_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return dot_bytes(a, b, c); }
};

// The weights of kLinearVecs * N columns of a panel, from a step on.
template <class Operand>
struct PanelColumns {
  static constexpr int64_t kTogether = Operand::kTogether;
  static constexpr bool kSideBySide = kTogether == kPanelColumns;
  const float* at[kSideBySide ? 1 : kLinearVecs];

  SBF_INLINE PanelColumns(const float* panel, int64_t steps, int64_t column, int64_t step) {
    SBF_UNROLL for (int v = 0; v < (kSideBySide ? 1 : kLinearVecs); ++v) {
      const int64_t c = column + v * VecF::N;
      const int64_t first = c / kTogether * (steps + Operand::kHeader) + Operand::kHeader;
      at[v] = panel + (first + step) * kTogether + c % kTogether;
    }
  }
  SBF_INLINE VecF load(int64_t step, int v) const {
    const float* const from = kSideBySide ? at[0] + v * VecF::N : at[v];
    return VecF::load(from + step * kTogether);
  }
};

// What to ask of memory while a tile is computed: `stride` more bytes at each step.
struct Ahead {
  const char* from;
  int64_t stride;
};

// sums[r][0, kLinearVecs * N) = x[r] times some columns of a panel, or += where `add` is set; x and
// panel in steps.
template <class Operand, int ROWS>
__attribute__((noinline)) void multiply_tile(const float* x, int64_t x_stride,
                                             PanelColumns<Operand> panel, int64_t steps, bool add,
                                             Ahead ahead, float* sums) {
  for (int64_t run = 0; run < steps; run += Operand::kRun) {
    const int64_t run_end = run + Operand::kRun < steps ? run + Operand::kRun : steps;
    VecF acc[ROWS][kLinearVecs];
    SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
      SBF_UNROLL for (int v = 0; v < kLinearVecs; ++v) acc[r][v] = VecF::zero();
    }
    for (int64_t s = run; s < run_end; ++s) {
      if constexpr (kSharesRuns) __builtin_prefetch(ahead.from + s * ahead.stride, 0, 2);
      VecF columns[kLinearVecs];
      SBF_UNROLL for (int v = 0; v < kLinearVecs; ++v) { columns[v] = panel.load(s, v); }
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        const VecF value = VecF::set1(x[r * x_stride + s]);
        SBF_UNROLL for (int v = 0; v < kLinearVecs; ++v) {
          acc[r][v] = Operand::multiply_add(value, columns[v], acc[r][v]);
        }
      }
    }
    SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
      SBF_UNROLL for (int v = 0; v < kLinearVecs; ++v) {
        float* const to = sums + r * kPanelColumns + v * VecF::N;
        if (run > 0 || add) acc[r][v] = acc[r][v] + VecF::load(to);
        acc[r][v].store(to);
      }
    }
  }
}

template <class Operand, int ROWS = kLinearRows>
SBF_INLINE void multiply_rows(int64_t rows, const float* x, int64_t x_stride,
                              const PanelColumns<Operand>& panel, int64_t steps, bool add,
                              Ahead ahead, float* sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return multiply_rows<Operand, ROWS - 1>(rows, x, x_stride, panel, steps, add, ahead, sums);
    }
  }
  multiply_tile<Operand, ROWS>(x, x_stride, panel, steps, add, ahead, sums);
}

// sums[r][:] = x[r] times a panel, for at most kRowBlock rows; x and panel in steps.
template <class Operand>
SBF_INLINE void multiply_block(const float* x, int64_t rows, const float* panel, int64_t steps,
                               float* sums) {
  constexpr int64_t kColumns = kLinearVecs * VecF::N, kTilesAcross = kPanelColumns / kColumns;
  const int64_t run = kSharesRuns ? Operand::kRun : steps;
  const int64_t tiles = (rows + kLinearRows - 1) / kLinearRows * kTilesAcross;
  const int64_t ahead = (kPanelColumns * static_cast<int64_t>(sizeof(float)) + tiles - 1) / tiles;
  for (int64_t s = 0; s < steps; s += run) {
    const int64_t count = steps - s < run ? steps - s : run;
    const float* weights = panel + s * kPanelColumns;
    // The tiles of this run ask for the next one, of this panel or the one behind it.
    const char* next = reinterpret_cast<const char*>(weights + count * kPanelColumns);
    for (int64_t r = 0; r < rows; r += kLinearRows) {
      for (int64_t c = 0; c < kPanelColumns; c += kColumns) {
        multiply_rows<Operand>(rows - r, x + r * steps + s, steps,
                               PanelColumns<Operand>(panel, steps, c, s), count, s > 0,
                               Ahead{next, ahead}, sums + r * kPanelColumns + c);
        next += ahead * count;
      }
    }
  }
}

template <class Out, class Activate>
SBF_INLINE void finish_row(const float* sums, int64_t columns, const float* bias, Activate activate,
                           Out* out) {
  constexpr int64_t N = VecF::N;
  int64_t c = 0;
  for (; c + N <= columns; c += N) {
    VecF v = VecF::load(sums + c);
    if (bias != nullptr) v = v + VecF::load(bias + c);
    store_rounded<Out>(out + c, activate(v));
  }
  if (c < columns) {
    const int n = static_cast<int>(columns - c);
    VecF v = VecF::load(sums + c);
    if (bias != nullptr) v = v + VecF::load_partial(bias + c, n);
    store_as_partial<Out>(out + c, activate(v), n);
  }
}

// What becomes of the sums of some rows of a panel; or of two, whose sums stand one after the
// other.
template <class Out>
using Finish = void (*)(const float* sums, int64_t rows, int64_t columns, const float* bias,
                        Out* out, int64_t out_stride);

template <class Out, class Activate>
void finish_tile(const float* sums, int64_t rows, int64_t columns, const float* bias, Out* out,
                 int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = sums + r * kPanelColumns;
    // Loops of a number of steps that is known are unrolled.
    if (columns == kPanelColumns) {
      finish_row(row, kPanelColumns, bias, Activate(), out + r * out_stride);
    } else {
      finish_row(row, columns, bias, Activate(), out + r * out_stride);
    }
  }
}

// f(a) * b of at most a strip of each, `bias` being that of both strips.
template <class Out, class Activate>
SBF_INLINE void finish_gate(const float* a, const float* b, int64_t columns, const float* bias,
                            Activate activate, Out* out) {
  constexpr int64_t N = VecF::N;
  for (int64_t c = 0; c < columns; c += N) {
    VecF activated = VecF::load(a + c), gate = VecF::load(b + c);
    if (bias != nullptr) {
      activated = activated + VecF::load(bias + c);
      gate = gate + VecF::load(bias + kStripColumns + c);
    }
    const VecF v = activate(activated) * gate;
    if (c + N <= columns) {
      store_rounded<Out>(out + c, v);
    } else {
      store_as_partial<Out>(out + c, v, static_cast<int>(columns - c));
    }
  }
}

template <class Out, class Activate>
void finish_gated_tile(const float* sums, int64_t rows, int64_t columns, const float* bias,
                       Out* out, int64_t out_stride) {
  const auto strip = [=](int64_t r, int64_t s) {
    return sums + (s / kStripsPerPanel * rows + r) * kPanelColumns +
           s % kStripsPerPanel * kStripColumns;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0, s = 0; c < columns; c += kStripColumns, s += 2) {
      const int64_t left = columns - c;
      finish_gate(strip(r, s), strip(r, s + 1), left < kStripColumns ? left : kStripColumns,
                  bias == nullptr ? nullptr : bias + 2 * c, Activate(), out + r * out_stride + c);
    }
  }
}

// What int32 sums of products of bytes stand for, plus `bias`: `scales` is of the row, `header` of
// the columns. Each step is rounded once, so that all code gives the same bits.
SBF_INLINE VecF from_int8(VecF sums, const float* scales, const float* header, VecF bias) {
  const VecF scale = VecF::load(header) * VecF::set1(scales[0]);
  const VecF weights = VecF::load(header + kStripColumns);
  return fused(fused(VecF::set1(-scales[1]), weights, from_integers(sums)), scale, bias);
}

SBF_INLINE VecF load_bias(const float* bias, int64_t column, int64_t columns) {
  const int64_t left = columns - column;
  if (bias == nullptr || left <= 0) return VecF::zero();
  if (left >= VecF::N) return VecF::load(bias + column);
  return VecF::load_partial(bias + column, static_cast<int>(left));
}

// Sums of a block as fp32, with the bias; the panel begins with the header of its first strip.
SBF_INLINE void scale_sums(float* sums, int64_t rows, int64_t columns, const float* bias,
                           const float* row_scales, const float* panel, int64_t steps) {
  for (int64_t c = 0; c < kPanelColumns; c += VecF::N) {
    const int64_t strip = c / kStripColumns * (steps + kInt8Header) * kStripColumns;
    const float* const header = panel + strip + c % kStripColumns;
    const VecF bias_of_columns = load_bias(bias, c, columns);
    for (int64_t r = 0; r < rows; ++r) {
      float* const at = sums + r * kPanelColumns + c;
      from_int8(VecF::load(at), row_scales + 2 * r, header, bias_of_columns).store(at);
    }
  }
}

// Rows [row, row_end) of the panels [panel, panel_end).
template <class T, class Out>
void linear_item(const LinearParams& p, int64_t row, int64_t row_end, int64_t panel,
                 int64_t panel_end, Finish<Out> finish) {
  using Operand = LinearOperand<T>;
  const int64_t together = p.gated ? 2 : 1;  // panels
  const int64_t steps = p.K / Operand::kValuesPerStep;
  const int64_t panel_size = (steps + Operand::kHeader) * kPanelColumns;  // of 32-bit lanes
  const int64_t fitting = kPanelGroupBytes / (panel_size * static_cast<int64_t>(sizeof(float)) + 1);
  const int64_t group = fitting > together ? fitting / together * together : together;
  alignas(64) float sums[2 * kRowBlock * kPanelColumns];

  for (int64_t first = panel; first < panel_end; first += group) {
    const int64_t last = first + group < panel_end ? first + group : panel_end;
    for (int64_t t = row; t < row_end; t += kRowBlock) {
      const int64_t rows = row_end - t < kRowBlock ? row_end - t : kRowBlock;
      // A lane holds a step of values; they are only broadcast, never computed with.
      const float* x = reinterpret_cast<const float*>(static_cast<const T*>(p.x) + t * p.K);
      for (int64_t i = first; i < last; i += together) {
        const int64_t column = i / together * kPanelColumns;
        const int64_t columns = p.N - column < kPanelColumns ? p.N - column : kPanelColumns;
        const float* bias = p.bias == nullptr ? nullptr : p.bias + i * kPanelColumns;
        for (int64_t half = 0; half < together; ++half) {
          const float* weights = static_cast<const float*>(p.panels) + (i + half) * panel_size;
          float* const sums_of_half = sums + half * rows * kPanelColumns;
          multiply_block<Operand>(x, rows, weights, steps, sums_of_half);
          if constexpr (Operand::kHeader > 0) {
            scale_sums(sums_of_half, rows, p.gated ? kPanelColumns : columns,
                       bias == nullptr ? nullptr : bias + half * kPanelColumns,
                       p.row_scales + 2 * t, weights, steps);
          }
        }
        if constexpr (Operand::kHeader > 0) bias = nullptr;
        finish(sums, rows, columns, bias, static_cast<Out*>(p.out) + t * p.N + column, p.N);
      }
    }
  }
}

template <class T, class Out>
void linear_items(const LinearParams& p, int64_t begin, int64_t end, Finish<Out> finish) {
  const int64_t panels = panel_count(p.N, p.gated);
  const int64_t across = (panels + p.item_panels - 1) / p.item_panels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / across * p.item_rows, panel = item % across * p.item_panels;
    const int64_t row_end = row + p.item_rows, panel_end = panel + p.item_panels;
    linear_item<T, Out>(p, row, row_end < p.T ? row_end : p.T, panel,
                        panel_end < panels ? panel_end : panels, finish);
  }
}

template <class T, class Out>
void linear(const LinearParams& p, int64_t begin, int64_t end) {
  with_activation<Out>(p.activation, [&](auto f) {
    using F = decltype(f);
    linear_items<T, Out>(p, begin, end, p.gated ? finish_gated_tile<Out, F> : finish_tile<Out, F>);
  });
}

}  // namespace sbert_fast::cpu::SBF_ISA
