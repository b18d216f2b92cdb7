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

}  // namespace dwl
