// The CPU kernel for candidates per row. A thread owns a range of rows. For each it reads the
// K rows of the table once from memory, fetched ahead of use, and has them in its cache when it
// comes back to them for the gradient:
//
//   z_j = <q, c_j> / tau - log Q_j
//   e_j = exp(z_j - m)                    in place; the shared code of row.h
//   dq  = a / (tau sum) sum_j e_j c_j
//   dL/d<q, c_j> = a / (tau sum) e_j      all that the gradient of the table needs of this row
//
// Nothing of the size [B, K, D] exists, and no thread writes to the table.

#include "../per_row_softmax.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "row.h"
#include "team.h"

namespace dwl {
namespace {

// Not inlined: candidates with the embedding of the positive get its product to the last bit.
template <typename T, typename S>
__attribute__((noinline)) T dot_stored(const T* q, const S* c, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += q[k] * static_cast<T>(c[k]);
  return sum;
}

// Rows of a table by id; in the place of id -1, whose e is 0, stands the positive.
template <typename S>
struct Rows {
  const S *table, *positive;
  int64_t dim;
  const S* operator[](int64_t id) const { return id < 0 ? positive : table + id * dim; }
};

// sum [D] = sum_j e_j c_j, four candidates at a time so that the sum is read and written less.
template <typename T, typename S>
void weighted_sum(const T* e, const Rows<S>& c, const int64_t* ids, int64_t n, T* sum) {
  const int64_t dim = c.dim;
  std::fill(sum, sum + dim, T(0));
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const S *c0 = c[ids[j]], *c1 = c[ids[j + 1]], *c2 = c[ids[j + 2]], *c3 = c[ids[j + 3]];
    const T e0 = e[j], e1 = e[j + 1], e2 = e[j + 2], e3 = e[j + 3];
#pragma omp simd
    for (int64_t k = 0; k < dim; ++k) {
      sum[k] += (e0 * static_cast<T>(c0[k]) + e1 * static_cast<T>(c1[k])) +
                (e2 * static_cast<T>(c2[k]) + e3 * static_cast<T>(c3[k]));
    }
  }
  for (; j < n; ++j) {
    const S* own = c[ids[j]];
#pragma omp simd
    for (int64_t k = 0; k < dim; ++k) sum[k] += e[j] * static_cast<T>(own[k]);
  }
}

constexpr int64_t kAhead = 16;  // candidates between the fetch of a row and its use

}  // namespace

template <typename T, typename S>
void per_row_softmax_cpu(const PerRowProblem<T, S>& p, const PerRowGradients<T>& out, int threads) {
  const int64_t n = p.candidates, dim = p.dim;
  const std::vector<int64_t> rows = active_rows(p);
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  const int team = static_cast<int>(std::clamp<int64_t>(num_rows / 16, 1, threads));
  std::unique_ptr<T[]> scratch;  // [team, K], where the gradient has no place for a row's logits
  if (out.candidate == nullptr) scratch.reset(new T[size_t(team) * n]);

  const auto solve_row = [&](int64_t i, const int64_t* next, T* s) {
    const T* query = p.query + i * dim;
    const int64_t* ids = p.candidate_ids + i * n;
    const S* positive = p.positive != nullptr ? p.positive + i * dim : nullptr;
    if (positive == nullptr) positive = p.table + p.positive_ids[i] * dim;
    const Rows<S> candidates{p.table, positive, dim};
    const T* log_q = p.candidate_log_q != nullptr ? p.candidate_log_q + i * n : nullptr;
    Row<T> row{};
    row.tau = p.tau[i];
    row.coefficient = p.coefficient[i];
    row.count = n;
    row.refined = p.refined;
    for (int64_t j = 0; j < n; ++j) {
      if (j + kAhead < n) {
        prefetch(candidates[ids[j + kAhead]], dim);
      } else if (next != nullptr && j + kAhead - n < n) {
        prefetch(candidates[next[j + kAhead - n]], dim);
      }
      if (ids[j] < 0) {
        s[j] = -kInfinity<T>;
        --row.count;
        continue;
      }
      s[j] = dot_stored(query, p.table + ids[j] * dim, dim) / row.tau;
      if (log_q == nullptr) continue;
      s[j] -= log_q[j];
      row.count -= log_q[j] == kInfinity<T>;
    }
    row.z_positive = dot_stored(query, positive, dim) / row.tau;
    if (p.positive_log_q != nullptr) {
      row.positive_log_q = p.positive_log_q + i;
      if (!p.refined) row.z_positive -= p.positive_log_q[i];
    }
    if (out.rank != nullptr) {
      int64_t ahead = 0;
      for (int64_t j = 0; j < n; ++j) {
        const bool removed = log_q != nullptr && log_q[j] == kInfinity<T>;
        ahead += !(s[j] < row.z_positive) && ids[j] >= 0 && !removed;
      }
      out.rank[i] = 1 + ahead;
    }
    T m = row_max(s, n);
    if (!p.refined) m = larger(m, row.z_positive);
    const T sum = row_exp(s, m, n);
    const RowResult<T> result = finish_row(row, m, sum);
    out.row_loss[i] = result.loss;
    if (out.rank != nullptr) {
      out.log_sum_exp[i] = result.log_sum_exp;
      out.log_probability[i] = result.log_probability;
    }
    if (out.query != nullptr) {
      T* d_query = out.query + i * dim;
      std::fill_n(d_query, dim, T(0));
      if (result.scale != 0) {
        weighted_sum(s, candidates, ids, n, d_query);
        for (int64_t k = 0; k < dim; ++k) d_query[k] *= result.scale;
      }
      for (int64_t k = 0; k < dim && result.positive != 0; ++k) {
        d_query[k] += result.positive * static_cast<T>(positive[k]);
      }
    }
    if (out.candidate != nullptr) {
      for (int64_t j = 0; j < n; ++j) s[j] = result.scale == 0 ? T(0) : s[j] * result.scale;
      out.positive[i] = result.positive;
    }
  };

#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int part = 0; part < team; ++part) {
    const FlushToZero flush;
    const int64_t last = num_rows * (part + 1) / team;
    for (int64_t r = num_rows * part / team; r < last; ++r) {
      const int64_t i = rows[r];
      const int64_t* next = r + 1 < last ? p.candidate_ids + rows[r + 1] * n : nullptr;
      solve_row(i, next,
                out.candidate != nullptr ? out.candidate + i * n : scratch.get() + part * n);
    }
  }
}

template void per_row_softmax_cpu(const PerRowProblem<float, float>&, const PerRowGradients<float>&,
                                  int);
template void per_row_softmax_cpu(const PerRowProblem<float, BFloat16>&,
                                  const PerRowGradients<float>&, int);
template void per_row_softmax_cpu(const PerRowProblem<double, double>&,
                                  const PerRowGradients<double>&, int);

}  // namespace dwl
