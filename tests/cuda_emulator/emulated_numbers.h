// The 16-bit floating point numbers of a GPU: rounded to nearest even, NaN always 0x7fff.
#pragma once

#include <bit>
#include <cstdint>

namespace sbert_fast::cuda {
namespace emulation {

inline constexpr uint32_t kInfinity = 0x7f800000u;
inline constexpr uint16_t kNaN = 0x7fff;

inline uint16_t to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (magnitude > kInfinity) return kNaN;
  uint32_t half;
  if (magnitude >= 0x477ff000u) {  // 65520, halfway to what would be the next number
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // In [0.5, 1) floats are as far apart as subnormal halves are.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline float from_half(uint16_t half) {
  const uint32_t bits = (half & 0x7fffu) << 13;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? kInfinity : 0;
  const float magnitude = std::bit_cast<float>(bits) * 0x1p112f;
  const uint32_t sign = (half & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | sign);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > kInfinity) return kNaN;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t number) {
  return std::bit_cast<float>(static_cast<uint32_t>(number) << 16);
}

}  // namespace emulation

struct Half {
  uint16_t bits;
  Half() = default;
  Half(float x) : bits(emulation::to_half(x)) {}
  operator float() const { return emulation::from_half(bits); }
};

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  BFloat16(float x) : bits(emulation::to_bfloat16(x)) {}
  operator float() const { return emulation::from_bfloat16(bits); }
};

/// Two numbers rounded to nearest even, `low` in the low half of the word.
template <class T>
uint32_t pack(float low, float high) {
  return T(low).bits | static_cast<uint32_t>(T(high).bits) << 16;
}

/// The number in a half of a word.
template <class T>
float unpack_half(uint32_t word, int half) {
  T number;
  number.bits = static_cast<uint16_t>(word >> 16 * half);
  return number;
}

}  // namespace sbert_fast::cuda
