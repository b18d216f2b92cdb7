// What the fibers of emulate.cpp and the checks of checks.cpp share.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulate.h"

namespace dwl {
namespace emulation {

struct Barrier {
  int size = 0, arrived = 0;
  uint32_t passed = 0;         // how many times all have arrived
  const char* name = nullptr;  // of the primitive that the first one waits in
};

struct Copy {
  char* to;
  const char* from;
  int bytes;
  bool valid;
};

struct Warp {
  Barrier barrier;
  uint32_t synced = 0;  // how many times its memory was put in order: sync_warp() alone does
  alignas(16) Slots slots[2];
};

struct Block {
  Barrier barrier;
  bool any = false;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
};

struct Fiber {
  ucontext_t start;
  jmp_buf point;
  bool started = false, done = false;
  int thread = 0, block = 0;
  int parity = 0;  // of the warp's slots
  char* stack = nullptr;
  Barrier* waiting = nullptr;
  uint32_t passed = 0;
  std::vector<Copy> copies;
};

class Checks;

struct Grid {
  int blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  Barrier barrier;
  std::vector<Block> block;
  std::vector<Fiber> fiber;
  std::unique_ptr<char[]> stacks;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  Checks* checks = nullptr;
  std::string error;
};

extern thread_local Grid* grid;  // null outside of a launch

constexpr size_t kStack = 256 << 10;

// Ends the launch from within a fiber; the first error is the one that the caller gets.
[[noreturn]] void fail(const std::string& error);

// The memory that the kernel may touch: who touched each byte last, and between which barriers.
class Checks {
 public:
  Checks(const Grid& grid, const Buffer* buffers, int64_t count);
  ~Checks();
  void access(const void* at, size_t bytes, bool writes, const void* code);
  void start_copy(const Copy& copy);
  void end_copy(const Copy& copy);
  std::string unwritten() const;  // which output is not complete, or nothing

 private:
  struct Region;
  std::vector<Region> regions_, shared_;
  size_t latest_ = 0;
  Region* find(uintptr_t at, size_t bytes);
  void touch(Region& region, size_t offset, size_t bytes, bool writes, const void* code);
};

}  // namespace emulation
}  // namespace dwl
