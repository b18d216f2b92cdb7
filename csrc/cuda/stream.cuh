// The loop of rows.cuh and candidates.cuh: blocks of one side stream past an owned tile of the
// other.
#pragma once

#include "program.cuh"

namespace dwl {

enum class Mode { kMaxima, kRows, kCandidates };

// What a lane knows of its rows of the owned side.
template <class S>
struct Owned {
  using Number = typename S::M::Number;
  int first;                // place of the tile's first row
  Number scale[S::MT][2];   // rows: of their logits
  Number offset[S::MT][2];  // rows: the reference; candidates: log-Q
};

template <class S>
struct Totals {
  using Number = typename S::M::Number;
  Number total[S::MT][2];  // rows: sum_j e_ij, or the largest logit; candidates: sum_i dz_ij
  int hits[S::MT][2];
};

// The block that passes.
struct Passing {
  int buffer;
  int first;      // its first place
  int remaining;  // how many of its places there are
};

// 16 by COLUMNS logits of a warp.
template <class S>
using Logits = typename S::M::Number[S::COLUMNS / 8][4];

template <class S, class Visit>
__device__ __forceinline__ void for_each(const Program<S>& p, Logits<S> (&s)[S::MT], Visit visit) {
#pragma unroll
  for (int nt = 0; nt < S::COLUMNS / 8; ++nt) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = p.member * S::COLUMNS + nt * 8 + 2 * p.lane.t + c;
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
        for (int h = 0; h < 2; ++h) visit(s[mt][nt][2 * h + c], column, mt, h);
      }
    }
  }
}

// s = owned streamed^T
template <class S, class At>
__device__ __forceinline__ void products(At at_a, At at_b, Logits<S> (&s)[S::MT]) {
  using M = typename S::M;
#pragma unroll M::UNROLL
  for (int d = 0; d < S::BLOCK_D; d += M::K) {
    typename M::A a[S::MT];
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt) {
      a[mt] = M::template load_a<S::STRIDE>(at_a, mt * 16 * S::STRIDE + d);
    }
#pragma unroll
    for (int n = 0; n < S::COLUMNS / 16; ++n) {
      typename M::B b[2];
      M::template load_b<S::STRIDE>(b, at_b, n * 16 * S::STRIDE + d);
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
        M::multiply(s[mt][2 * n], a[mt], b[0]);
        M::multiply(s[mt][2 * n + 1], a[mt], b[1]);
      }
    }
  }
}

// From products to logits less the reference: z - reference for rows, z - lse for candidates.
template <Mode MODE, class S>
__device__ __forceinline__ void logits(const Program<S>& p, const Passing& block,
                                       const Owned<S>& own, Logits<S> (&s)[S::MT]) {
  using Number = typename S::M::Number;
  const auto& shared = p.shared;
  if constexpr (MODE == Mode::kCandidates) {
    for_each<S>(p, s, [&](Number& z, int column, int mt, int h) {
      const RowNumbers<Number>& row = shared.rows[block.buffer][column];
      z = p.scaled(z, row.scale) - own.offset[mt][h] - row.statistic;
    });
    return;
  }
  for_each<S>(p, s, [&](Number& z, int, int mt, int h) { z = p.scaled(z, own.scale[mt][h]); });
  if (p.call.candidate_log_q != nullptr) {
    for_each<S>(p, s, [&](Number& z, int column, int, int) {
      z -= shared.log_q[block.buffer][column] * p.unit();
    });
  }
  if constexpr (MODE == Mode::kRows) {
    for_each<S>(p, s, [&](Number& z, int, int mt, int h) { z -= own.offset[mt][h]; });
  }
}

// Hits, a row's own positive, and what lies past the end have no probability.
template <Mode MODE, class S>
__device__ __forceinline__ void exclude(const Program<S>& p, const Passing& block,
                                        Logits<S> (&s)[S::MT], Totals<S>& totals) {
  using Number = typename S::M::Number;
  constexpr Number INF = INFINITY;
  if (p.call.row_ids != nullptr) {
    const int64_t* ids = p.shared.integers[block.buffer][kId];
    const bool counted = MODE == Mode::kRows && p.call.refined;
    for_each<S>(p, s, [&](Number& z, int column, int mt, int h) {
      const bool hit = p.shared.id[p.row_of(mt, h)] == ids[column];
      if (hit) z = -INF;
      if (counted) totals.hits[mt][h] += hit && column < block.remaining ? 1 : 0;
    });
  }
  if (MODE != Mode::kCandidates && p.competes()) {
    bool here = false;
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = p.shared.own[p.row_of(mt, h)] - block.first;
        here |= column >= 0 && column < S::BN;
      }
    }
    if (here) {
      for_each<S>(p, s, [&](Number& z, int column, int mt, int h) {
        if (p.shared.own[p.row_of(mt, h)] - block.first == column) z = -INF;
      });
    }
  }
  if (block.remaining < S::BN) {
    for_each<S>(p, s, [&](Number& z, int column, int, int) {
      if (column >= block.remaining) z = -INF;
    });
  }
}

// The positive of a row is one of the owned candidates: its gradient in the place of e.
template <class S>
__device__ __forceinline__ void place_positives(const Program<S>& p, const Passing& block,
                                                const Owned<S>& own, Logits<S> (&s)[S::MT]) {
  using Number = typename S::M::Number;
  const int64_t* places = p.shared.integers[block.buffer][kOwn];
  const bool own_given = p.call.own != nullptr;
  // In a batch only blocks on the diagonal have any; elsewhere few lanes do.
  const int ahead = block.first - own.first;
  bool here = !own_given && ahead < S::BM && ahead > -S::BN;
#pragma unroll
  for (int n = 0; n < S::COLUMNS && own_given; n += 8) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = p.member * S::COLUMNS + n + 2 * p.lane.t + c;
      const int row = static_cast<int>(places[column]) - own.first;
      here |= row >= 0 && row < S::BM;
    }
  }
  if (!here) return;
  for_each<S>(p, s, [&](Number& e, int column, int mt, int h) {
    const int place = own_given ? static_cast<int>(places[column]) : block.first + column;
    if (place == own.first + p.row_of(mt, h) && column < block.remaining) {
      e = p.shared.rows[block.buffer][column].positive;
    }
  });
}

// sums += e streamed
template <class S, class At>
__device__ __forceinline__ void weigh(const Program<S>& p, At at_b_transposed,
                                      const Logits<S> (&s)[S::MT], Sums<S> (&sums)[S::MT]) {
  using M = typename S::M;
  if constexpr (S::TEAM > 1) {
#pragma unroll
    for (int k = 0; k < S::COLUMNS; k += M::K) {
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
        p.shared.exchanged[p.team][(p.member * S::COLUMNS + k) / M::K][mt][p.lane.index] =
            M::next_a(&s[mt][k / 8], p.lane);
      }
    }
    sync_block();  // those of the other warps are here
  }
#pragma unroll
  for (int k = 0; k < S::BN; k += M::K) {
    typename M::A a[S::MT];
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt) {
      if constexpr (S::TEAM > 1) {
        a[mt] = p.shared.exchanged[p.team][k / M::K][mt][p.lane.index];
      } else {
        a[mt] = M::next_a(&s[mt][k / 8], p.lane);
      }
    }
#pragma unroll
    for (int d = 0; d < S::ACC_D / 16; ++d) {
      typename M::B b[2];
      M::template load_b_transposed<S::STRIDE>(b, at_b_transposed, k * S::STRIDE + d * 16);
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
        M::multiply(sums[mt][2 * d], a[mt], b[0]);
        M::multiply(sums[mt][2 * d + 1], a[mt], b[1]);
      }
    }
  }
}

// Streams the blocks of `part` past the owned tile. With e = exp(z - reference) for rows and
// e = a p / tau for candidates, sums e times the streamed embeddings into `sums`, the columns
// d0 : d0 + ACC_D of the warp's.
template <Mode MODE, class S>
__device__ __forceinline__ void stream(const Program<S>& given, const Unit& part,
                                       const Owned<S>& own, Totals<S>& totals,
                                       Sums<S> (&sums)[S::MT], int d0, bool weighted) {
  using M = typename S::M;
  using Number = typename M::Number;
  constexpr bool PAST_ROWS = MODE != Mode::kCandidates;
  const Program<S> p = given.anew();
  const auto& shared = p.shared;
  const int count = PAST_ROWS ? p.places() : p.rows();
  const auto* mine = shared.owned + p.team * S::MT * 16 * S::STRIDE;
  const auto at_a = M::template at_a<S::STRIDE>(mine, p.lane);

  for (int step = part.first - 1; step < part.stop; ++step) {
    wait_copies();
    Passing block{(step - part.first) & 1, step * S::BN, 0};
    if constexpr (M::ROUNDED) {
      if (step < part.first) {
        p.template round_embeddings<S::BM>(p.shared.owned);
      } else {
        p.template round_embeddings<S::BN>(p.shared.streamed[block.buffer]);
      }
    }
    // The block of this step is here, and nobody reads the other buffer any more.
    if (MODE == Mode::kCandidates && step >= part.first) {
      p.sync_and_clear_weightless(block.buffer);
    } else {
      sync_block();
    }
    if (step + 1 < part.stop) {
      p.template prefetch<PAST_ROWS>(block.first + S::BN, block.buffer ^ 1);
    }
    if (step < part.first) continue;
    block.remaining = count - block.first;

    const auto* tile = shared.streamed[block.buffer];
    const auto at_b = M::template at_b<S::STRIDE>(tile + p.member * S::COLUMNS * S::STRIDE, p.lane);
    const auto at_b_transposed =
        M::template at_b_transposed<S::STRIDE>(tile + p.member * S::SUM_D + d0, p.lane);
    Logits<S> s[S::MT];
    zero(s);
    products<S>(at_a, at_b, s);
    logits<MODE>(p, block, own, s);
    exclude<MODE>(p, block, s, totals);
    if constexpr (MODE == Mode::kMaxima) {
      for_each<S>(p, s, [&](Number& z, int, int mt, int h) {
        totals.total[mt][h] = fmax(totals.total[mt][h], z);
      });
      continue;
    }
    if constexpr (MODE == Mode::kRows) {
      for_each<S>(p, s, [&](Number& z, int, int mt, int h) {
        z = p.power(z);
        totals.total[mt][h] += z;
      });
    } else {
      // Loaded a second time: kept since `logits` they would take registers from the sums.
      const auto* rows = shared.rows[opaque(block.buffer)];
      for_each<S>(p, s, [&](Number& z, int column, int, int) {
        z = p.power(z) * rows[column].coefficient;
      });
      if (p.competes()) place_positives(p, block, own, s);
      if (p.call.candidate_log_q_gradient != nullptr) {
        for_each<S>(p, s, [&](Number& e, int column, int mt, int h) {
          if (column >= block.remaining) return;
          totals.total[mt][h] += e * p.tau_of(shared.rows[block.buffer][column].scale);
        });
      }
    }
    sync_warp();  // lanes may have taken different ways; products need all of them
    if (weighted) weigh(p, at_b_transposed, s, sums);
  }
  sync_block();  // the buffers are free
}

}  // namespace dwl
