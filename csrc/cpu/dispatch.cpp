#include "dispatch.h"

#include <atomic>

#include "amx_permission.h"

namespace sbert_fast::cpu {

namespace generic {
const KernelTable& kernel_table();
}
namespace generic_tiles {
const KernelTable& kernel_table();
}

#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx_vnni {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx512_vnni {
const KernelTable& kernel_table();
}
namespace avx512_bf16 {
const KernelTable& kernel_table();
}
namespace amx_bf16 {
const KernelTable& kernel_table();
}
#endif

namespace {

// Tables that this CPU runs, best first. A table is named here only once its features are known, so
// no instruction of a foreign set runs before.
std::vector<const KernelTable*> detect() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx_vnni = has_avx2 && __builtin_cpu_supports("avxvnni");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && request_amx()) tables.push_back(&amx_bf16::kernel_table());
  if (has_bf16) tables.push_back(&avx512_bf16::kernel_table());
  if (has_vnni) tables.push_back(&avx512_vnni::kernel_table());
  if (has_avx512) tables.push_back(&avx512::kernel_table());
  if (has_avx_vnni) tables.push_back(&avx_vnni::kernel_table());
  if (has_avx2) tables.push_back(&avx2::kernel_table());
#endif
  tables.push_back(&generic::kernel_table());
  return tables;
}

const std::vector<const KernelTable*>& available() {
  static const std::vector<const KernelTable*> tables = detect();
  return tables;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{available().front()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->isa);
  return names;
}

bool select_isa(const std::string& isa) {
  std::vector<const KernelTable*> tables = available();
  tables.push_back(&generic_tiles::kernel_table());
  for (const KernelTable* table : tables) {
    if (isa != table->isa) continue;
    active().store(table, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace sbert_fast::cpu
