// API layer of bias_gelu.
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

}  // namespace sbert_fast::cpu
