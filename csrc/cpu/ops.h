// The API layer of the CPU ops: checks, allocation and scheduling; the arguments are those of the
// schemas in sbert_fast/ops/schemas.py. Registered in ops.cpp.
#pragma once

#include <vector>

#include "checks.h"
#include "kernels.h"

namespace sbert_fast::cpu {

inline constexpr int64_t kMinHeadDim = 8, kMaxHeadDim = 256;

Tensor varlen_attention(const Tensor& qkv,                 // [T, 3, H, D], or, where there
                                                           // are kv_heads, [T, H + 2 * kv_heads, D]
                        const Tensor& cu_seqlens,          // [B + 1] int32
                        int64_t max_seqlen, double scale,  //
                        const std::optional<Tensor>& bias,              // [H, 2R + 1] fp32
                        int64_t window,                                 // -1: none
                        const std::optional<Tensor>& rotary_cos,        // [T, D / 2] fp32
                        const std::optional<Tensor>& rotary_sin,        // [T, D / 2] fp32
                        const std::optional<Tensor>& tiles,             // [n, 4] int32
                        bool causal, int64_t kv_heads,                  // 0: one a head
                        const std::optional<Tensor>& query_norm,        // [D] fp32
                        const std::optional<Tensor>& key_norm,          // [D] fp32
                        double norm_eps,                                //
                        const std::optional<Tensor>& position_keys,     // [H, P, D]
                        const std::optional<Tensor>& position_queries,  // [H, P, D]
                        const std::optional<Tensor>& buckets,           // [2R + 1] int32
                        double dropout,                                 // [0, 1)
                        const std::optional<Tensor>& seed);             // [1] int64

Tensor embed_norm(const Tensor& ids,                            // [T] int32
                  const std::optional<Tensor>& positions,       // [T] int32
                  const std::optional<Tensor>& types,           // [T] int32
                  const Tensor& word,                           // [V, E]
                  const std::optional<Tensor>& position_table,  // [P, E]
                  const std::optional<Tensor>& type_table,      // [Y, E]
                  const std::optional<Tensor>& weight,          // [E] fp32
                  const std::optional<Tensor>& bias,            // [E] fp32
                  double eps, ScalarType out_dtype, bool rms);

Tensor add_norm(const Tensor& x,                        // [T, E]
                const std::optional<Tensor>& bias,      // [E] fp32
                const std::optional<Tensor>& residual,  // [T, E]
                const Tensor& weight,                   // [E] fp32
                const Tensor& ln_bias,                  // [E] fp32
                double eps, bool rms);

// The norm, and the sum.
std::tuple<Tensor, Tensor> add_norm_sum(const Tensor& x,                        // [T, E]
                                        const std::optional<Tensor>& bias,      // [E] fp32
                                        const std::optional<Tensor>& residual,  // [T, E]
                                        const Tensor& weight,                   // [E] fp32
                                        const Tensor& ln_bias,                  // [E] fp32
                                        double eps, bool rms);

Tensor gated_activation(const Tensor& x,                    // [T, 2F]
                        const std::optional<Tensor>& bias,  // [2F] fp32
                        int64_t activation, bool first);

Tensor bias_gelu(const Tensor& x,                    // [T, F]
                 const std::optional<Tensor>& bias,  // [F] fp32
                 bool tanh);

Tensor linear(const Tensor& x,                    // [T, K]
              const Tensor& panels,               // [panels, K, 48] or [3 * panels, K / 2, 16, 2]
              const std::optional<Tensor>& bias,  // [N] fp32; gated: [48 * panels]
              int64_t features,                   // N
              int64_t activation, bool gated);

Tensor linear_norm(const Tensor& x,                    // [T, K]
                   const Tensor& panels,               // as linear
                   const std::optional<Tensor>& bias,  // [N] fp32
                   const Tensor& residual,             // [T, N]
                   const Tensor& weight,               // [N] fp32
                   const Tensor& ln_bias,              // [N] fp32
                   double eps);

Tensor segment_pool(const Tensor& x,           // [T, E], unit inner stride
                    const Tensor& cu_seqlens,  // [B + 1] int32
                    int64_t mode, bool normalize, int64_t skip,
                    const std::optional<Tensor>& spans);  // [P, 2] int32

void segment_pool_out(const Tensor& x,           // [T, E], unit inner stride
                      const Tensor& cu_seqlens,  // [B + 1] int32
                      int64_t mode, bool normalize, int64_t skip,
                      const std::optional<Tensor>& spans,      // [P, 2] int32
                      const Tensor& out,                       // [N, E] fp32, unit inner stride
                      const std::optional<Tensor>& out_rows);  // [B] or [P] int32

// The gradients of qkv, of bias [H, 2R + 1] fp32, and of the norms [2, D] fp32; of what there is
// not, [0].
std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad,  // [T, H, D]
    const Tensor& qkv,   // this and the rest as varlen_attention
    const Tensor& cu_seqlens, int64_t max_seqlen, double scale, const std::optional<Tensor>& bias,
    int64_t window, bool causal, const std::optional<Tensor>& rotary_cos,
    const std::optional<Tensor>& rotary_sin, int64_t kv_heads,
    const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm, double norm_eps,
    double dropout, const std::optional<Tensor>& seed);

// The gradients of x [T, E], and of weight, ln_bias and bias [3, E] fp32.
std::tuple<Tensor, Tensor> add_norm_backward(const Tensor& grad,  // [T, E]
                                             const Tensor& x,     // as add_norm
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& residual,
                                             const Tensor& weight, double eps, bool rms,
                                             const std::optional<Tensor>& grad_sum);  // [T, E]

// The gradient of x [T, F].
Tensor bias_gelu_backward(const Tensor& grad,                 // [T, F]
                          const Tensor& x,                    // as bias_gelu
                          const std::optional<Tensor>& bias,  //
                          bool tanh);

// The gradient of x [T, 2F].
Tensor gated_activation_backward(const Tensor& grad,                 // [T, F]
                                 const Tensor& x,                    // as gated_activation
                                 const std::optional<Tensor>& bias,  //
                                 int64_t activation, bool first);

/// The arguments of attention, checked; there is no result and no table of distances yet.
struct CheckedAttention {
  AttentionParams params;
  Dtype dtype;
  int64_t longest;  // tokens of a sequence
};

CheckedAttention check_attention(const char* op, const Tensor& qkv, const Tensor& cu_seqlens,
                                 int64_t max_seqlen, double scale,
                                 const std::optional<Tensor>& bias, int64_t window,
                                 const std::optional<Tensor>& rotary_cos,
                                 const std::optional<Tensor>& rotary_sin, bool causal,
                                 int64_t kv_heads, const std::optional<Tensor>& query_norm,
                                 const std::optional<Tensor>& key_norm, double norm_eps,
                                 double dropout, const std::optional<Tensor>& seed);

/// 64 bits over the geometry of `tensors` and the content of the first `read`, those elsewhere than
/// on the CPU left out.
int64_t content_hash(std::vector<Tensor> tensors, int64_t read);

/// What the kernels take for the rate and the seed of dropout; refuses those that are none.
Dropout dropout_of(const char* op, double rate, const std::optional<Tensor>& seed);

/// The kernels' dtype of a torch dtype; refuses those they do not take.
Dtype kernel_dtype(const char* op, const char* name, ScalarType dtype);

/// Requires contiguous activations with `sizes`, named by `dims`; returns their dtype.
Dtype check_activation(const char* op, const char* name, const Tensor& tensor, const char* dims,
                       std::initializer_list<int64_t> sizes);

/// An uninitialised contiguous CPU tensor. A quarter of the cost of new_empty, which goes through
/// the dispatcher: it counts where a whole forward pass takes a millisecond.
Tensor new_output(std::initializer_list<int64_t> sizes, Dtype dtype);

}  // namespace sbert_fast::cpu
