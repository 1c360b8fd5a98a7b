// API layer of linear and linear_norm.
#include <algorithm>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace sbert_fast::cpu {
namespace {

constexpr int64_t kItemsPerThread = 4;
// Multiplications below which waking another thread costs more than it saves.
constexpr int64_t kGrainProducts = 1 << 20;
// Of int8, so that no sum of products of bytes overflows.
constexpr int64_t kInt8Inputs = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What the weights are, beside activations of a dtype.
enum class Format { kPlain, kInt8, kSplit };

// The sizes of x @ weight.T.
struct LinearShape {
  Dtype dtype;
  Format format;
  bool gated;
  int64_t T, K, N;
  LinearItems items;

  int64_t panels() const { return panel_count(N, gated); }
};

LinearShape check_linear(const KernelTable& table, const char* op, const Tensor& x,
                         const Tensor& panels, const std::optional<Tensor>& bias, int64_t features,
                         bool gated = false) {
  const Dtype dtype = check_activation(op, "x", x, "[T, K]", {kAnySize, kAnySize});
  const ScalarType weights = panels.scalar_type();
  const bool split = dtype == kFloat32 && weights == ScalarType::BFloat16;
  const bool int8 = weights == ScalarType::Char;
  LinearShape shape{.dtype = dtype,
                    .format = split  ? Format::kSplit
                              : int8 ? Format::kInt8
                                     : Format::kPlain,
                    .gated = gated,
                    .T = x.size(0),
                    .K = x.size(1),
                    .N = features,
                    .items = table.linear_items[int8 || split ? kBFloat16 : dtype]};
  if (gated) shape.items.panel_step = 2;
  SBF_CHECK(features >= 1, op, "features must be at least 1, got ", features);
  SBF_CHECK(shape.K >= 1, op, "x must have at least one column, got [", shape.T, ", 0]");
  if (int8) {
    SBF_CHECK(shape.K % 4 == 0 && shape.K < kInt8Inputs, op, "K must be a multiple of 4 and below ",
              kInt8Inputs, " in int8, got ", shape.K);
    check_tensor(op, "panels", panels, ScalarType::Char, "[3 * panels, 2 + K / 4, 16, 4]",
                 {kStripsPerPanel * shape.panels(), kInt8Header + shape.K / 4, kStripColumns, 4});
  } else if (split) {
    SBF_CHECK(table.linear_split != nullptr, op, "split panels need AMX, this CPU runs ",
              table.isa);
    SBF_CHECK(shape.K % kSplitInputs == 0, op, "K must be a multiple of ", kSplitInputs,
              " where panels are split, got ", shape.K);
    check_tensor(op, "panels", panels, ScalarType::BFloat16, "[3 * panels, K, 16, 2]",
                 {kStripsPerPanel * shape.panels(), shape.K, kStripColumns, 2});
  } else if (dtype == kFloat32) {
    check_tensor(op, "panels", panels, ScalarType::Float, "[panels, K, 48]",
                 {shape.panels(), shape.K, kPanelColumns});
  } else {
    SBF_CHECK(shape.K % 2 == 0, op, "K must be even in bfloat16, got ", shape.K);
    check_tensor(op, "panels", panels, ScalarType::BFloat16, "[3 * panels, K / 2, 16, 2]",
                 {kStripsPerPanel * shape.panels(), shape.K / 2, kStripColumns, 2});
  }
  if (gated) {
    check_tensor(op, "bias", bias, ScalarType::Float, "[48 * panels]",
                 {kPanelColumns * shape.panels()});
  } else {
    check_tensor(op, "bias", bias, ScalarType::Float, "[N]", {features});
  }
  return shape;
}

int64_t item_rows(const LinearShape& shape) {
  const LinearItems& items = shape.items;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t part = threads == 1 ? shape.T : shape.T / (kItemsPerThread * threads);
  const int64_t rows = std::clamp(part / items.row_step * items.row_step,  //
                                  items.least_rows, items.most_rows);
  return std::min(rows, round_up(std::max<int64_t>(shape.T, 1), items.row_step));
}

// What a layer multiplies: x itself or, by int8 or split weights, its rows in their format.
class Operand {
 public:
  Operand(const KernelTable& table, const LinearShape& shape, const Tensor& x)
      : x_(x.const_data_ptr()) {
    if (shape.format == Format::kPlain) return;
    if (shape.format == Format::kSplit) {
      rows_ = new_output({shape.T, 2 * shape.K}, kBFloat16);
      const SplitParams params{
          .x = x.const_data_ptr<float>(), .out = rows_->mutable_data_ptr(), .K = shape.K};
      parallel_rows(table.split_rows, params, shape.T, shape.K);
      x_ = params.out;
      return;
    }
    const int64_t words = ceil_div(shape.T * shape.K, sizeof(float));
    rows_ = new_output({words + 2 * shape.T}, kFloat32);
    auto* const words_of = static_cast<float*>(rows_->mutable_data_ptr());
    const QuantizeParams params{.x = x_,
                                .out = reinterpret_cast<uint8_t*>(words_of),
                                .scales = words_of + words,
                                .K = shape.K};
    parallel_rows(table.quantize_rows[shape.dtype], params, shape.T, shape.K);
    x_ = params.out;
    scales_ = params.scales;
  }

  const void* x() const { return x_; }
  const float* scales() const { return scales_; }

 private:
  const void* x_;
  const float* scales_ = nullptr;
  std::optional<Tensor> rows_;
};

LinearParams linear_params(const LinearShape& shape, const Operand& x, const Tensor& panels,
                           const std::optional<Tensor>& bias, void* out, Activation activation) {
  return {
      .x = x.x(),
      .row_scales = x.scales(),
      .panels = panels.const_data_ptr(),
      .bias = data_or_null<float>(bias),
      .out = out,
      .T = shape.T,
      .K = shape.K,
      .N = shape.N,
      .item_rows = item_rows(shape),
      .item_panels = shape.panels(),
      .activation = activation,
      .gated = shape.gated,
  };
}

RangeKernel<LinearParams> linear_kernel(const KernelTable& table, const LinearShape& shape,
                                        Dtype out) {
  switch (shape.format) {
    case Format::kInt8:
      return table.linear_int8[out];
    case Format::kSplit:
      return table.linear_split;
    default:
      return table.linear[shape.dtype][out];
  }
}

RangeKernel<LinearNormParams> linear_norm_kernel(const KernelTable& table,
                                                 const LinearShape& shape) {
  switch (shape.format) {
    case Format::kInt8:
      return table.linear_norm_int8[shape.dtype];
    case Format::kSplit:
      return table.linear_norm_split;
    default:
      return table.linear_norm[shape.dtype];
  }
}

// Whether `items` keep every thread busy to the end.
bool fills_threads(int64_t items) {
  return items >= kItemsPerThread * torch::stable::get_num_threads();
}

void run_linear(RangeKernel<LinearParams> kernel, LinearParams params, const LinearItems& step) {
  if (params.T == 0) return;
  const int64_t panels = params.item_panels;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || params.T * params.K * params.N <= kGrainProducts) {
    return kernel(params, 0, ceil_div(params.T, params.item_rows));
  }
  const int64_t down = ceil_div(params.T, params.item_rows);
  if (!fills_threads(down)) {
    const int64_t wanted = kItemsPerThread * threads;
    params.item_panels = round_up(std::max<int64_t>(1, panels * down / wanted), step.panel_step);
    if (panels * down < wanted) {
      const int64_t rows = params.T * panels / wanted;
      params.item_rows = std::max(step.row_step, rows / step.row_step * step.row_step);
    }
  }
  const int64_t items = ceil_div(params.T, params.item_rows) * ceil_div(panels, params.item_panels);
  parallel_dynamic(items, [&](int64_t item) { kernel(params, item, item + 1); });
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias,
              int64_t features, int64_t activation, bool gated) {
  constexpr const char* op = "linear";
  const KernelTable& table = kernels();
  const LinearShape shape = check_linear(table, op, x, panels, bias, features, gated);
  SBF_CHECK(0 <= activation && activation < kNumActivations, op, "activation must be in [0, ",
            kNumActivations, "), got ", activation);
  Tensor out = new_output({shape.T, shape.N}, shape.dtype);
  const Operand operand(table, shape, x);
  run_linear(linear_kernel(table, shape, shape.dtype),
             linear_params(shape, operand, panels, bias, out.mutable_data_ptr(),
                           static_cast<Activation>(activation)),
             shape.items);
  return out;
}

Tensor linear_norm(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias,
                   const Tensor& residual, const Tensor& weight, const Tensor& ln_bias,
                   double eps) {
  constexpr const char* op = "linear_norm";
  const KernelTable& table = kernels();
  check_tensor(op, "residual", residual, x.scalar_type(), "[T, N]", {kAnySize, kAnySize});
  const int64_t N = residual.size(1);
  const LinearShape shape = check_linear(table, op, x, panels, bias, N);
  check_tensor(op, "residual", residual, x.scalar_type(), "[T, N]", {shape.T, N});
  check_tensor(op, "weight", weight, ScalarType::Float, "[N]", {N});
  check_tensor(op, "ln_bias", ln_bias, ScalarType::Float, "[N]", {N});

  Tensor out = new_output({shape.T, N}, shape.dtype);
  const AddNormParams norm{
      .x = nullptr,
      .bias = nullptr,
      .residual = residual.const_data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .ln_bias = ln_bias.const_data_ptr<float>(),
      .out = out.mutable_data_ptr(),
      .E = N,
      .eps = static_cast<float>(eps),
  };
  const Operand operand(table, shape, x);
  const LinearParams params =
      linear_params(shape, operand, panels, bias, nullptr, Activation::kNone);
  const int64_t items = ceil_div(shape.T, params.item_rows);
  const int64_t threads = torch::stable::get_num_threads();

  if (threads > 1 && !fills_threads(items)) {
    const Tensor sums = new_output({shape.T, N}, kFloat32);
    LinearParams whole = params;
    whole.out = sums.mutable_data_ptr();
    run_linear(linear_kernel(table, shape, kFloat32), whole, shape.items);
    AddNormParams rows = norm;
    rows.x = sums.const_data_ptr();
    parallel_rows(table.add_norm[kFloat32][shape.dtype], rows, shape.T, N);
    return out;
  }

  // Every item has its rows normalised while they are in the cache.
  const auto kernel = linear_norm_kernel(table, shape);
  const int64_t stride = linear_norm_stride(shape.panels());
  const int64_t size = params.item_rows * stride;
  const Tensor scratch = new_output({std::min(threads, items), size}, kFloat32);
  std::atomic<int64_t> next_scratch{0};
  parallel_workers(items, [&](auto next_item) {
    auto* sums = static_cast<float*>(scratch.mutable_data_ptr()) + next_scratch.fetch_add(1) * size;
    const LinearNormParams rows{
        .linear = params, .norm = norm, .scratch = sums, .scratch_stride = stride};
    for (int64_t item; (item = next_item()) < items;) kernel(rows, item, item + 1);
  });
  return out;
}

}  // namespace sbert_fast::cpu
