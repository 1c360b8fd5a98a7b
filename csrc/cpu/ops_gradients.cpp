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

std::tuple<Tensor, Tensor> varlen_attention_backward(const Tensor& grad, const Tensor& qkv,
                                                     const Tensor& cu_seqlens, int64_t max_seqlen,
                                                     double scale,
                                                     const std::optional<Tensor>& bias,
                                                     int64_t window, bool causal) {
  constexpr const char* op = "varlen_attention_backward";
  const Dtype dtype =
      check_activation(op, "qkv", qkv, "[T, 3, H, D]", {kAnySize, 3, kAnySize, kAnySize});
  const int64_t T = qkv.size(0), H = qkv.size(2), D = qkv.size(3);
  check_tensor(op, "grad", grad, qkv.scalar_type(), "[T, H, D]", {T, H, D});
  SBF_CHECK(kMinHeadDim <= D && D <= kMaxHeadDim, op, "D must be in [", kMinHeadDim, ", ",
            kMaxHeadDim, "], got ", D);
  check_tensor(op, "bias", bias, ScalarType::Float, "[H, 2R + 1]", {H, kAnySize});
  SBF_CHECK(!bias.has_value() || bias->size(1) % 2 == 1, op,
            "bias must be [H, 2R + 1] with an odd number of columns, got ", describe(*bias));
  SBF_CHECK(window >= -1, op, "window must be at least -1, got ", window);
  const auto [cu, B, longest] = check_cu_seqlens(op, cu_seqlens, T);
  SBF_CHECK(longest <= max_seqlen, op, "max_seqlen must be at least ", longest,
            ", the longest sequence, got ", max_seqlen);

  const int64_t columns = bias.has_value() ? bias->size(1) : 0;
  Tensor d_qkv = new_output({T, 3, H, D}, dtype);
  Tensor d_bias = bias.has_value() ? new_output({H, columns}, kFloat32) : new_output({0}, kFloat32);
  std::vector<double> by_sequence(B * H * columns);
  AttentionParams forward{};
  forward.qkv = qkv.const_data_ptr();
  forward.cu_seqlens = cu;
  forward.T = T;
  forward.B = B;
  forward.H = forward.kv_heads = H;
  forward.D = D;
  forward.scale = static_cast<float>(scale);
  forward.causal = causal;
  forward.bias = data_or_null<float>(bias);
  forward.R = columns / 2;
  forward.window = std::min(window, T);
  const AttentionBackwardParams params{
      .forward = forward,
      .grad = grad.const_data_ptr(),
      .d_qkv = d_qkv.mutable_data_ptr(),
      .d_bias = bias.has_value() ? by_sequence.data() : nullptr,
      .scratch = nullptr,
  };
  const size_t row_bytes = static_cast<size_t>(3 * H * D) * d_qkv.element_size();
  std::memset(static_cast<char*>(params.d_qkv) + cu[B] * row_bytes, 0, (T - cu[B]) * row_bytes);

  const KernelTable& table = kernels();
  const int64_t size = table.attention_backward_scratch(longest, D);
  parallel_workers(B * H, [&](auto next) {
    std::vector<float> scratch(size);
    AttentionBackwardParams own = params;
    own.scratch = scratch.data();
    for (int64_t item; (item = next()) < B * H;) {
      table.attention_backward[dtype](own, item, item + 1);
    }
  });
  if (bias.has_value()) {
    sum_rows(by_sequence.data(), B, H * columns, static_cast<float*>(d_bias.mutable_data_ptr()));
  }
  return {d_qkv, d_bias};
}

std::tuple<Tensor, Tensor> add_norm_backward(const Tensor& grad, const Tensor& x,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& residual,
                                             const Tensor& weight, double eps, bool rms) {
  constexpr const char* op = "add_norm_backward";
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), E = x.size(1), chunks = (T + kNormChunk - 1) / kNormChunk;
  check_tensor(op, "grad", grad, x.scalar_type(), "[T, E]", {T, E});
  check_tensor(op, "bias", bias, ScalarType::Float, "[E]", {E});
  check_tensor(op, "residual", residual, x.scalar_type(), "[T, E]", {T, E});
  check_tensor(op, "weight", weight, ScalarType::Float, "[E]", {E});

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
  };
  parallel_rows(kernels().add_norm_backward[dtype], params, chunks, E * kNormChunk);
  sum_rows(params.sums, chunks, 3 * E, static_cast<float*>(sums.mutable_data_ptr()));
  return {d_x, sums};
}

}  // namespace sbert_fast::cpu
