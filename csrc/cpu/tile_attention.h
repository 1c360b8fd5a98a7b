// varlen_attention in bf16 on tiles.
//
// Queries of a head go through in units of 16, keys in steps of 32:
//
//   score     queries x keys
//   weigh     scores become weights, which are the left operand of the next product as they lie
//   multiply  weights x values, and x ones: the sums of the weights
//   finish    divides by them
//
// Tiles and vector units work side by side: while scores are multiplied, those before them become
// weights, and the weights of the unit before are multiplied by their values. So several units are
// under way, of as many heads where sequences are short.
//
// A unit computes nothing but its own rows and takes the keys in steps counted from the start of
// the sequence: a row's bits depend on nothing but its sequence.
#pragma once

#include "attention_kernel.h"
#include "tile_attention_panels.h"
#include "tile_attention_unit.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kBlockKeys = 1024;  // of a long sequence, or fewer
constexpr int64_t kBlockUnits = 16;   // of queries that a block of keys is packed for
constexpr int64_t kFewestKeys = 6;    // tiles that are less full take longer than dot products
constexpr int64_t kPrefetchedRows = 128;

struct alignas(64) TileScratch {
  TilePanels panels;
  float scores[2][2 * kTileSlots];
  float weights[3][kBlockKeys / kStepKeys * kTileSlots];  // the last one for what is done again
  float out[kBlockUnits][kTileSide * kMaxHeadDim + kTileSlots];
  float offsets[kBlockUnits][kTileSide];
  float tops[kBlockUnits][kTileSlots];
};

class TileAttention {
 public:
  TileAttention(const AttentionParams& params, TileScratch& scratch)
      : s_(scratch),
        D_(params.D),
        c_(VecF::set1(params.scale * kLog2e)),
        packer_(params, scratch.panels),
        products_(params.D) {}
  ~TileAttention() { drain(); }

  void attend(const HeadRows<bf16>& rows) {
    const int64_t length = rows.length;
    if (length == 0) return;
    if (length > block_keys()) return attend_blocks(rows);
    const bool is_long = panel_slots(length, D_) > kHeadPanel;
    if (is_long || was_long_) drain();
    was_long_ = is_long;
    const int64_t at = is_long ? 0 : num_heads_++ % kHeads;
    TileHead& head = heads_[at];
    head = {};
    head.rows = rows;
    packer_.pack_queries(head, 0, length, at);
    packer_.pack_keys(head, 0, length, at);
    packer_.pack_values(head, at);
    packer_.fill_terms(head, 1 - length, round_up(length, kStepKeys), at);
    push_packed();
    packed_ = &head;
  }

 private:
  // A multiple of kStepKeys.
  int64_t block_keys() const {
    return smaller(kBlockKeys, kWholePanel * 2 / D_ / kStepKeys * kStepKeys);
  }

  // More keys than the panels hold: a block of them for some units after another. First come the
  // maxima of all of them.
  void attend_blocks(const HeadRows<bf16>& rows) {
    drain();
    was_long_ = true;
    TileHead& head = heads_[0];
    head = {};
    head.rows = rows;
    for (int64_t q0 = 0; q0 < rows.length; q0 += kBlockUnits * kTileSide) {
      const int64_t q_end = smaller(rows.length, q0 + kBlockUnits * kTileSide);
      packer_.pack_queries(head, q0, q_end, 0);
      const int64_t from = larger(0, q0 - rows.before) / kStepKeys * kStepKeys;
      const int64_t to = smaller(rows.length, q_end + rows.after);
      for (int64_t i = 0; i < kBlockUnits; ++i) reset_tops(s_.tops[i], s_.offsets[i]);
      for (int64_t key = from; key < to; key += block_keys()) {
        pack_block(head, key, to, q0, q_end);
        for_each_unit(head, q0, q_end,
                      [&](TileUnit& unit, int64_t i) { raise_tops(unit, s_.tops[i]); });
      }
      for (int64_t i = 0; i < kBlockUnits; ++i) set_offsets(s_.tops[i], s_.offsets[i]);
      for (int64_t key = from; key < to; key += block_keys()) {
        pack_block(head, key, to, q0, q_end);
        packer_.pack_values(head, 0);
        for_each_unit(head, q0, q_end, [&](TileUnit& unit, int64_t) { push(unit); });
        drain();
      }
    }
  }

  void pack_block(TileHead& head, int64_t key, int64_t to, int64_t q0, int64_t q_end) {
    packer_.pack_keys(head, key, smaller(to, key + block_keys()), 0);
    packer_.fill_terms(head, key - (q_end - 1), round_up(head.key_end, kStepKeys) - q0, 0);
  }

  // Calls body(unit, its number in the block) for those that see some of the keys of the block.
  template <class Body>
  void for_each_unit(TileHead& head, int64_t q0, int64_t q_end, const Body& body) {
    for (int64_t query = q0; query < q_end; query += kTileSide) {
      const int64_t i = (query - q0) / kTileSide;
      TileUnit& unit = next_unit(head, query, i);
      if (unit.step >= unit.step_end) continue;
      unit.has_offsets = true;
      unit.goes_on = head.key > query - head.rows.before && head.key > 0;
      unit.is_last = head.key_end >= smaller(head.rows.length, query + unit.rows + head.rows.after);
      body(unit, i);
    }
  }

  // 16 queries and the keys of the block; `at` is where they have offsets and sums.
  TileUnit& next_unit(TileHead& head, int64_t query, int64_t at) {
    const HeadRows<bf16>& rows = head.rows;
    TileUnit& unit = units_[num_units_ % kAlive];
    unit = {};
    unit.head = &head;
    unit.query = query;
    unit.rows = smaller(kTileSide, rows.length - query);
    unit.step = larger(head.key, query - rows.before) / kStepKeys;
    unit.step_end = ceil_div(smaller(head.key_end, query + unit.rows + rows.after), kStepKeys);
    unit.weights = s_.weights[num_units_ % 2];
    unit.offsets = s_.offsets[at];
    unit.out = s_.out[at];
    const bool is_packed = query >= head.packed;
    unit.queries = is_packed
                       ? static_cast<const void*>(head.queries + (query - head.packed) * D_ / 2)
                       : rows.q + query * rows.stride;
    unit.query_bytes = 2 * (is_packed ? D_ : rows.stride);
    return unit;
  }

  void push(TileUnit& unit) {
    ++num_units_;
    for (int64_t step = unit.step; step < unit.step_end; ++step) {
      float* const scores = s_.scores[num_steps_++ % 2];
      const int64_t rows = last_.unit == nullptr ? 0 : last_.unit->rows;
      int64_t weighed = 0;
      if (D_ == kStepDims) {
        products_.score(unit, step, scores);
      } else {
        // Products are longer, and tiles wait while a long piece of vector code is in the way.
        products_.score_half(unit, step, 0, scores);
        weigh_last(0, rows / 3);
        products_.score_half(unit, step, 1, scores);
        weigh_last(rows / 3, weighed = rows * 2 / 3);
      }
      const int64_t left = products_.left();
      advance(step == unit.step ? left : ceil_div(left, unit.step_end - step));
      weigh_last(weighed, rows);
      end_weighing();
      last_ = {&unit, step, scores};
    }
  }

  // Some rows of the scores that were multiplied last become weights.
  SBF_INLINE void weigh_last(int64_t from, int64_t to) {
    if (from >= to) return;
    const TileUnit& unit = *last_.unit;
    unit.scores(last_.step, last_.scores, c_)
        .weigh(from, to, unit.keys(last_.step), unit.weights_of(last_.step));
  }

  // After the last step of a unit, its values are due.
  void end_weighing() {
    TileUnit* const unit = last_.unit;
    last_.unit = nullptr;
    if (unit == nullptr || last_.step + 1 < unit->step_end) return;
    products_.begin_values(*unit);
    weighed_ = unit;
  }

  SBF_INLINE void advance(int64_t count) {
    if (weighed_ == nullptr) return;
    products_.advance(count);
    if (products_.left() > 0) return;
    if (stored_ != nullptr) finish(*stored_);
    stored_ = weighed_;
    weighed_ = nullptr;
  }

  // The units of the head that was packed before the last one: what was just stored cannot be
  // loaded into tiles yet.
  void push_packed() {
    if (packed_ == nullptr) return;
    TileHead& head = *packed_;
    packed_ = nullptr;
    for (int64_t query = 0; query < head.rows.length; query += kTileSide) {
      TileUnit& unit = next_unit(head, query, num_units_ % kAlive);
      unit.has_offsets = head.has_offsets;
      unit.is_last = true;
      clear(unit.offsets, kTileSide);
      if (unit.has_offsets) find_offsets(unit);
      push(unit);
    }
  }

  // Finishes all that is under way.
  void drain() {
    push_packed();
    advance(products_.left());
    if (last_.unit != nullptr) weigh_last(0, last_.unit->rows);
    end_weighing();
    advance(products_.left());
    if (stored_ != nullptr) finish(*stored_);
    stored_ = nullptr;
  }

  SBF_INLINE void finish(TileUnit& unit) {
    if (!unit.is_last) return;
    alignas(64) float sums[4 * kTileSide], inverses[kTileSide];
    const float* const tile = unit.out + D_ * kTileSide;
    for (int64_t i = 0; i < kTileSide; i += VecF::N) {
      transpose4(tile + i * kTileSide, kTileSide, sums + i, kTileSide);
      (VecF::set1(1.0f) / VecF::load(sums + i)).store(inverses + i);
    }
    if (!unit.has_offsets && !are_within_reach(sums, inverses, unit.rows)) return redo(unit);
    const int64_t count = unit.rows, stride = unit.head->rows.out_stride, D = D_;
    bf16* to = unit.head->rows.out + unit.query * stride;
    const float* from = unit.out;
    for (int64_t i = 0; i < count; ++i, to += stride, from += kTileSide) {
      const VecF factor = VecF::set1(inverses[i]);
      for (int64_t d = 0; d < D; d += kStepDims) {
        const float* const left = from + d * kTileSide;
        store_unzipped(to + d, left, left + kTileSlots, factor);
      }
    }
  }

  // Computes a unit again, with offsets; those of its head that have not begun will have them too.
  __attribute__((noinline)) void redo(TileUnit& unit) {
    alignas(64) float scores[2 * kTileSlots];
    unit.head->has_offsets = unit.has_offsets = true;
    unit.weights = s_.weights[2];
    find_offsets(unit);
    for (int64_t step = unit.step; step < unit.step_end; ++step) {
      products_.score(unit, step, scores);
      unit.scores(step, scores, c_).weigh(0, unit.rows, unit.keys(step), unit.weights_of(step));
    }
    products_.begin_values(unit);
    products_.advance(products_.left());
    finish(unit);
  }

  void find_offsets(TileUnit& unit) {
    reset_tops(s_.tops[0], unit.offsets);
    raise_tops(unit, s_.tops[0]);
    set_offsets(s_.tops[0], unit.offsets);
  }

  static void reset_tops(float* tops, float* offsets) {
    clear(offsets, kTileSide);
    for (int64_t i = 0; i < kTileSlots; i += VecF::N) VecF::set1(kLowest).store(tops + i);
  }

  void raise_tops(const TileUnit& unit, float* tops) {
    alignas(64) float scores[2 * kTileSlots];
    for (int64_t step = unit.step; step < unit.step_end; ++step) {
      products_.score(unit, step, scores);
      unit.scores(step, scores, c_).raise(unit.rows, unit.keys(step), tops);
    }
  }

  static void set_offsets(const float* tops, float* offsets) {
    for (int64_t row = 0; row < kTileSide; ++row, tops += kTileSide) {
      VecF top = VecF::load(tops);
      for (int64_t i = VecF::N; i < kTileSide; i += VecF::N) top = max(top, VecF::load(tops + i));
      offsets[row] = -reduce_max(top);
    }
  }

  struct Step {
    TileUnit* unit = nullptr;
    int64_t step = 0;
    const float* scores = nullptr;
  };

  TileScratch& s_;
  const int64_t D_;
  const VecF c_;
  TilePacker packer_;
  TileProducts products_;
  TileHead heads_[kHeads];
  TileUnit units_[kAlive];
  int64_t num_heads_ = 0, num_units_ = 0, num_steps_ = 0;
  bool was_long_ = false;
  Step last_;                    // its scores become weights next
  TileHead* packed_ = nullptr;   // its units come next
  TileUnit* weighed_ = nullptr;  // its values are multiplied
  TileUnit* stored_ = nullptr;   // is only to be finished
};

/// Items are sequence * H + head. Tiles have no code for what is passed on, or are slower.
inline void tile_attention(const AttentionParams& p, int64_t begin, int64_t end) {
  if (p.D % kStepDims != 0 || p.buckets != nullptr || p.dropout.threshold != 0) {
    return varlen_attention<bf16>(p, begin, end);
  }
  if (begin >= end) return;
  TileScratch scratch;
  TileAttention tiles(p, scratch);
  const auto at = [&](int64_t item) { return HeadRows<bf16>(p, item / p.H, item % p.H); };
  HeadRows<bf16> rows = at(begin);
  for (int64_t item = begin; item < end; ++item) {
    const HeadRows<bf16> next = item + 1 < end ? at(item + 1) : HeadRows<bf16>{};
    next.prefetch_keys(smaller(next.length, kPrefetchedRows), p.D);
    if (rows.length < kFewestKeys) {
      varlen_attention<bf16>(p, item, item + 1);
    } else {
      tiles.attend(rows);
    }
    rows = next;
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
