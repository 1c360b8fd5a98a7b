// API layer of bias_gelu and gated_activation, and of their gradients.
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace sbert_fast::cpu {

namespace {

struct CheckedGelu {
  BiasGeluParams params;
  Dtype dtype;
  int64_t T;
};

/// The arguments of bias_gelu, checked; there is no result yet.
CheckedGelu check_gelu(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                       bool tanh) {
  const Dtype dtype = check_activation(op, "x", x, "[T, F]", {kAnySize, kAnySize});
  const int64_t F = x.size(1);
  check_tensor(op, "bias", bias, ScalarType::Float, "[F]", {F});
  const BiasGeluParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = nullptr,
      .F = F,
      .tanh = tanh,
  };
  return {params, dtype, x.size(0)};
}

struct CheckedGate {
  GatedParams params;
  Dtype dtype;
  int64_t T;
};

/// The arguments of gated_activation, checked; there is no result yet.
CheckedGate check_gate(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                       int64_t activation, bool first) {
  const Dtype dtype = check_activation(op, "x", x, "[T, 2F]", {kAnySize, kAnySize});
  const int64_t columns = x.size(1);
  SBF_CHECK(columns % 2 == 0, op, "x must have an even number of columns, got ", columns);
  check_tensor(op, "bias", bias, ScalarType::Float, "[2F]", {columns});
  SBF_CHECK(0 <= activation && activation < kNumActivations, op, "activation must be in [0, ",
            kNumActivations, "), got ", activation);
  const GatedParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = nullptr,
      .F = columns / 2,
      .activation = static_cast<Activation>(activation),
      .first = first,
  };
  return {params, dtype, x.size(0)};
}

}  // namespace

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh) {
  auto [params, dtype, T] = check_gelu("bias_gelu", x, bias, tanh);
  Tensor out = new_output({T, params.F}, dtype);
  params.out = out.mutable_data_ptr();
  parallel_rows(kernels().bias_gelu[dtype], params, T, params.F);
  return out;
}

Tensor bias_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                          bool tanh) {
  constexpr const char* op = "bias_gelu_backward";
  const auto [forward, dtype, T] = check_gelu(op, x, bias, tanh);
  check_tensor(op, "grad", grad, x.scalar_type(), "[T, F]", {T, forward.F});
  Tensor d_x = new_output({T, forward.F}, dtype);
  const BiasGeluBackwardParams params{
      .forward = forward,
      .grad = grad.const_data_ptr(),
      .d_x = d_x.mutable_data_ptr(),
  };
  parallel_rows(kernels().gelu_backward[dtype], params, T, forward.F);
  return d_x;
}

Tensor gated_activation(const Tensor& x, const std::optional<Tensor>& bias, int64_t activation,
                        bool first) {
  auto [params, dtype, T] = check_gate("gated_activation", x, bias, activation, first);
  Tensor out = new_output({T, params.F}, dtype);
  params.out = out.mutable_data_ptr();
  parallel_rows(kernels().gated_activation[dtype], params, T, 2 * params.F);
  return out;
}

Tensor gated_activation_backward(const Tensor& grad, const Tensor& x,
                                 const std::optional<Tensor>& bias, int64_t activation,
                                 bool first) {
  constexpr const char* op = "gated_activation_backward";
  const auto [forward, dtype, T] = check_gate(op, x, bias, activation, first);
  check_tensor(op, "grad", grad, x.scalar_type(), "[T, F]", {T, forward.F});
  Tensor d_x = new_output({T, 2 * forward.F}, dtype);
  const GatedBackwardParams params{
      .forward = forward,
      .grad = grad.const_data_ptr(),
      .d_x = d_x.mutable_data_ptr(),
  };
  parallel_rows(kernels().gated_backward[dtype], params, T, 2 * forward.F);
  return d_x;
}

}  // namespace sbert_fast::cpu
