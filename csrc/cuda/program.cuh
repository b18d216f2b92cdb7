// What the phases of the CUDA kernel share: the call as a block sees it, its memory, units.
#pragma once

#include <cmath>

#include "call.h"
#include "shape.cuh"
#include "shares.h"

namespace dwl {

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

enum class Phase { kRows, kCandidates };

struct Sum {
  template <class Number>
  __device__ Number operator()(Number x, Number y) const {
    return x + y;
  }
};
struct Largest {
  template <class Number>
  __device__ Number operator()(Number x, Number y) const {
    return fmax(x, y);
  }
};

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
  int team, member;  // of the warp

  __device__ explicit Program(const Call& given)
      : call(given), shared(*reinterpret_cast<typename S::Shared*>(shared_memory())) {
    const int thread = opaque(thread_index()), index = thread % 32;
    lane = {index, index / 4, index % 4};
    warp = thread / 32;
    team = warp / S::TEAM;
    member = warp % S::TEAM;
  }

  // The same, of which nothing is kept from before.
  __device__ Program anew() const { return Program(call); }

  // Whether embeddings are copied 16 bytes at a time.
  __device__ bool aligned() const {
    const auto addresses = reinterpret_cast<uintptr_t>(call.row.embedding) |
                           reinterpret_cast<uintptr_t>(call.candidate.embedding);
    return ((addresses | (call.dim * sizeof(Element))) & 15) == 0;
  }
  // Whether the positive of a row is one of the candidates.
  __device__ bool competes() const { return call.positive == nullptr; }

  // What streams: rows and candidates that are not padding. Like `unit` read anew where they are
  // needed: kept through a tile they would take registers from its sums.
  __device__ int rows() const { return count_of(call.row); }
  __device__ int places() const { return count_of(call.candidate); }
  template <Phase PHASE>
  __device__ Shares shares() const {
    constexpr bool FIRST = PHASE == Phase::kRows;
    return Shares(divide_up(FIRST ? rows() : places(), S::BM),
                  divide_up(FIRST ? places() : rows(), S::BN), opaque(num_blocks()));
  }
  template <Phase PHASE>
  __device__ Unit unit(int turn) const {
    return shares<PHASE>().unit(opaque(turn), opaque(block_index()));
  }

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
  __device__ Number* part(int place) const {
    return reinterpret_cast<Number*>(row_numbers() + call.row.length) +
           int64_t(opaque(place)) * S::PART;
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
  __device__ int row_of(int mt, int h) const { return (team * S::MT + mt) * 16 + h * 8 + lane.g; }

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

  // Waits for the warps of the team.
  __device__ static void sync_team() {
    if constexpr (S::TEAM == 1) {
      sync_warp();
    } else {
      sync_block();
    }
  }
  // From what each lane knows of its rows to what is known of them: `with` joins the lanes of a
  // quad and, in their order, the warps of a team.
  template <class Join>
  __device__ void join(Number (&x)[S::MT][2], Join with) const {
    const auto each = [&](auto visit) {
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
        for (int h = 0; h < 2; ++h) visit(x[mt][h], row_of(mt, h));
      }
    };
    each([&](Number& mine, int) {
      mine = with(mine, shuffle_xor(mine, 1));
      mine = with(mine, shuffle_xor(mine, 2));
    });
    if constexpr (S::TEAM > 1) {
      auto& numbers = shared.joined;
      each([&](Number& mine, int row) {
        if (lane.t == 0) numbers[member][row] = mine;
      });
      sync_block();  // all have told
      each([&](Number& mine, int row) {
        mine = numbers[0][row];
#pragma unroll
        for (int k = 1; k < S::TEAM; ++k) mine = with(mine, numbers[k][row]);
      });
      sync_block();  // all have read
    }
  }

  __device__ static Number add_quad(Number x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
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

  // Rounds what this thread copied and nobody else has seen.
  template <int ROWS>
  __device__ void round_embeddings(Element* to) const {
    const int thread = opaque(thread_index());
    if (aligned()) {
      constexpr int WIDTH = 16 / sizeof(Element), CHUNKS = S::BLOCK_D / WIDTH;
      constexpr int GROUP = (CHUNKS & -CHUNKS) < 32 ? (CHUNKS & -CHUNKS) : 32;
      constexpr int STEP = S::THREADS / GROUP;
      struct alignas(16) Chunk {
        Element x[WIDTH];
      };
      const int r0 = thread / GROUP, d0 = thread % GROUP * WIDTH;
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP) {
        if (ROWS % STEP != 0 && r0 + r >= ROWS) break;
#pragma unroll
        for (int d = 0; d < S::BLOCK_D; d += GROUP * WIDTH) {
          if (d0 + d >= call.dim) continue;
          Chunk* at = reinterpret_cast<Chunk*>(to + (r0 + r) * S::STRIDE + d0 + d);
          Chunk chunk = *at;
#pragma unroll
          for (Element& x : chunk.x) M::round(x);
          *at = chunk;
        }
      }
    } else {
      for (int k = thread; k < ROWS * S::BLOCK_D; k += S::THREADS) {
        if (k % S::BLOCK_D < call.dim) M::round(to[k / S::BLOCK_D * S::STRIDE + k % S::BLOCK_D]);
      }
    }
  }

  // Waits for the block of rows that has been copied, and takes zeros for those that weigh nothing:
  // what they hold may be NaN, which times 0 is not 0.
  __device__ void sync_and_clear_weightless(int buffer) const {
    constexpr Number INF = INFINITY;
    const auto& rows = shared.rows[buffer];
    const auto weightless = [&](int n) {
      return rows[n].coefficient == 0 && rows[n].statistic == INF;
    };
    bool any = false;
    for (int n = opaque(thread_index()); n < S::BN; n += S::THREADS) any |= weightless(n);
    if (!any_in_block(any)) return;
    for (int k = opaque(thread_index()); k < S::BN * S::BLOCK_D; k += S::THREADS) {
      const int n = k / S::BLOCK_D;
      if (weightless(n)) shared.streamed[buffer][n * S::STRIDE + k % S::BLOCK_D] = Element();
    }
    sync_block();
  }

  __device__ void own_tile(const Side& side, int count, int tile) const {
    copy_embeddings<S::BM>(shared.owned, side, count, tile * S::BM);
  }

  // Start copying a block of the streamed side.
  template <bool CANDIDATES>  // or rows
  __device__ void prefetch(int first, int buffer) const {
    const Side& side = CANDIDATES ? call.candidate : call.row;
    const int count = CANDIDATES ? places() : rows();
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
                                           int place, int d0) {
  typename S::M::Number* part = p.part(place);
  const int first = (p.member * S::SUM_D + d0) / 8;
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
    const int m = p.row_of(mt, 0) - p.lane.g;
#pragma unroll
    for (int k = 0; k < S::ACC_D / 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[part_index(p, m, first + k, i)] = sums[mt][k][i];
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
