// API layer of the gradients: varlen_attention_backward and add_norm_backward.
#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "value_checks.h"

namespace sbert_fast::cpu {
namespace {

/// The sums over `count` rows of `width` elements, in their order.
template <class T>
void sum_rows(const T* rows, int64_t count, int64_t width, float* out) {
  std::vector<T> sums(width);
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < width; ++i) sums[i] += rows[row * width + i];
  }
  std::copy(sums.begin(), sums.end(), out);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
    double scale, const std::optional<Tensor>& bias, int64_t window, bool causal,
    const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
    int64_t kv_heads, const std::optional<Tensor>& query_norm,
    const std::optional<Tensor>& key_norm, double norm_eps, double dropout,
    const std::optional<Tensor>& seed) {
  constexpr const char* op = "varlen_attention_backward";
  const auto [forward, dtype, longest] =
      check_attention(op, qkv, cu_seqlens, max_seqlen, scale, bias, window, rotary_cos, rotary_sin,
                      causal, kv_heads, query_norm, key_norm, norm_eps, dropout, seed);
  const int64_t T = forward.T, B = forward.B, H = forward.H, D = forward.D;
  check_tensor(op, "grad", grad, qkv.scalar_type(), "[T, H, D]", {T, H, D});

  Tensor d_qkv =
      kv_heads == 0 ? new_output({T, 3, H, D}, dtype) : new_output({T, H + 2 * kv_heads, D}, dtype);
  const int64_t columns = bias.has_value() ? bias->size(1) : 0, items = B * forward.kv_heads;
  Tensor d_bias = bias.has_value() ? new_output({H, columns}, kFloat32) : new_output({0}, kFloat32);
  Tensor d_norms =
      query_norm.has_value() ? new_output({2, D}, kFloat32) : new_output({0}, kFloat32);
  std::vector<double> bias_sums(B * H * columns);
  std::vector<double> norm_sums(query_norm.has_value() ? items * 2 * D : 0);
  const AttentionBackwardParams params{
      .forward = forward,
      .grad = grad.const_data_ptr(),
      .d_qkv = d_qkv.mutable_data_ptr(),
      .d_bias = bias.has_value() ? bias_sums.data() : nullptr,
      .d_norms = query_norm.has_value() ? norm_sums.data() : nullptr,
      .scratch = nullptr,
  };
  const int64_t last = forward.cu_seqlens[B];
  const size_t row_bytes =
      static_cast<size_t>((H + 2 * forward.kv_heads) * D) * d_qkv.element_size();
  std::memset(static_cast<char*>(params.d_qkv) + last * row_bytes, 0, (T - last) * row_bytes);

  const KernelTable& table = kernels();
  const auto kernel = table.attention_backward[dtype];
  const int64_t size = table.attention_backward_scratch(longest, D);
  parallel_workers(items, [&](auto next) {
    std::vector<float> scratch(size);
    AttentionBackwardParams own = params;
    own.scratch = scratch.data();
    for (int64_t item; (item = next()) < items;) kernel(own, item, item + 1);
  });
  if (bias.has_value()) {
    sum_rows(bias_sums.data(), B, H * columns, static_cast<float*>(d_bias.mutable_data_ptr()));
  }
  if (query_norm.has_value()) {
    sum_rows(norm_sums.data(), items, 2 * D, static_cast<float*>(d_norms.mutable_data_ptr()));
  }
  return {d_qkv, d_bias, d_norms};
}

std::tuple<Tensor, Tensor> add_norm_backward(const Tensor& grad, const Tensor& x,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& residual,
                                             const Tensor& weight, double eps, bool rms,
                                             const std::optional<Tensor>& grad_sum) {
  constexpr const char* op = "add_norm_backward";
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), E = x.size(1), chunks = (T + kNormChunk - 1) / kNormChunk;
  check_tensor(op, "grad", grad, x.scalar_type(), "[T, E]", {T, E});
  check_tensor(op, "bias", bias, ScalarType::Float, "[E]", {E});
  check_tensor(op, "residual", residual, x.scalar_type(), "[T, E]", {T, E});
  check_tensor(op, "weight", weight, ScalarType::Float, "[E]", {E});
  check_tensor(op, "grad_sum", grad_sum, x.scalar_type(), "[T, E]", {T, E});

  Tensor d_x = new_output({T, E}, dtype), sums = new_output({3, E}, kFloat32);
  const Tensor by_chunk = new_output({chunks, 3, E}, kFloat32);
  const AddNormBackwardParams params{
      .grad = grad.const_data_ptr(),
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .residual = data_or_null<void>(residual),
      .weight = weight.const_data_ptr<float>(),
      .d_x = d_x.mutable_data_ptr(),
      .sums = static_cast<float*>(by_chunk.mutable_data_ptr()),
      .T = T,
      .E = E,
      .eps = static_cast<float>(eps),
      .rms = rms,
      .grad_sum = data_or_null<void>(grad_sum),
  };
  parallel_rows(kernels().add_norm_backward[dtype], params, chunks, E * kNormChunk);
  sum_rows(params.sums, chunks, 3 * E, static_cast<float*>(sums.mutable_data_ptr()));
  return {d_x, sums};
}

}  // namespace sbert_fast::cpu
