#include "emulated_context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "emulated_fibers.h"

// The registers that a function must leave as they were, then the address to return to: by a jump,
// since a processor foretells where `ret` goes, and here would be wrong.
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl sbf_switch_context
.hidden sbf_switch_context
.type sbf_switch_context, @function
sbf_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size sbf_switch_context, . - sbf_switch_context
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.globl sbf_switch_context
.hidden sbf_switch_context
.type sbf_switch_context, %function
sbf_switch_context:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size sbf_switch_context, . - sbf_switch_context
.popsection
)");
#else
#error "kernels are emulated on x86-64 and aarch64"
#endif

namespace sbert_fast::cuda::emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

/// Stacks of all threads that a block can have; memory is spent on those that run.
struct Stacks {
  Stacks() {
    void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    begin = static_cast<unsigned char*>(memory);
    for (int thread = 0; thread < kMaxThreads; ++thread) {
      mprotect(begin + thread * kStackBytes, page, PROT_NONE);
    }
  }
  ~Stacks() { munmap(begin, bytes()); }
  static size_t bytes() { return kMaxThreads * kStackBytes; }

  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  unsigned char* begin = nullptr;
};

const Stacks& stacks() {
  static const Stacks all;
  return all;
}

}  // namespace

Context new_context(unsigned char* top, void (*entry)()) {
  void** slot = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  *--slot = nullptr;  // the address `entry` would return to; it also aligns the stack
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
#else
  for (int i = 0; i < 20; ++i) *--slot = nullptr;
  slot[1] = reinterpret_cast<void*>(entry);
#endif
  return slot;
}

unsigned char* stack_of(int thread) {
  // Stacks of a warp that began at the same offset would fight for the same lines of the cache.
  return stacks().begin + (thread + 1) * kStackBytes - thread % kWarpThreads * 128;
}

bool is_stack_guard(const void* address) {
  const auto offset = static_cast<const unsigned char*>(address) - stacks().begin;
  return offset >= 0 && static_cast<size_t>(offset) < Stacks::bytes() &&
         static_cast<size_t>(offset) % kStackBytes < stacks().page;
}

}  // namespace sbert_fast::cuda::emulation
