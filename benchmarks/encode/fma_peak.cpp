// Prints what the vector units of this CPU multiply and add at most, in GFLOP/s, on so many
// threads: fma_peak float32|bfloat16 THREADS. Exits with 3 where there are no instructions for the
// precision.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Enough independent chains to hide the latency of an addition on two units.
constexpr int kChains = 12;
constexpr long kSteps = 20'000'000;

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16;
inline Vector Fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector Fill(float value) { return _mm512_set1_ps(value); }
#else
using Vector = __m256;
constexpr int kLanes = 8;
inline Vector Fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector Fill(float value) { return _mm256_set1_ps(value); }
#endif

// Keeps the compiler from knowing, and so from shortening, a chain.
inline void Hide(Vector& value) { asm volatile("" : "+v"(value)); }

template <typename Step>
float RunChains(Step step) {
  Vector sums[kChains];
  for (Vector& sum : sums) sum = Fill(1.0F);
  for (long i = 0; i < kSteps; ++i) {
    for (Vector& sum : sums) {
      sum = step(sum);
      Hide(sum);
    }
  }
  Vector total = Fill(0.0F);
  for (const Vector& sum : sums) total = Fma(sum, Fill(1.0F), total);
  float lanes[kLanes];
  std::memcpy(lanes, &total, sizeof(lanes));
  return lanes[0];
}

float RunFloat32() {
  Vector a = Fill(0.5F), b = Fill(0.25F);
  Hide(a);
  Hide(b);
  return RunChains([&](Vector sum) { return Fma(a, b, sum); });
}

#if defined(__AVX512BF16__)
float RunBfloat16() {
  Vector a = Fill(0.5F), b = Fill(0.25F);
  Hide(a);
  Hide(b);
  const auto pairs_a = reinterpret_cast<__m512bh>(a), pairs_b = reinterpret_cast<__m512bh>(b);
  return RunChains([&](Vector sum) { return _mm512_dpbf16_ps(sum, pairs_a, pairs_b); });
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const bool is_bfloat16 = std::strcmp(argv[1], "bfloat16") == 0;
  float (*run)() = RunFloat32;
  double flops_per_lane = 2;
  if (is_bfloat16) {
#if defined(__AVX512BF16__)
    run = RunBfloat16;
    flops_per_lane = 4;
#else
    return 3;
#endif
  }
  const int threads = std::atoi(argv[2]);
  std::vector<float> results(static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (float& result : results) workers.emplace_back([&result, run] { result = run(); });
  for (std::thread& worker : workers) worker.join();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  const double flops = flops_per_lane * kLanes * kChains * static_cast<double>(kSteps) * threads;
  std::printf("%.1f\n", flops / taken.count() / 1e9);
  return 0;
}
