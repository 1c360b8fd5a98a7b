// API layer of the CUDA ops: arguments as torch has them. Each op checks its tensors, fills in the
// parameters of its kernels and launches them on the current stream of the tensors' device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "checks.h"
#include "params.h"

namespace sbert_fast::cuda {

/// Bytes of one access of the kernels: every row begins at a multiple of it.
inline constexpr int64_t kAlignment = 16;

/// Requires a contiguous, aligned float16 or bfloat16 tensor on a GPU, `sizes` named by `dims`.
Dtype check_activation(const char* op, const char* name, const Tensor& tensor, const char* dims,
                       std::initializer_list<int64_t> sizes);

/// Requires rows [T, E] on a GPU, of float16 or bfloat16, with a unit inner stride.
Dtype check_activation_rows(const char* op, const char* name, const Tensor& tensor,
                            const char* dims);

/// Requires a tensor on the device of `like`.
void check_device_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like);

/// Requires a contiguous tensor of `dtype` on the device of `like`.
void check_tensor_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType dtype, const char* dims, std::initializer_list<int64_t> sizes);
void check_tensor_like(const char* op, const char* name, const std::optional<Tensor>& tensor,
                       const Tensor& like, ScalarType dtype, const char* dims,
                       std::initializer_list<int64_t> sizes);

/// Requires 16-bit rows that all begin at a multiple of kAlignment bytes.
void check_row_alignment(const char* op, const char* name, const Tensor& tensor);

/// Requires data that begins at a multiple of kAlignment bytes.
void check_alignment(const char* op, const char* name, const Tensor& tensor);

/// Requires rows of whole pieces of sixteen bytes, at most `largest` columns.
void check_width(const char* op, const char* name, int64_t width, int64_t largest);

/// Requires a number of rows that the kernels can count.
void check_tokens(const char* op, const char* name, int64_t tokens);

/// Requires what LayerNorm(x + bias + residual) needs, for an x that is checked.
void check_norm(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias);

/// A contiguous tensor on the device of `like`, its values undefined.
Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

/// Makes the device of a tensor the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  /// The device's current stream.
  StreamHandle stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  StreamHandle stream_ = nullptr;
};

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        double scale, const std::optional<Tensor>& bias, int64_t window,
                        const std::optional<Tensor>& rotary_cos,
                        const std::optional<Tensor>& rotary_sin,
                        const std::optional<Tensor>& tiles);

Tensor embed_norm(const Tensor& ids, const Tensor& positions, const std::optional<Tensor>& types,
                  const Tensor& word, const Tensor& position_table,
                  const std::optional<Tensor>& type_table, const Tensor& weight, const Tensor& bias,
                  double eps, ScalarType out_dtype);

Tensor add_norm(const Tensor& x, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias,
                double eps);

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh);

Tensor segment_pool(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                    int64_t skip, const std::optional<Tensor>& spans);

void segment_pool_out(const Tensor& x, const Tensor& cu_seqlens, int64_t mode, bool normalize,
                      int64_t skip, const std::optional<Tensor>& spans, const Tensor& out,
                      const std::optional<Tensor>& out_rows);

Tensor norm_pool(const Tensor& x, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias,
                 double eps, const Tensor& cu_seqlens, int64_t mode, bool normalize, int64_t skip,
                 const std::optional<Tensor>& spans);

void norm_pool_out(const Tensor& x, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const Tensor& weight,
                   const Tensor& ln_bias, double eps, const Tensor& cu_seqlens, int64_t mode,
                   bool normalize, int64_t skip, const std::optional<Tensor>& spans,
                   const Tensor& out, const std::optional<Tensor>& out_rows);

}  // namespace sbert_fast::cuda
