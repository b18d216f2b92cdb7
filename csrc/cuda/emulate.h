// The primitives of device.cuh on a CPU. Every thread of the grid is a fiber that runs until it
// waits: at a barrier of its block or of the grid, or in a collective of its warp, where the lanes
// exchange their registers in the fragment layouts of the PTX manual.
//
// It is stricter than a GPU where a GPU would hide a mistake: shared memory starts as NaN, a copy
// in the background arrives only when it is waited for, addresses are checked, a barrier that not
// all threads reach is an error, and threads can run in any order between two barriers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace dwl {
namespace emulation {

struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[2][32][32];
};

struct Block {
  Barrier barrier;
  bool any = false;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
};

struct Fiber {
  ucontext_t start;
  jmp_buf point;
  bool started = false, done = false;
  int thread = 0, block = 0;
  int parity = 0;  // of the warp's slots
  Barrier* waiting = nullptr;
  uint64_t generation = 0;
  std::vector<Copy> copies;
};

struct Grid {
  int blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  std::function<void()> body;
  Barrier barrier;
  std::vector<Block> block;
  std::vector<Fiber> fiber;
  std::unique_ptr<char[]> stacks;
  ucontext_t first;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::string error;
};

inline thread_local Grid* grid = nullptr;

constexpr size_t kStack = 256 << 10;

// To the scheduler and, later, back. No local lives across the jump.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(grid->current->point) == 0) _longjmp(grid->scheduler, 1);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  grid->current->waiting = &barrier;
  grid->current->generation = barrier.generation;
  yield();
}

inline void run_fiber() {
  try {
    grid->body();
  } catch (const std::exception& error) {
    grid->error = error.what();
  }
  grid->current->done = true;
  _longjmp(grid->scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  grid->current = &fiber;
  if (_setjmp(grid->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs `body` once for every thread of the grid. A warp runs on until it waits for others. Order 0
// takes the threads as they are numbered, 1 the other way round, and any other draws a new order
// each time and lets a warp run for as long as chance has it.
inline void launch(int blocks, int threads, size_t shared_bytes, int order,
                   std::function<void()> body) {
  Grid own;
  grid = &own;
  own.blocks = blocks;
  own.threads = threads;
  own.shared_bytes = shared_bytes;
  own.body = std::move(body);
  own.barrier.size = blocks * threads;
  own.block.resize(blocks);
  own.fiber.resize(size_t(blocks) * threads);
  own.stacks.reset(new char[own.fiber.size() * kStack]);
  for (Block& block : own.block) {
    block.barrier.size = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.size = 32;
    block.shared.reset(new char[shared_bytes + 16]);
    std::memset(block.shared.get(), 0xff, shared_bytes + 16);  // NaN in every format
  }
  for (size_t k = 0; k < own.fiber.size(); ++k) {
    Fiber& fiber = own.fiber[k];
    fiber.thread = static_cast<int>(k % threads);
    fiber.block = static_cast<int>(k / threads);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = own.stacks.get() + k * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  std::mt19937 random(order);
  std::vector<size_t> warps(own.fiber.size() / 32), lanes(32);
  for (auto* turn : {&warps, &lanes}) {
    std::iota(turn->begin(), turn->end(), size_t(0));
    if (order == 1) std::reverse(turn->begin(), turn->end());
  }
  // Whether any lane of the warp could run.
  const auto run_warp = [&](size_t warp) {
    bool ran = false;
    if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
    for (size_t lane : lanes) {
      Fiber& fiber = own.fiber[warp * 32 + lane];
      const bool waits = fiber.waiting != nullptr && fiber.waiting->generation == fiber.generation;
      if (fiber.done || waits || !own.error.empty()) continue;
      fiber.waiting = nullptr;
      resume(fiber);
      ran = true;
    }
    return ran;
  };
  for (bool moved = true; moved && own.error.empty();) {
    moved = false;
    if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
    for (size_t warp : warps) {
      while (run_warp(warp)) {
        moved = true;
        if (order > 1 && random() % 8 == 0) break;
      }
    }
  }
  const bool all = std::all_of(own.fiber.begin(), own.fiber.end(), [](auto& f) { return f.done; });
  if (!all && own.error.empty()) own.error = "deadlock: a barrier that not all threads reach";
  grid = nullptr;
  if (!own.error.empty()) throw std::runtime_error(own.error);
}

inline Block& own_block() {
  return grid->block[grid->current->block];
}

// What all lanes of the warp passed.
template <typename T>
const T* exchange(const T& value, const T* (&lanes)[32]) {
  static_assert(sizeof(T) <= 32);
  Fiber& fiber = *grid->current;
  Warp& warp = own_block().warps[fiber.thread / 32];
  auto& slots = warp.slots[fiber.parity];
  fiber.parity ^= 1;  // who reads these slots late is not overtaken: the next ones are others
  std::memcpy(slots[fiber.thread % 32], &value, sizeof(T));
  wait(warp.barrier);
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = reinterpret_cast<const T*>(slots[lane]);
  return lanes[0];
}

inline void check_shared(const void* pointer, size_t bytes, size_t alignment) {
  const char* base = own_block().shared.get();
  const char* at = static_cast<const char*>(pointer);
  if (at < base || at + bytes > base + 16 + grid->shared_bytes)
    throw std::runtime_error("an address outside of shared memory");
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0)
    throw std::runtime_error("a shared address that is not aligned");
}

}  // namespace emulation

struct Bfloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline int thread_index() {
  return emulation::grid->current->thread;
}
inline int block_index() {
  return emulation::grid->current->block;
}
inline int num_blocks() {
  return emulation::grid->blocks;
}
inline char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(emulation::own_block().shared.get());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

inline int opaque(int x) {
  return x;
}

inline void sync_block() {
  emulation::wait(emulation::own_block().barrier);
}
inline void sync_warp() {
  emulation::wait(emulation::own_block().warps[thread_index() / 32].barrier);
}
inline bool any_in_block(bool value) {
  emulation::Block& block = emulation::own_block();
  sync_block();
  if (thread_index() == 0) block.any = false;
  sync_block();
  block.any |= value;
  sync_block();
  return block.any;
}
inline void sync_grid() {
  emulation::wait(emulation::grid->barrier);
}
template <typename T>
T shuffle(T value, int lane) {
  const T* lanes[32];
  emulation::exchange(value, lanes);
  return *lanes[lane];
}
template <typename T>
T shuffle_xor(T value, int mask) {
  const T* lanes[32];
  emulation::exchange(value, lanes);
  return *lanes[(thread_index() % 32) ^ mask];
}

using SharedAddress = char*;

inline SharedAddress shared_address(const void* pointer) {
  return static_cast<char*>(const_cast<void*>(pointer));
}

template <int BYTES>
void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::check_shared(to, BYTES, BYTES);
  if (valid && reinterpret_cast<uintptr_t>(from) % BYTES != 0)
    throw std::runtime_error("a copy from an address that is not aligned");
  emulation::grid->current->copies.push_back({to, from, BYTES, valid});
}
inline void wait_copies() {
  auto& copies = emulation::grid->current->copies;
  for (const auto& copy : copies) {
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies.clear();
}

// Rows of 8 by 8 matrices: lane l passes row l % 8 of matrix l / 8.
inline void load_matrices(uint32_t (&x)[4], SharedAddress row) {
  emulation::check_shared(row, 16, 16);
  const SharedAddress* rows[32];
  emulation::exchange(row, rows);
  const int lane = thread_index() % 32;
  for (int m = 0; m < 4; ++m) {  // a lane gets two neighbours of row lane / 4
    const char* at = (*rows[m * 8 + lane / 4]);
    std::memcpy(&x[m], at + lane % 4 * 4, 4);
  }
}
inline void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  emulation::check_shared(row, 16, 16);
  const SharedAddress* rows[32];
  emulation::exchange(row, rows);
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
  emulation::exchange(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, lanes);
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
  emulation::exchange(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, lanes);
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
  emulation::exchange(Lane{{a}, {b}}, lanes);
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 4; ++k) {
    c0 += lanes[4 * g + k]->a[0] * lanes[4 * (2 * t) + k]->b[0];
    c1 += lanes[4 * g + k]->a[0] * lanes[4 * (2 * t + 1) + k]->b[0];
  }
}

}  // namespace dwl
