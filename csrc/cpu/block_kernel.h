// What the CPU kernels of shared candidates have in common: everything but the products and the
// exponentials between them. sampled_softmax.cpp, whose header draws the whole, makes them through
// BLAS, bfloat16_softmax.cpp in bfloat16.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../sampled_softmax.h"
#include "positive_rank.h"
#include "row.h"
#include "team.h"

namespace dwl {

// T computes, S is how embeddings are stored, W is the kernel's Worker<T>.
template <typename T, typename S, typename W>
class BlockKernel {
 public:
  BlockKernel(const Problem<T, S>& p, const Gradients<T>& out, int threads, Cut cut)
      : p_(p),
        out_(out),
        index_{{p.candidate_ids[0], p.candidates}, {p.candidate_ids[1], p.candidates}},
        candidate_gradient_(out.candidate != nullptr || out.candidate_log_q != nullptr),
        team_(active_rows(p), p.candidates, p.dim, threads, cut, out.query != nullptr) {
    const int64_t n = p.candidates, more = team_.groups() - 1;
    padded_ = p.in_batch() ? p.rows - static_cast<int64_t>(team_.rows().size()) : 0;
    if (p.candidate_log_q != nullptr || padded_ > 0) {
      bias_.resize(n);
      for (int64_t j = 0; j < n; ++j) {
        bias_[j] = p.candidate_log_q != nullptr ? -p.log_q(j) : T(0);
        if (padded_ > 0 && padding(j)) bias_[j] = -kInfinity<T>;
        removed_ += removed(j) && !padding(j);
      }
    }
    if (out.candidate != nullptr && more > 0) dc_ = buffer<T>(more * n * p.dim);
    if (out.candidate_log_q != nullptr && more > 0) d_log_q_ = buffer<T>(more * n);
  }
  virtual ~BlockKernel() = default;

  void run();

 protected:
  // Product 1 of a block, e and its sums, and product 2 unless that waits for the totals.
  virtual void exponentials(W& w, int64_t round) = 0;
  // Product 3 of a block, or, where product 2 waits, both.
  virtual void products(W& w, int64_t round) = 0;
  // Before and after all blocks of a worker, in its thread.
  virtual void enter(W&) {}
  virtual void leave(W&) {}

  // Whether candidate j is the positive of a padded row.
  bool padding(int64_t j) const {
    return p_.in_batch() && p_.active != nullptr && j < p_.rows && !p_.active[j];
  }
  // Whether its log-Q takes candidate j out.
  bool removed(int64_t j) const {
    return p_.candidate_log_q != nullptr && p_.log_q(j) == kInfinity<T>;
  }
  // Where a group adds its gradients up: the first straight in the output.
  T* dc_of(int group) {
    if (group == 0 || out_.candidate == nullptr) return out_.candidate;
    return dc_.get() + (group - 1) * p_.candidates * p_.dim;
  }
  T* d_log_q_of(int group) {
    if (group == 0 || out_.candidate_log_q == nullptr) return out_.candidate_log_q;
    return d_log_q_.get() + (group - 1) * p_.candidates;
  }
  // Calls exclude(r, j) for the pairs of a block with candidates [j0, j1) that do not compete: rows
  // with their own positive, and hits. Tiles have to come in their order.
  template <typename Exclude>
  void exclude_pairs(W& w, int64_t j0, int64_t j1, Exclude exclude) {
    for (size_t r = 0; r < w.row.size(); ++r) {
      const int64_t i = w.row[r];
      if (p_.positive == nullptr && p_.own(i) >= j0 && p_.own(i) < j1) exclude(r, p_.own(i));
      for (int k = 0; k < 2 && p_.row_ids[k] != nullptr; ++k) {
        const int64_t id = p_.row_ids[k][i];
        if (j0 == w.first) w.hits[k][r] = index_[k].find(id, j0);
        IdIndex::visit(w.hits[k][r], id, j1, [&](int64_t j) { exclude(r, j); });
      }
    }
  }

  const Problem<T, S>& p_;
  const Gradients<T>& out_;
  const IdIndex index_[2];
  const bool candidate_gradient_;
  bool late_ = false;  // whether product 2 waits for the totals
  Team<T, W> team_;
  std::vector<T> bias_;  // [N] -log Q_j, or empty

 private:
  // The parts of a group wait for each other.
  void wait() {
    if (team_.parts() > 1) {
#pragma omp barrier
    }
  }
  void begin(W& w, int64_t round);
  void finish_rows(W& w, int64_t round);
  void add_positives(W& w);
  void write_rows(W& w, int64_t round);
  void finish_candidates(int64_t j0, int64_t j1);

  int64_t padded_;          // positives of padded rows: in a batch they are nobody's candidates
  int64_t removed_ = 0;     // other candidates that their log-Q takes out
  Buffer<T> dc_, d_log_q_;  // of the other groups, [groups - 1, N, D], [groups - 1, N]
};

template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::run() {
#pragma omp parallel num_threads(team_.size())
  {
    const FlushToZero flush;
    team_.each([&](W& w) {
      const int64_t count = w.last - w.first;
      T *dc = dc_of(w.group), *d_log_q = d_log_q_of(w.group);
      if (dc != nullptr) std::fill_n(dc + w.first * p_.dim, count * p_.dim, T(0));
      if (d_log_q != nullptr) std::fill_n(d_log_q + w.first, count, T(0));
      enter(w);
    });
    if (team_.groups() > 1) {
#pragma omp barrier
    }
    for (int64_t round = 0; round < team_.rounds(); ++round) {
      team_.each([&](W& w) {
        begin(w, round);
        exponentials(w, round);
      });
      wait();
      team_.each([&](W& w) {
        finish_rows(w, round);
        if (candidate_gradient_ || late_) products(w, round);
        if (candidate_gradient_) add_positives(w);
      });
      if (late_) wait();
      team_.each([&](W& w) { write_rows(w, round); });
    }
    team_.each([&](W& w) { leave(w); });
    if (candidate_gradient_ && (team_.groups() > 1 || padded_ > 0)) {
#pragma omp barrier
      team_.each([&](W& w) {
        const int64_t k = w.group * team_.parts() + w.part, n = p_.candidates;
        finish_candidates(n * k / team_.size(), n * (k + 1) / team_.size());
      });
    }
  }
}

// The next block of rows, and the logits of their positives.
template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::begin(W& w, int64_t round) {
  const int64_t d = p_.dim;
  team_.take_block(w, round);
  for (size_t r = 0; r < w.row.size(); ++r) {
    const int64_t i = w.row[r];
    Row<T>& row = w.rows[r];
    row.tau = p_.tau[i];
    row.coefficient = p_.coefficient[i];
    row.inverse = Inverse<T>(row.tau);
    row.positive_log_q = p_.positive_log_q != nullptr ? p_.positive_log_q + i : nullptr;
    row.refined = p_.refined;
    const bool corrected = !p_.refined && p_.positive_log_q != nullptr;
    const T bias = corrected ? -p_.positive_log_q[i] : T(0);
    row.z_positive = dot<T>(p_.query + i * d, p_.positive_of(i), d);
    row_logits(&row.z_positive, row.inverse, &bias, T(0), 1);
    if (!p_.refined && out_.rank == nullptr) continue;
    row.count = p_.candidates - padded_ - removed_;
    row.count -= p_.positive == nullptr && !removed(p_.own(i));
    for (int k = 0; k < 2 && p_.row_ids[k] != nullptr; ++k) {
      const int64_t id = p_.row_ids[k][i], other = p_.row_ids[0][i];
      IdIndex::Hits hits = index_[k].find(id, 0);
      IdIndex::visit(hits, id, p_.candidates, [&](int64_t j) {
        bool counted = p_.positive == nullptr && j == p_.own(i);
        counted |= k == 1 && p_.candidate_ids[0][j] == other && other != kNoItem;
        row.count -= !padding(j) && !removed(j) && !counted;
      });
    }
  }
}

// The totals of the rows and what follows from them.
template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::finish_rows(W& w, int64_t round) {
  for (size_t r = 0; r < w.row.size(); ++r) {
    T m = w.report(round).m[r];
    for (int k = 0; k < team_.parts(); ++k) m = larger(m, team_.mate(w, k).report(round).m[r]);
    double sum = 0;
    for (int k = 0; k < team_.parts(); ++k) {
      const Report<T>& report = team_.mate(w, k).report(round);
      sum += report.sum[r] * between(report.m[r], m);
    }
    w.m[r] = m;
    w.results[r] = finish_row(w.rows[r], m, sum);
  }
}

// The gradients of positives that are candidates of this worker.
template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::add_positives(W& w) {
  const int64_t d = p_.dim;
  T *dc = dc_of(w.group), *d_log_q = d_log_q_of(w.group);
  for (size_t r = 0; p_.positive == nullptr && r < w.row.size(); ++r) {
    const int64_t j = p_.own(w.row[r]);
    const T scale = w.results[r].positive;
    if (j < w.first || j >= w.last || scale == 0) continue;
    if (dc != nullptr) add_scaled(scale, p_.query + w.row[r] * d, d, dc + j * d);
    if (d_log_q != nullptr) d_log_q[j] -= scale * w.rows[r].tau;
  }
}

// The losses and gradients by row, of the rows of a block that fall to this worker.
template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::write_rows(W& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim;
  const int parts = team_.parts();
  const int64_t last = rows * (w.part + 1) / parts;
  for (int64_t r = rows * w.part / parts; r < last; ++r) {
    const int64_t i = w.row[r];
    const RowResult<T>& result = w.results[r];
    out_.row_loss[i] = result.loss;
    if (out_.rank != nullptr) {
      out_.log_sum_exp[i] = result.log_sum_exp;
      out_.log_probability[i] = result.log_probability;
      out_.rank[i] = 1;
      for (int k = 0; k < parts; ++k) out_.rank[i] += team_.mate(w, k).report(round).ahead[r];
      if (w.marks[r].is_lost()) out_.rank[i] = 1 + w.rows[r].count;
    }
    const S *query = p_.query + i * d, *positive = p_.positive_of(i);
    if (out_.query != nullptr) {
      T* d_query = out_.query + i * d;
      std::fill_n(d_query, d, T(0));
      for (int part = 0; part < parts && result.scale != 0; ++part) {
        const Report<T>& report = team_.mate(w, part).report(round);
        add_scaled(result.scale * between(report.m[r], w.m[r]), report.dq.get() + r * d, d,
                   d_query);
      }
      add_scaled(result.positive, positive, d, d_query);
    }
    if (out_.positive != nullptr) {
      std::fill_n(out_.positive + i * d, d, T(0));
      add_scaled(result.positive, query, d, out_.positive + i * d);
    }
  }
}

// Adds the gradients of candidates [j0, j1) from all groups, in their order. Those of padding are
// zeros, also where a row that is NaN made NaN of all.
template <typename T, typename S, typename W>
void BlockKernel<T, S, W>::finish_candidates(int64_t j0, int64_t j1) {
  const int64_t d = p_.dim;
  T *dc = out_.candidate, *d_log_q = out_.candidate_log_q;
  for (int group = 1; group < team_.groups(); ++group) {
    const T *more = dc_of(group), *more_log_q = d_log_q_of(group);
    for (int64_t k = j0 * d; dc != nullptr && k < j1 * d; ++k) dc[k] += more[k];
    for (int64_t j = j0; d_log_q != nullptr && j < j1; ++j) d_log_q[j] += more_log_q[j];
  }
  for (int64_t j = j0; padded_ > 0 && j < j1; ++j) {
    if (!padding(j)) continue;
    if (dc != nullptr) std::fill_n(dc + j * d, d, T(0));
    if (d_log_q != nullptr) d_log_q[j] = 0;
  }
}

}  // namespace dwl
