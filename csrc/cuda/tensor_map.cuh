// Tensor maps for load_box(), and what a launch has to know of the device.
#pragma once

#include <cstdlib>

#include "hopper.cuh"
#include "launch.cuh"
#include "params.h"

namespace sbert_fast::cuda {

/// A tensor of 16-bit numbers, innermost dim first, and the box that one copy takes of it.
struct Boxes {
  const void* base;
  int64_t sizes[3];
  int box[3];  // the innermost 32 or 64 numbers, which is as far as the swizzle goes
};

#if defined(__CUDACC__)

inline int device_attribute(const char* op, cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&value, attribute, device), op);
  return value;
}
inline int num_multiprocessors(const char* op) {
  return device_attribute(op, cudaDevAttrMultiProcessorCount);
}
/// The current device runs code for 9.0a. SBERT_FAST_CUDA_SM90=0 leaves it to the kernels that run
/// everywhere: to compare the two.
inline bool is_sm90(const char* op) {
  const char* wanted = std::getenv("SBERT_FAST_CUDA_SM90");
  if (wanted != nullptr && wanted[0] == '0') return false;
  return device_attribute(op, cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(op, cudaDevAttrComputeCapabilityMinor) == 0;
}

inline TensorMap make_tensor_map(const char* op, Dtype dtype, const Boxes& boxes) {
  // The driver's library is not linked: this file must load where there is no driver.
  static const auto encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          op);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found), op);
#endif
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  TensorMap map;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3];
  const cuuint32_t steps[3] = {1, 1, 1};
  for (int dim = 0; dim < 3; ++dim) {
    sizes[dim] = static_cast<cuuint64_t>(boxes.sizes[dim]);
    box[dim] = static_cast<cuuint32_t>(boxes.box[dim]);
    if (dim < 2) strides[dim] = (dim == 0 ? 2 : strides[dim - 1]) * sizes[dim];
  }
  const CUresult result = encode(
      &map, dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(boxes.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      boxes.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

inline int num_multiprocessors(const char*) { return 3; }
/// Tests choose by an environment variable.
inline bool is_sm90(const char*) { return std::getenv("SBF_EMULATED_SM90") != nullptr; }

inline TensorMap make_tensor_map(const char*, Dtype, const Boxes& boxes) {
  TensorMap map = {static_cast<const unsigned char*>(boxes.base), {}, {2, 0, 0}, {}, 0};
  for (int dim = 0; dim < 3; ++dim) {
    map.sizes[dim] = boxes.sizes[dim];
    map.box[dim] = boxes.box[dim];
    if (dim > 0) map.strides[dim] = map.strides[dim - 1] * map.sizes[dim - 1];
  }
  map.swizzle = map.box[0] * 2;
  return map;
}

#endif

}  // namespace sbert_fast::cuda
