#include "emulated_memory.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulated_fibers.h"

namespace sbert_fast::cuda::emulation {
namespace {

constexpr int kPoison = 0xff;
constexpr size_t kGuardBytes = 1024 * 1024;
constexpr size_t kDynamicBytes = 256 * 1024;
constexpr size_t kAlignment = 128;

/// Pages for the dynamic part, between pages that nobody may touch.
struct Arena {
  Arena() {
    void* memory = mmap(nullptr, kGuardBytes * 2 + kDynamicBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    begin = static_cast<unsigned char*>(memory) + kGuardBytes;
    end = begin + kDynamicBytes;
  }
  ~Arena() { munmap(begin - kGuardBytes, kGuardBytes * 2 + kDynamicBytes); }

  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;
  unsigned char* open = nullptr;  // the first byte that may be touched
  unsigned char* dynamic = nullptr;
  size_t bytes = 0;
};

Arena& arena() {
  static Arena only;
  return only;
}

/// SBF_SHARED variables are the thread-local ones of this library; this one makes sure of one.
thread_local unsigned char static_marker;

struct Range {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* address, size_t size) const {
    const auto offset = static_cast<const unsigned char*>(address) - begin;
    return offset >= 0 && static_cast<size_t>(offset) + size <= bytes;
  }
};
Range static_shared;
const void* static_shared_marker = nullptr;  // of the thread that it belongs to

int find_static_shared(dl_phdr_info* library, size_t, void*) {
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    if (library->dlpi_phdr[i].p_type != PT_TLS || library->dlpi_tls_data == nullptr) continue;
    const Range range = {static_cast<unsigned char*>(library->dlpi_tls_data),
                         library->dlpi_phdr[i].p_memsz};
    if (!range.holds(&static_marker, 1)) continue;
    static_shared = range;
    static_shared_marker = &static_marker;
    return 1;
  }
  return 0;
}

bool is_shared(const void* address, size_t bytes) {
  return Range{arena().dynamic, arena().bytes}.holds(address, bytes) ||
         static_shared.holds(address, bytes);
}

struct Copy {
  unsigned char* shared;
  const void* source;
  int group;
};

struct CopyQueue {
  std::vector<Copy> copies;
  int group = 0;  // the one that is open
};
CopyQueue copy_queues[kMaxThreads];

}  // namespace

unsigned char* dynamic_shared_memory() { return arena().dynamic; }

void begin_shared_memory(size_t dynamic_bytes) {
  Arena& all = arena();
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t rounded = (dynamic_bytes + kAlignment - 1) / kAlignment * kAlignment;
  unsigned char* open = all.end - (rounded + page - 1) / page * page;
  if (open != all.open) {
    mprotect(all.begin, kDynamicBytes, PROT_NONE);
    mprotect(open, static_cast<size_t>(all.end - open), PROT_READ | PROT_WRITE);
    all.open = open;
  }
  all.dynamic = all.end - rounded;
  all.bytes = dynamic_bytes;
  std::memset(open, kPoison, static_cast<size_t>(all.end - open));

  if (static_shared_marker != &static_marker) {
    static_marker = kPoison;
    dl_iterate_phdr(find_static_shared, nullptr);
  }
  std::memset(static_shared.begin, kPoison, static_shared.bytes);

  for (int thread = 0; thread < running.threads; ++thread) {
    copy_queues[thread].copies.clear();
    copy_queues[thread].group = 0;
  }
}

void end_shared_memory() {
  const Arena& all = arena();
  const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
  const bool before = std::all_of(all.open, all.dynamic, poisoned);
  const bool behind = std::all_of(all.dynamic + all.bytes, all.end, poisoned);
  if (before && behind) return;
  throw std::runtime_error(std::string(running.op) + ": block " + std::to_string(running.block) +
                           " wrote " + (before ? "behind" : "in front of") + " its " +
                           std::to_string(all.bytes) + " bytes of shared memory");
}

void require_aligned(const char* operation, const void* address) {
  const uintptr_t behind = reinterpret_cast<uintptr_t>(address) % 16;
  if (behind == 0) return;
  fail(std::string(operation) + ": the address is " + std::to_string(behind) +
       " bytes behind a multiple of 16");
}

void require_shared(const char* operation, const void* address, size_t bytes) {
  if (is_shared(address, bytes)) return;
  fail(std::string(operation) + ": the address is outside of the block's shared memory");
}

void require_not_shared(const char* operation, const void* address) {
  if (is_shared(address, 1)) {
    fail(std::string(operation) + ": the address is in shared memory, not in global memory");
  }
}

void start_copy(void* shared, const void* source) {
  CopyQueue& queue = copy_queues[running.thread];
  queue.copies.push_back({static_cast<unsigned char*>(shared), source, queue.group});
  std::memset(shared, kPoison, 16);
}

void close_copy_group() { ++copy_queues[running.thread].group; }

void finish_copies(int pending_groups) {
  CopyQueue& queue = copy_queues[running.thread];
  auto first = queue.copies.begin();
  for (; first != queue.copies.end() && first->group < queue.group - pending_groups; ++first) {
    if (first->source == nullptr) {
      std::memset(first->shared, 0, 16);
    } else {
      std::memcpy(first->shared, first->source, 16);
    }
  }
  queue.copies.erase(queue.copies.begin(), first);
}

std::string describe_address(const void* at) {
  const Arena& all = arena();
  const auto* address = static_cast<const unsigned char*>(at);
  if (address >= all.end && address < all.end + kGuardBytes) {
    const auto behind = address - (all.dynamic + all.bytes);
    return "an access " + std::to_string(behind) + " bytes behind the end of shared memory";
  }
  if (address >= all.begin - kGuardBytes && address < all.dynamic) {
    const auto before = all.dynamic - address;
    return "an access " + std::to_string(before) + " bytes in front of shared memory";
  }
  return {};
}

}  // namespace sbert_fast::cuda::emulation
