// Phase 1: a tile of rows, past which the candidates stream.
#pragma once

#include "stream.cuh"

namespace dwl {

// Leaves <q_i, p_i> / tau_i - log Q+_i, own place and id of the team's rows in shared memory; the
// refined correction leaves log-Q out.
template <class S>
__device__ __forceinline__ void positive_logits(const Program<S>& p, int first) {
  using Number = typename S::M::Number;
  const Call& call = p.call;
  constexpr int ROWS = S::BM / S::WARPS;
#pragma unroll 2
  for (int r = p.warp * ROWS; r < (p.warp + 1) * ROWS; ++r) {
    const int place = first + r < p.rows() ? first + r : p.rows() - 1;
    const auto* query = p.embedding(call.row.embedding, p.at(call.row, place));
    const auto* positive = p.positive(place);
    Number z = 0;
    for (int d = p.lane.index; d < call.dim; d += 32) {
      z += Number(widen(query[d])) * Number(widen(positive[d]));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) z += shuffle_xor(z, mask);
    z = p.scaled(z, p.scale_of(p.numbers(call.tau)[place]));
    if (call.positive_log_q != nullptr && !call.refined) {
      z -= p.numbers(call.positive_log_q)[place] * p.unit();
    }
    if (p.lane.index == 0) {
      p.shared.z_positive[r] = z;
      p.shared.own[r] = p.own(place);
      if (call.row_ids != nullptr) p.shared.id[r] = call.row_ids[place];
    }
  }
  p.sync_team();
}

// From the sums over all candidates to the losses, gradients and statistics of 16 rows, those from
// row m of the tile on. Its parts are joined in their order.
template <class S>
__device__ __forceinline__ void finish_rows(const Program<S>& given, int tile, int m,
                                            const Parts& parts) {
  using Number = typename S::M::Number;
  constexpr Number INF = INFINITY;
  const Program<S> p = given.anew();
  const Call& call = p.call;
  const Number unit = p.unit();
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int r = m + 8 * h + p.lane.g, place = tile * S::BM + r;
    const bool inside = place < p.rows();
    const int known = inside ? place : p.rows() - 1;
    const int64_t row = p.at(call.row, known);
    const Number z_positive = p.part(parts[0])[kZPositive * S::BM + r];
    const Number tau = p.numbers(call.tau)[known];

    Number reference = -kFinite<Number>, total = 0, hits = 0;
    for (int s = 0; s < parts.count; ++s) reference = fmax(reference, p.part(parts[s])[r]);
    for (int s = 0; s < parts.count; ++s) {
      const Number* part = p.part(parts[s]);
      total += part[kTotal * S::BM + r] * p.power(part[r] - reference);
      hits += part[kHits * S::BM + r];
    }

    Number all_terms = total, r_i = 1, row_loss, statistic, p_positive_minus_1;
    if (call.refined) {
      statistic = reference + p.logarithm(total);
      Number lse = statistic / unit;
      if (call.positive_log_q != nullptr) {  // log(1 - Q), also where 1 - Q would round Q away
        lse += log1p(-exp(p.numbers(call.positive_log_q)[known]));
      }
      if (call.row_ids == nullptr) hits = 0;
      bool removed = false;  // the row's own positive
      if (call.removed != nullptr) {
        hits += Number(*call.removed);
        if (p.competes()) removed = p.numbers(call.candidate_log_q)[p.own(known)] == INF;
      }
      // With an id, a row's own positive was counted as a hit.
      const bool hit = call.row_ids != nullptr && call.row_ids[known] != kNoItem;
      if (p.competes() && !hit && !removed) hits += 1;
      const Number compete = Number(p.places()) - hits;
      r_i = 1 / (1 + exp(z_positive / unit + log(compete) - lse));
      if (lse == -INF) r_i = 0;
      row_loss = r_i == 0 ? 0 : r_i * (lse - z_positive / unit);
      p_positive_minus_1 = -1;
    } else {
      all_terms += p.power(z_positive - reference);
      statistic = reference + p.logarithm(all_terms);
      // Where the positive leads, log1p keeps the digits that lse - z+ would round away.
      const Number odds = total * p.power(reference - z_positive);
      const Number large = ((reference - z_positive) + p.logarithm(all_terms)) / unit;
      row_loss = odds < 1 ? log1p(odds) : large;
      p_positive_minus_1 = total == INF ? -1 : -total / all_terms;
    }
    Number a = p.numbers(call.coefficient)[known];
    if (a != 0) a *= r_i;
    const bool nothing = a == 0;  // exact zeros, also where p overflowed or r is NaN
    const Number coefficient = a / tau;
    const Number d_positive = nothing ? 0 : coefficient * p_positive_minus_1;

    if (inside && p.lane.t == 0) {
      const Number lift = call.narrowing == nullptr ? 1 : *p.numbers(call.narrowing);
      static_cast<Number*>(call.row_loss)[row] = row_loss;
      p.row_numbers()[place] = {p.scale_of(tau), nothing ? INF : statistic, coefficient * lift,
                                d_positive * lift};
    }
    const bool weighted = call.query_gradient != nullptr || call.tau_gradient != nullptr;
    if (!weighted && call.positive_gradient == nullptr) continue;
    const auto* query = p.embedding(call.row.embedding, row);
    const auto* positive = p.positive(known);
    const Number mean = coefficient / all_terms;
    Number product = 0;  // <q, dq>
    for (int d = 2 * p.lane.t; d < call.dim; d += 8) {
      Number sum[2] = {0, 0}, q[2], dq[2];
      for (int s = 0; weighted && s < parts.count; ++s) {
        const Number* part = p.part(parts[s]);
        const Number factor = p.power(part[r] - reference);
        sum[0] += part[part_index(p, m, d / 8, 2 * h)] * factor;
        sum[1] += part[part_index(p, m, d / 8, 2 * h + 1)] * factor;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const bool there = d + c < call.dim;
        q[c] = there ? Number(widen(query[d + c])) : Number(0);
        const Number other = there ? Number(widen(positive[d + c])) : Number(0);
        dq[c] = nothing ? 0 : mean * sum[c] + d_positive * other;
        product += nothing ? 0 : q[c] * dq[c];
      }
      if (!inside) continue;
      if (call.query_gradient != nullptr) {
        store_pair(p, call.query_gradient, row, d, dq[0], dq[1]);
      }
      if (call.positive_gradient != nullptr) {
        store_pair(p, call.positive_gradient, row, d, nothing ? 0 : d_positive * q[0],
                   nothing ? 0 : d_positive * q[1]);
      }
    }
    if (call.tau_gradient != nullptr) {
      product = p.add_quad(product);
      if (inside && p.lane.t == 0) static_cast<Number*>(call.tau_gradient)[row] = -product / tau;
    }
  }
}

// The row tile and the candidates of a unit.
template <class S>
__device__ __forceinline__ void row_tile(const Program<S>& p, int turn) {
  using M = typename S::M;
  using Number = typename M::Number;
  const Call& call = p.call;
  const bool weighted = call.query_gradient != nullptr || call.tau_gradient != nullptr;
  const Unit unit = p.template unit<Phase::kRows>(turn);
  p.own_tile(call.row, p.rows(), unit.tile);

  Owned<S> own;
  own.first = unit.tile * S::BM;
  positive_logits(p, own.first);
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int place = own.first + p.row_of(mt, h);
      place = place < p.rows() ? place : p.rows() - 1;
      own.scale[mt][h] = p.scale_of(p.numbers(call.tau)[place]);
      own.offset[mt][h] =
          fmin(fmax(p.shared.z_positive[p.row_of(mt, h)], -kFinite<Number>), kFinite<Number>);
      if (!M::LARGEST && call.refined) own.offset[mt][h] = -kFinite<Number>;  // it is no term
    }
  }

  Totals<S> totals;
  Sums<S> sums[S::MT];
  const auto clear = [&](Number start) {
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt) {
      totals.total[mt][0] = totals.total[mt][1] = start;
      totals.hits[mt][0] = totals.hits[mt][1] = 0;
    }
  };
  bool again = false;
  for (int d0 = 0; d0 < S::SUM_D; d0 += S::ACC_D) {
    for (;;) {
      if (d0 == 0) {
        clear(-kFinite<Number>);
        Unit seen = unit;
        if (!M::LARGEST && !again) seen.stop = seen.first + 1;
        stream<Mode::kMaxima, S>(p, seen, own, totals, sums, 0, false);
        p.join(totals.total, Largest());
#pragma unroll
        for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Number largest = fmin(totals.total[mt][h], kFinite<Number>);
            Number& reference = own.offset[mt][h];
            if (M::LIFT) {
              reference = fmax(largest - kHeadroom, reference - 100);
            } else {
              // By whole powers of two, so that no term is rounded as it would not have been.
              const Number ahead = ceil(fmax(largest - reference, Number(0)));
              reference = ahead < kExactly ? reference + ahead : fmax(largest, reference);
              if (!M::LARGEST && !again) reference += kRaise;
            }
          }
        }
      }
      clear(0);
      zero(sums);
      stream<Mode::kRows, S>(p, unit, own, totals, sums, d0, weighted);
      p.join(totals.total, Sum());
      bool above = false;
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt) {
        above |= totals.total[mt][0] > kLimit || totals.total[mt][1] > kLimit;
      }
      if (M::LARGEST || again || d0 > 0) break;
      again = any_in_block(above);
      if (!again) break;
    }
    if (weighted) store_sums(p, sums, p.template unit<Phase::kRows>(turn).part, d0);
  }
  Number hits[S::MT][2];
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) hits[mt][h] = totals.hits[mt][h];
  }
  p.join(hits, Sum());
  Number* part = p.part(p.template unit<Phase::kRows>(turn).part);
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = p.row_of(mt, h);
      if (p.member != 0 || p.lane.t != 0) continue;
      part[r] = own.offset[mt][h];
      part[kTotal * S::BM + r] = totals.total[mt][h];
      part[kHits * S::BM + r] = hits[mt][h];
      part[kZPositive * S::BM + r] = p.shared.z_positive[r];
    }
  }
  p.sync_team();
  const Unit done = p.template unit<Phase::kRows>(turn);
  if (!done.whole) return;
#pragma unroll 1
  for (int mt = p.member; mt < S::MT; mt += S::TEAM) {
    finish_rows(p, done.tile, (p.team * S::MT + mt) * 16, {0, done.part, 1});
  }
}

}  // namespace dwl
