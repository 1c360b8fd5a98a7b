// Accesses to memory that may not be touched end the launch, not the process.
#pragma once

#include <csignal>

namespace sbert_fast::cuda::emulation {

/// While it lives, a bad access of this CPU thread is taken for one of the running thread.
class FaultReports {
 public:
  FaultReports();
  ~FaultReports();
  FaultReports(const FaultReports&) = delete;
  FaultReports& operator=(const FaultReports&) = delete;

 private:
  stack_t old_stack_;
};

}  // namespace sbert_fast::cuda::emulation
