// Parameter structs and the table of kernels: the seam between the ops and the kernels.
//
// Plain data only. No torch header may be included here or by a kernel, and the ops never see an
// instruction set: they fill a struct and call through the table of the active one (dispatch.h).
// Kernels trust their arguments; every check is in the op. Sizes use the project's alphabet: B
// sequences, T packed tokens, H heads, D head dim, E hidden, F FFN width. Pointers to activations
// are void; the entry of the table fixes their dtype.
#pragma once

#include <cstdint>

namespace sbert_fast::cpu {

enum Dtype { kFloat32 = 0, kBFloat16 = 1, kNumDtypes = 2 };

// Dropout of attention weights, see attention_dropout.h; a threshold of 0 drops none.
struct Dropout {
  uint32_t threshold = 0;
  float scale = 1.0f;  // of the weights that stay
  uint64_t seed = 0;
};

struct AttentionParams {
  const void* qkv;            // [T, H + 2 * kv_heads, D]
  void* out;                  // [T, H, D]
  const int32_t* cu_seqlens;  // [B + 1]
  int64_t T, B, H, D;
  int64_t kv_heads;  // divides H
  float scale;
  bool causal;
  const float* bias;        // [H, 2R + 1], or null
  int64_t R;                // reach of the bias
  int64_t window;           // -1: none
  const float* rotary_cos;  // [T, D / 2], or null
  const float* rotary_sin;  // [T, D / 2], or null
  const float* query_norm;  // [D], or null: no RMSNorm of heads
  const float* key_norm;    // [D], null where query_norm is
  float norm_eps;
  const void* position_keys;     // [H, P, D], or null: rows that queries are multiplied by
  const void* position_queries;  // [H, P, D], or null: rows that keys are multiplied by
  const int32_t* buckets;        // [2 * reach + 1], rows by distance, or null: there are no tables
  int64_t P, reach;
  Dropout dropout{};
};

struct AttentionBackwardParams {
  AttentionParams forward;  // out is null, and so are the tables of distances
  const void* grad;         // [T, H, D]
  void* d_qkv;              // as forward.qkv
  double* d_bias;           // [B, H, 2R + 1], zeros, or null: added to, by sequence
  double* d_norms;          // [B, kv_heads, 2, D], zeros, or null: added to, by item
  float* scratch;           // attention_backward_scratch(longest sequence, D), of this thread
};

struct EmbedNormParams {
  const int32_t* ids;          // [T]
  const int32_t* positions;    // [T], or null
  const int32_t* types;        // [T], or null: type 0
  const void* word;            // [V, E]
  const void* position_table;  // [P, E], null where positions are
  const void* type_table;      // [Y, E], or null
  const float* weight;         // [E], or null: no norm
  const float* bias;           // [E], null where weight is
  void* out;                   // [T, E]
  int64_t E;
  float eps;
  bool rms;  // RMSNorm
};

struct AddNormParams {
  const void* x;         // [T, E]
  const float* bias;     // [E], or null
  const void* residual;  // [T, E], or null
  const float* weight;   // [E]
  const float* ln_bias;  // [E]
  void* out;             // [T, E]
  int64_t E;
  float eps;
  bool rms = false;     // RMSNorm
  void* sum = nullptr;  // [T, E], or null: of x, bias and residual
};

/// Rows whose contributions to the gradients of parameters are summed together.
inline constexpr int64_t kNormChunk = 64;

struct AddNormBackwardParams {
  const void* grad;      // [T, E]
  const void* x;         // [T, E]
  const float* bias;     // [E], or null
  const void* residual;  // [T, E], or null
  const float* weight;   // [E]
  void* d_x;             // [T, E]
  float* sums;           // [chunks, 3, E]: for weight, ln_bias and bias
  int64_t T, E;
  float eps;
  bool rms;              // RMSNorm
  const void* grad_sum;  // [T, E], or null: the gradient of the sum of x, bias and residual
};

struct BiasGeluParams {
  const void* x;      // [T, F]
  const float* bias;  // [F], or null
  void* out;          // [T, F]
  int64_t F;
  bool tanh;
};

struct BiasGeluBackwardParams {
  BiasGeluParams forward;  // out is null
  const void* grad;        // [T, F]
  void* d_x;               // [T, F]
};

// Activation functions, by their numbers in the schemas.
enum class Activation : int64_t { kNone, kGelu, kGeluTanh, kSilu };
inline constexpr int64_t kNumActivations = 4;

struct GatedParams {
  const void* x;      // [T, 2F]
  const float* bias;  // [2F], or null
  void* out;          // [T, F]
  int64_t F;
  Activation activation;
  bool first;  // whether the first half is the one that is activated
};

struct GatedBackwardParams {
  GatedParams forward;  // out is null
  const void* grad;     // [T, F]
  void* d_x;            // [T, 2F]
};

/// Columns of a panel. The weights of a linear layer lie as fp32 [panels, K, 48], or in strips of
/// 16 columns, bf16 [3 * panels, K / 2, 16, 2] or int8 [3 * panels, 2 + K / 4, 16, 4], zeros beyond
/// column N: the order in which they are read, on every instruction set. Two steps come before the
/// weights in int8, both fp32: the scale of each column, and the sum of its weights.
///
/// fp32 weights may also be split, bf16 [3 * panels, K, 16, 2]: for each 32 inputs of a strip, what
/// bf16 leaves of the weights, itself as bf16, then the weights as bf16, both in strips as above.
///
/// Gated layers have two panels for 48 columns of the result: strips of those that are activated,
/// each before the strip of those that they are multiplied by.
inline constexpr int64_t kPanelColumns = 48;
inline constexpr int64_t kStripColumns = 16, kStripsPerPanel = kPanelColumns / kStripColumns;
inline constexpr int64_t kInt8Header = 2;

// What int8 weights multiply: rows of x as bytes, x / scale + zero, rounded to the nearest.
struct QuantizeParams {
  const void* x;  // [T, K]
  uint8_t* out;   // [T, K]
  float* scales;  // [T, 2]: the scale and the zero of each row
  int64_t K;
};

// What split weights multiply: each 32 values of a row of x as bf16, then what that leaves of them.
struct SplitParams {
  const float* x;  // [T, K]
  void* out;       // bf16 [T, 2K]
  int64_t K;       // a multiple of kSplitInputs
};
inline constexpr int64_t kSplitInputs = 32;

// Work items are item_rows x item_panels parts of the result, those of the same rows together.
struct LinearParams {
  const void* x;            // [T, K]
  const float* row_scales;  // [T, 2] of bytes, or null
  const void* panels;       // aligned to 4 bytes
  const float* bias;        // [N], in the order of the panels where they are gated; or null
  void* out;                // [T, N]
  int64_t T, K, N;
  int64_t item_rows, item_panels;  // of gated ones an even number
  Activation activation;
  bool gated;
};

inline constexpr int64_t panel_count(int64_t N, bool gated) {
  return (N + kPanelColumns - 1) / kPanelColumns * (gated ? 2 : 1);
}

// Work items are linear.item_rows rows of the result, all panels of them.
struct LinearNormParams {
  LinearParams linear;     // out is null
  AddNormParams norm;      // x and bias are null
  float* scratch;          // [item_rows, scratch_stride], of this thread
  int64_t scratch_stride;  // linear_norm_stride()
};

/// Elements of a row of sums: all panels, and as many columns as blocks of tiles store.
inline constexpr int64_t linear_norm_stride(int64_t panels) {
  return (panels * kPanelColumns + 31) / 32 * 32;
}

enum class PoolMode : int64_t { kMean, kCls, kMax, kMeanSqrtLen, kWeightedMean, kLastToken };
inline constexpr int64_t kNumPoolModes = 6;

// Segment i covers the packed tokens [starts[i * step], ends[i * step]).
struct SegmentPoolParams {
  const void* x;            // [T, E], rows x_stride elements apart
  const int32_t* starts;    // cu_seqlens, or the first column of spans
  const int32_t* ends;      // cu_seqlens + 1, or the second column of spans
  const int32_t* out_rows;  // [segments], or null: row i
  float* out;               // rows out_stride elements apart
  int64_t step;             // 1 for cu_seqlens, 2 for spans
  int64_t x_stride;
  int64_t out_stride;
  int64_t E;
  int64_t skip;
  PoolMode mode;
  bool normalize;
};

/// A kernel over the half-open range [begin, end) of its rows or work items.
template <class Params>
using RangeKernel = void (*)(const Params&, int64_t begin, int64_t end);

/// How linear layers are cut into work items: multiples of `row_step` rows and `panel_step` panels;
/// `most_rows`, or fewer where threads would be idle, but not fewer than `least_rows` of all
/// panels.
struct LinearItems {
  int64_t row_step, least_rows, most_rows, panel_step;
};

/// The kernels of one instruction set, indexed by the dtype of the activations.
struct KernelTable {
  const char* isa;
  RangeKernel<AttentionParams> varlen_attention[kNumDtypes];  // items: sequence * H + head
  RangeKernel<AttentionBackwardParams>
      attention_backward[kNumDtypes];                                // sequence * kv_heads + head
  int64_t (*attention_backward_scratch)(int64_t length, int64_t D);  // elements
  RangeKernel<AddNormBackwardParams> add_norm_backward[kNumDtypes];  // chunks of kNormChunk rows
  RangeKernel<EmbedNormParams> embed_norm[kNumDtypes][kNumDtypes];   // rows; [tables][out]
  RangeKernel<AddNormParams> add_norm[kNumDtypes][kNumDtypes];       // rows; [x][residual and out]
  RangeKernel<BiasGeluParams> bias_gelu[kNumDtypes];                 // rows
  RangeKernel<BiasGeluBackwardParams> gelu_backward[kNumDtypes];     // rows
  RangeKernel<GatedParams> gated_activation[kNumDtypes];             // rows
  RangeKernel<GatedBackwardParams> gated_backward[kNumDtypes];       // rows
  RangeKernel<LinearParams> linear[kNumDtypes][kNumDtypes];          // items; [x and weights][out]
  RangeKernel<LinearNormParams> linear_norm[kNumDtypes];             // items
  RangeKernel<QuantizeParams> quantize_rows[kNumDtypes];             // rows
  RangeKernel<LinearParams> linear_int8[kNumDtypes];                 // items; [out]
  RangeKernel<LinearNormParams> linear_norm_int8[kNumDtypes];        // items; [residual and out]
  RangeKernel<SplitParams> split_rows;                               // rows; null without tiles
  RangeKernel<LinearParams> linear_split;                            // items; null without tiles
  RangeKernel<LinearNormParams> linear_norm_split;                   // items; null without tiles
  RangeKernel<SegmentPoolParams> segment_pool[kNumDtypes];           // segments
  LinearItems linear_items[kNumDtypes];
};

}  // namespace sbert_fast::cpu
