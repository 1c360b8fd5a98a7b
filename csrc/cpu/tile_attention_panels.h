// Where the panels of the heads under way lie, and how they are filled.
#pragma once

#include "tile_attention_unit.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kAlive = 4;           // units under way at most, and heads that they belong to
constexpr int64_t kHeads = kAlive + 1;  // and one that is packed
constexpr int64_t kHeadPanel = 8192;    // slots of the keys, or values, of a short sequence
constexpr int64_t kWholePanel = kHeads * kHeadPanel;  // of a long one, which is alone
constexpr int64_t kHeadTerms = kHeadPanel * 2 / (kStepDims / 2);

struct alignas(64) TilePanels {
  float queries[kWholePanel], keys[kWholePanel], values[kWholePanel];
  float terms[kHeads * kHeadTerms];
};

SBF_INLINE int64_t panel_slots(int64_t keys, int64_t D) {
  return round_up(keys, kStepKeys) * D / 2;
}

// Fills the panels of a head, those that begin where the head `at` has its own.
class TilePacker {
 public:
  TilePacker(const AttentionParams& params, TilePanels& panels)
      : p_(params), panels_(panels), D_(params.D) {}

  // Only those that something is done to, and those that end the tensor within a tile: from others,
  // tiles read what follows along.
  void pack_queries(TileHead& head, int64_t query, int64_t query_end, int64_t at) {
    const HeadRows<bf16>& rows = head.rows;
    const RowChanges changes{{p_.query_norm, p_.norm_eps}, rows.rotary_at(query)};
    float* const panel = panels_.queries + at * kHeadPanel;
    head.queries = panel;
    head.packed = query;
    if (!changes.any()) {
      head.packed = smaller(query_end, rows.readable / kTileSide * kTileSide);
      if (head.packed == query_end) return;
    }
    pack_rows<Bf16Rows>(rows.q + head.packed * rows.stride, rows.stride, query_end - head.packed,
                        D_, changes.norm, changes.rotary, panel, D_ / 2);
  }

  void pack_keys(TileHead& head, int64_t key, int64_t key_end, int64_t at) {
    const HeadRows<bf16>& rows = head.rows;
    float* const panel = panels_.keys + at * kHeadPanel;
    head.key = key;
    head.key_end = key_end;
    head.keys = panel - key * D_ / 2;
    for (; key < key_end; key += kTileSide) {
      pack_key_tiles(rows.k + key * rows.stride, rows.stride, smaller(kTileSide, key_end - key),
                     rows.readable - key, D_, {{p_.key_norm, p_.norm_eps}, rows.rotary_at(key)},
                     panel + (key - head.key) * D_ / 2);
    }
  }

  void pack_values(TileHead& head, int64_t at) {
    const HeadRows<bf16>& rows = head.rows;
    float* const panel = panels_.values + at * kHeadPanel;
    head.values = panel - head.key * D_ / 2;
    for (int64_t key = head.key; key < head.key_end; key += kStepKeys) {
      pack_value_tiles(rows.v + key * rows.stride, rows.stride, head.key_end - key, D_,
                       panel + (key - head.key) * D_ / 2);
    }
  }

  // For keys [ahead, ahead_end) behind their queries.
  void fill_terms(TileHead& head, int64_t ahead, int64_t ahead_end, int64_t at) {
    if (!head.rows.has_terms()) return;
    float* const terms = panels_.terms + at * kHeadTerms - ahead;
    for (; ahead < ahead_end; ++ahead) terms[ahead] = head.rows.term(ahead) * kLog2e;
    head.terms = terms;
  }

 private:
  const AttentionParams& p_;
  TilePanels& panels_;
  const int64_t D_;
};

}  // namespace sbert_fast::cpu::SBF_ISA
