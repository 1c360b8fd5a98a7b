// API layer of varlen_attention.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace sbert_fast::cuda {
namespace {

constexpr const char* op = "varlen_attention";
constexpr int64_t kMinHeadDim = 8;
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

void check_sizes(int64_t T, int64_t H, int64_t D, int64_t max_seqlen) {
  SBF_CHECK(kMinHeadDim <= D && D <= kMaxHeadDim && D % 8 == 0, op,
            "D must be a multiple of 8 in [", kMinHeadDim, ", ", kMaxHeadDim,
            "] for the CUDA kernels, got ", D, ": impl='triton' takes any");
  SBF_CHECK(0 < H && H <= kMaxIndex, op, "H must be positive, got ", H);
  SBF_CHECK(T <= kMaxIndex, op, "qkv must have fewer than 2^31 tokens, got ", T);
  SBF_CHECK(max_seqlen >= 0, op, "max_seqlen must not be negative, got ", max_seqlen);
}

}  // namespace

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        double scale, const std::optional<Tensor>& bias, int64_t window,
                        const std::optional<Tensor>& rotary_cos,
                        const std::optional<Tensor>& rotary_sin,
                        const std::optional<Tensor>& tiles) {
  constexpr double kLog2E = 1.4426950408889634;
  const Dtype dtype =
      check_activation(op, "qkv", qkv, "[T, 3, H, D]", {kAnySize, 3, kAnySize, kAnySize});
  const int64_t T = qkv.size(0), H = qkv.size(2), D = qkv.size(3);
  check_sizes(T, H, D, max_seqlen);
  check_tensor_like(op, "cu_seqlens", cu_seqlens, qkv, ScalarType::Int, "[B + 1]", {kAnySize});
  SBF_CHECK(cu_seqlens.size(0) > 0, op, "cu_seqlens must be [B + 1], got no element");
  check_tensor_like(op, "bias", bias, qkv, ScalarType::Float, "[H, 2R + 1]", {H, kAnySize});
  SBF_CHECK(!bias.has_value() || bias->size(1) % 2 == 1, op,
            "bias must be [H, 2R + 1] with an odd number of columns, got ", describe(*bias));
  SBF_CHECK(window >= -1, op, "window must be at least -1, got ", window);
  SBF_CHECK(
      !rotary_cos.has_value() && !rotary_sin.has_value(), op,
      "rotary_cos and rotary_sin must be None for the CUDA kernels: impl='triton' takes them");
  check_tensor_like(op, "tiles", tiles, qkv, ScalarType::Int, "[n, 4]", {kAnySize, 4});

  Tensor out = new_output(qkv, {T, H, D}, qkv.scalar_type());
  if (T == 0) return out;
  const AttentionParams params{
      .qkv = qkv.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
      .tiles = data_or_null<int32_t>(tiles),
      .bias = data_or_null<float>(bias),
      .T = T,
      .B = static_cast<int32_t>(cu_seqlens.size(0) - 1),
      .H = static_cast<int32_t>(H),
      .D = static_cast<int32_t>(D),
      .max_seqlen = static_cast<int32_t>(std::min(max_seqlen, T)),
      .num_tiles = tiles.has_value() ? static_cast<int32_t>(tiles->size(0)) : 0,
      .R = bias.has_value() ? static_cast<int32_t>(bias->size(1) / 2) : 0,
      .window = static_cast<int32_t>(std::min(window, T)),
      .scale = static_cast<float>(scale * kLog2E),
  };
  const OnDevice device(qkv);
  launch_varlen_attention(dtype, params, device.stream());
  return out;
}

}  // namespace sbert_fast::cuda
