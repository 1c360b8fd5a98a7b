// A block of threads on one CPU thread: every thread of it is a fiber, and runs until it has to
// wait for others.
//
// A thread that waits names its site, so that a block in which nobody can go on is reported. What a
// GPU does beyond taking threads in any order is not shown: memory is in order after every meeting,
// while on a GPU only sync_warp and sync_block see to that.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

namespace sbert_fast::cuda::emulation {

inline constexpr int kWarpThreads = 32;
inline constexpr int kMaxThreads = 1024;

using Location = std::source_location;

/// An operation, and where it stands in a kernel.
struct Site {
  const char* operation = nullptr;
  Location location;
};

/// Shape of a launch, and which of its threads is running.
struct Running {
  const char* op = nullptr;
  int64_t blocks = 0;
  int threads = 0;
  int64_t block = 0;
  int thread = 0;
};
extern Running running;

/// The order in which threads run where they may run in any. Zero takes warps and lanes by their
/// numbers; any other number is the seed of a random order, the same for every launch.
void set_order(uint64_t seed);

/// Starts that order again.
void begin_order();
uint32_t random_number();

/// Runs `body(argument)` on each thread of the block `running.block`.
///
/// Throws std::runtime_error where a thread fails, or where nobody can go on.
void run_block(void (*body)(const void*), const void* argument);

/// Ends the launch from within a thread: it throws "op: block b, thread t: what".
[[noreturn]] void fail(const std::string& what);

/// Operands of a warp, by lane.
using Operands = void* const (&)[kWarpThreads];

/// Waits for the other lanes of the warp at the same site; the last one calls `work` for all.
void meet_warp(const Site& site, void* operand, void (*work)(Operands));
/// Waits for all threads of the block.
void meet_block(const Site& site);

/// Lets others run.
void pause(const Site& site);
/// Tells that a pause has come to its end.
void go_on();

/// Waits until `ready()`, which other threads bring about; they are asked again and again.
template <class Ready>
void wait_until(const Site& site, const Ready& ready) {
  if (ready()) return;
  do pause(site);
  while (!ready());
  go_on();
}

}  // namespace sbert_fast::cuda::emulation
