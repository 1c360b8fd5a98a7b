// Registration of the CPU ops, and the ops that know of no implementation: the instruction set,
// content_hash.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace sbert_fast::cpu {

Dtype kernel_dtype(const char* op, const char* name, ScalarType dtype) {
  SBF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, name,
            " must be float32 or bfloat16, got ", dtype_name(dtype));
  return dtype == ScalarType::Float ? kFloat32 : kBFloat16;
}

Dtype check_activation(const char* op, const char* name, const Tensor& tensor, const char* dims,
                       std::initializer_list<int64_t> sizes) {
  const Dtype dtype = kernel_dtype(op, name, tensor.scalar_type());
  check_tensor(op, name, tensor, tensor.scalar_type(), dims, sizes);
  return dtype;
}

Tensor new_output(std::initializer_list<int64_t> sizes, Dtype dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[dim]);
  }
  const int32_t code = dtype == kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

namespace {

std::string cpu_isa() { return kernels().isa; }

// Best first, comma separated.
std::string cpu_isas() {
  std::string names;
  for (const std::string& name : available_isas()) names += names.empty() ? name : ',' + name;
  return names;
}

void set_cpu_isa(std::string isa) {
  SBF_CHECK(select_isa(isa), "set_cpu_isa", "isa must be one of ", cpu_isas(), ", got ", isa);
}

}  // namespace
}  // namespace sbert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(sbert_fast, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("content_hash(Tensor[] tensors, int read) -> int");
}

// For every device: it never differentiates, and tells the geometry of tensors elsewhere.
STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CompositeImplicitAutograd, m) {
  m.impl("content_hash", TORCH_BOX(&sbert_fast::cpu::content_hash));
}

STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sbert_fast::cpu::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&sbert_fast::cpu::cpu_isas));
  m.impl("set_cpu_isa", TORCH_BOX(&sbert_fast::cpu::set_cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(sbert_fast, CPU, m) {
  m.impl("varlen_attention.cpu", TORCH_BOX(&sbert_fast::cpu::varlen_attention));
  m.impl("varlen_attention_backward.cpu", TORCH_BOX(&sbert_fast::cpu::varlen_attention_backward));
  m.impl("add_norm_backward.cpu", TORCH_BOX(&sbert_fast::cpu::add_norm_backward));
  m.impl("bias_gelu_backward.cpu", TORCH_BOX(&sbert_fast::cpu::bias_gelu_backward));
  m.impl("gated_activation_backward.cpu", TORCH_BOX(&sbert_fast::cpu::gated_activation_backward));
  m.impl("embed_norm.cpu", TORCH_BOX(&sbert_fast::cpu::embed_norm));
  m.impl("add_norm.cpu", TORCH_BOX(&sbert_fast::cpu::add_norm));
  m.impl("add_norm_sum.cpu", TORCH_BOX(&sbert_fast::cpu::add_norm_sum));
  m.impl("gated_activation.cpu", TORCH_BOX(&sbert_fast::cpu::gated_activation));
  m.impl("bias_gelu.cpu", TORCH_BOX(&sbert_fast::cpu::bias_gelu));
  m.impl("linear.cpu", TORCH_BOX(&sbert_fast::cpu::linear));
  m.impl("linear_norm.cpu", TORCH_BOX(&sbert_fast::cpu::linear_norm));
  m.impl("segment_pool.cpu", TORCH_BOX(&sbert_fast::cpu::segment_pool));
  m.impl("segment_pool_out.cpu", TORCH_BOX(&sbert_fast::cpu::segment_pool_out));
}
