// The memory of a block, and what goes wrong with memory.
//
// Shared memory holds NaN when a block begins. Its dynamic part ends at a page that nobody may
// touch; the bytes between are compared when the block ends.
#pragma once

#include <cstddef>
#include <string>

namespace sbert_fast::cuda::emulation {

/// Of a block on compute capability 9.0.
inline constexpr size_t kMaxSharedBytes = 227 * 1024;

/// The dynamic shared memory of the running block.
unsigned char* dynamic_shared_memory();

/// Lays out and fills the shared memory of a block that begins.
void begin_shared_memory(size_t dynamic_bytes);
/// Throws std::runtime_error where the block wrote beside its shared memory.
void end_shared_memory();

/// Of the running thread, whose launch they end where the answer is no.
void require_aligned(const char* operation, const void* address);
void require_shared(const char* operation, const void* address, size_t bytes);
void require_not_shared(const char* operation, const void* address);

/// Copies of 16 bytes to shared memory, of the running thread. The target holds NaN until a wait
/// covers the group of the copy: only then is the source read. A null source stands for zeros.
void start_copy(void* shared, const void* source);
void close_copy_group();
void finish_copies(int pending_groups);

/// What to call an access to an address beside the dynamic shared memory; empty for any other.
std::string describe_address(const void* address);

}  // namespace sbert_fast::cuda::emulation
