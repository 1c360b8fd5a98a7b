// Launching a kernel on a CPU: its blocks run one after the other, before the call returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

namespace sbert_fast::cuda {
namespace emulation {

/// Throws std::runtime_error where the launch is refused, or where a thread fails.
void run_blocks(const char* op, int64_t blocks, int threads, size_t shared_bytes,
                void (*body)(const void*), const void* argument);

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
  static void run(const void* call) {
    const auto& own = *static_cast<const Call*>(call);
    std::apply(own.kernel, own.arguments);
  }
};

}  // namespace emulation

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, void*, const Arguments&... arguments) {
  const emulation::Call<Parameters...> call = {kernel, {arguments...}};
  emulation::run_blocks(op, blocks, threads, shared_bytes, call.run, &call);
}

}  // namespace sbert_fast::cuda
