// What the phases of the CUDA kernel share: shapes, memory, units.
#pragma once

#include <cmath>

#include "call.h"
#include "fragments.cuh"
#include "shares.h"

namespace dwl {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLimit = 0x1p100f;  // of a row's total: above, its reference was too low
constexpr float kFinite = 1e30f;    // a reference must not be infinite: inf - inf is NaN
constexpr int kHeadroom = 14;       // float16 ends at 2^16: terms start at 2^14 there

// What phase 1 leaves to phase 2 of each row; it streams beside the embeddings.
template <class Number>
struct alignas(16) RowNumbers {
  Number scale, statistic, coefficient, positive;
};

// Numbers [BM] of a part, before the sums.
enum PartArray { kReference, kTotal, kHits, kZPositive, kNumPartArrays };
enum Integers { kId, kOwn, kNumIntegers };

// A block of WARPS warps owns BM rows of one side, 16 MT for each warp; BN of the other side pass
// at a time. Rows of shared memory are 8 elements longer than BLOCK_D, against bank conflicts.
template <class Math, int BLOCK_D_, int BN_, int MT_, int WARPS_>
struct Shape {
  using M = Math;
  static constexpr int BLOCK_D = BLOCK_D_, BN = BN_, MT = MT_, WARPS = WARPS_;
  static constexpr int THREADS = 32 * WARPS, BM = 16 * MT * WARPS, STRIDE = BLOCK_D + 8;
  // Columns whose sums fit the registers; wider float64 embeddings take several passes.
  static constexpr bool WIDE = sizeof(typename M::Number) == 8 && BLOCK_D > 96;
  static constexpr int ACC_D = !WIDE ? BLOCK_D : BLOCK_D % 96 == 0 ? 96 : 64;
  // What a block leaves of a tile, or of its part: four numbers and the sums of each row.
  static constexpr int PART = BM * (BLOCK_D + kNumPartArrays);
  static_assert(BLOCK_D % 16 == 0 && BLOCK_D % ACC_D == 0 && BN % 16 == 0);

  struct alignas(16) Shared {
    typename M::Element owned[BM * STRIDE];
    typename M::Element streamed[2][BN * STRIDE];
    RowNumbers<typename M::Number> rows[2][BN];
    typename M::Number log_q[2][BN];
    int64_t integers[2][kNumIntegers][BN];
    typename M::Number z_positive[BM];
  };
};

template <class S>
using Sums = typename S::M::Number[S::ACC_D / 8][4];  // of 16 rows, in the layout of a C block

template <class Row, int ROWS>
__device__ __forceinline__ void zero(Row (&sums)[ROWS]) {
#pragma unroll
  for (Row& row : sums) {
#pragma unroll
    for (auto& block : row) {
#pragma unroll
      for (auto& entry : block) entry = 0;
    }
  }
}

template <class S>
struct Program {
  using M = typename S::M;
  using Element = typename M::Element;
  using Number = typename M::Number;
  using Gradient = typename M::Gradient;

  const Call& call;
  typename S::Shared& shared;
  Lane lane;
  int warp;
  int rows, places;  // what streams: rows and candidates that are not padding

  __device__ explicit Program(const Call& given)
      : call(given), shared(*reinterpret_cast<typename S::Shared*>(shared_memory())) {
    const int index = thread_index() % 32;
    lane = {index, index / 4, index % 4};
    warp = thread_index() / 32;
    rows = count_of(call.row);
    places = count_of(call.candidate);
  }

  // Whether embeddings are copied 16 bytes at a time.
  __device__ bool aligned() const {
    const auto addresses = reinterpret_cast<uintptr_t>(call.row.embedding) |
                           reinterpret_cast<uintptr_t>(call.candidate.embedding);
    return ((addresses | (call.dim * sizeof(Element))) & 15) == 0;
  }
  // Whether the positive of a row is one of the candidates.
  __device__ bool competes() const { return call.positive == nullptr; }

  __device__ static int count_of(const Side& side) {
    return static_cast<int>(side.count == nullptr ? side.length : *side.count);
  }
  __device__ static int64_t at(const Side& side, int place) {
    return side.order == nullptr ? place : side.order[place];
  }
  __device__ const Number* numbers(const void* pointer) const {
    return static_cast<const Number*>(pointer);
  }
  __device__ RowNumbers<Number>* row_numbers() const {
    return static_cast<RowNumbers<Number>*>(call.space);
  }
  __device__ Number* part(int block) const {
    return reinterpret_cast<Number*>(row_numbers() + call.row.length) + int64_t(block) * S::PART;
  }
  __device__ const Element* embedding(const void* matrix, int64_t row) const {
    return static_cast<const Element*>(matrix) + row * call.dim;
  }
  // The place of the positive of a row among the candidates; -1 where it is none of them.
  __device__ int own(int place) const {
    if (!competes()) return -1;
    return call.own == nullptr ? place : static_cast<int>(call.own[place]);
  }
  __device__ const Element* positive(int place) const {
    if (!competes()) return embedding(call.positive, at(call.row, place));
    return embedding(call.candidate.embedding, at(call.candidate, own(place)));
  }
  // The row of the tile that the lane holds in c[2 h] and c[2 h + 1] of block `mt`.
  __device__ int row_of(int mt, int h) const { return (warp * S::MT + mt) * 16 + h * 8 + lane.g; }

  // Logits are in units of 1 / log2 e, so that their exponential is one instruction, or plain.
  __device__ static Number unit() { return M::EXACT ? 1 : kLog2e; }
  __device__ static Number scale_of(Number tau) { return M::EXACT ? tau : Number(kLog2e) / tau; }
  __device__ static Number tau_of(Number scale) {
    if constexpr (M::EXACT) {
      return scale;
    } else {
      return Number(kLog2e) * fast_reciprocal(scale);
    }
  }
  __device__ static Number scaled(Number product, Number scale) {
    return M::EXACT ? product / scale : product * scale;
  }
  __device__ static Number power(Number z) {
    if constexpr (M::EXACT) {
      return exp(z);
    } else {
      return fast_exp2(z);
    }
  }
  __device__ static Number logarithm(Number x) { return M::EXACT ? log(x) : log2(x); }

  __device__ static Number add_quad(Number x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }
  __device__ static Number max_quad(Number x) {
    x = fmax(x, shuffle_xor(x, 1));
    return fmax(x, shuffle_xor(x, 2));
  }

  // Columns past D stay zero for the whole call.
  __device__ void clear() const {
    for (int k = thread_index(); k < S::BM * S::STRIDE; k += S::THREADS) {
      shared.owned[k] = Element();
    }
    for (auto& tile : shared.streamed) {
      for (int k = thread_index(); k < S::BN * S::STRIDE; k += S::THREADS) tile[k] = Element();
    }
    sync_block();
  }

  // Starts copying ROWS embeddings from place `first` on; zeros past `count`. GROUP threads share a
  // row.
  template <int ROWS>
  __device__ void copy_embeddings(Element* to, const Side& side, int count, int first) const {
    const int thread = opaque(thread_index());
    if (aligned()) {
      constexpr int WIDTH = 16 / sizeof(Element), CHUNKS = S::BLOCK_D / WIDTH;
      constexpr int GROUP = (CHUNKS & -CHUNKS) < 32 ? (CHUNKS & -CHUNKS) : 32;
      constexpr int STEP = S::THREADS / GROUP;
      const int r0 = thread / GROUP, d0 = thread % GROUP * WIDTH;
      const Element* from = embedding(side.embedding, first + r0) + d0;
      const SharedAddress target = shared_address(to + r0 * S::STRIDE + d0);
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP) {
        if (ROWS % STEP != 0 && r0 + r >= ROWS) break;
        const bool valid = first + r0 + r < count;
        const Element* row = from;
        if (side.order != nullptr || !valid) {
          row = embedding(side.embedding, valid ? at(side, first + r0 + r) : 0) + d0;
        }
#pragma unroll
        for (int d = 0; d < S::BLOCK_D; d += GROUP * WIDTH) {
          if (d0 + d >= call.dim) continue;
          const int offset = (r * S::STRIDE + d) * static_cast<int>(sizeof(Element));
          copy_async<16>(target + offset, row + d, valid);
        }
        from += STEP * call.dim;
      }
    } else {
      for (int k = thread; k < ROWS * S::BLOCK_D; k += S::THREADS) {
        const int r = k / S::BLOCK_D, d = k % S::BLOCK_D;
        if (d >= call.dim) continue;
        const bool valid = first + r < count;
        const Element* from = embedding(side.embedding, valid ? at(side, first + r) : 0) + d;
        if constexpr (sizeof(Element) >= 4) {
          copy_async<sizeof(Element)>(shared_address(to + r * S::STRIDE + d), from, valid);
        } else {
          to[r * S::STRIDE + d] = valid ? *from : Element();
        }
      }
    }
  }

  __device__ void own_tile(const Side& side, int count, int tile) const {
    copy_embeddings<S::BM>(shared.owned, side, count, tile * S::BM);
  }

  // Start copying a block of the streamed side.
  template <bool CANDIDATES>  // or rows
  __device__ void prefetch(int first, int buffer) const {
    const Side& side = CANDIDATES ? call.candidate : call.row;
    const int count = CANDIDATES ? places : rows;
    copy_embeddings<S::BN>(shared.streamed[buffer], side, count, first);
    for (int n = opaque(thread_index()); n < S::BN; n += S::THREADS) {
      const int place = first + n;
      const bool valid = place < count;
      const auto integer = [&](int slot, const int64_t* from) {
        copy_async<8>(shared_address(&shared.integers[buffer][slot][n]), from + place, valid);
      };
      if constexpr (CANDIDATES) {
        if (call.candidate_log_q != nullptr) {
          copy_async<sizeof(Number)>(shared_address(&shared.log_q[buffer][n]),
                                     numbers(call.candidate_log_q) + place, valid);
        }
        if (call.row_ids != nullptr) integer(kId, call.candidate_ids);
      } else {
        const SharedAddress to = shared_address(&shared.rows[buffer][n]);
        const char* from = reinterpret_cast<const char*>(row_numbers() + place);
#pragma unroll
        for (int k = 0; k < static_cast<int>(sizeof(RowNumbers<Number>)); k += 16) {
          copy_async<16>(to + k, from + k, valid);
        }
        if (call.row_ids != nullptr) integer(kId, call.row_ids);
        if (call.own != nullptr) integer(kOwn, call.own);
      }
    }
  }
};

// Where a lane leaves sums[k][i] of the 16 rows from row m of its tile on: neighbouring lanes have
// neighbouring addresses.
template <class S>
__device__ __forceinline__ int part_index(const Program<S>& p, int m, int k, int i) {
  return kNumPartArrays * S::BM + ((m / 16 * (S::BLOCK_D / 8) + k) * 4 + i) * 32 + p.lane.index;
}

// Leaves what the block knows of its tile, or of its part of one, in the workspace.
template <class S>
__device__ __forceinline__ void store_sums(const Program<S>& p, const Sums<S> (&sums)[S::MT],
                                           int d0) {
  typename S::M::Number* part = p.part(block_index());
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
    const int m = p.row_of(mt, 0) - p.lane.g;
#pragma unroll
    for (int k = 0; k < S::ACC_D / 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[part_index(p, m, d0 / 8 + k, i)] = sums[mt][k][i];
    }
  }
}

// Writes two neighbours of a row of a [*, D] matrix.
template <class S>
__device__ __forceinline__ void store_pair(const Program<S>& p, void* matrix, int64_t row, int d,
                                           typename S::M::Number x, typename S::M::Number y) {
  using Gradient = typename S::M::Gradient;
  struct alignas(2 * sizeof(Gradient)) Pair {
    Gradient x, y;
  } pair;
  narrow(pair.x, x);
  narrow(pair.y, y);
  Gradient* to = static_cast<Gradient*>(matrix) + row * p.call.dim + d;
  if (p.call.dim % 2 == 0) {
    if (d < p.call.dim) *reinterpret_cast<Pair*>(to) = pair;
  } else {
    if (d < p.call.dim) to[0] = pair.x;
    if (d + 1 < p.call.dim) to[1] = pair.y;
  }
}

}  // namespace dwl
