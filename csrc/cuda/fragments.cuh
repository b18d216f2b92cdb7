// Products of a warp: how each type is stored, multiplied and rounded.
//
// All types share the layout of a 16 by 8 block C: lane 4 g + t holds C(g + 8 (i / 2), 2t + i % 2)
// in c[i]. An A covers 16 rows and K columns of the owned side, a B covers K by 8. `load_b` takes B
// from the rows of a [BN, D] tile, for logits; `load_b_transposed` from its columns, for the sums
// of embeddings; both two neighbours at once. Addresses of a lane are made once and take constant
// offsets, in elements. `next_a` makes logits into the A of the second product
// without leaving registers.
#pragma once

#include <cstring>

#include "device.cuh"

namespace dwl {

struct Lane {
  int index, g, t;
};

// bfloat16 and float16.
template <typename T>
struct HalfPrecision {
  using Element = T;
  using Number = float;
  using At = SharedAddress;
  static constexpr int K = 16, UNROLL = 16;
  static constexpr bool EXACT = false, ROUNDED = false;

  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  // Of the row of an 8 by 8 matrix that the lane names: matrices 1 and 3 of A lie below, 2 and 3 to
  // the right; those of two neighbours B the other way round.
  template <int STRIDE>
  __device__ static __forceinline__ At at_a(const T* tile, Lane lane) {
    const int matrix = lane.index / 8, r = lane.index % 8;
    return shared_address(tile + (matrix % 2 * 8 + r) * STRIDE + matrix / 2 * 8);
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b(const T* tile, Lane lane) {
    const int matrix = lane.index / 8, r = lane.index % 8;
    return shared_address(tile + (matrix / 2 * 8 + r) * STRIDE + matrix % 2 * 8);
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b_transposed(const T* tile, Lane lane) {
    return at_a<STRIDE>(tile, lane);
  }
  template <int STRIDE>
  __device__ static __forceinline__ A load_a(At at, int offset) {
    A a;
    load_matrices(a.x, at + offset * 2);
    return a;
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b(B (&b)[2], At at, int offset) {
    uint32_t x[4];
    load_matrices(x, at + offset * 2);
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b_transposed(B (&b)[2], At at, int offset) {
    uint32_t x[4];
    load_matrices_transposed(x, at + offset * 2);
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }
  __device__ static __forceinline__ A next_a(const float (*c)[4], Lane) {
    return {pack(c[0][0], c[0][1], T()), pack(c[0][2], c[0][3], T()), pack(c[1][0], c[1][1], T()),
            pack(c[1][2], c[1][3], T())};
  }
  __device__ static __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    mma(c, a.x, b.x, T());
  }
};

// tf32 and float64. The columns of a product may be summed in any order, so that k = t and t + 4 of
// the fragments stand for the neighbours 2t and 2t + 1: logits need no exchange between lanes.
template <typename T, typename Register>
struct Pairs {
  using Element = T;
  using Number = T;
  using At = const T*;
  static constexpr int K = 8;

  struct A {
    Register x[4];
  };
  struct B {
    Register x[2];
  };
  struct alignas(2 * sizeof(T)) Two {
    T x, y;
  };

  __device__ static __forceinline__ Two two(At at) { return *reinterpret_cast<const Two*>(at); }
  template <int STRIDE>
  __device__ static __forceinline__ At at_a(At tile, Lane lane) {
    return tile + lane.g * STRIDE + 2 * lane.t;
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b(At tile, Lane lane) {
    return tile + lane.g * STRIDE + 2 * lane.t;
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b_transposed(At tile, Lane lane) {
    return tile + 2 * lane.t * STRIDE + lane.g;
  }
};

// Its embeddings are rounded once, when they have arrived in shared memory.
struct Tf32 : Pairs<float, uint32_t> {
  using Gradient = float;
  static constexpr int UNROLL = 4;
  static constexpr bool EXACT = false, LARGEST = false, LIFT = false, ROUNDED = true;

  __device__ static __forceinline__ uint32_t bits(float x) {
    uint32_t found;
    std::memcpy(&found, &x, sizeof(x));
    return found;
  }
  __device__ static __forceinline__ void round(float& x) {
    const uint32_t rounded = round_tf32(x);
    std::memcpy(&x, &rounded, sizeof(x));
  }
  template <int STRIDE>
  __device__ static __forceinline__ A load_a(At at, int offset) {
    const Two low = two(at + offset), high = two(at + offset + 8 * STRIDE);
    return {bits(low.x), bits(high.x), bits(low.y), bits(high.y)};
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b(B (&b)[2], At at, int offset) {
    const Two left = two(at + offset), right = two(at + offset + 8 * STRIDE);
    b[0] = {bits(left.x), bits(left.y)};
    b[1] = {bits(right.x), bits(right.y)};
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b_transposed(B (&b)[2], At at, int offset) {
    at += offset;
    b[0] = {bits(at[0]), bits(at[STRIDE])};
    b[1] = {bits(at[8]), bits(at[STRIDE + 8])};
  }
  __device__ static __forceinline__ A next_a(const float (*c)[4], Lane) {
    return {round_tf32(c[0][0]), round_tf32(c[0][2]), round_tf32(c[0][1]), round_tf32(c[0][3])};
  }
  __device__ static __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    mma_tf32(c, a.x, b.x);
  }
};

struct Float64 : Pairs<double, double> {
  using Gradient = double;
  static constexpr int UNROLL = 2;
  static constexpr bool EXACT = true, LARGEST = true, LIFT = false, ROUNDED = false;

  template <int STRIDE>
  __device__ static __forceinline__ A load_a(At at, int offset) {
    const Two low = two(at + offset), high = two(at + offset + 8 * STRIDE);
    return {low.x, high.x, low.y, high.y};
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b(B (&b)[2], At at, int offset) {
    const Two left = two(at + offset), right = two(at + offset + 8 * STRIDE);
    b[0] = {left.x, left.y};
    b[1] = {right.x, right.y};
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b_transposed(B (&b)[2], At at, int offset) {
    at += offset;
    b[0] = {at[0], at[STRIDE]};
    b[1] = {at[8], at[STRIDE + 8]};
  }
  __device__ static __forceinline__ A next_a(const double (*c)[4], Lane) {
    return {c[0][0], c[0][2], c[0][1], c[0][3]};
  }
  __device__ static __forceinline__ void multiply(double (&c)[4], const A& a, const B& b) {
    mma(c[0], c[1], a.x[0], b.x[0]);
    mma(c[0], c[1], a.x[2], b.x[1]);
    mma(c[2], c[3], a.x[1], b.x[0]);
    mma(c[2], c[3], a.x[3], b.x[1]);
  }
};

// float32 without rounding: no tensor core has it, so every lane multiplies its own four entries of
// C, with eight columns of its two rows in A and its two columns in B.
struct Float32 {
  using Element = float;
  using Number = float;
  using Gradient = float;
  using At = const float*;
  static constexpr int K = 8, UNROLL = 2;
  static constexpr bool EXACT = true, LARGEST = true, LIFT = false, ROUNDED = false;

  struct A {
    float x[2][8];
  };
  struct B {
    float x[2][8];
  };
  struct alignas(16) Four {
    float x[4];
  };
  struct alignas(8) Two {
    float x[2];
  };

  __device__ static __forceinline__ void eight(float (&to)[8], At from) {
    const Four first = reinterpret_cast<const Four*>(from)[0];
    const Four second = reinterpret_cast<const Four*>(from)[1];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to[k] = first.x[k];
      to[4 + k] = second.x[k];
    }
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_a(At tile, Lane lane) {
    return tile + lane.g * STRIDE;
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b(At tile, Lane lane) {
    return tile + 2 * lane.t * STRIDE;
  }
  template <int STRIDE>
  __device__ static __forceinline__ At at_b_transposed(At tile, Lane lane) {
    return tile + 2 * lane.t;
  }
  template <int STRIDE>
  __device__ static __forceinline__ A load_a(At at, int offset) {
    A a;
    eight(a.x[0], at + offset);
    eight(a.x[1], at + offset + 8 * STRIDE);
    return a;
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b(B (&b)[2], At at, int offset) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      eight(b[n].x[0], at + offset + 8 * n * STRIDE);
      eight(b[n].x[1], at + offset + (8 * n + 1) * STRIDE);
    }
  }
  template <int STRIDE>
  __device__ static __forceinline__ void load_b_transposed(B (&b)[2], At at, int offset) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const Two pair = *reinterpret_cast<const Two*>(at + offset + k * STRIDE + 8 * n);
        b[n].x[0][k] = pair.x[0];
        b[n].x[1][k] = pair.x[1];
      }
    }
  }
  __device__ static __forceinline__ A next_a(const float (*c)[4], Lane lane) {
    A a;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        a.x[h][k] = shuffle(c[0][2 * h + k % 2], 4 * lane.g + k / 2);
      }
    }
    return a;
  }
  __device__ static __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    // Eight terms are summed on their own: one chain through all columns would lose digits.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = a.x[i / 2][0] * b.x[i % 2][0];
#pragma unroll
      for (int k = 1; k < 8; ++k) sum = fmaf(a.x[i / 2][k], b.x[i % 2][k], sum);
      c[i] += sum;
    }
  }
};

// LARGEST: the reference of a row is its largest logit, at the price of a pass for it. LIFT: the
// weights of phase 2 are lifted by a power of two, for want of exponent bits.
struct BrainFloat : HalfPrecision<Bfloat16> {
  using Gradient = Bfloat16;
  static constexpr bool LARGEST = false, LIFT = false;
};
struct Half : HalfPrecision<Float16> {
  using Gradient = float;
  static constexpr bool LARGEST = true, LIFT = true;
};

}  // namespace dwl
