// How embeddings are stored beside float and double, free of PyTorch.
#pragma once

#include <bit>
#include <cstdint>

namespace dwl {

// bfloat16 is the upper half of a float32, and free of PyTorch that is all to know about it.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float value) {  // rounds to nearest, ties to even
    const uint32_t b = std::bit_cast<uint32_t>(value);
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// The float32 of float16 bits, for one or for vectors of them. Its exponent is 112 too small where
// the bits are moved to their places, and a product mends that for subnormal numbers as well; the
// largest exponent is infinity's and NaN's.
template <typename Float, typename Word>
Float float16_widened(Word bits) {
  const Word magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Word value = std::bit_cast<Word>(std::bit_cast<Float>(magnitude) * 0x1p112f);
  const Word largest = value | 0x7f800000;
  return std::bit_cast<Float>(sign | (magnitude >= 0x0f800000 ? largest : value));
}

struct Float16 {
  uint16_t bits;
  Float16() = default;
  explicit Float16(float value) {  // rounds to nearest, ties to even
    const uint32_t b = std::bit_cast<uint32_t>(value), magnitude = b & 0x7fffffff;
    uint32_t narrow;
    if (!(magnitude < 0x477ff000)) {  // from 65520 on
      narrow = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal, of which beside 0.5 as many digits are left
      narrow = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
      narrow = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    }
    bits = static_cast<uint16_t>(b >> 16 & 0x8000) | static_cast<uint16_t>(narrow);
  }
  explicit operator float() const { return float16_widened<float>(uint32_t(bits)); }
};

}  // namespace dwl
