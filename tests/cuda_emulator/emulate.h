// The primitives of device.cuh on a CPU, which device.cuh takes where DWL_EMULATE is defined. Every
// thread of the grid is a fiber (emulate.cpp) that runs until it waits: at a barrier of its block
// or of the grid, or in a collective of its warp, where the lanes exchange their registers in the
// fragment layouts of the PTX manual.
//
// It is stricter than a GPU where a GPU would hide a mistake. Shared memory starts as NaN, a copy
// in the background arrives only when it is waited for, a barrier that not all threads reach is an
// error, and threads can run in any order between two barriers. Every load and store of the kernel
// is checked (checks.cpp): for races, for bounds, and for bytes that nobody has written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace dwl {
namespace emulation {

// A piece of memory that the kernel may touch; only the call and inputs hold anything before.
struct Buffer {
  const char* name;
  const void* begin;
  int64_t bytes;
  int64_t use;
  int64_t written;  // of an output: how many of its bytes the launch has to write
};
enum Use : int64_t { kInput, kOutput, kWorkspace };

// Runs `body` once for every thread of the grid. A warp runs on until it waits for others. Order 0
// takes the threads as they are numbered, 1 the other way round, and any other draws a new order
// each time and lets a warp run for as long as chance has it. Returns 0, or 1 and leaves a message.
int launch(int blocks, int threads, size_t shared_bytes, int order, void (*body)(const void*),
           const void* argument, const Buffer* buffers, int64_t count, char* message, int64_t size);

// What the lanes of a warp pass to each other.
constexpr size_t kSlot = 32;
using Slots = unsigned char[32][kSlot];

// What all lanes passed to the primitive `name`.
const Slots& exchange(const void* value, size_t bytes, const char* name);

template <typename T>
void exchange(const T& value, const T* (&lanes)[32], const char* name) {
  static_assert(sizeof(T) <= kSlot);
  const Slots& slots = exchange(&value, sizeof(T), name);
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = reinterpret_cast<const T*>(slots[lane]);
}

void check_shared(const void* pointer, size_t bytes, size_t alignment);
void copy_async(char* to, const void* from, int bytes, bool valid);

}  // namespace emulation

struct Bfloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

int thread_index();
int block_index();
int num_blocks();
char* shared_memory();

inline int opaque(int x) {
  return x;
}

void sync_block();
void sync_warp();
bool any_in_block(bool value);
void sync_grid();

// Not a barrier for memory, on a GPU either.
template <typename T>
T shuffle(T value, int lane) {
  const T* lanes[32];
  emulation::exchange(value, lanes, "shuffle");
  return *lanes[lane];
}
template <typename T>
T shuffle_xor(T value, int mask) {
  const T* lanes[32];
  emulation::exchange(value, lanes, "shuffle_xor");
  return *lanes[(thread_index() % 32) ^ mask];
}

using SharedAddress = char*;

inline SharedAddress shared_address(const void* pointer) {
  return static_cast<char*>(const_cast<void*>(pointer));
}

template <int BYTES>
void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::copy_async(to, from, BYTES, valid);
}
void wait_copies();

// Rows of 8 by 8 matrices: lane l passes row l % 8 of matrix l / 8.
inline void load_matrices(uint32_t (&x)[4], SharedAddress row) {
  emulation::check_shared(row, 16, 16);
  const SharedAddress* rows[32];
  emulation::exchange(row, rows, "load_matrices");
  const int lane = thread_index() % 32;
  for (int m = 0; m < 4; ++m) {  // a lane gets two neighbours of row lane / 4
    const char* at = (*rows[m * 8 + lane / 4]);
    std::memcpy(&x[m], at + lane % 4 * 4, 4);
  }
}
inline void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  emulation::check_shared(row, 16, 16);
  const SharedAddress* rows[32];
  emulation::exchange(row, rows, "load_matrices");
  const int lane = thread_index() % 32;
  for (int m = 0; m < 4; ++m) {  // and here two neighbours of column lane / 4
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const char* at = (*rows[m * 8 + lane % 4 * 2 + k]);
      std::memcpy(&pair[k], at + lane / 4 * 2, 2);
    }
    std::memcpy(&x[m], pair, 4);
  }
}

inline float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(Float16 x) {
  return static_cast<float>(x);
}
inline void narrow(Bfloat16& to, float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    to.bits = 0x7fff;
    return;
  }
  to.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(Float16& to, float x) {
  to = static_cast<Float16>(x);
}
template <typename T>
uint32_t pack(float low, float high, T) {
  T pair[2];
  narrow(pair[0], low);
  narrow(pair[1], high);
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}
inline uint32_t round_tf32(float x) {  // 10 bits of mantissa, ties away from zero
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & 0xffffe000;
  return bits;
}
inline float fast_exp2(float x) {
  return x < -126 ? 0 : std::exp2(x);
}

inline float fast_reciprocal(float x) {
  return 1 / x;
}

namespace emulation {

template <typename R, int A, int B>
struct Operands {
  R a[A], b[B];
};

}  // namespace emulation

// m16n8k16: lane = 4 g + t holds a[i] = A(g + 8 (i % 2), 2t + 8 (i / 2) + 0:1),
// b[i] = B(2t + 8i + 0:1, g) and c[i] = C(g + 8 (i / 2), 2t + i % 2).
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  using Lane = emulation::Operands<uint32_t, 4, 2>;
  const Lane* lanes[32];
  emulation::exchange(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, lanes, "mma");
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  float row[2][16], column[2][16];
  const auto unpack = [](float* to, uint32_t bits) {
    T pair[2];
    std::memcpy(pair, &bits, 4);
    to[0] = widen(pair[0]);
    to[1] = widen(pair[1]);
  };
  for (int u = 0; u < 4; ++u) {
    for (int half = 0; half < 2; ++half) {
      for (int h = 0; h < 2; ++h) {
        unpack(row[h] + 8 * half + 2 * u, lanes[4 * g + u]->a[2 * half + h]);
        unpack(column[h] + 8 * half + 2 * u, lanes[4 * (2 * t + h) + u]->b[half]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
    c[i] += sum;
  }
}
// m16n8k8: a[i] = A(g + 8 (i % 2), t + 4 (i / 2)), b[i] = B(t + 4i, g), c as above.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Lane = emulation::Operands<uint32_t, 4, 2>;
  const Lane* lanes[32];
  emulation::exchange(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, lanes, "mma");
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const auto number = [](uint32_t bits) {
    bits &= 0xffffe000;  // what a tensor core reads of it
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      const float x = number(lanes[4 * g + k % 4]->a[2 * (k / 4) + i / 2]);
      sum += x * number(lanes[4 * (2 * t + i % 2) + k % 4]->b[k / 4]);
    }
    c[i] += sum;
  }
}
// m8n8k4: a = A(g, t), b = B(t, g), c0:c1 = C(g, 2t + 0:1).
inline void mma(double& c0, double& c1, double a, double b) {
  using Lane = emulation::Operands<double, 1, 1>;
  const Lane* lanes[32];
  emulation::exchange(Lane{{a}, {b}}, lanes, "mma");
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 4; ++k) {
    c0 += lanes[4 * g + k]->a[0] * lanes[4 * (2 * t) + k]->b[0];
    c1 += lanes[4 * g + k]->a[0] * lanes[4 * (2 * t + 1) + k]->b[0];
  }
}

}  // namespace dwl
