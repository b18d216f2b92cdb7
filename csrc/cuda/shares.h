// Dealing out tiles, in arithmetic that host and device share.
#pragma once

#ifdef __CUDACC__
#define DWL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DWL_HOST_DEVICE inline
#endif

namespace dwl {

DWL_HOST_DEVICE int divide_up(int a, int b) {
  return a / b + (a % b != 0);
}

// A part of a split tile streams at least so many blocks: less would not pay for the merge.
constexpr int kMinSteps = 2;

struct Unit {
  int tile;
  int first, stop;  // steps of the streamed side
  bool whole;       // not a part of a split tile
};

// The tiles that fill complete rounds of the workers are taken whole. Each of the others is split
// along the streamed side, so that they make one more complete round, or nearly. Worker w takes the
// units w, w + workers, ...; its part of a split tile is its last unit, so that part s of split
// tile t is with worker t * splits + s.
struct Shares {
  int tiles, steps, whole, splits;

  DWL_HOST_DEVICE Shares(int all_tiles, int all_steps, int workers)
      : tiles(all_tiles), steps(all_steps), whole(all_tiles), splits(1) {
    const int rest = tiles % workers;
    if (rest == 0) return;
    const int most = steps / kMinSteps > 1 ? steps / kMinSteps : 1;
    splits = workers / rest < most ? workers / rest : most;
    if (splits > 1) whole = tiles - rest;
  }
  DWL_HOST_DEVICE int units() const { return whole + (tiles - whole) * splits; }
  DWL_HOST_DEVICE Unit unit(int number) const {
    if (number < whole) return {number, 0, steps, true};
    const int tile = (number - whole) / splits, turn = (number - whole) % splits;
    return {whole + tile, start(turn), start(turn + 1), false};
  }

 private:
  DWL_HOST_DEVICE int start(int turn) const {
    const int more = steps % splits;
    return turn * (steps / splits) + (turn < more ? turn : more);
  }
};

}  // namespace dwl
