// Arguments of the CUDA kernels, as plain numbers and device pointers: the API layer fills them in,
// the kernels trust them.
#pragma once

#include <cstdint>

namespace sbert_fast::cuda {

/// A stream of the CUDA runtime; the API layer sees no CUDA header.
using StreamHandle = void*;

enum Dtype : int32_t { kFloat16, kBFloat16 };

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

/// Launches on `stream` of the current device.
void launch_varlen_attention(Dtype dtype, const AttentionParams& params, StreamHandle stream);
/// The part of it that computes what is not short, on compute capability 9.0; false, and nothing is
/// launched, where that kernel does not do it.
bool launch_long_sm90(Dtype dtype, const AttentionParams& params, StreamHandle stream);

}  // namespace sbert_fast::cuda
