// The problem and its gradients as plain structs, free of PyTorch, so that a kernel can be compiled
// and read on its own. Letters as in dwl_kernels/backends/reference/.
#pragma once

#include <cstdint>
#include <limits>

#include "numbers.h"

namespace dwl {

// Matrices are dense and row-major. A pointer marked "or null" may be absent; that of a matrix
// without elements must not be null. A row of padding is never read or written, except that in a
// batch its embedding is among the candidates, where it must be finite. T computes, S is how
// embeddings are stored.
template <typename T, typename S = T>
struct Problem {
  int64_t rows;              // B
  int64_t candidates;        // N
  int64_t dim;               // D
  const S* query;            // [B, D]
  const S* positive;         // [B, D], or null: the positive of row i is a candidate, own(i)
  const S* candidate;        // [N, D]
  const int64_t* target;     // [B] own(i), or null: own(i) = i (in-batch)
  const T* tau;              // [B] temperature
  const T* coefficient;      // [B] a_i / r_i, what row i weighs in the gradients
  const S* score;            // [B, D], or null: the query; z_ij = <score_i, c_j> / tau_i + ...
  const T* shift;            // [B], or null; added to the logits of all candidates of row i
  const T* positive_log_q;   // [B], nats, or null
  const T* candidate_log_q;  // [N], nats, or null; see log_q
  const T* skip_below;       // [B], or null; blocks of pairs of smaller p_ij may be left out
  const bool* active;        // [B], or null: false marks padding, see below
  bool refined;              // correction of arXiv 2507.09331 instead of the standard one

  // Ids of up to two kinds, [B] and [N], the others null. A candidate that has an id of the row,
  // and not -1, is no candidate of it.
  const int64_t *row_ids[2], *candidate_ids[2];

  bool is_active(int64_t i) const { return active == nullptr || active[i]; }
  bool in_batch() const { return positive == nullptr && target == nullptr; }
  int64_t own(int64_t i) const { return target != nullptr ? target[i] : i; }
  // log Q_j. A positive of the batch that is never drawn (-inf) is no candidate of other rows.
  T log_q(int64_t j) const {
    constexpr T kInfinite = std::numeric_limits<T>::infinity();
    const T given = candidate_log_q[j];
    return given == -kInfinite && in_batch() && j < rows ? kInfinite : given;
  }
  const S* positive_of(int64_t i) const {
    return positive != nullptr ? positive + i * dim : candidate + own(i) * dim;
  }
};

// What is not wanted is null and is not computed.
template <typename T>
struct Gradients {
  T* row_loss;         // [B] r_i l_i, 0 for padding
  T* query;            // [B, D], or null
  T* positive;         // [B, D], or null; that of a candidate goes to `candidate`
  T* candidate;        // [N, D], or null
  T* candidate_log_q;  // [N], or null
  // What the rows know, all three or null; 0 for padding:
  T* log_sum_exp;      // [B] lse_i
  T* log_probability;  // [B] z_i+ - lse_i
  int64_t* rank;       // [B] 1 + how many candidates are not below the positive
};

// Solves the problem on `threads` threads of a CPU. The result depends on `threads` only by
// rounding, and is bitwise the same from run to run.
template <typename T>
void sampled_softmax_cpu(const Problem<T>& problem, const Gradients<T>& gradients, int threads);

// The same with the products of bfloat16_products.h, which must run here. e, and the queries times
// the scales of their rows, are rounded to bfloat16. It takes an even number of dimensions, and
// neither `score` nor ranks; `skip_below` leaves nothing out.
void sampled_softmax_bfloat16(const Problem<float, BFloat16>& problem,
                              const Gradients<float>& gradients, int threads);

}  // namespace dwl
