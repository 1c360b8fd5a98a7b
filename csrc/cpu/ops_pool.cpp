// API layer of segment_pool and segment_pool_out.
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "value_checks.h"

namespace sbert_fast::cpu {
namespace {

/// Arguments that both ops share, checked; `segments` output rows.
struct Pooling {
  SegmentPoolParams params;
  Dtype dtype;
  int64_t segments;
};

Pooling check_pooling(const char* op, const Tensor& x, const Tensor& cu_seqlens, int64_t mode,
                      bool normalize, int64_t skip, const std::optional<Tensor>& spans) {
  const Dtype dtype = kernel_dtype(op, "x", x.scalar_type());
  SBF_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), op,
            "x must be [T, E] with unit inner stride, got ", describe(x));
  check_tensor(op, "spans", spans, ScalarType::Int, "[P, 2]", {kAnySize, 2});
  SBF_CHECK(0 <= mode && mode < kNumPoolModes, op, "mode must be in [0, ", kNumPoolModes, "), got ",
            mode);
  SBF_CHECK(skip >= 0, op, "skip must be at least 0, got ", skip);
  const auto [cu, B, longest] = check_cu_seqlens(op, cu_seqlens, x.size(0));

  SegmentPoolParams params{};
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.starts = cu;
  params.step = 1;
  int64_t segments = B;
  if (spans.has_value()) {
    params.starts = spans->const_data_ptr<int32_t>();
    params.step = 2;
    segments = spans->size(0);
    check_spans(op, params.starts, segments, cu[B]);
  }
  params.ends = params.starts + 1;
  params.E = x.size(1);
  params.skip = skip;
  params.mode = static_cast<PoolMode>(mode);
  params.normalize = normalize;
  return {params, dtype, segments};
}

void run(const Pooling& pooling) {
  const SegmentPoolParams& params = pooling.params;
  const bool one_row = params.mode == PoolMode::kCls || params.mode == PoolMode::kLastToken;
  const auto segment = [&](int64_t i) {
    const int64_t length = params.ends[i * params.step] - params.starts[i * params.step];
    return ItemGroup{.items = 1, .cost = (one_row ? 1 : length + 1) * params.E};
  };
  parallel_items(kernels().segment_pool[pooling.dtype], params, pooling.segments, segment);
}

}  // namespace

Tensor segment_pool(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                    int64_t skip, const std::optional<Tensor>& spans) {
  Pooling pooling = check_pooling("segment_pool", x, cu_seqlens, mode, normalize, skip, spans);
  Tensor out = new_output({pooling.segments, x.size(1)}, kFloat32);
  pooling.params.out = out.mutable_data_ptr<float>();
  pooling.params.out_stride = x.size(1);
  run(pooling);
  return out;
}

void segment_pool_out(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                      int64_t skip, const std::optional<Tensor>& spans, const Tensor& out,
                      const std::optional<Tensor>& out_rows) {
  constexpr const char* op = "segment_pool_out";
  Pooling pooling = check_pooling(op, x, cu_seqlens, mode, normalize, skip, spans);
  const int64_t E = x.size(1);
  SBF_CHECK(out.scalar_type() == ScalarType::Float && has_sizes(out, {kAnySize, E}) &&
                (out.stride(1) == 1 || E <= 1) && (out.stride(0) >= E || out.size(0) <= 1),
            op, "out must be float32 [N, E] = [*, ", E,
            "] with unit inner stride and separate rows, got ", describe(out));
  check_tensor(op, "out_rows", out_rows, ScalarType::Int, spans.has_value() ? "[P]" : "[B]",
               {pooling.segments});
  pooling.params.out_rows = data_or_null<int32_t>(out_rows);
  if (out_rows.has_value()) {
    check_indices(op, "out_rows", pooling.params.out_rows, pooling.segments, out.size(0), "out");
    check_distinct(op, "out_rows", pooling.params.out_rows, pooling.segments);
  } else {
    SBF_CHECK(pooling.segments <= out.size(0), op, "out must have at least ", pooling.segments,
              " rows, got ", describe(out));
  }
  pooling.params.out = out.mutable_data_ptr<float>();
  pooling.params.out_stride = out.stride(0);
  run(pooling);
}

}  // namespace sbert_fast::cpu
