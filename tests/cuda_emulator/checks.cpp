// What compute-sanitizer does on a GPU, for the emulated kernel: races, bounds, bytes read before
// they are written.
//
// The kernel is compiled with -fsanitize=thread,undefined, which calls a function before every load
// and store and at every operation without a defined result; those functions are here, in the place
// of the compiler's own libraries. For every byte of shared and of written global memory it is kept
// who touched it last, between which barriers. Two threads race where they touch a byte, one of
// them writes, and no barrier that both have passed lies between: that of the grid; in a block that
// of the block; in a warp sync_warp(). The kernel knows no other way to wait, so that counting
// barriers is enough. Lanes that exchange registers are not in order by that, on a GPU either. A
// copy in the background touches its bytes when it starts, when it is waited for, and all the time
// between.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

#include "emulation.h"

namespace dwl {
namespace emulation {

namespace {

constexpr int kSeveral = -1;

// Where and when: the counts are of barriers passed, from 1 on. 0 as `grid` is never.
struct Moment {
  uint32_t grid = 0, in_block = 0, in_warp = 0;
  int16_t block = 0, warp = 0, lane = 0;
};

Moment now() {
  const Fiber& fiber = *grid->current;
  const Block& block = grid->block[fiber.block];
  const int warp = fiber.thread / 32;
  return {grid->barrier.passed + 1,   block.barrier.passed,
          block.warps[warp].synced,   static_cast<int16_t>(fiber.block),
          static_cast<int16_t>(warp), static_cast<int16_t>(fiber.thread % 32)};
}

bool ordered(const Moment& before, const Moment& after) {
  if (before.grid < after.grid) return true;
  if (before.block != after.block) return false;
  if (before.in_block < after.in_block) return true;
  if (before.warp != after.warp) return false;
  return before.in_warp < after.in_warp || before.lane == after.lane;
}

// `reads` stands for all reads that a later write must come after: those that the new one does not
// come after itself make it one of several lanes, warps or blocks.
void join(Moment& reads, const Moment& read) {
  if (ordered(reads, read)) {
    reads = read;
  } else if (reads.block != read.block) {
    reads.block = kSeveral;
  } else if (reads.warp != read.warp) {
    reads.warp = kSeveral;
  } else {
    reads.lane = kSeveral;
  }
}

std::string name_of(const Moment& moment) {
  if (moment.block == kSeveral) return "several blocks";
  const std::string block = " of block " + std::to_string(moment.block);
  if (moment.warp == kSeveral) return "several warps" + block;
  if (moment.lane == kSeveral)
    return "several lanes of warp " + std::to_string(moment.warp) + block;
  return "thread " + std::to_string(moment.warp * 32 + moment.lane) + block;
}

struct Byte {
  Moment read, written;
  bool known = false, arriving = false;  // arriving: a copy in the background is on its way
};

// For `addr2line -Cife LIBRARY`.
std::string place_of(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return "";
  char text[40];
  const char* base = static_cast<const char*>(info.dli_fbase);
  std::snprintf(text, sizeof(text), ", code at 0x%zx",
                static_cast<size_t>(static_cast<const char*>(code) - base));
  return text;
}

[[noreturn]] void report(const std::string& what, const char* doing, size_t bytes, size_t offset,
                         const std::string& where, const void* code) {
  fail(what + ": " + name_of(now()) + " " + doing + " " + std::to_string(bytes) +
       " bytes at byte " + std::to_string(offset) + " of " + where + place_of(code));
}

}  // namespace

struct Checks::Region {
  std::string name;
  uintptr_t begin;
  size_t size;
  Use use;
  int64_t written;
  std::vector<Byte> bytes;  // of inputs none
};

Checks::Checks(const Grid& grid, const Buffer* buffers, int64_t count) {
  const auto add = [](std::vector<Region>& to, const Buffer& buffer) {
    const auto begin = reinterpret_cast<uintptr_t>(buffer.begin);
    const auto size = static_cast<size_t>(buffer.bytes);
    to.push_back({buffer.name, begin, size, static_cast<Use>(buffer.use), buffer.written, {}});
    if (buffer.use != kInput) to.back().bytes.resize(size);
  };
  for (int64_t k = 0; k < count; ++k) add(regions_, buffers[k]);
  const auto shared_bytes = static_cast<int64_t>(grid.shared_bytes);
  for (const Block& block : grid.block) {
    add(shared_, {"shared memory", block.shared, shared_bytes, kWorkspace, 0});
  }
}

Checks::~Checks() = default;

Checks::Region* Checks::find(uintptr_t at, size_t bytes) {
  const auto holds = [&](const Region& region) {
    const uintptr_t offset = at - region.begin;
    return offset < region.size && bytes <= region.size - offset;
  };
  Region& shared = shared_[grid->current->block];
  if (holds(shared)) return &shared;
  for (size_t k = 0; k < regions_.size(); ++k) {
    if (latest_ >= regions_.size()) latest_ = 0;
    if (holds(regions_[latest_])) return &regions_[latest_];
    ++latest_;
  }
  return nullptr;
}

void Checks::access(const void* pointer, size_t bytes, bool writes, const void* code) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const Fiber& fiber = *grid->current;
  if (at - reinterpret_cast<uintptr_t>(fiber.stack) < kStack) return;  // its registers
  const Warp& warp = grid->block[fiber.block].warps[fiber.thread / 32];
  if (at - reinterpret_cast<uintptr_t>(warp.slots) < sizeof(warp.slots)) return;
  Region* region = find(at, bytes);
  const char* doing = writes ? "writes" : "reads";
  if (region == nullptr) {
    for (const Region& near : regions_) {
      const auto offset = static_cast<int64_t>(at - near.begin);
      if (offset >= -64 && offset < static_cast<int64_t>(near.size) + 64) {
        report("out of bounds", doing, bytes, offset,
               near.name + " of " + std::to_string(near.size) + " bytes", code);
      }
    }
    report("out of bounds", doing, bytes, at, "the address space", code);
  }
  if (region->use == kInput) {
    if (writes) report("an input is changed", doing, bytes, at - region->begin, region->name, code);
    return;
  }
  touch(*region, at - region->begin, bytes, writes, code);
}

void Checks::touch(Region& region, size_t offset, size_t bytes, bool writes, const void* code) {
  const Moment moment = now();
  const char* doing = writes ? "writes" : "reads";
  for (Byte* byte = &region.bytes[offset]; byte != &region.bytes[offset] + bytes; ++byte) {
    if (byte->arriving) {
      report("a race with a copy in the background of " + name_of(byte->written), doing, bytes,
             offset, region.name, code);
    }
    if (!ordered(byte->written, moment)) {
      report("a race with a write by " + name_of(byte->written), doing, bytes, offset, region.name,
             code);
    }
    if (writes) {
      if (!ordered(byte->read, moment)) {
        report("a race with a read by " + name_of(byte->read), doing, bytes, offset, region.name,
               code);
      }
      byte->written = moment;
      byte->known = true;
    } else {
      if (!byte->known) {
        report("nobody has written it", doing, bytes, offset, region.name, code);
      }
      join(byte->read, moment);
    }
  }
}

void Checks::start_copy(const Copy& copy) {
  if (copy.valid) access(copy.from, copy.bytes, false, nullptr);
  access(copy.to, copy.bytes, true, nullptr);
  Region& shared = shared_[grid->current->block];
  Byte* to = &shared.bytes[reinterpret_cast<uintptr_t>(copy.to) - shared.begin];
  for (int k = 0; k < copy.bytes; ++k) to[k].arriving = true;
}

void Checks::end_copy(const Copy& copy) {
  Region& shared = shared_[grid->current->block];
  Byte* to = &shared.bytes[reinterpret_cast<uintptr_t>(copy.to) - shared.begin];
  for (int k = 0; k < copy.bytes; ++k) to[k].arriving = false;
  if (copy.valid) access(copy.from, copy.bytes, false, nullptr);
  access(copy.to, copy.bytes, true, nullptr);
}

std::string Checks::unwritten() const {
  for (const Region& region : regions_) {
    if (region.use != kOutput) continue;
    const auto written = std::count_if(region.bytes.begin(), region.bytes.end(),
                                       [](const Byte& byte) { return byte.known; });
    if (written != region.written) {
      return std::to_string(written) + " bytes of " + region.name + " are written, not " +
             std::to_string(region.written);
    }
  }
  return "";
}

}  // namespace emulation
}  // namespace dwl

namespace {

void touched(const void* at, size_t bytes, bool writes, const void* code) {
  using dwl::emulation::grid;
  if (grid != nullptr) grid->checks->access(at, bytes, writes, code);  // else the host runs
}

}  // namespace

// What the compiler calls.
extern "C" {

#define DWL_ACCESS(NAME, BYTES, WRITES)                      \
  void __tsan_##NAME(void* at) {                             \
    touched(at, BYTES, WRITES, __builtin_return_address(0)); \
  }
#define DWL_ACCESSES(BYTES)                       \
  DWL_ACCESS(read##BYTES, BYTES, false)           \
  DWL_ACCESS(write##BYTES, BYTES, true)           \
  DWL_ACCESS(unaligned_read##BYTES, BYTES, false) \
  DWL_ACCESS(unaligned_write##BYTES, BYTES, true)
DWL_ACCESSES(1)
DWL_ACCESSES(2)
DWL_ACCESSES(4)
DWL_ACCESSES(8)
DWL_ACCESSES(16)

void __tsan_read_range(void* at, size_t bytes) {
  touched(at, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  touched(at, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct DwlLocation {  // what every one of these functions gets first
  const char* file;
  uint32_t line, column;
};
#define DWL_UNDEFINED(NAME)                                                                   \
  void __ubsan_handle_##NAME(const DwlLocation* at) {                                         \
    if (dwl::emulation::grid == nullptr) return;                                              \
    dwl::emulation::fail("undefined behaviour: " #NAME " at " + std::string(at->file) + ":" + \
                         std::to_string(at->line));                                           \
  }
DWL_UNDEFINED(add_overflow)
DWL_UNDEFINED(sub_overflow)
DWL_UNDEFINED(mul_overflow)
DWL_UNDEFINED(negate_overflow)
DWL_UNDEFINED(divrem_overflow)
DWL_UNDEFINED(shift_out_of_bounds)
DWL_UNDEFINED(out_of_bounds)
DWL_UNDEFINED(type_mismatch_v1)  // a null pointer, or one that is not aligned
DWL_UNDEFINED(pointer_overflow)
DWL_UNDEFINED(load_invalid_value)
DWL_UNDEFINED(nonnull_arg)
DWL_UNDEFINED(missing_return)
DWL_UNDEFINED(builtin_unreachable)
DWL_UNDEFINED(invalid_builtin)
}
