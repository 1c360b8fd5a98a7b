// A kernel for every function of device.cuh, right and wrong ones, for tests/test_cuda_emulator.py.
#include <cstdio>
#include <cstring>
#include <exception>

#include "launch.cuh"

namespace sbert_fast::cuda {
namespace {

template <class T>
SBF_DEVICE T* at(void* base, int index) {
  return static_cast<T*>(base) + index;
}
template <class T>
SBF_DEVICE T value_at(const void* base, int index) {
  return static_cast<const T*>(base)[index];
}

SBF_KERNEL(1024, 1) indices(const void*, void* out) {
  const int all[4] = {thread_index(), block_threads(), block_index(), num_blocks()};
  for (int i = 0; i < 4; ++i) {
    *at<int>(out, (block_index() * block_threads() + thread_index()) * 4 + i) = all[i];
  }
}

// in [2, 32]: values and lanes; out [3, 32].
template <class T>
SBF_KERNEL(32, 1)
shuffles(const void* in, void* out) {
  const int t = thread_index(), other = static_cast<int>(value_at<T>(in, 32 + t));
  const T value = value_at<T>(in, t);
  *at<T>(out, t) = shuffle(value, other);
  *at<T>(out, 32 + t) = shuffle_xor(value, other);
  *at<T>(out, 64 + t) = shuffle_up(value, other);
}

SBF_KERNEL(64, 1) ballots(const void* in, void* out) {
  const uint32_t votes = ballot(value_at<int>(in, thread_index()) != 0);
  *at<uint32_t>(out, thread_index()) = votes;
  *at<int>(out, 64 + thread_index()) = count_trailing_zeros(votes);
}

// in [threads, 3]; out [threads, 5].
SBF_KERNEL(1024, 1) functions(const void* in, void* out) {
  const int t = thread_index();
  const float x = value_at<float>(in, 3 * t), y = value_at<float>(in, 3 * t + 1);
  const float all[5] = {exp2_approx(x), reciprocal(x), rsqrt_approx(x),
                        fma(x, y, value_at<float>(in, 3 * t + 2)), infinity()};
  for (int i = 0; i < 5; ++i) *at<float>(out, 5 * t + i) = all[i];
}

// in [threads, 2] fp32; out [threads] words.
template <class T>
SBF_KERNEL(1024, 1)
packs(const void* in, void* out) {
  const int i = block_index() * block_threads() + thread_index();
  *at<uint32_t>(out, i) = pack<T>(value_at<float>(in, 2 * i), value_at<float>(in, 2 * i + 1));
}

// in [threads] words; out [threads, 2] fp32.
template <class T>
SBF_KERNEL(1024, 1)
unpacks(const void* in, void* out) {
  const int i = block_index() * block_threads() + thread_index();
  *at<float2>(out, i) = unpack<T>(value_at<uint32_t>(in, i));
}

// in: a [16, 16], then the transpose of b [16, 8]; out: d [16, 8] fp32, which is added to.
template <class T>
SBF_KERNEL(32, 1)
products(const void* in, void* out) {
  const int g = thread_index() / 4, c = thread_index() % 4;
  const auto a_word = [&](int row, int column) {
    return value_at<uint32_t>(in, row * 8 + column / 2);
  };
  const uint32_t a[4] = {a_word(g, 2 * c), a_word(g + 8, 2 * c), a_word(g, 2 * c + 8),
                         a_word(g + 8, 2 * c + 8)};
  float* sums = at<float>(out, g * 8 + 2 * c);
  float d[4] = {sums[0], sums[1], sums[64], sums[65]};
  mma_16x8x16<T>(d, a, a_word(16 + g, 2 * c), a_word(16 + g, 2 * c + 8));
  sums[0] = d[0];
  sums[1] = d[1];
  sums[64] = d[2];
  sums[65] = d[3];
}

SBF_KERNEL(32, 1) transposes(const void* in, void* out) {
  *at<uint32_t>(out, thread_index()) = transpose_8x8(value_at<uint32_t>(in, thread_index()));
}

// in [4, 8, 8]: matrices of 16-bit numbers; out [32, 4] words: transposed.
SBF_KERNEL(32, 1) matrices(const void* in, void* out) {
  const int t = thread_index();
  Vector* rows = reinterpret_cast<Vector*>(shared_memory());
  rows[t] = load_16(at<const Vector>(const_cast<void*>(in), t));
  sync_warp();
  store_16(at<Vector>(out, t), load_matrices_transposed(rows + t));
}

// Two groups of copies, the second one of zeros. The source is `out`, and changes after the start.
// out [4, 4] words: the sources, then both targets before, between and after the waits.
SBF_KERNEL(32, 1) copies(const void*, void* out) {
  uint32_t* target = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* words = static_cast<uint32_t*>(out);
  if (thread_index() != 0) return;
  for (int i = 0; i < 8; ++i) target[i] = 7;
  copy_async_16(target, words, true);
  copy_async_commit();
  copy_async_16(target + 4, words, false);
  copy_async_commit();
  const auto show = [&](int step) {
    words[4 + 2 * step] = target[0];
    words[5 + 2 * step] = target[4];
  };
  show(0);
  words[0] = 42;
  copy_async_wait<1>();
  show(1);
  copy_async_wait<0>();
  show(2);
}

// A copy without a group: no wait covers it.
SBF_KERNEL(32, 1) open_copies(const void* in, void* out) {
  uint32_t* target = reinterpret_cast<uint32_t*>(shared_memory()) + 4 * thread_index();
  copy_async_16(target, in, true);
  copy_async_wait<0>();
  *at<uint32_t>(out, thread_index()) = target[0];
}

template <int COUNT>
SBF_DEVICE float* static_numbers() {
  alignas(64) SBF_SHARED float numbers[COUNT];
  return numbers;
}

// out [blocks, 3, threads]: shared memory as a block finds it.
SBF_KERNEL(64, 1) fresh_memory(const void*, void* out) {
  SBF_SHARED float own[64];
  const int t = thread_index();
  float* memory[3] = {own, static_numbers<64>(), reinterpret_cast<float*>(shared_memory())};
  for (int i = 0; i < 3; ++i) {
    *at<float>(out, (block_index() * 3 + i) * 64 + t) = memory[i][t];
    memory[i][t] = 1;
  }
}

// Every thread gets the number of its mirror image in the block.
template <bool BARRIER>
SBF_KERNEL(128, 1)
mirrored(const void* in, void* out) {
  float* numbers = static_numbers<128>();
  numbers[thread_index()] = value_at<float>(in, thread_index());
  if (BARRIER) sync_block();
  *at<float>(out, thread_index()) = numbers[block_threads() - 1 - thread_index()];
}

// The same within a warp.
template <bool BARRIER>
SBF_KERNEL(128, 1)
mirrored_in_warps(const void* in, void* out) {
  float* numbers = static_numbers<128>();
  numbers[thread_index()] = value_at<float>(in, thread_index());
  if (BARRIER) sync_warp();
  *at<float>(out, thread_index()) = numbers[thread_index() ^ 31];
}

SBF_KERNEL(64, 1) different_operations(const void*, void* out) {
  if (thread_index() != 40) {
    *at<int>(out, thread_index()) = shuffle(1, 0);
  } else {
    *at<uint32_t>(out, thread_index()) = ballot(true);
  }
}
SBF_KERNEL(64, 1) different_places(const void*, void*) {
  if (thread_index() % 2) {
    sync_warp();
  } else {
    sync_warp();
  }
}
SBF_KERNEL(64, 1) absent_lane(const void*, void*) {
  if (thread_index() != 37) sync_warp();
}
SBF_KERNEL(64, 1) absent_warp(const void*, void*) {
  if (thread_index() < 32) sync_block();
}

// The four kernels below: in holds an offset in bytes.
SBF_KERNEL(32, 1) loads(const void* in, void* out) {
  const auto* from = static_cast<unsigned char*>(out) + value_at<int64_t>(in, 0);
  *at<uint32_t>(out, 0) = load_16(from).word[0];
}
SBF_KERNEL(32, 1) stores(const void* in, void* out) {
  store_16(static_cast<unsigned char*>(out) + value_at<int64_t>(in, 0), Vector{});
}
SBF_KERNEL(32, 1) starts_copies(const void* in, void* out) {
  copy_async_16(shared_memory() + value_at<int64_t>(in, 0), out, true);
}
SBF_KERNEL(32, 1) loads_matrices(const void* in, void* out) {
  *at<uint32_t>(out, 0) =
      load_matrices_transposed(shared_memory() + value_at<int64_t>(in, 0)).word[0];
}
SBF_KERNEL(32, 1) stores_to_shared(const void*, void*) { store_16(shared_memory(), Vector{}); }
SBF_KERNEL(32, 1) loads_matrix_of_global(const void*, void* out) { load_matrices_transposed(out); }
SBF_KERNEL(32, 1) writes_shared(const void* in, void*) {
  if (thread_index() == 3) *(shared_memory() + value_at<int64_t>(in, 0)) = 0;
}
SBF_KERNEL(32, 1) writes_nowhere(const void*, void*) {
  volatile int* nowhere = nullptr;
  if (thread_index() == 3) *nowhere = 0;
}

SBF_DEVICE int depth(int levels) {
  volatile int frame[64];
  frame[levels % 64] = 1;
  return levels == 0 ? 0 : depth(levels - 1) + frame[levels % 64];
}
SBF_KERNEL(32, 1) recurses(const void* in, void* out) {
  *at<int>(out, thread_index()) = depth(static_cast<int>(value_at<int64_t>(in, 0)));
}

#if defined(SBF_EMULATED)
SBF_KERNEL(64, 1) waits(const void* in, void* out) {
  volatile int* count = reinterpret_cast<volatile int*>(static_numbers<1>());
  if (thread_index() == 0) *count = 0;
  sync_block();
  const emulation::Site site = {"count", emulation::Location::current()};
  // One after the other, the last thread first.
  const int turn = block_threads() - 1 - thread_index() + value_at<int>(in, 0);
  emulation::wait_until(site, [&] { return *count == turn; });
  *at<int>(out, thread_index()) = *count;
  *count = *count + 1;
}
#endif

struct Named {
  const char* name;
  void (*kernel)(const void*, void*);
};
#define SBF_NAMED(...) {#__VA_ARGS__, __VA_ARGS__}
const Named kKernels[] = {SBF_NAMED(indices),
                          SBF_NAMED(shuffles<int32_t>),
                          SBF_NAMED(shuffles<int64_t>),
                          SBF_NAMED(shuffles<float>),
                          SBF_NAMED(ballots),
                          SBF_NAMED(functions),
                          SBF_NAMED(packs<Half>),
                          SBF_NAMED(packs<BFloat16>),
                          SBF_NAMED(unpacks<Half>),
                          SBF_NAMED(unpacks<BFloat16>),
                          SBF_NAMED(products<Half>),
                          SBF_NAMED(products<BFloat16>),
                          SBF_NAMED(transposes),
                          SBF_NAMED(matrices),
                          SBF_NAMED(copies),
                          SBF_NAMED(open_copies),
                          SBF_NAMED(fresh_memory),
                          SBF_NAMED(mirrored<true>),
                          SBF_NAMED(mirrored<false>),
                          SBF_NAMED(mirrored_in_warps<true>),
                          SBF_NAMED(mirrored_in_warps<false>),
                          SBF_NAMED(different_operations),
                          SBF_NAMED(different_places),
                          SBF_NAMED(absent_lane),
                          SBF_NAMED(absent_warp),
                          SBF_NAMED(loads),
                          SBF_NAMED(stores),
                          SBF_NAMED(starts_copies),
                          SBF_NAMED(loads_matrices),
                          SBF_NAMED(stores_to_shared),
                          SBF_NAMED(loads_matrix_of_global),
                          SBF_NAMED(writes_shared),
#if defined(SBF_EMULATED)
                          SBF_NAMED(waits),
#endif
                          SBF_NAMED(writes_nowhere),
                          SBF_NAMED(recurses)};

}  // namespace

/// Runs a kernel; what it throws is `error` afterwards, empty where it throws nothing.
extern "C" [[gnu::visibility("default")]] void sbf_self_test(const char* name, const void* in,
                                                             void* out, int64_t blocks, int threads,
                                                             size_t shared_bytes, char* error,
                                                             size_t error_bytes) {
  std::snprintf(error, error_bytes, "there is no kernel %s", name);
  for (const Named& each : kKernels) {
    if (std::strcmp(each.name, name) != 0) continue;
    error[0] = 0;
    try {
      launch("self_test", each.kernel, blocks, threads, shared_bytes, nullptr, in, out);
    } catch (const std::exception& thrown) {
      std::snprintf(error, error_bytes, "%s", thrown.what());
    }
  }
}

}  // namespace sbert_fast::cuda
