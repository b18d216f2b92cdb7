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
#include <cstring>
#include <memory>
#include <vector>

#include "registers.h"
#include "row.h"
#include "team.h"

namespace dwl {
namespace {

constexpr int kAtOnce = 4;  // candidates that share what is read of a query, and their summing up

// The sum of a register's numbers: its halves are added up until they are as narrow as can be.
template <typename T, int lanes>
struct LaneSum {
  typedef T Half __attribute__((vector_size(lanes / 2 * sizeof(T))));
  static T of(const void* x) {
    Half low, high;
    std::memcpy(&low, x, sizeof low);
    std::memcpy(&high, static_cast<const char*>(x) + sizeof low, sizeof high);
    low += high;
    return LaneSum<T, lanes / 2>::of(&low);
  }
};
template <typename T>
struct LaneSum<T, 2> {
  static T of(const void* x) {
    T pair[2];
    std::memcpy(pair, x, sizeof pair);
    return pair[0] + pair[1];
  }
};

// to_l = <q, c_l>, of an arranged q. Not inlined, so that a candidate with the embedding of the
// positive gets its product to the last bit.
template <typename T, typename S>
__attribute__((noinline)) void products(const T* q, const S* const c[kAtOnce], int64_t n, T* to) {
  Vector<T> sum[kAtOnce];
#pragma GCC unroll 4
  for (int l = 0; l < kAtOnce; ++l) sum[l] = Vector<T>{};
  int64_t k = 0;
  for (; k + kChunk<T, S> <= n; k += kChunk<T, S>) {
    Vector<T> other[kParts<T, S>];
    for (int l = 0; l < kAtOnce; ++l) {
      load(c[l] + k, other);
      for (int part = 0; part < kParts<T, S>; ++part) {
        Vector<T> own;
        load(q + k + part * kLanes<T>, &own);
        sum[l] += own * other[part];
      }
    }
  }
  for (int l = 0; l < kAtOnce; ++l) to[l] = LaneSum<T, kLanes<T>>::of(&sum[l]);
  for (; k < n; ++k) {
    for (int l = 0; l < kAtOnce; ++l) to[l] += q[k] * static_cast<T>(c[l][k]);
  }
}

// Rows of a table by id; in the place of id -1, whose e is 0, stands the positive.
template <typename S>
struct Rows {
  const S *table, *positive;
  int64_t dim;
  const S* operator[](int64_t id) const { return id < 0 ? positive : table + id * dim; }
};

// to [columns] = scale sum_j e_j c_j, of columns that stay in registers while all rows pass.
template <int64_t columns, typename T, typename S>
void weighted_columns(const T* e, const Rows<S>& c, const int64_t* ids, int64_t n, T scale,
                      int64_t first, T* to) {
  constexpr int kTaken = kParts<T, S>;
  constexpr int64_t kSums = columns / kLanes<T>;
  Vector<T> sum[kSums];
#pragma GCC unroll 8
  for (int l = 0; l < kSums; ++l) sum[l] = Vector<T>{};
  for (int64_t j = 0; j < n; ++j) {
    const S* own = c[ids[j]] + first;
    for (int l = 0; l < kSums; l += kTaken) {
      Vector<T> some[kTaken];
      load(own + l * kLanes<T>, some);
      for (int part = 0; part < kTaken; ++part) sum[l + part] += e[j] * some[part];
    }
  }
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = k - k % kChunk<T, S> + place<T, S>(k % kChunk<T, S>);
    to[k] = scale * sum[at / kLanes<T>][at % kLanes<T>];
  }
}

// to [D] = scale sum_j e_j c_j.
template <typename T, typename S>
void weighted_sum(const T* e, const Rows<S>& c, const int64_t* ids, int64_t n, T scale, T* to) {
  int64_t k = 0;
  const auto pass = [&]<int64_t columns>() {
    for (; k + columns <= c.dim; k += columns) {
      weighted_columns<columns>(e, c, ids, n, scale, k, to + k);
    }
  };
  pass.template operator()<8 * kLanes<T>>();
  pass.template operator()<4 * kLanes<T>>();
  pass.template operator()<kChunk<T, S>>();
  if (k == c.dim) return;
  std::fill(to + k, to + c.dim, T(0));
  for (int64_t j = 0; j < n; ++j) {
    const S* own = c[ids[j]];
#pragma omp simd
    for (int64_t d = k; d < c.dim; ++d) to[d] += e[j] * static_cast<T>(own[d]);
  }
  for (; k < c.dim; ++k) to[k] *= scale;
}

// Bytes of the table that are on their way while a candidate is read, a quarter of a core's nearest
// cache: with half of that the memory waits, with twice that the row in use is driven out.
constexpr int64_t kAheadBytes = 12288;

// The candidates of the rows of a thread, one after the other, some way ahead of their use.
template <typename S>
class Fetches {
 public:
  template <typename T>
  Fetches(const PerRowProblem<T, S>& p, const int64_t* row, const int64_t* end)
      : ids_(p.candidate_ids),
        width_(p.candidates),
        table_(p.table),
        dim_(p.dim),
        row_(row),
        end_(width_ > 0 ? end : row) {
    if (row_ != end_) next_ = ids_ + *row_ * width_, last_ = next_ + width_;
    const int64_t ahead = kAheadBytes / std::max<int64_t>(dim_ * sizeof(S), 1);
    for (int64_t k = std::clamp<int64_t>(ahead, 4, 128); k > 0; --k) fetch();
  }

  void fetch() {
    if (next_ == last_) return;
    const int64_t id = *next_++;
    if (id >= 0) prefetch(table_ + id * dim_, dim_);
    if (next_ == last_ && ++row_ != end_) next_ = ids_ + *row_ * width_, last_ = next_ + width_;
  }

 private:
  const int64_t *ids_, width_;
  const S* table_;
  const int64_t dim_;
  const int64_t *row_, *end_, *next_ = nullptr, *last_ = nullptr;
};

}  // namespace

template <typename T, typename S>
void per_row_softmax_cpu(const PerRowProblem<T, S>& p, const PerRowGradients<T>& out, int threads) {
  const int64_t n = p.candidates, dim = p.dim;
  const std::vector<int64_t> rows = active_rows(p);
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  const int team = static_cast<int>(std::clamp<int64_t>(num_rows / 16, 1, threads));
  std::unique_ptr<T[]> scratch;  // [team, K], where the gradient has no place for a row's logits
  if (out.candidate == nullptr) scratch.reset(new T[size_t(team) * n]);

  const auto solve_row = [&](int64_t i, Fetches<S>& fetches, T* query, T* s) {
    arrange<T, S>(p.query + i * dim, dim, query);
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
    prefetch(positive, dim);
    const S* read[kAtOnce];
    T product[kAtOnce];
    int64_t j = 0;
    for (; j + kAtOnce <= n; j += kAtOnce) {
      for (int l = 0; l < kAtOnce; ++l) read[l] = candidates[ids[j + l]];
      for (int l = 0; l < kAtOnce; ++l) fetches.fetch();
      products(query, read, dim, s + j);
    }
    for (; j < n; ++j) {
      std::fill_n(read, kAtOnce, candidates[ids[j]]);
      fetches.fetch();
      products(query, read, dim, product);
      s[j] = product[0];
    }
    std::fill_n(read, kAtOnce, positive);
    products(query, read, dim, product);
    row.z_positive = product[0] / row.tau;
    const T tau = row.tau;
    int64_t none = 0;
#pragma omp simd reduction(+ : none)
    for (int64_t k = 0; k < n; ++k) none += ids[k] < 0;
    row.count -= none;
    if (log_q == nullptr) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) s[k] /= tau;
    } else {
      int32_t removed = 0;
#pragma omp simd reduction(| : removed)
      for (int64_t k = 0; k < n; ++k) {
        s[k] = s[k] / tau - log_q[k];
        removed |= log_q[k] == kInfinity<T>;
      }
      for (int64_t k = 0; k < n && removed; ++k) {
        row.count -= ids[k] >= 0 && log_q[k] == kInfinity<T>;
      }
    }
    for (int64_t k = 0; k < n && none > 0; ++k) {
      if (ids[k] < 0) s[k] = -kInfinity<T>;
    }
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
      if (result.scale != 0) {
        weighted_sum(s, candidates, ids, n, result.scale, d_query);
      } else {
        std::fill_n(d_query, dim, T(0));
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
    const std::unique_ptr<T[]> query(new T[dim]);
    Fetches<S> fetches(p, rows.data() + num_rows * part / team, rows.data() + last);
    for (int64_t r = num_rows * part / team; r < last; ++r) {
      const int64_t i = rows[r];
      solve_row(i, fetches, query.get(),
                out.candidate != nullptr ? out.candidate + i * n : scratch.get() + part * n);
    }
  }
}

template void per_row_softmax_cpu(const PerRowProblem<float, float>&, const PerRowGradients<float>&,
                                  int);
template void per_row_softmax_cpu(const PerRowProblem<float, BFloat16>&,
                                  const PerRowGradients<float>&, int);
template void per_row_softmax_cpu(const PerRowProblem<float, Float16>&,
                                  const PerRowGradients<float>&, int);
template void per_row_softmax_cpu(const PerRowProblem<double, double>&,
                                  const PerRowGradients<double>&, int);

}  // namespace dwl
