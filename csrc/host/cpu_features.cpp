#include "cpu_features.h"

#include <cstdint>
#include <cstring>
#include <fstream>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sbert_fast::host {
namespace {

bool bit(uint64_t word, unsigned position) { return (word >> position) & 1u; }

struct X86Features {
  bool avx2, fma, f16c, avx_vnni;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16;
  bool amx_tile, amx_bf16, amx_int8;
};

struct ArmFeatures {
  bool neon, dotprod, i8mm, bf16, sve;
};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  // Answers zeros, that is "no feature", for a leaf the processor does not have.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// The XCR0 register: which register files the operating system saves at a context switch.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

X86Features x86_features() {
  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  const Registers more = extended.eax >= 1 ? cpuid(7, 1) : Registers{};
  const bool has_xgetbv = bit(basic.ecx, 27);
  const uint64_t saved = has_xgetbv ? saved_state() : 0;
  const bool avx = bit(basic.ecx, 28) && (saved & 0x6) == 0x6;             // SSE, AVX
  const bool avx512 = avx && (saved & 0xe6) == 0xe6;                       // opmask, ZMM
  const bool amx = (saved & 0x60000) == 0x60000 && bit(extended.edx, 24);  // tile config, data
  X86Features f{};
  f.avx2 = avx && bit(extended.ebx, 5);
  f.fma = avx && bit(basic.ecx, 12);
  f.f16c = avx && bit(basic.ecx, 29);
  f.avx_vnni = avx && bit(more.eax, 4);
  f.avx512f = avx512 && bit(extended.ebx, 16);
  f.avx512dq = avx512 && bit(extended.ebx, 17);
  f.avx512bw = avx512 && bit(extended.ebx, 30);
  f.avx512vl = avx512 && bit(extended.ebx, 31);
  f.avx512_vnni = avx512 && bit(extended.ecx, 11);
  f.avx512_bf16 = avx512 && bit(more.eax, 5);
  f.amx_tile = amx;
  f.amx_bf16 = amx && bit(extended.edx, 22);
  f.amx_int8 = amx && bit(extended.edx, 25);
  return f;
}

std::string brand_string() {
  constexpr uint32_t kFirstLeaf = 0x80000002;
  char text[3 * sizeof(Registers) + 1] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(kFirstLeaf + i, 0);
    std::memcpy(text + i * sizeof(Registers), &r, sizeof(Registers));
  }
  return text;
}

#else

X86Features x86_features() { return {}; }
std::string brand_string() { return {}; }

#endif

#if defined(__aarch64__) && defined(__linux__)

// Positions as in Linux's asm/hwcap.h, written out because older C libraries lack the names.
ArmFeatures arm_features() {
  const uint64_t hwcap = getauxval(AT_HWCAP);
  const uint64_t hwcap2 = getauxval(AT_HWCAP2);
  return {bit(hwcap, 1), bit(hwcap, 20), bit(hwcap2, 13), bit(hwcap2, 14), bit(hwcap, 22)};
}

#else

ArmFeatures arm_features() { return {}; }

#endif

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

std::string name_from_proc() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const bool names_cpu = line.starts_with("model name") || line.starts_with("Hardware");
    const size_t colon = line.find(':');
    if (names_cpu && colon != std::string::npos) return trimmed(line.substr(colon + 1));
  }
  return {};
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
  const X86Features x86 = x86_features();
  const ArmFeatures arm = arm_features();
  return {
      {"avx2", x86.avx2},
      {"fma", x86.fma},
      {"f16c", x86.f16c},
      {"avx_vnni", x86.avx_vnni},
      {"avx512f", x86.avx512f},
      {"avx512bw", x86.avx512bw},
      {"avx512dq", x86.avx512dq},
      {"avx512vl", x86.avx512vl},
      {"avx512_vnni", x86.avx512_vnni},
      {"avx512_bf16", x86.avx512_bf16},
      {"amx_tile", x86.amx_tile},
      {"amx_bf16", x86.amx_bf16},
      {"amx_int8", x86.amx_int8},
      {"neon", arm.neon},
      {"neon_dotprod", arm.dotprod},
      {"neon_i8mm", arm.i8mm},
      {"neon_bf16", arm.bf16},
      {"sve", arm.sve},
  };
}

std::string cpu_name() {
  std::string name = trimmed(brand_string());
  if (name.empty()) name = name_from_proc();
  return name.empty() ? "unknown" : name;
}

}  // namespace sbert_fast::host
