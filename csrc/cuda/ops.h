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

/// Requires a contiguous tensor of `dtype` on the device of `like`.
void check_tensor_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType dtype, const char* dims, std::initializer_list<int64_t> sizes);
void check_tensor_like(const char* op, const char* name, const std::optional<Tensor>& tensor,
                       const Tensor& like, ScalarType dtype, const char* dims,
                       std::initializer_list<int64_t> sizes);

/// Requires data that begins at a multiple of kAlignment bytes.
void check_alignment(const char* op, const char* name, const Tensor& tensor);

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

}  // namespace sbert_fast::cuda
