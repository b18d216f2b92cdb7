// The loss and its gradients in one cooperative launch; dwl_kernels/backends/reference/ has the
// formulas and the names.
//
// The grid is as many blocks as the chip runs at once, and stays for the whole call.
//
// Phase 1  owns q[BM, D] in shared memory  streams candidates  writes l, dq, dp, dtau, statistics
// Phase 2  owns c[BM, D]                   streams rows        writes dc, d log Q
//
// Between the phases every block waits for all others. Each output has one owner and every sum a
// fixed order: no atomics, and the same call gives the same bits.
//
// A warp, or a team of warps, owns 16 MT rows of the tile. A block of the streamed side passes
// through two buffers, one being filled by cp.async while the other is multiplied: one product
// gives the logits in registers, exponentials are taken in place, and as the left operand of a
// second product, rounded to its type without leaving registers, they sum the streamed embeddings.
// The reference of a row stands 44 nats above the larger of two logits, that of its positive and
// the largest of the first block: nothing is rescaled on the way, and only where a total leaves the
// range of the type the tile looks for its maxima and starts again. What rows leave to phase 2 is
// `lse` and `a / tau`: e = exp(z - lse) a / tau is the gradient of <q, c>. A positive that is
// itself a candidate has its own gradient in its place there.
//
// Where tiles do not fill the last round of blocks, the streamed side of those that are left is
// split; the parts go to the workspace and are merged in their order after a barrier.
//
// Compiled once for each type and each D rounded up, DWL_BLOCK_D, on first use.

#include <cstdio>
#include <cstring>

#include "candidates.cuh"
#include "program.cuh"
#include "rows.cuh"

namespace dwl {

using Built = Shape<DWL_MATH, DWL_BLOCK_D, DWL_BN, DWL_MT, DWL_WARPS, DWL_TEAM, DWL_PAD>;

template <class S>
__global__ void __launch_bounds__(S::THREADS, DWL_BLOCKS)
    sampled_softmax(const __grid_constant__ Call call) {
  const Program<S> p(call);
  p.clear();
  constexpr int PIECES = S::BM / 16;  // of a tile, one for a warp
  const auto first_piece = [&] { return opaque(block_index()) * S::WARPS + p.warp; };

  const auto block = [] { return opaque(block_index()); };
  for (int turn = 0; turn < p.template shares<Phase::kRows>().units(block()); ++turn) {
    row_tile(p, turn);
  }
  const Shares row_shares = p.template shares<Phase::kRows>();
  if (row_shares.split()) {
    sync_grid();
    const int pieces = (row_shares.tiles - row_shares.whole) * PIECES;
    for (int k = first_piece(); k < pieces; k += num_blocks() * S::WARPS) {
      const int tile = k / PIECES;
      finish_rows(p, row_shares.whole + tile, k % PIECES * 16, row_shares.parts(tile));
    }
  }
  if (call.candidate_gradient == nullptr && call.candidate_log_q_gradient == nullptr) return;

  sync_grid();
  for (int turn = 0; turn < p.template shares<Phase::kCandidates>().units(block()); ++turn) {
    candidate_tile(p, turn);
  }
  const Shares by_candidate = p.template shares<Phase::kCandidates>();
  if (by_candidate.split()) {
    sync_grid();
    const int pieces = (by_candidate.tiles - by_candidate.whole) * PIECES;
    for (int k = first_piece(); k < pieces; k += num_blocks() * S::WARPS) {
      const int tile = k / PIECES;
      finish_candidates(p, by_candidate.whole + tile, k % PIECES * 16, by_candidate.parts(tile));
    }
  }
}

}  // namespace dwl

// What Python calls. Functions that can fail return 0 or leave a message of at most `size` bytes.
extern "C" {

// Numbers of the workspace.
int64_t dwl_space(int64_t rows, int64_t blocks) {
  return 4 * rows + 2 * blocks * dwl::Built::PART;
}

// For the tests.
int64_t dwl_shared_bytes() {
  return sizeof(dwl::Built::Shared);
}

#ifndef DWL_EMULATE  // else the emulator launches it

namespace {

int failed(cudaError_t error, const char* doing, char* message, int64_t size) {
  if (error == cudaSuccess) return 0;
  cudaGetLastError();  // a later call must not find it
  std::snprintf(message, size, "%s: %s", doing, cudaGetErrorString(error));
  return 1;
}

}  // namespace

// How many blocks the device runs at once; makes the kernel ready on it.
int dwl_blocks(int device, int64_t* blocks, char* message, int64_t size) {
  const auto kernel = dwl::sampled_softmax<dwl::Built>;
  const int shared = sizeof(dwl::Built::Shared);
  int per_multiprocessor = 0, multiprocessors = 0;
  if (failed(cudaSetDevice(device), "cudaSetDevice", message, size) ||
      failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "shared memory", message, size) ||
      failed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel,
                                                           dwl::Built::THREADS, shared),
             "occupancy", message, size) ||
      failed(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "multiprocessors", message, size))
    return 1;
  *blocks = int64_t(per_multiprocessor) * multiprocessors;
  return 0;
}

int dwl_launch(const dwl::Call* call, int device, void* stream, int64_t blocks, char* message,
               int64_t size) {
  if (failed(cudaSetDevice(device), "cudaSetDevice", message, size)) return 1;
  void* arguments[] = {const_cast<dwl::Call*>(call)};
  const void* kernel = reinterpret_cast<const void*>(dwl::sampled_softmax<dwl::Built>);
  return failed(cudaLaunchCooperativeKernel(
                    kernel, dim3(static_cast<unsigned>(blocks)), dim3(dwl::Built::THREADS),
                    arguments, sizeof(dwl::Built::Shared), static_cast<cudaStream_t>(stream)),
                "launch", message, size);
}

#endif  // DWL_EMULATE
}
