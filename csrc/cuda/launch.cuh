// Launching a kernel. An error becomes an exception.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

#if defined(__CUDACC__)

namespace sbert_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would find the same error again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

/// Runs `blocks` blocks of `threads` threads, each block with `shared_bytes` of dynamic memory.
///
/// Throws std::runtime_error, whose message begins with `op`, where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, void* stream, const Arguments&... arguments) {
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (blocks == 0) return;
  if (blocks > kMaxBlocks) {
    throw std::runtime_error(std::string(op) + ": the input is too large for one launch");
  }
  if (shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          op);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
           static_cast<Stream>(stream)>>>(arguments...);
  check(cudaGetLastError(), op);
}

}  // namespace sbert_fast::cuda

#endif
