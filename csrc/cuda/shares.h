// Dealing out tiles to blocks, in arithmetic that host and device share: `Program` asks it for its
// tiles, the host for the size of the workspace.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DWL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DWL_HOST_DEVICE inline
#endif

namespace dwl {

DWL_HOST_DEVICE int divide_up(int a, int b) {
  return a / b + (a % b != 0);
}

// A part of a split tile streams at least so many blocks.
constexpr int kMinSteps = 1;

struct Unit {
  int tile;
  int first, stop;  // steps of the streamed side
  int part;         // where the worker leaves it: one of two places of its own
  bool whole;       // not a part of a split tile
};

// The parts of a tile lie with one worker after another: the first has it at `part`, those that
// follow at the first of their two places.
struct Parts {
  int worker, part, count;

  DWL_HOST_DEVICE int operator[](int s) const { return s == 0 ? part : 2 * (worker + s); }
};

// The tiles that fill complete rounds of the workers are taken whole. The steps of those that are
// left stand in a line, `room` places for each tile, of which every worker takes the next `per`:
// parts of at most two tiles. `room` is a multiple of `per` where that costs no more than a step,
// so that nobody begins a second tile. Where nothing is split no barrier is needed.
struct Shares {
  int tiles, steps, workers, whole, per, room;

  DWL_HOST_DEVICE Shares(int all_tiles, int all_steps, int all_workers)
      : tiles(all_tiles), steps(all_steps), workers(all_workers), whole(all_tiles) {
    const int rest = tiles % workers;
    // The parts of a tile are merged one after another, each in about half the time of a step.
    int least = static_cast<int>(sqrtf(static_cast<float>(steps) / 2));
    if (least < kMinSteps) least = kMinSteps;
    // ceil(rest steps / workers), whose product may not fit 32 bits
    int even = rest * (steps / workers) + divide_up(rest * (steps % workers), workers);
    if (even < least) even = least;
    int aligned = divide_up(steps, workers / (rest > 0 ? rest : 1));
    if (aligned < least) aligned = least;
    per = aligned <= even + 1 ? aligned : even;
    room = aligned <= even + 1 ? divide_up(steps, per) * per : steps;
    if (room < 1) room = 1;  // no steps where no row counts
    if (rest > 0 && per < steps) whole -= rest;
  }
  DWL_HOST_DEVICE bool split() const { return whole < tiles; }
  DWL_HOST_DEVICE int units(int worker) const {
    const int rounds = whole > worker ? divide_up(whole - worker, workers) : 0;
    const int64_t low = int64_t(worker) * per, high = end(low);
    return low < high ? rounds + static_cast<int>((high - 1) / room - low / room) + 1 : rounds;
  }
  DWL_HOST_DEVICE Unit unit(int turn, int worker) const {
    const int number = worker + turn * workers;
    if (number < whole) return {number, 0, steps, 2 * worker, true};
    const int piece = turn - whole / workers;
    const int64_t low = int64_t(worker) * per, high = end(low);
    const int tile = static_cast<int>(low / room) + piece;
    const int64_t begin = int64_t(tile) * room;
    const int first = low > begin ? static_cast<int>(low - begin) : 0;
    const int stop = high - begin < steps ? static_cast<int>(high - begin) : steps;
    return {whole + tile, first, stop, 2 * worker + piece, false};
  }
  DWL_HOST_DEVICE Parts parts(int split_tile) const {
    const int64_t first = int64_t(split_tile) * room, worker = first / per;
    const int piece = split_tile - static_cast<int>(worker * per / room);
    const int count = static_cast<int>((first + steps - 1) / per - worker) + 1;
    return {static_cast<int>(worker), static_cast<int>(2 * worker) + piece, count};
  }

 private:
  DWL_HOST_DEVICE int64_t end(int64_t low) const {
    const int64_t length = int64_t(tiles - whole) * room;
    return low + per < length ? low + per : length;
  }
};

}  // namespace dwl
