#include "emulated_launch.h"

#include <mutex>
#include <stdexcept>
#include <string>

#include "emulated_fault.h"
#include "emulated_fibers.h"
#include "emulated_memory.h"

namespace sbert_fast::cuda::emulation {
namespace {

std::mutex device;

void require(bool accepted, const char* op, const char* what) {
  if (!accepted) throw std::runtime_error(std::string(op) + ": " + what);
}

}  // namespace

void run_blocks(const char* op, int64_t blocks, int threads, size_t shared_bytes,
                void (*body)(const void*), const void* argument) {
  if (blocks == 0) return;
  require(blocks > 0 && blocks <= 0x7fffffff, op, "the input is too large for one launch");
  require(threads > 0 && threads <= kMaxThreads && threads % kWarpThreads == 0, op,
          "a block must have 32, 64, ... or 1024 threads");
  require(shared_bytes <= kMaxSharedBytes, op, "a block has at most 227 KiB of shared memory");
  const std::lock_guard<std::mutex> lock(device);
  const FaultReports reports;
  begin_order();
  running = {op, blocks, threads, 0, 0};
  for (; running.block < blocks; ++running.block) {
    begin_shared_memory(shared_bytes);
    run_block(body, argument);
    end_shared_memory();
  }
}

}  // namespace sbert_fast::cuda::emulation

/// For tests: the order in which threads run from now on.
extern "C" [[gnu::visibility("default")]] void sbf_emulation_set_order(uint64_t seed) {
  sbert_fast::cuda::emulation::set_order(seed);
}
