// API layer of embed_norm, add_norm and bias_gelu.
#include "ops.h"

namespace sbert_fast::cuda {
namespace {

/// A vector over the columns, read sixteen bytes at a time.
void check_vector(const char* op, const char* name, const Tensor& vector, const Tensor& like,
                  const char* dims, int64_t size) {
  check_tensor_like(op, name, vector, like, ScalarType::Float, dims, {size});
  check_alignment(op, name, vector);
}
void check_vector(const char* op, const char* name, const std::optional<Tensor>& vector,
                  const Tensor& like, const char* dims, int64_t size) {
  if (vector.has_value()) check_vector(op, name, *vector, like, dims, size);
}

/// Rows of the dtype and the width of `like`.
void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& like,
                const char* dims, std::initializer_list<int64_t> sizes) {
  check_tensor_like(op, name, rows, like, like.scalar_type(), dims, sizes);
  check_alignment(op, name, rows);
}
void check_rows(const char* op, const char* name, const std::optional<Tensor>& rows,
                const Tensor& like, const char* dims, std::initializer_list<int64_t> sizes) {
  if (rows.has_value()) check_rows(op, name, *rows, like, dims, sizes);
}

}  // namespace

void check_width(const char* op, const char* name, int64_t width, int64_t largest) {
  SBF_CHECK(0 < width && width <= largest && width % kWidthMultiple == 0, op, name,
            " must have a multiple of ", kWidthMultiple, " columns, at most ", largest,
            ", for the CUDA kernels, got ", width, ": impl='triton' takes other widths");
}

void check_tokens(const char* op, const char* name, int64_t tokens) {
  SBF_CHECK(tokens <= kMaxTokens, op, name, " must have at most ", kMaxTokens, " rows, got ",
            tokens);
}

void check_norm(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& weight,
                const Tensor& ln_bias) {
  const int64_t T = x.size(0), E = x.size(1);
  check_vector(op, "bias", bias, x, "[E]", E);
  check_rows(op, "residual", residual, x, "[T, E]", {T, E});
  check_vector(op, "weight", weight, x, "[E]", E);
  check_vector(op, "ln_bias", ln_bias, x, "[E]", E);
}

Tensor embed_norm(const Tensor& ids, const Tensor& positions, const std::optional<Tensor>& types,
                  const Tensor& word, const Tensor& position_table,
                  const std::optional<Tensor>& type_table, const Tensor& weight, const Tensor& bias,
                  double eps, ScalarType out_dtype) {
  constexpr const char* op = "embed_norm";
  const Dtype dtype = check_activation(op, "word", word, "[V, E]", {kAnySize, kAnySize});
  const int64_t E = word.size(1);
  check_width(op, "word", E, kMaxWidth);
  check_tensor_like(op, "ids", ids, word, ScalarType::Int, "[T]", {kAnySize});
  const int64_t T = ids.size(0);
  check_tokens(op, "ids", T);
  check_tensor_like(op, "positions", positions, word, ScalarType::Int, "[T]", {T});
  check_tensor_like(op, "types", types, word, ScalarType::Int, "[T]", {T});
  check_rows(op, "position_table", position_table, word, "[P, E]", {kAnySize, E});
  check_rows(op, "type_table", type_table, word, "[Y, E]", {kAnySize, E});
  check_vector(op, "weight", weight, word, "[E]", E);
  check_vector(op, "bias", bias, word, "[E]", E);
  SBF_CHECK(out_dtype == ScalarType::Half || out_dtype == ScalarType::BFloat16, op,
            "out_dtype must be float16 or bfloat16, got ", dtype_name(out_dtype));
  SBF_CHECK(type_table.has_value() || !types.has_value(), op,
            "types must be None where there is no type_table, got ", describe(*types));
  SBF_CHECK(!type_table.has_value() || type_table->size(0) > 0, op,
            "type_table must have a row for type 0, got ", describe(*type_table));

  Tensor out = new_output(word, {T, E}, out_dtype);
  if (T == 0) return out;
  const EmbedNormParams params{
      .ids = static_cast<const int32_t*>(ids.const_data_ptr()),
      .positions = static_cast<const int32_t*>(positions.const_data_ptr()),
      .types = data_or_null<int32_t>(types),
      .word = word.const_data_ptr(),
      .position_table = position_table.const_data_ptr(),
      .type_table = data_or_null<void>(type_table),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .bias = static_cast<const float*>(bias.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .T = T,
      .E = static_cast<int32_t>(E),
      .out_dtype = out_dtype == ScalarType::Half ? kFloat16 : kBFloat16,
      .inverse_width = 1.0f / static_cast<float>(E),
      .eps = static_cast<float>(eps),
  };
  const OnDevice device(word);
  launch_embed_norm(dtype, params, device.stream());
  return out;
}

Tensor add_norm(const Tensor& x, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias,
                double eps) {
  constexpr const char* op = "add_norm";
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), E = x.size(1);
  check_width(op, "x", E, kMaxWidth);
  check_tokens(op, "x", T);
  check_norm(op, x, bias, residual, weight, ln_bias);

  Tensor out = new_output(x, {T, E}, x.scalar_type());
  if (T == 0) return out;
  const AddNormParams params{
      .x = x.const_data_ptr(),
      .bias = static_cast<const float*>((bias.has_value() ? *bias : weight).const_data_ptr()),
      .residual = data_or_null<void>(residual),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .ln_bias = static_cast<const float*>(ln_bias.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .T = T,
      .E = static_cast<int32_t>(E),
      .has_bias = bias.has_value(),
      .inverse_width = 1.0f / static_cast<float>(E),
      .eps = static_cast<float>(eps),
  };
  const OnDevice device(x);
  launch_add_norm(dtype, params, device.stream());
  return out;
}

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh) {
  constexpr const char* op = "bias_gelu";
  const Dtype dtype = check_activation(op, "x", x, "[T, F]", {kAnySize, kAnySize});
  const int64_t T = x.size(0), F = x.size(1);
  check_width(op, "x", F, kMaxTokens);
  check_tokens(op, "x", T);
  check_vector(op, "bias", bias, x, "[F]", F);

  Tensor out = new_output(x, {T, F}, x.scalar_type());
  if (T == 0) return out;
  const BiasGeluParams params{
      .x = x.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out.mutable_data_ptr(),
      .T = T,
      .F = static_cast<int32_t>(F),
  };
  const OnDevice device(x);
  launch_bias_gelu(dtype, tanh, params, device.stream());
  return out;
}

}  // namespace sbert_fast::cuda
