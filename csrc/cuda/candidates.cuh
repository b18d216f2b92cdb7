// Phase 2: a tile of candidates, past which the rows stream.
#pragma once

#include "stream.cuh"

namespace dwl {

// Writes the gradients of 16 candidates, those from candidate m of the tile on, from its parts.
template <class S>
__device__ __forceinline__ void finish_candidates(const Program<S>& given, int tile, int m,
                                                  const Parts& parts) {
  using Number = typename S::M::Number;
  const Program<S> p = given.anew();
  const Call& call = p.call;
  const Number lift = call.narrowing == nullptr ? 1 : *p.numbers(call.narrowing);
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int r = m + 8 * h + p.lane.g, place = tile * S::BM + r;
    if (place >= p.places()) continue;
    const int64_t row = p.at(call.candidate, place);
    if (call.candidate_log_q_gradient != nullptr && p.lane.t == 0) {
      Number total = 0;
      for (int s = 0; s < parts.count; ++s) total += p.part(parts[s])[kTotal * S::BM + r];
      static_cast<Number*>(call.candidate_log_q_gradient)[row] = -total / lift;
    }
    if (call.candidate_gradient == nullptr) continue;
    for (int d = 2 * p.lane.t; d < call.dim; d += 8) {
      Number sum[2] = {0, 0};
      for (int s = 0; s < parts.count; ++s) {
        const Number* part = p.part(parts[s]);
        sum[0] += part[part_index(p, m, d / 8, 2 * h)];
        sum[1] += part[part_index(p, m, d / 8, 2 * h + 1)];
      }
      store_pair(p, call.candidate_gradient, row, d, sum[0] / lift, sum[1] / lift);
    }
  }
}

// The candidate tile and the rows of a unit.
template <class S>
__device__ __forceinline__ void candidate_tile(const Program<S>& p, int turn) {
  using Number = typename S::M::Number;
  const Call& call = p.call;
  const Unit unit = p.template unit<Phase::kCandidates>(turn);
  p.own_tile(call.candidate, p.places(), unit.tile);

  Owned<S> own;
  own.first = unit.tile * S::BM;
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int place = own.first + p.row_of(mt, h);
      place = place < p.places() ? place : p.places() - 1;
      own.offset[mt][h] = 0;
      if (call.candidate_log_q != nullptr) {
        own.offset[mt][h] = p.numbers(call.candidate_log_q)[place] * p.unit();
      }
      if (call.row_ids != nullptr && p.member == 0 && p.lane.t == 0) {
        p.shared.id[p.row_of(mt, h)] = call.candidate_ids[place];
      }
    }
  }
  p.sync_team();
  const bool weighted = call.candidate_gradient != nullptr;
  for (int d0 = 0; d0 < S::SUM_D; d0 += S::ACC_D) {
    Totals<S> totals = {};
    Sums<S> sums[S::MT];
    zero(sums);
    stream<Mode::kCandidates, S>(p, unit, own, totals, sums, d0, weighted);
    const int place = p.template unit<Phase::kCandidates>(turn).part;
    if (weighted) store_sums(p, sums, place, d0);
    Number* part = p.part(place);
    p.join(totals.total, Sum());
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (p.member == 0 && p.lane.t == 0) {
          part[kTotal * S::BM + p.row_of(mt, h)] = totals.total[mt][h];
        }
      }
    }
  }
  p.sync_team();
  const Unit done = p.template unit<Phase::kCandidates>(turn);
  if (!done.whole) return;
#pragma unroll 1
  for (int mt = p.member; mt < S::MT; mt += S::TEAM) {
    finish_candidates(p, done.tile, (p.team * S::MT + mt) * 16, {0, done.part, 1});
  }
}

}  // namespace dwl
