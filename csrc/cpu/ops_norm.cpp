// API layer of embed_norm, add_norm and add_norm_sum.
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "value_checks.h"

namespace sbert_fast::cpu {

Tensor embed_norm(const Tensor& ids, const std::optional<Tensor>& positions,
                  const std::optional<Tensor>& types, const Tensor& word,
                  const std::optional<Tensor>& position_table,
                  const std::optional<Tensor>& type_table, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps, ScalarType out_dtype, bool rms) {
  constexpr const char* op = "embed_norm";
  check_tensor(op, "ids", ids, ScalarType::Int, "[T]", {kAnySize});
  const int64_t T = ids.size(0);
  check_tensor(op, "positions", positions, ScalarType::Int, "[T]", {T});
  check_tensor(op, "types", types, ScalarType::Int, "[T]", {T});

  const Dtype dtype = check_activation(op, "word", word, "[V, E]", {kAnySize, kAnySize});
  const int64_t E = word.size(1);
  const ScalarType table_dtype = word.scalar_type();
  check_tensor(op, "position_table", position_table, table_dtype, "[P, E]", {kAnySize, E});
  check_tensor(op, "type_table", type_table, table_dtype, "[Y, E]", {kAnySize, E});
  check_tensor(op, "weight", weight, ScalarType::Float, "[E]", {E});
  check_tensor(op, "bias", bias, ScalarType::Float, "[E]", {E});
  const Dtype kernel_out_dtype = kernel_dtype(op, "out_dtype", out_dtype);
  const auto kernel = kernels().embed_norm[dtype][kernel_out_dtype];
  SBF_CHECK(kernel != nullptr, op, "out_dtype must be ", dtype_name(table_dtype),
            ", the dtype of the tables, got ", dtype_name(out_dtype));
  SBF_CHECK(type_table.has_value() || !types.has_value(), op,
            "types must be None where there is no type_table, got ", describe(*types));

  const auto* id = ids.const_data_ptr<int32_t>();
  SBF_CHECK(position_table.has_value() == positions.has_value(), op,
            "positions and position_table must come together, got one of them");
  SBF_CHECK(weight.has_value() == bias.has_value(), op,
            "weight and bias must come together, got one of them");
  const auto* position = data_or_null<int32_t>(positions);
  const auto* type = data_or_null<int32_t>(types);
  check_indices(op, "ids", id, T, word.size(0), "word");
  if (position != nullptr) {
    check_indices(op, "positions", position, T, position_table->size(0), "position_table");
  }
  if (type != nullptr) {
    check_indices(op, "types", type, T, type_table->size(0), "type_table");
  } else {
    SBF_CHECK(!type_table.has_value() || type_table->size(0) > 0, op,
              "type_table must have a row for type 0, got ", describe(*type_table));
  }

  Tensor out = new_output({T, E}, kernel_out_dtype);
  const EmbedNormParams params{
      .ids = id,
      .positions = position,
      .types = type,
      .word = word.const_data_ptr(),
      .position_table = data_or_null<void>(position_table),
      .type_table = data_or_null<void>(type_table),
      .weight = data_or_null<float>(weight),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .E = E,
      .eps = static_cast<float>(eps),
      .rms = rms,
  };
  parallel_rows(kernel, params, T, E);
  return out;
}

namespace {

// The norm, written to `out`, of x + bias + residual, which goes to `sum` where there is one.
void run_add_norm(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const Tensor& weight,
                  const Tensor& ln_bias, double eps, bool rms, Tensor out,
                  std::optional<Tensor> sum) {
  const int64_t T = x.size(0), E = x.size(1);
  check_tensor(op, "bias", bias, ScalarType::Float, "[E]", {E});
  check_tensor(op, "residual", residual, x.scalar_type(), "[T, E]", {T, E});
  check_tensor(op, "weight", weight, ScalarType::Float, "[E]", {E});
  check_tensor(op, "ln_bias", ln_bias, ScalarType::Float, "[E]", {E});
  const Dtype dtype = kernel_dtype(op, "x", x.scalar_type());
  const AddNormParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .residual = data_or_null<void>(residual),
      .weight = weight.const_data_ptr<float>(),
      .ln_bias = ln_bias.const_data_ptr<float>(),
      .out = out.mutable_data_ptr(),
      .E = E,
      .eps = static_cast<float>(eps),
      .rms = rms,
      .sum = sum.has_value() ? sum->mutable_data_ptr() : nullptr,
  };
  parallel_rows(kernels().add_norm[dtype][dtype], params, T, E);
}

}  // namespace

Tensor add_norm(const Tensor& x, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias,
                double eps, bool rms) {
  constexpr const char* op = "add_norm";
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  Tensor out = new_output({x.size(0), x.size(1)}, dtype);
  run_add_norm(op, x, bias, residual, weight, ln_bias, eps, rms, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> add_norm_sum(const Tensor& x, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& residual, const Tensor& weight,
                                        const Tensor& ln_bias, double eps, bool rms) {
  constexpr const char* op = "add_norm_sum";
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  Tensor out = new_output({x.size(0), x.size(1)}, dtype);
  Tensor sum = new_output({x.size(0), x.size(1)}, dtype);
  run_add_norm(op, x, bias, residual, weight, ln_bias, eps, rms, out, sum);
  return {out, sum};
}

}  // namespace sbert_fast::cpu
