// Numbers a register at a time, in the vectors of the compiler, and 16-bit ones widened.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numbers.h"

namespace dwl {

// A register's worth of numbers, of the widest registers that there are.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
typedef float Floats __attribute__((vector_size(kRegister)));
typedef double Doubles __attribute__((vector_size(kRegister)));
typedef uint32_t Words __attribute__((vector_size(kRegister)));
template <typename T>
using Vector = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;
template <typename T>
constexpr int64_t kLanes = kRegister / sizeof(T);

// A register of the table's numbers is one or, of 16-bit numbers, two of those that compute.
template <typename T, typename S>
constexpr int kParts = sizeof(T) / sizeof(S);
template <typename T, typename S>
constexpr int64_t kChunk = kParts<T, S> * kLanes<T>;

// Widening 16-bit numbers in their order takes four instructions that move them across the
// register. So the first ones of all pairs make one part, the second ones the other, and what they
// meet is arranged alike: see `place`.
inline void load(const float* from, Floats* to) {
  std::memcpy(to, from, sizeof *to);
}
inline void load(const double* from, Doubles* to) {
  std::memcpy(to, from, sizeof *to);
}
constexpr bool kSwapped = std::endian::native == std::endian::big;
inline void load(const BFloat16* from, Floats* to) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  to[kSwapped] = (Floats)(pairs << 16);
  to[!kSwapped] = (Floats)(pairs & 0xffff0000);
}
inline void load(const Float16* from, Floats* to) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  to[kSwapped] = float16_widened<Floats>(pairs & 0xffff);
  to[!kSwapped] = float16_widened<Floats>(pairs >> 16);
}

// A chunk of 16-bit numbers from its parts, rounded as one by one.
inline void store(const float* from, BFloat16* to) {
  Words rounded[2];
  for (int part = 0; part < 2; ++part) {
    Floats x;
    load(from + part * kLanes<float>, &x);
    const Words bits = (Words)x;
    rounded[part] = x != x ? Words{} + 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
  }
  const Words pairs = rounded[kSwapped] >> 16 | (rounded[!kSwapped] & 0xffff0000);
  std::memcpy(to, &pairs, sizeof pairs);
}
inline void store(const float* from, Float16* to) {
  for (int64_t k = 0; k < kLanes<float>; ++k) {
    for (int part = 0; part < 2; ++part) {
      to[2 * k + part] = static_cast<Float16>(from[part * kLanes<float> + k]);
    }
  }
}

// Where number k of a chunk stands among its parts, one after the other.
template <typename T, typename S>
constexpr int64_t place(int64_t k) {
  return k % kParts<T, S> * kLanes<T> + k / kParts<T, S>;
}
// to [n] = from [n], arranged; what is left behind the last whole chunk stays in its order.
template <typename T, typename S>
void arrange(const T* from, int64_t n, T* to) {
  int64_t first = 0;
  for (; first + kChunk<T, S> <= n; first += kChunk<T, S>) {
    for (int64_t k = 0; k < kChunk<T, S>; ++k) to[first + place<T, S>(k)] = from[first + k];
  }
  std::copy(from + first, from + n, to + first);
}
// to [n] = from [n], which is arranged, in their order and rounded.
template <typename T, typename S>
void round_arranged(const T* from, int64_t n, S* to) {
  int64_t first = 0;
  for (; first + kChunk<T, S> <= n; first += kChunk<T, S>) store(from + first, to + first);
  for (; first < n; ++first) to[first] = static_cast<S>(from[first]);
}
// sum [n] += a x [n], an arranged sum.
template <typename T, typename S>
void add_to_arranged(T a, const S* x, int64_t n, T* sum) {
  int64_t k = 0;
  for (; k + kChunk<T, S> <= n; k += kChunk<T, S>) {
    Vector<T> some[kParts<T, S>], own;
    load(x + k, some);
    for (int part = 0; part < kParts<T, S>; ++part) {
      T* at = sum + k + part * kLanes<T>;
      load(at, &own);
      own += a * some[part];
      std::memcpy(at, &own, sizeof own);
    }
  }
  for (; k < n; ++k) sum[k] += a * static_cast<T>(x[k]);
}

}  // namespace dwl
