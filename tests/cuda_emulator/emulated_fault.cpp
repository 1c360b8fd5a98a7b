#include "emulated_fault.h"

#include <pthread.h>
#include <ucontext.h>

#include <cstdint>
#include <sstream>

#include "emulated_context.h"
#include "emulated_fibers.h"
#include "emulated_memory.h"

namespace sbert_fast::cuda::emulation {
namespace {

constexpr size_t kSignalStackBytes = 64 * 1024;
alignas(16) unsigned char signal_stack[kSignalStackBytes];
// A fault may be an overflow of the thread's own stack.
alignas(16) unsigned char report_stack[kSignalStackBytes];

struct sigaction old_action;
pthread_t launching;
const void* fault_address = nullptr;

[[noreturn]] void report() {
  if (is_stack_guard(fault_address)) fail("its stack has overflowed");
  if (std::string what = describe_address(fault_address); !what.empty()) fail(what);
  std::ostringstream text;
  text << "an access to forbidden memory, address " << fault_address;
  fail(text.str());
}

void handle(int, siginfo_t* info, void* context) {
  if (!pthread_equal(launching, pthread_self())) {
    sigaction(SIGSEGV, &old_action, nullptr);  // the access is repeated, and reported there
    return;
  }
  fault_address = info->si_addr;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
  // As after a call: eight bytes below a multiple of 16 on x86-64.
  const auto top = reinterpret_cast<uintptr_t>(report_stack + kSignalStackBytes);
#if defined(__x86_64__)
  registers.gregs[REG_RSP] = static_cast<greg_t>(top - 8);
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(report);
#else
  registers.sp = top;
  registers.pc = reinterpret_cast<uintptr_t>(report);
#endif
}

}  // namespace

FaultReports::FaultReports() {
  launching = pthread_self();
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_action);
}

FaultReports::~FaultReports() {
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace sbert_fast::cuda::emulation
