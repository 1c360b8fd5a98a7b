// Stacks of fibers, and the switch from one to another.
#pragma once

#include <cstddef>

extern "C" [[gnu::visibility("hidden")]] void sbf_switch_context(void** from, void* to);

namespace sbert_fast::cuda::emulation {

/// Where a fiber goes on that does not run: its stack pointer, the registers saved above it.
using Context = void*;

/// Goes on with `to`; whoever goes on with `*from` comes back from this call.
inline void switch_context(Context* from, Context to) { sbf_switch_context(from, to); }

/// A fiber that begins with `entry`, which must not return, on the stack that ends at `top`.
Context new_context(unsigned char* top, void (*entry)());

/// The end of the stack of a thread of the block. Below each stack is a page nobody may touch.
unsigned char* stack_of(int thread);
bool is_stack_guard(const void* address);

}  // namespace sbert_fast::cuda::emulation
