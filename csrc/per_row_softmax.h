// The problem whose candidates are rows of a table, each query with its own, and the gradient of
// that table. Plain structs as in sampled_softmax.h; the letters are the same.
#pragma once

#include <cstdint>
#include <functional>

#include "numbers.h"

namespace dwl {

// T computes, S is how the table is stored. Ids of active rows must be in [0, table_rows), those
// of candidates -1 otherwise.
template <typename T, typename S>
struct PerRowProblem {
  int64_t rows;                  // B
  int64_t candidates;            // K
  int64_t dim;                   // D
  const T* query;                // [B, D]
  const S* table;                // [V, D]
  const S* positive;             // [B, D], or null: the positives are rows of the table
  const int64_t* positive_ids;   // [B] these rows, or null
  const int64_t* candidate_ids;  // [B, K]; -1 is no candidate
  const T* tau;                  // [B] temperature
  const T* coefficient;          // [B] a_i / r_i
  const T* positive_log_q;       // [B], nats, or null
  const T* candidate_log_q;      // [B, K], nats, or null
  const bool* active;            // [B], or null: false marks padding, never read or written
  bool refined;                  // correction of arXiv 2507.09331 instead of the standard one

  bool is_active(int64_t i) const { return active == nullptr || active[i]; }
};

// What is not wanted is null; positive and candidate are wanted together or not at all.
template <typename T>
struct PerRowGradients {
  T* row_loss;   // [B] r_i l_i, 0 for padding
  T* query;      // [B, D], or null
  T* positive;   // [B] dL/d<q_i, p_i>, or null
  T* candidate;  // [B, K] dL/d<q_i, c_ij>, or null
  // What the rows know, all three or null; 0 for padding:
  T* log_sum_exp;      // [B] lse_i
  T* log_probability;  // [B] z_i+ - lse_i
  int64_t* rank;       // [B] 1 + how many candidates are not below the positive
};

// Solves the problem on `threads` threads of a CPU; the result does not depend on `threads`.
template <typename T, typename S>
void per_row_softmax_cpu(const PerRowProblem<T, S>& problem, const PerRowGradients<T>& gradients,
                         int threads);

// Places of a table: row r of the source goes, times its coefficient, to each of its J ids.
template <typename T>
struct Places {
  int64_t width;         // J
  const int64_t* ids;    // [R, J]; an id outside the table goes nowhere
  const T* coefficient;  // [R, J], or null for 1; a coefficient of 0 goes nowhere
};

template <typename T, typename S>
struct TableGradient {
  int64_t rows;             // R
  int64_t dim;              // D
  int64_t table_rows;       // V
  const S* source;          // [R, D]
  const Places<T>* pieces;  // several, taken one after the other
  int num_pieces;
  bool compact;  // only rows that have a place are wanted
};

// Where the sums go: to all V rows of `values`, or, compact, to as many rows as there are different
// ids, which are listed in rising order.
template <typename S>
struct TableRows {
  S* values;     // [V, D] or [number of different ids, D]
  int64_t* ids;  // [number of different ids], or null
};

// Sums by id in a fixed order; every row is written once, and rows without a place get zeros.
// `allocate` is called once with the number of rows that are wanted.
template <typename T, typename S>
void table_gradient_cpu(const TableGradient<T, S>& problem, int threads,
                        const std::function<TableRows<S>(int64_t)>& allocate);

}  // namespace dwl
