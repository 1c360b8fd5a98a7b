// Arguments of the CUDA kernels, as plain numbers and device pointers: the API layer fills them in,
// the kernels trust them.
#pragma once

#include <cstdint>

namespace sbert_fast::cuda {

/// A stream of the CUDA runtime; the API layer sees no CUDA header.
using StreamHandle = void*;

/// kFloat32 is for tables of embeddings alone.
enum Dtype : int32_t { kFloat16, kBFloat16, kFloat32 };

struct AttentionParams {
  const void* qkv;            // [T, 3, H, D]
  void* out;                  // [T, H, D]
  const int32_t* cu_seqlens;  // [B + 1]
  const int32_t* tiles;       // [num_tiles, 4] or null
  const float* bias;          // [H, 2R + 1] or null
  int64_t T;
  int32_t B;
  int32_t H;
  int32_t D;
  int32_t max_seqlen;
  int32_t num_tiles;
  int32_t R;
  int32_t window;  // largest distance of a key, or -1
  float scale;     // of the logits, times log2(e)
};

/// Makes a device the current one of the CUDA runtime that launches: it is not torch's.
void use_device(int32_t index);

/// Launches on `stream` of the current device.
void launch_varlen_attention(Dtype dtype, const AttentionParams& params, StreamHandle stream);
/// The part of it that computes what is not short, on compute capability 9.0; false, and nothing is
/// launched, where that kernel does not do it.
bool launch_long_sm90(Dtype dtype, const AttentionParams& params, StreamHandle stream);

/// Widest row of the row and pooling kernels, and what its width is a multiple of.
inline constexpr int64_t kMaxWidth = 4096;
inline constexpr int64_t kWidthMultiple = 8;
inline constexpr int64_t kMaxTokens = 0x7fffffff;

struct EmbedNormParams {
  const int32_t* ids;          // [T]
  const int32_t* positions;    // [T]
  const int32_t* types;        // [T], or null: type 0
  const void* word;            // [V, E]
  const void* position_table;  // [P, E]
  const void* type_table;      // [Y, E] or null
  const float* weight;         // [E]
  const float* bias;           // [E]
  void* out;                   // [T, E] of out_dtype
  int64_t T;
  int32_t E;
  Dtype out_dtype;
  float inverse_width;  // 1 / E
  float eps;
};

struct AddNormParams {
  const void* x;         // [T, E]
  const float* bias;     // [E], or any such vector where not has_bias
  const void* residual;  // [T, E] or null
  const float* weight;   // [E]
  const float* ln_bias;  // [E]
  void* out;             // [T, E]
  int64_t T;
  int32_t E;
  bool has_bias;
  float inverse_width;  // 1 / E
  float eps;
};

struct BiasGeluParams {
  const void* x;      // [T, F]
  const float* bias;  // [F] or null
  void* out;          // [T, F]
  int64_t T;
  int32_t F;
};

/// In the order of the op's modes.
enum PoolMode : int32_t { kMean, kCls, kMax, kMeanSqrtLen, kWeightedMean, kLastToken };
inline constexpr int64_t kNumPoolModes = 6;

/// Pooling of x, or of LayerNorm(x + bias + residual).
struct PoolParams {
  const void* x;            // [T, E], rows x_stride apart
  const int32_t* ranges;    // cu_seqlens [B + 1], or spans [P, 2]
  float* out;               // [N, E], rows out_stride apart
  const int32_t* out_rows;  // [segments], or null: row i
  const void* residual;     // [T, E] or null, as all that follow where there is no LayerNorm
  const float* bias;        // [E], or any such vector where not has_bias
  const float* weight;      // [E]
  const float* ln_bias;     // [E]
  int64_t x_stride;
  int64_t out_stride;
  int64_t T;
  int64_t segments;
  int64_t skip;
  int32_t E;
  PoolMode mode;
  bool spans;
  bool normalize;
  bool has_bias;
  bool out_aligned;     // its rows, to 16 bytes
  float inverse_width;  // 1 / E
  float eps;
};

/// `dtype` is that of the tables.
void launch_embed_norm(Dtype dtype, const EmbedNormParams& params, StreamHandle stream);
void launch_add_norm(Dtype dtype, const AddNormParams& params, StreamHandle stream);
void launch_bias_gelu(Dtype dtype, bool tanh, const BiasGeluParams& params, StreamHandle stream);
void launch_segment_pool(Dtype dtype, const PoolParams& params, StreamHandle stream);
void launch_norm_pool(Dtype dtype, const PoolParams& params, StreamHandle stream);

}  // namespace sbert_fast::cuda
