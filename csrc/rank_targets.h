// Targets to be ranked among the rows of a table. Plain structs as in sampled_softmax.h.
#pragma once

#include <cstdint>

#include "per_row_softmax.h"

namespace dwl {

// T computes, S is how the table is stored. Targets of other rows than padding are in [0, items) or
// marked as `nowhere`; seen ids too, or they are negative: no item.
template <typename T, typename S>
struct RankProblem {
  int64_t rows;            // B
  int64_t items;           // V
  int64_t dim;             // D
  const T* query;          // [B, D]
  const S* table;          // [V, D]
  const int64_t* target;   // [B]
  const T* bias;           // [V], or null
  const int64_t* offsets;  // [B + 1], or null: row i has seen seen[offsets[i] : offsets[i + 1]]
  const int64_t* seen;     // [offsets[B]]
  const bool* padded;      // [B], true: the rank is 0
  const bool* nowhere;     // [B], true: the target is no item, and ranks as one whose score is NaN
};

// Writes the ranks, [B], on `threads` threads of a CPU. They do not depend on `threads`.
template <typename T, typename S>
void rank_targets_cpu(const RankProblem<T, S>& problem, int64_t* rank, int threads);

}  // namespace dwl
