// API layer of segment_pool and norm_pool, and of their forms that write to rows of a tensor.
#include "ops.h"

namespace sbert_fast::cuda {
namespace {

/// Arguments that all four ops share, checked.
struct Pooling {
  PoolParams params;
  Dtype dtype;
};

/// How to pool the rows of x, which are checked.
Pooling check_pooling(const char* op, const Tensor& x, Dtype dtype, const Tensor& cu_seqlens,
                      int64_t mode, bool normalize, int64_t skip,
                      const std::optional<Tensor>& spans) {
  const int64_t T = x.size(0), E = x.size(1);
  check_width(op, "x", E, kMaxWidth);
  check_tokens(op, "x", T);
  check_tensor_like(op, "cu_seqlens", cu_seqlens, x, ScalarType::Int, "[B + 1]", {kAnySize});
  SBF_CHECK(cu_seqlens.size(0) > 0, op, "cu_seqlens must be int32 [B + 1], got ",
            describe(cu_seqlens));
  check_tensor_like(op, "spans", spans, x, ScalarType::Int, "[P, 2]", {kAnySize, 2});
  SBF_CHECK(0 <= mode && mode < kNumPoolModes, op, "mode must be in [0, ", kNumPoolModes, "), got ",
            mode);
  SBF_CHECK(skip >= 0, op, "skip must be at least 0, got ", skip);

  PoolParams params{};
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  const Tensor& ranges = spans.has_value() ? *spans : cu_seqlens;
  params.ranges = static_cast<const int32_t*>(ranges.const_data_ptr());
  params.segments = spans.has_value() ? spans->size(0) : cu_seqlens.size(0) - 1;
  params.T = T;
  params.skip = skip;
  params.E = static_cast<int32_t>(E);
  params.mode = static_cast<PoolMode>(mode);
  params.spans = spans.has_value();
  params.normalize = normalize;
  params.inverse_width = 1.0f / static_cast<float>(E);
  return {params, dtype};
}

Pooling check_segments(const char* op, const Tensor& x, const Tensor& cu_seqlens, int64_t mode,
                       bool normalize, int64_t skip, const std::optional<Tensor>& spans) {
  const Dtype dtype = check_activation_rows(op, "x", x, "[T, E]");
  const Pooling pooling = check_pooling(op, x, dtype, cu_seqlens, mode, normalize, skip, spans);
  check_row_alignment(op, "x", x);
  return pooling;
}

Pooling check_norm_pooling(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, const Tensor& weight,
                           const Tensor& ln_bias, double eps, const Tensor& cu_seqlens,
                           int64_t mode, bool normalize, int64_t skip,
                           const std::optional<Tensor>& spans) {
  const Dtype dtype = check_activation(op, "x", x, "[T, E]", {kAnySize, kAnySize});
  Pooling pooling = check_pooling(op, x, dtype, cu_seqlens, mode, normalize, skip, spans);
  check_norm(op, x, bias, residual, weight, ln_bias);
  PoolParams& params = pooling.params;
  params.residual = data_or_null<void>(residual);
  params.bias = static_cast<const float*>((bias.has_value() ? *bias : weight).const_data_ptr());
  params.has_bias = bias.has_value();
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  params.ln_bias = static_cast<const float*>(ln_bias.const_data_ptr());
  params.eps = static_cast<float>(eps);
  return pooling;
}

void set_output(PoolParams& params, const Tensor& out, const std::optional<Tensor>& out_rows) {
  constexpr int64_t kNumbers = kAlignment / static_cast<int64_t>(sizeof(float));
  params.out = static_cast<float*>(out.mutable_data_ptr());
  params.out_stride = out.stride(0);
  params.out_rows = data_or_null<int32_t>(out_rows);
  params.out_aligned = reinterpret_cast<uintptr_t>(params.out) % kAlignment == 0 &&
                       params.out_stride % kNumbers == 0;
}

void check_output(const char* op, const PoolParams& params, const Tensor& x, const Tensor& out,
                  const std::optional<Tensor>& out_rows) {
  const int64_t E = x.size(1);
  SBF_CHECK(out.scalar_type() == ScalarType::Float && has_sizes(out, {kAnySize, E}) &&
                out.stride(1) == 1 && (out.stride(0) >= E || out.size(0) <= 1),
            op, "out must be float32 [N, E] = [*, ", E,
            "] with unit inner stride and separate rows, got ", describe(out));
  check_device_like(op, "out", out, x);
  check_tensor_like(op, "out_rows", out_rows, x, ScalarType::Int, params.spans ? "[P]" : "[B]",
                    {params.segments});
  SBF_CHECK(out_rows.has_value() || params.segments <= out.size(0), op, "out must have at least ",
            params.segments, " rows, got ", describe(out));
}

using Launcher = void (*)(Dtype, const PoolParams&, StreamHandle);

void run(Launcher launcher, const Pooling& pooling, const Tensor& x) {
  if (pooling.params.segments == 0) return;
  const OnDevice device(x);
  launcher(pooling.dtype, pooling.params, device.stream());
}

Tensor run_to_new(Launcher launcher, Pooling pooling, const Tensor& x) {
  Tensor out = new_output(x, {pooling.params.segments, x.size(1)}, ScalarType::Float);
  set_output(pooling.params, out, std::nullopt);
  run(launcher, pooling, x);
  return out;
}

}  // namespace

Tensor segment_pool(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                    int64_t skip, const std::optional<Tensor>& spans) {
  constexpr const char* op = "segment_pool";
  const Pooling pooling = check_segments(op, x, cu_seqlens, mode, normalize, skip, spans);
  return run_to_new(launch_segment_pool, pooling, x);
}

void segment_pool_out(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                      int64_t skip, const std::optional<Tensor>& spans, const Tensor& out,
                      const std::optional<Tensor>& out_rows) {
  constexpr const char* op = "segment_pool_out";
  Pooling pooling = check_segments(op, x, cu_seqlens, mode, normalize, skip, spans);
  check_output(op, pooling.params, x, out, out_rows);
  set_output(pooling.params, out, out_rows);
  run(launch_segment_pool, pooling, x);
}

Tensor norm_pool(const Tensor& x, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias,
                 double eps, const Tensor& cu_seqlens, int64_t mode, bool normalize, int64_t skip,
                 const std::optional<Tensor>& spans) {
  const Pooling pooling = check_norm_pooling("norm_pool", x, bias, residual, weight, ln_bias, eps,
                                             cu_seqlens, mode, normalize, skip, spans);
  return run_to_new(launch_norm_pool, pooling, x);
}

void norm_pool_out(const Tensor& x, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const Tensor& weight,
                   const Tensor& ln_bias, double eps, const Tensor& cu_seqlens, int64_t mode,
                   bool normalize, int64_t skip, const std::optional<Tensor>& spans,
                   const Tensor& out, const std::optional<Tensor>& out_rows) {
  constexpr const char* op = "norm_pool_out";
  Pooling pooling = check_norm_pooling(op, x, bias, residual, weight, ln_bias, eps, cu_seqlens,
                                       mode, normalize, skip, spans);
  check_output(op, pooling.params, x, out, out_rows);
  set_output(pooling.params, out, out_rows);
  run(launch_norm_pool, pooling, x);
}

}  // namespace sbert_fast::cuda
