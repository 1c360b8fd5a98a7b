// What the CUDA ops have in common, and their registration.
//
// Compiled with SBF_EMULATED the same ops run on CPU tensors, their kernels thread by thread.
#include "ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

namespace sbert_fast::cuda {
namespace {

#if defined(SBF_EMULATED)
constexpr const char* kDeviceName = "cpu";
int32_t device_type() { return aoti_torch_device_type_cpu(); }
#else
constexpr const char* kDeviceName = "cuda";
int32_t device_type() { return aoti_torch_device_type_cuda(); }
#endif

int32_t device_type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float32();
  }
}

}  // namespace

namespace {

Dtype check_activation_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  SBF_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, name,
            " must be float16 or bfloat16, got ", dtype_name(dtype));
  SBF_CHECK(device_type_of(tensor) == device_type(), op, name, " must be on ", kDeviceName);
  return dtype == ScalarType::Half ? kFloat16 : kBFloat16;
}

}  // namespace

Dtype check_activation(const char* op, const char* name, const Tensor& tensor, const char* dims,
                       std::initializer_list<int64_t> sizes) {
  const Dtype dtype = check_activation_dtype(op, name, tensor);
  check_tensor(op, name, tensor, tensor.scalar_type(), dims, sizes);
  check_alignment(op, name, tensor);
  return dtype;
}

Dtype check_activation_rows(const char* op, const char* name, const Tensor& tensor,
                            const char* dims) {
  const Dtype dtype = check_activation_dtype(op, name, tensor);
  SBF_CHECK(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), op, name,
            " must be ", dims, " with unit inner stride, got ", describe(tensor));
  return dtype;
}

void check_row_alignment(const char* op, const char* name, const Tensor& tensor) {
  constexpr int64_t kNumbers = kAlignment / 2;
  SBF_CHECK(tensor.stride(0) % kNumbers == 0 || tensor.size(0) <= 1, op, name,
            " must have rows a multiple of ", kNumbers, " columns apart, got ", describe(tensor));
  check_alignment(op, name, tensor);
}

void check_device_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  SBF_CHECK(device_type_of(tensor) == device_type() &&
                tensor.get_device_index() == like.get_device_index(),
            op, name, " must be on ", kDeviceName, ':', like.get_device_index(),
            ", like the other tensors");
}

void check_tensor_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType dtype, const char* dims, std::initializer_list<int64_t> sizes) {
  check_tensor(op, name, tensor, dtype, dims, sizes);
  check_device_like(op, name, tensor, like);
}

void check_tensor_like(const char* op, const char* name, const std::optional<Tensor>& tensor,
                       const Tensor& like, ScalarType dtype, const char* dims,
                       std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) check_tensor_like(op, name, *tensor, like, dtype, dims, sizes);
}

void check_alignment(const char* op, const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  SBF_CHECK(address % kAlignment == 0, op, name, " must begin at a multiple of ", kAlignment,
            " bytes, got one ", address % kAlignment, " bytes behind");
}

Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[dim]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), dtype_code(dtype), device_type(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

#if defined(SBF_EMULATED)
OnDevice::OnDevice(const Tensor&) {}
#else
OnDevice::OnDevice(const Tensor& tensor) : guard_(std::in_place, tensor.get_device_index()) {
  use_device(tensor.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}
#endif

#if !defined(SBF_EMULATED)
namespace {

// The CUDA version and the targets: a library may lie beside the record of another.
[[gnu::used]] constexpr char kBuild[] = SBF_CUDA_BUILD;
std::string cuda_build() { return kBuild; }

}  // namespace
#endif

}  // namespace sbert_fast::cuda

#if defined(SBF_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CPU, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(sbert_fast, m) { m.def("cuda_build() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&sbert_fast::cuda::cuda_build));
}

STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CUDA, m) {
#endif
  m.impl("varlen_attention.cuda", TORCH_BOX(&sbert_fast::cuda::varlen_attention));
  m.impl("embed_norm.cuda", TORCH_BOX(&sbert_fast::cuda::embed_norm));
  m.impl("add_norm.cuda", TORCH_BOX(&sbert_fast::cuda::add_norm));
  m.impl("bias_gelu.cuda", TORCH_BOX(&sbert_fast::cuda::bias_gelu));
  m.impl("segment_pool.cuda", TORCH_BOX(&sbert_fast::cuda::segment_pool));
  m.impl("segment_pool_out.cuda", TORCH_BOX(&sbert_fast::cuda::segment_pool_out));
  m.impl("norm_pool.cuda", TORCH_BOX(&sbert_fast::cuda::norm_pool));
  m.impl("norm_pool_out.cuda", TORCH_BOX(&sbert_fast::cuda::norm_pool_out));
}
