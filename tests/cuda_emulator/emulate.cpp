// The grid as fibers: who runs when, and what the primitives of emulate.h do. It is compiled
// without the instrumentation of the kernel, so that nothing in here counts as an access of the
// kernel.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>

#include "emulation.h"

namespace dwl {
namespace emulation {

thread_local Grid* grid = nullptr;

namespace {

// To the scheduler and, later, back. No local lives across the jump.
[[gnu::noinline]] void yield() {
  if (_setjmp(grid->current->point) == 0) _longjmp(grid->scheduler, 1);
}

// Whether this thread was the last to arrive.
bool wait(Barrier& barrier, const char* name) {
  if (barrier.arrived > 0 && std::strcmp(barrier.name, name) != 0) {
    fail(std::string("a part of the threads waits in ") + barrier.name + ", another in " + name);
  }
  barrier.name = name;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.passed;
    return true;
  }
  grid->current->waiting = &barrier;
  grid->current->passed = barrier.passed;
  yield();
  return false;
}

void run_fiber() {
  grid->body(grid->argument);
  grid->current->done = true;
  _longjmp(grid->scheduler, 1);
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  grid->current = &fiber;
  if (_setjmp(grid->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare(Grid& own) {
  own.barrier.size = own.blocks * own.threads;
  own.block.resize(own.blocks);
  own.fiber.resize(size_t(own.blocks) * own.threads);
  own.stacks.reset(new char[own.fiber.size() * kStack]);
  for (Block& block : own.block) {
    block.barrier.size = own.threads;
    block.warps.resize(own.threads / 32);
    for (Warp& warp : block.warps) warp.barrier.size = 32;
    block.memory.reset(new char[own.shared_bytes + 16]);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = block.memory.get() + (16 - address % 16) % 16;
    std::memset(block.shared, 0xff, own.shared_bytes);  // NaN in every format
  }
  for (size_t k = 0; k < own.fiber.size(); ++k) {
    Fiber& fiber = own.fiber[k];
    fiber.thread = static_cast<int>(k % own.threads);
    fiber.block = static_cast<int>(k / own.threads);
    fiber.stack = own.stacks.get() + k * kStack;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

void schedule(Grid& own, int order) {
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
      const bool waits = fiber.waiting != nullptr && fiber.waiting->passed == fiber.passed;
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
}

Block& own_block() {
  return grid->block[grid->current->block];
}
Warp& own_warp() {
  return own_block().warps[grid->current->thread / 32];
}

}  // namespace

void fail(const std::string& error) {
  if (grid->error.empty()) grid->error = error;
  _longjmp(grid->scheduler, 1);
}

int launch(int blocks, int threads, size_t shared_bytes, int order, void (*body)(const void*),
           const void* argument, const Buffer* buffers, int64_t count, char* message,
           int64_t size) {
  Grid own;
  own.blocks = blocks;
  own.threads = threads;
  own.shared_bytes = shared_bytes;
  own.body = body;
  own.argument = argument;
  prepare(own);
  Checks checks(own, buffers, count);
  own.checks = &checks;
  grid = &own;
  schedule(own, order);
  grid = nullptr;
  if (own.error.empty()) own.error = checks.unwritten();
  if (own.error.empty()) return 0;
  std::snprintf(message, size, "%s", own.error.c_str());
  return 1;
}

const Slots& exchange(const void* value, size_t bytes, const char* name) {
  Fiber& fiber = *grid->current;
  Warp& warp = own_warp();
  Slots& slots = warp.slots[fiber.parity];
  fiber.parity ^= 1;  // who reads these slots late is not overtaken: the next ones are others
  std::memcpy(slots[fiber.thread % 32], value, bytes);
  wait(warp.barrier, name);
  return slots;
}

void check_shared(const void* pointer, size_t bytes, size_t alignment) {
  const char* base = own_block().shared;
  const char* at = static_cast<const char*>(pointer);
  if (at < base || at + bytes > base + grid->shared_bytes) {
    fail("an address outside of shared memory");
  }
  if ((at - base) % alignment != 0) fail("a shared address that is not aligned");
}

void copy_async(char* to, const void* from, int bytes, bool valid) {
  check_shared(to, bytes, bytes);
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("a copy from an address that is not aligned");
  }
  grid->current->copies.push_back({to, static_cast<const char*>(from), bytes, valid});
  grid->checks->start_copy(grid->current->copies.back());
}

}  // namespace emulation

int thread_index() {
  return emulation::grid->current->thread;
}
int block_index() {
  return emulation::grid->current->block;
}
int num_blocks() {
  return emulation::grid->blocks;
}
char* shared_memory() {
  return emulation::own_block().shared;
}

void sync_block() {
  emulation::wait(emulation::own_block().barrier, "sync_block");
}
void sync_warp() {
  emulation::Warp& warp = emulation::own_warp();
  if (emulation::wait(warp.barrier, "sync_warp")) ++warp.synced;
}
bool any_in_block(bool value) {
  emulation::Block& block = emulation::own_block();
  emulation::wait(block.barrier, "any_in_block");
  if (thread_index() == 0) block.any = false;
  emulation::wait(block.barrier, "any_in_block");
  block.any |= value;
  emulation::wait(block.barrier, "any_in_block");
  return block.any;
}
void sync_grid() {
  emulation::wait(emulation::grid->barrier, "sync_grid");
}

void wait_copies() {
  auto& copies = emulation::grid->current->copies;
  for (const auto& copy : copies) {
    emulation::grid->checks->end_copy(copy);
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies.clear();
}

}  // namespace dwl
