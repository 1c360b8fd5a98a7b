// Prints what this CPU multiplies and adds at most, in GFLOP/s, on so many threads:
// fma_peak float32|bfloat16|int8 THREADS. The tile unit (AMX) counts in bfloat16 and int8 where
// there is one, the vector units elsewhere. Exits with 3 where there are no instructions for the
// precision.
#include <immintrin.h>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Multiplies and adds by `step(sum, a, b)`, in independent chains.
template <typename Step>
float Run(Step step) {
  Vector a = Fill(0.5F), b = Fill(0.25F);
  Hide(a);
  Hide(b);
  Vector sums[kChains];
  for (Vector& sum : sums) sum = Fill(1.0F);
  for (long i = 0; i < kSteps; ++i) {
    for (Vector& sum : sums) {
      sum = step(sum, a, b);
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
  return Run([](Vector sum, Vector a, Vector b) { return Fma(a, b, sum); });
}

#if defined(__AVX512BF16__)
float RunBfloat16() {
  return Run([](Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  });
}
#endif

#if defined(__AVX512VNNI__)
float RunInt8() {
  return Run([](Vector sum, Vector a, Vector b) {
    // By the intrinsic, sums of another type than their array's would lie in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  });
}
#endif

#if defined(__AMX_BF16__)
constexpr long kTileSteps = kSteps / 8;
// Six tiles of sums; a product adds 16 x 16 sums of 32 products each, of 64 in int8.
constexpr int kTiles = 6;
constexpr double kFlopsOfTile = 2.0 * 16 * 16 * 32;
// Instructions name their tiles: a loop cannot.
#define EACH_TILE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ZERO(tile) _tile_zero(tile);
#define MULTIPLY_INT8(tile) _tile_dpbusd(tile, 6, 7);
#define MULTIPLY_BFLOAT16(tile) _tile_dpbf16ps(tile, 6, 7);

// Linux lends the tile registers to who asks.
bool HasTiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

template <bool kInt8>
float RunTiles() {
  alignas(64) unsigned char config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;  // bytes of a row
    config[48 + tile] = 16;      // rows
  }
  _tile_loadconfig(config);
  alignas(64) float zeros[256] = {};
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  EACH_TILE(ZERO)
  for (long i = 0; i < kTileSteps; ++i) {
    if constexpr (kInt8) {
      EACH_TILE(MULTIPLY_INT8)
    } else {
      EACH_TILE(MULTIPLY_BFLOAT16)
    }
  }
  _tile_stored(0, zeros, 64);
  _tile_release();
  return zeros[0];
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const bool is_bfloat16 = std::strcmp(argv[1], "bfloat16") == 0;
  const bool is_int8 = std::strcmp(argv[1], "int8") == 0;
  float (*run)() = is_bfloat16 || is_int8 ? nullptr : RunFloat32;
  double flops = 2.0 * kLanes * kChains * kSteps;
#if defined(__AVX512BF16__)
  if (is_bfloat16) {
    run = RunBfloat16;
    flops *= 2;
  }
#endif
#if defined(__AVX512VNNI__)
  if (is_int8) {
    run = RunInt8;
    flops *= 4;
  }
#endif
#if defined(__AMX_BF16__)
  if ((is_bfloat16 || is_int8) && HasTiles()) {
    run = is_int8 ? RunTiles<true> : RunTiles<false>;
    flops = kFlopsOfTile * kTiles * kTileSteps * (is_int8 ? 2 : 1);
  }
#endif
  if (run == nullptr) return 3;
  const int threads = std::atoi(argv[2]);
  std::vector<float> results(static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (float& result : results) workers.emplace_back([&result, run] { result = run(); });
  for (std::thread& worker : workers) worker.join();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%.1f\n", flops * threads / taken.count() / 1e9);
  return 0;
}
