// API layer of bias_gelu and gated_activation.
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace sbert_fast::cpu {

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh) {
  constexpr const char* op = "bias_gelu";
  const Dtype dtype = check_activation(op, "x", x, "[T, F]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), F = x.size(1);
  check_tensor(op, "bias", bias, ScalarType::Float, "[F]", {F});

  Tensor out = new_output({T, F}, dtype);
  const BiasGeluParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .F = F,
      .tanh = tanh,
  };
  parallel_rows(kernels().bias_gelu[dtype], params, T, F);
  return out;
}

Tensor gated_activation(const Tensor& x, const std::optional<Tensor>& bias, int64_t activation,
                        bool first) {
  constexpr const char* op = "gated_activation";
  const Dtype dtype = check_activation(op, "x", x, "[T, 2F]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), columns = x.size(1);
  SBF_CHECK(columns % 2 == 0, op, "x must have an even number of columns, got ", columns);
  check_tensor(op, "bias", bias, ScalarType::Float, "[2F]", {columns});
  SBF_CHECK(0 <= activation && activation < kNumActivations, op, "activation must be in [0, ",
            kNumActivations, "), got ", activation);

  Tensor out = new_output({T, columns / 2}, dtype);
  const GatedParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .F = columns / 2,
      .activation = static_cast<Activation>(activation),
      .first = first,
  };
  parallel_rows(kernels().gated_activation[dtype], params, T, columns);
  return out;
}

}  // namespace sbert_fast::cpu
