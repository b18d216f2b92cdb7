// The CPU kernel. A thread owns a range of rows and takes them in blocks whose logits S [b, N] stay
// in its cache from the forward to the backward, so that nothing is computed twice:
//
//   S  = q c^T - tau log Q               product 1, through the BLAS that PyTorch ships
//   e  = exp(S / tau - m)                in place; m is the row's maximum, sum its total
//   dq = diag(a / (tau sum)) e c         product 2
//   dc += e^T diag(a / (tau sum)) q      product 3, into the thread's own dc
//
// The row coefficient scales the small matrices q and dq, never S. Hits are found by looking the
// row's id up among the sorted candidate ids, so they cost nothing per element either. Padded rows
// are left out when a block is gathered. At the end the threads' dc are added in their order.

#include "../sampled_softmax.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "row.h"

extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
            const float*, const int*, const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
            const double*, const int*, const double*, const int*, const double*, double*,
            const int*);
#ifdef __linux__
// MKL alone has these: a matrix that many products share is laid out for them once.
[[gnu::weak]] size_t sgemm_pack_get_size_(const char*, const int*, const int*, const int*);
[[gnu::weak]] void sgemm_pack_(const char*, const char*, const int*, const int*, const int*,
                               const float*, const float*, const int*, float*);
[[gnu::weak]] void sgemm_compute_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const int*, const float*, const int*, const float*,
                                  float*, const int*);
#endif
}

namespace dwl {
namespace {

// C = op(A) op(B) + beta C in the column-major order of BLAS.
void gemm(char ta, char tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
          float beta, float* c, int ldc) {
  const float one = 1;
  sgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
void gemm(char ta, char tb, int m, int n, int k, const double* a, int lda, const double* b, int ldb,
          double beta, double* c, int ldc) {
  const double one = 1;
  dgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}

// The products of blocks of queries with all candidates, S = q c^T - tau log Q. Log-Q is one more
// dimension, [q, tau] [c, -log Q]^T, so that it costs nothing per element afterwards.
template <typename T>
class Scores {
 public:
  Scores(const Problem<T>& p, const std::vector<T>& bias, int64_t block)
      : candidates_(p.candidate),
        n_(static_cast<int>(p.candidates)),
        width_(static_cast<int>(p.dim) + !bias.empty()) {
    if (n_ == 0) return;
    if (!bias.empty()) {
      extended_.reset(new T[size_t(n_) * width_]);
      for (int64_t j = 0; j < n_; ++j) {
        std::copy_n(p.candidate + j * p.dim, p.dim, extended_.get() + j * width_);
        extended_[j * width_ + p.dim] = bias[j];
      }
      candidates_ = extended_.get();
    }
#ifdef __linux__
    // Packing the candidates once for all blocks saves a fifth of this product and gives bitwise
    // the same (two AVX-512 cores, D = 64 and 128).
    if constexpr (std::is_same_v<T, float>) {
      if (sgemm_compute_ == nullptr) return;
      const int height = static_cast<int>(block);
      const float one = 1;
      packed_.reset(new T[sgemm_pack_get_size_("A", &n_, &height, &width_) / sizeof(T) + 1]);
      sgemm_pack_("A", "T", &n_, &height, &width_, &one, candidates_, &width_, packed_.get());
      extended_.reset();
    }
#endif
  }

  int64_t width() const { return width_; }

  // query [rows, width], s [rows, N]
  void operator()(const T* query, int rows, T* s) const {
    if (n_ == 0) return;
#ifdef __linux__
    if constexpr (std::is_same_v<T, float>) {
      if (packed_ != nullptr) {
        const float zero = 0;
        sgemm_compute_("P", "N", &n_, &rows, &width_, packed_.get(), &n_, query, &width_, &zero, s,
                       &n_);
        return;
      }
    }
#endif
    gemm('T', 'N', n_, rows, width_, candidates_, width_, query, width_, T(0), s, n_);
  }

 private:
  const T* candidates_;  // [N, width]
  int n_, width_;
  std::unique_ptr<T[]> extended_, packed_;
};

// Candidates by id, sorted once per call.
class IdIndex {
 public:
  IdIndex(const int64_t* ids, int64_t n) {
    if (ids == nullptr) return;
    entries_.reserve(n);
    for (int64_t j = 0; j < n; ++j) entries_.emplace_back(ids[j], j);
    std::sort(entries_.begin(), entries_.end());
  }
  template <typename Visit>
  void for_each(int64_t id, Visit visit) const {
    auto it =
        std::lower_bound(entries_.begin(), entries_.end(), std::pair<int64_t, int64_t>(id, 0));
    for (; it != entries_.end() && it->first == id; ++it) visit(it->second);
  }

 private:
  std::vector<std::pair<int64_t, int64_t>> entries_;
};

// Turns row i's products `s` into e = exp(z - m), in place.
template <typename T>
RowResult<T> solve_row(const Problem<T>& p, int64_t i, T* s, const IdIndex& index,
                       int64_t excluded_everywhere, bool gradients) {
  const int64_t n = p.candidates;
  int64_t count = n - excluded_everywhere;  // n_i of the refined correction
  const auto exclude = [&](int64_t j) {
    const bool padding = p.in_batch() && p.active != nullptr && j < p.rows && !p.active[j];
    count -= !padding;
    s[j] = -kInfinity<T>;
  };
  if (p.positive == nullptr) exclude(p.own(i));
  if (p.positive_ids != nullptr) {
    index.for_each(p.positive_ids[i], [&](int64_t j) {
      if (p.positive != nullptr || j != p.own(i)) exclude(j);
    });
  }
  const T inverse = T(1) / p.tau[i];
  T z_positive = dot(p.query + i * p.dim, p.positive_of(i), p.dim) * inverse;
  if (!p.refined && p.positive_log_q != nullptr) z_positive -= p.positive_log_q[i];

  Row<T> row{};
  row.tau = p.tau[i];
  row.shift = p.shift != nullptr ? p.shift[i] : T(0);
  row.coefficient = p.coefficient[i];
  row.z_positive = z_positive;
  row.positive_log_q = p.positive_log_q != nullptr ? p.positive_log_q + i : nullptr;
  row.count = count;
  row.refined = p.refined;
  return softmax_row(row, s, n, gradients);
}

// Rows of a block: enough that adding to dc costs little beside the product, few enough that S
// stays near the core. 96 rows were best for N = 8,192 at D = 64 and 128 (two AVX-512 cores, 32 to
// 192 tried); narrower and wider problems keep that size of S within bounds.
int64_t block_rows(int64_t candidates) {
  return std::clamp<int64_t>(96 * 8192 / std::max<int64_t>(candidates, 1) / 8 * 8, 32, 128);
}

}  // namespace

template <typename T>
void sampled_softmax_cpu(const Problem<T>& p, const Gradients<T>& out, int threads) {
  const int64_t n = p.candidates, d = p.dim;
  const int dim = static_cast<int>(d), columns = static_cast<int>(n);
  const bool gradients =
      out.query != nullptr || out.candidate != nullptr || out.candidate_log_q != nullptr;
  const IdIndex index(p.candidate_ids, n);

  std::vector<int64_t> rows;  // the active ones
  rows.reserve(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.active == nullptr || p.active[i]) rows.push_back(i);
  }
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  // In a batch, the positives of padded rows are nobody's candidates.
  const int64_t padded = p.in_batch() ? p.rows - num_rows : 0;
  std::vector<T> bias;  // -log Q_j
  if (p.candidate_log_q != nullptr || padded > 0) {
    bias.resize(n);
    for (int64_t j = 0; j < n; ++j) {
      bias[j] = p.candidate_log_q != nullptr ? -p.candidate_log_q[j] : T(0);
      if (padded > 0 && j < p.rows && !p.active[j]) bias[j] = -kInfinity<T>;
    }
  }

  const int64_t block = block_rows(n);
  const int team = static_cast<int>(std::clamp<int64_t>(num_rows / 16, 1, threads));
  const Scores<T> scores(p, bias, block);
  const int64_t width = scores.width();
  // Each thread's dc; the first adds straight into the output, unless the gradient of log-Q, one
  // more column, comes along.
  const bool bias_gradient = out.candidate_log_q != nullptr;
  const bool candidate_gradient = out.candidate != nullptr || bias_gradient;
  const int64_t dc_width = bias_gradient ? width : d;
  const int direct = bias_gradient ? 0 : 1;
  std::unique_ptr<T[]> partial;
  if (candidate_gradient && team > direct) {
    partial.reset(new T[size_t(team - direct) * n * dc_width]);
  }
  const auto dc_of = [&](int part) -> T* {
    if (!candidate_gradient) return nullptr;
    return part < direct ? out.candidate : partial.get() + size_t(part - direct) * n * dc_width;
  };

  // Allocated out here, because an exception must not leave the parallel region.
  const int64_t step = std::min<int64_t>(block, num_rows);
  struct Scratch {
    std::unique_ptr<T[]> s, q, dq;  // [b, N], [b, width] the query, then scaled, [b, D]
    std::vector<RowResult<T>> results;
  };
  std::vector<Scratch> scratch(team);
  for (Scratch& own : scratch) {
    own = {std::unique_ptr<T[]>(new T[step * n]), std::unique_ptr<T[]>(new T[step * width]),
           std::unique_ptr<T[]>(new T[step * d]), std::vector<RowResult<T>>(step)};
  }

  // Rows [first, last) of the active ones, in blocks of about equal size.
  const auto solve_rows = [&](int64_t first, int64_t last, Scratch& own, T* dc) {
    if (dc != nullptr) std::fill(dc, dc + n * dc_width, T(0));
    auto& [s, q, dq, results] = own;
    const int64_t blocks = (last - first + block - 1) / block;
    for (int64_t number = 0; number < blocks; ++number) {
      const int64_t start = first + (last - first) * number / blocks;
      const int64_t b = first + (last - first) * (number + 1) / blocks - start;
      const int height = static_cast<int>(b);
      for (int64_t r = 0; r < b; ++r) {
        const int64_t i = rows[start + r];
        std::copy_n((p.score != nullptr ? p.score : p.query) + i * d, d, q.get() + r * width);
        if (width > d) q[r * width + d] = p.tau[i];
      }
      scores(q.get(), height, s.get());
      for (int64_t r = 0; r < b; ++r) {
        const int64_t i = rows[start + r];
        results[r] = solve_row(p, i, s.get() + r * n, index, padded, gradients);
        out.row_loss[i] = results[r].loss;
      }
      if (out.query != nullptr) {
        if (n > 0) {
          gemm('N', 'N', dim, height, columns, p.candidate, dim, s.get(), columns, T(0), dq.get(),
               dim);
        } else {
          std::fill(dq.get(), dq.get() + b * d, T(0));
        }
        for (int64_t r = 0; r < b; ++r) {
          const int64_t i = rows[start + r];
          const T* positive = p.positive_of(i);
          for (int64_t k = 0; k < d; ++k) {
            out.query[i * d + k] =
                results[r].scale * dq[r * d + k] + results[r].positive * positive[k];
          }
        }
      }
      for (int64_t r = 0; r < b; ++r) {
        const int64_t i = rows[start + r];
        const T* query = p.query + i * d;
        if (out.positive != nullptr) {
          for (int64_t k = 0; k < d; ++k) out.positive[i * d + k] = results[r].positive * query[k];
        }
        if (dc != nullptr) {
          for (int64_t k = 0; k < d; ++k) q[r * width + k] = results[r].scale * query[k];
          if (bias_gradient) q[r * width + d] = results[r].scale * p.tau[i];
          if (p.positive == nullptr) {
            T* own = dc + p.own(i) * dc_width;
            for (int64_t k = 0; k < d; ++k) own[k] += results[r].positive * query[k];
            if (bias_gradient) own[d] += results[r].positive * p.tau[i];
          }
        }
      }
      if (dc != nullptr && n > 0) {
        const int all = static_cast<int>(dc_width);
        gemm('N', 'T', all, columns, height, q.get(), static_cast<int>(width), s.get(), columns,
             T(1), dc, all);
      }
    }
  };

#pragma omp parallel num_threads(team)
  {
    // A team may come out smaller than asked for: the ranges are dealt out, not assumed.
#pragma omp for schedule(static, 1)
    for (int part = 0; part < team; ++part) {
      solve_rows(num_rows * part / team, num_rows * (part + 1) / team, scratch[part], dc_of(part));
    }
    if (candidate_gradient) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < n; ++j) {
        for (int part = 0; part < team; ++part) {
          const T* dc = dc_of(part) + j * dc_width;
          if (out.candidate != nullptr && dc != out.candidate + j * d) {
            T* target = out.candidate + j * d;
            for (int64_t k = 0; k < d; ++k) target[k] = part == 0 ? dc[k] : target[k] + dc[k];
          }
          if (bias_gradient) {
            T* target = out.candidate_log_q + j;
            *target = (part == 0 ? T(0) : *target) - dc[d];
          }
        }
      }
    }
  }
}

template void sampled_softmax_cpu<float>(const Problem<float>&, const Gradients<float>&, int);
template void sampled_softmax_cpu<double>(const Problem<double>&, const Gradients<double>&, int);

}  // namespace dwl
