// The emulated library of one variant: the kernel's source as it is, and what Python calls of it
// here (build.py compiles it, __init__.py and tests/test_cuda.py call it). The include path leads
// to csrc/cuda, or to a copy with a mistake in it.
#include "sampled_softmax.cu"

extern "C" {

// `buffers`: all memory that the call points to, and the call.
int dwl_launch(const dwl::Call* call, int64_t blocks, int64_t order,
               const dwl::emulation::Buffer* buffers, int64_t count, char* message, int64_t size) {
  const auto body = [](const void* argument) {
    dwl::sampled_softmax<dwl::Built>(*static_cast<const dwl::Call*>(argument));
  };
  return dwl::emulation::launch(static_cast<int>(blocks), dwl::Built::THREADS,
                                sizeof(dwl::Built::Shared), static_cast<int>(order), body, call,
                                buffers, count, message, size);
}

// How many units a worker has, and tile, first and last step, place and wholeness of one; of a
// split tile how many parts it has, and their places.
int dwl_unit(int tiles, int steps, int workers, int worker, int turn, int* found) {
  const dwl::Shares shares(tiles, steps, workers);
  if (turn < shares.units(worker)) {
    const dwl::Unit unit = shares.unit(turn, worker);
    found[0] = unit.tile;
    found[1] = unit.first;
    found[2] = unit.stop;
    found[3] = unit.part;
    found[4] = unit.whole;
  }
  return shares.units(worker);
}
int dwl_parts(int tiles, int steps, int workers, int tile, int* found) {
  const dwl::Shares shares(tiles, steps, workers);
  if (tile < shares.whole) return 0;
  const dwl::Parts parts = shares.parts(tile - shares.whole);
  for (int s = 0; s < parts.count; ++s) found[s] = parts[s];
  return parts.count;
}

// The most steps that any of the workers takes.
int64_t dwl_longest(int tiles, int steps, int workers) {
  const dwl::Shares shares(tiles, steps, workers);
  int64_t longest = 0;
  for (int worker = 0; worker < workers; ++worker) {
    int64_t mine = 0;
    for (int turn = 0; turn < shares.units(worker); ++turn) {
      const dwl::Unit unit = shares.unit(turn, worker);
      mine += unit.stop - unit.first;
    }
    longest = mine > longest ? mine : longest;
  }
  return longest;
}
}
