// The CPU kernel. All threads work on the same block of rows, each on its own part of the
// candidates, in tiles whose S stays in the core's cache:
//
//   S   = q c^T                             product 1, through the BLAS that PyTorch ships
//   e   = exp(S / tau - log Q - m)          in place, and its sum by row
//   dq += e c                               product 2, of this part of the candidates
//   -- the parts wait for each other, then add their sums up to the rows' totals
//   dc += e^T diag(a / (tau total)) q       product 3, the tiles once more; no other part's columns
//
// so that nothing is computed twice, and what is kept is e of one block. The reference m is the
// largest logit of the row so far, that of the positive to begin with: no pass for a maximum has to
// come first, and logits of any size take the same time. Each tile keeps its m. Sums and dq move
// along when m rises, product 3 brings e to the final maximum M by the row's coefficient, times
// exp(m - M).
//
// The row coefficient scales the small matrices q and dq, never e. Hits are found by looking the
// row's id up among the candidate ids by hash, so they cost nothing per element either. Padded rows
// are left out when a block is gathered. Where there are fewer candidates than make a part for
// every thread, groups of threads take ranges of rows, and their dc are added in their order.

#include "../sampled_softmax.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "blas.h"
#include "positive_rank.h"
#include "row.h"
#include "team.h"

namespace dwl {
namespace {

template <typename T>
class Kernel {
 public:
  Kernel(const Problem<T>& p, const Gradients<T>& out, int threads)
      : p_(p),
        out_(out),
        index_{{p.candidate_ids[0], p.candidates}, {p.candidate_ids[1], p.candidates}},
        rank_(p, out.rank != nullptr),
        candidate_gradient_(out.candidate != nullptr || out.candidate_log_q != nullptr),
        late_(p.skip_below != nullptr),
        team_(active_rows(p), p.candidates, p.dim, threads,
              {candidate_gradient_ || late_, out.query != nullptr, late_}) {
    const int64_t n = p.candidates, more = team_.groups() - 1;
    padded_ = p.in_batch() ? p.rows - static_cast<int64_t>(team_.rows().size()) : 0;
    if (p.candidate_log_q != nullptr || padded_ > 0) {
      bias_.resize(n);
      for (int64_t j = 0; j < n; ++j) {
        bias_[j] = p.candidate_log_q != nullptr ? -p.candidate_log_q[j] : T(0);
        if (padded_ > 0 && padding(j)) bias_[j] = -kInfinity<T>;
        removed_ += removed(j) && !padding(j);
      }
    }
    if (out.candidate != nullptr && more > 0) dc_ = buffer<T>(more * n * p.dim);
    if (out.candidate_log_q != nullptr && more > 0) d_log_q_ = buffer<T>(more * n);
  }

  void run();

 private:
  using Part = Worker<T>;

  void begin(Part& w, int64_t round);
  void logits(Part& w, int64_t j0, int64_t j1, T* s);
  void exponentials(Part& w, int64_t round);
  void carry_dq(Part& w, int64_t round, int64_t tile);
  void add_dq(Part& w, int64_t round, int64_t j0, int64_t columns, const T* e);
  void finish_rows(Part& w, int64_t round);
  bool counts(Part& w, int64_t tile, int64_t segment);
  void products(Part& w, int64_t round);
  void write_rows(Part& w, int64_t round);
  void finish_candidates(int64_t j0, int64_t j1);

  // Whether candidate j is the positive of a padded row.
  bool padding(int64_t j) const {
    return p_.in_batch() && p_.active != nullptr && j < p_.rows && !p_.active[j];
  }
  // Whether its log-Q takes candidate j out.
  bool removed(int64_t j) const {
    return p_.candidate_log_q != nullptr && p_.candidate_log_q[j] == kInfinity<T>;
  }
  T shift(int64_t i) const { return p_.shift != nullptr ? p_.shift[i] : T(0); }
  // Where a group adds its gradients up: the first straight in the output.
  T* dc_of(int group) {
    if (group == 0 || out_.candidate == nullptr) return out_.candidate;
    return dc_.get() + (group - 1) * p_.candidates * p_.dim;
  }
  T* d_log_q_of(int group) {
    if (group == 0 || out_.candidate_log_q == nullptr) return out_.candidate_log_q;
    return d_log_q_.get() + (group - 1) * p_.candidates;
  }

  const Problem<T>& p_;
  const Gradients<T>& out_;
  const IdIndex index_[2];
  const PositiveRank<T> rank_;
  const bool candidate_gradient_;
  const bool late_;  // product 2 waits for the totals too, so that some can be left out
  Team<T> team_;
  int64_t padded_;          // positives of padded rows: in a batch they are nobody's candidates
  int64_t removed_ = 0;     // other candidates that their log-Q takes out
  std::vector<T> bias_;     // [N] -log Q_j, or empty
  Buffer<T> dc_, d_log_q_;  // of the other groups, [groups - 1, N, D], [groups - 1, N]
};

template <typename T>
void Kernel<T>::run() {
#pragma omp parallel num_threads(team_.size())
  {
    const FlushToZero flush;
    team_.each([&](Part& w) {
      const int64_t count = w.last - w.first;
      T *dc = dc_of(w.group), *d_log_q = d_log_q_of(w.group);
      if (dc != nullptr) std::fill_n(dc + w.first * p_.dim, count * p_.dim, T(0));
      if (d_log_q != nullptr) std::fill_n(d_log_q + w.first, count, T(0));
    });
    for (int64_t round = 0; round < team_.rounds(); ++round) {
      team_.each([&](Part& w) {
        begin(w, round);
        exponentials(w, round);
      });
#pragma omp barrier
      team_.each([&](Part& w) {
        finish_rows(w, round);
        if (candidate_gradient_ || late_) products(w, round);
      });
      if (late_) {
#pragma omp barrier
      }
      team_.each([&](Part& w) { write_rows(w, round); });
    }
    if (candidate_gradient_ && (team_.groups() > 1 || padded_ > 0)) {
#pragma omp barrier
      team_.each([&](Part& w) {
        const int64_t k = w.group * team_.parts() + w.part, n = p_.candidates;
        finish_candidates(n * k / team_.size(), n * (k + 1) / team_.size());
      });
    }
  }
}

// The next block of rows: their queries, the logits of their positives.
template <typename T>
void Kernel<T>::begin(Part& w, int64_t round) {
  const int64_t d = p_.dim;
  team_.take_block(w, round);
  for (size_t r = 0; r < w.row.size(); ++r) {
    const int64_t i = w.row[r];
    std::copy_n((p_.score != nullptr ? p_.score : p_.query) + i * d, d, w.query.get() + r * d);
    Row<T>& row = w.rows[r];
    row.tau = p_.tau[i];
    row.coefficient = p_.coefficient[i];
    row.inverse = Inverse<T>(row.tau);
    row.positive_log_q = p_.positive_log_q != nullptr ? p_.positive_log_q + i : nullptr;
    row.refined = p_.refined;
    const bool corrected = !p_.refined && p_.positive_log_q != nullptr;
    const T bias = corrected ? -p_.positive_log_q[i] : T(0);
    row.z_positive = dot(p_.query + i * d, p_.positive_of(i), d);
    row_logits(&row.z_positive, row.inverse, &bias, T(0), 1);
    if (out_.rank != nullptr) w.marks[r] = rank_.mark(i);
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

// s = the logits of the block with candidates [j0, j1), -inf where one is excluded.
template <typename T>
void Kernel<T>::logits(Part& w, int64_t j0, int64_t j1, T* s) {
  const int width = static_cast<int>(j1 - j0), dim = static_cast<int>(p_.dim);
  gemm('T', 'N', width, static_cast<int>(w.row.size()), dim, p_.candidate + j0 * dim, dim,
       w.query.get(), dim, T(0), s, static_cast<int>(w.stride));
  const T* bias = bias_.empty() ? nullptr : bias_.data() + j0;
  for (size_t r = 0; r < w.row.size(); ++r, s += w.stride) {
    const int64_t i = w.row[r];
    row_logits(s, w.rows[r].inverse, bias, shift(i), width);
    if (p_.positive == nullptr && p_.own(i) >= j0 && p_.own(i) < j1) {
      s[p_.own(i) - j0] = -kInfinity<T>;
    }
    for (int k = 0; k < 2 && p_.row_ids[k] != nullptr; ++k) {
      const int64_t id = p_.row_ids[k][i];
      if (j0 == w.first) w.hits[k][r] = index_[k].find(id, j0);
      IdIndex::visit(w.hits[k][r], id, j1, [&](int64_t j) { s[j - j0] = -kInfinity<T>; });
    }
  }
}

// e of the block, its sums and, unless that waits for the totals, product 2.
template <typename T>
void Kernel<T>::exponentials(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size());
  Report<T>& report = w.report(round);
  for (int64_t r = 0; r < rows; ++r) {
    report.m[r] = p_.refined ? -kInfinity<T> : w.rows[r].z_positive;
    report.sum[r] = 0;
    report.ahead[r] = 0;
  }
  if (out_.query != nullptr) std::fill_n(report.dq.get(), rows * p_.dim, T(0));
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile, T* e) {
    const int64_t width = j1 - j0;
    T* m = team_.reference(w, tile);
    logits(w, j0, j1, e);
    for (int64_t r = 0; r < rows; ++r) {
      T* own = e + r * w.stride;
      if (out_.rank != nullptr)
        report.ahead[r] += rank_.ahead(w.row[r], w.marks[r], j0, own, width);
      m[r] = larger(report.m[r], row_max(own, width));
      report.sum[r] *= between(report.m[r], m[r]);
      report.sum[r] += row_exp(own, m[r], width);
      report.m[r] = m[r];
      for (int64_t k = 0; late_ && k < width; k += kSegment) {
        const T top = row_max(own + k, std::min(kSegment, width - k));
        team_.segment_top(w, tile, k / kSegment)[r] = top;
      }
    }
    if (out_.query == nullptr || late_) return;
    carry_dq(w, round, tile);
    add_dq(w, round, j0, width, e);
  });
}

// Moves dq from the references of the tile before to those of this one.
template <typename T>
void Kernel<T>::carry_dq(Part& w, int64_t round, int64_t tile) {
  if (tile == 0) return;
  const T *from = team_.reference(w, tile - 1), *to = team_.reference(w, tile);
  T* dq = w.report(round).dq.get();
  for (size_t r = 0; r < w.row.size(); ++r, dq += p_.dim) {
    if (from[r] == to[r]) continue;
    const T factor = between(from[r], to[r]);
    for (int64_t k = 0; k < p_.dim; ++k) dq[k] *= factor;
  }
}

// dq += e c over some columns of a tile, from candidate j0 on.
template <typename T>
void Kernel<T>::add_dq(Part& w, int64_t round, int64_t j0, int64_t columns, const T* e) {
  const int dim = static_cast<int>(p_.dim);
  gemm('N', 'N', dim, static_cast<int>(w.row.size()), static_cast<int>(columns),
       p_.candidate + j0 * dim, dim, e, static_cast<int>(w.stride), T(1), w.report(round).dq.get(),
       dim);
}

// The totals of the rows and what follows from them.
template <typename T>
void Kernel<T>::finish_rows(Part& w, int64_t round) {
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

// Whether some probability of a segment reaches the threshold of its row.
template <typename T>
bool Kernel<T>::counts(Part& w, int64_t tile, int64_t segment) {
  const T* top = team_.segment_top(w, tile, segment);
  for (size_t r = 0; r < w.row.size(); ++r) {
    // Not below, rather than at least: NaN counts.
    if (!(top[r] * w.factor[r] < p_.skip_below[w.row[r]] * w.results[r].total)) return true;
  }
  return false;
}

// Product 3 and the gradient of log-Q, over all tiles or what the threshold leaves of them.
template <typename T>
void Kernel<T>::products(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim;
  const int dim = static_cast<int>(d), height = static_cast<int>(rows);
  T *dc = dc_of(w.group), *d_log_q = d_log_q_of(w.group);
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile, T* e) {
    const int64_t width = j1 - j0;
    const T* m = team_.reference(w, tile);
    for (int64_t r = 0; r < rows; ++r) {
      w.factor[r] = between(m[r], w.m[r]);
      const T scale = w.results[r].scale * w.factor[r], *query = p_.query + w.row[r] * d;
      T* scaled = w.scaled.get() + r * d;
      if (w.results[r].scale == 0) {
        std::fill_n(e + r * w.stride, width, T(0));
        std::fill_n(scaled, d, T(0));
      } else {
        for (int64_t k = 0; k < d; ++k) scaled[k] = scale * query[k];
      }
    }
    if (late_ && out_.query != nullptr) carry_dq(w, round, tile);
    // Runs of segments that count; everything is one run where nothing is left out.
    for (int64_t k = 0, end; k < width; k = end) {
      const bool counting = !late_ || counts(w, tile, k / kSegment);
      end = late_ ? std::min(k + kSegment, width) : width;
      while (end < width && counts(w, tile, end / kSegment) == counting) {
        end = std::min(end + kSegment, width);
      }
      if (!counting) continue;
      if (late_ && out_.query != nullptr) add_dq(w, round, j0 + k, end - k, e + k);
      if (dc != nullptr) {
        gemm('N', 'T', dim, static_cast<int>(end - k), height, w.scaled.get(), dim, e + k,
             static_cast<int>(w.stride), T(1), dc + (j0 + k) * d, dim);
      }
      for (int64_t r = 0; d_log_q != nullptr && r < rows; ++r) {
        if (w.results[r].scale == 0) continue;
        const T scale = w.results[r].scale * w.factor[r] * w.rows[r].tau;
        const T* own = e + r * w.stride;
#pragma omp simd
        for (int64_t j = k; j < end; ++j) d_log_q[j0 + j] -= scale * own[j];
      }
    }
  });
  for (int64_t r = 0; p_.positive == nullptr && r < rows; ++r) {
    const int64_t j = p_.own(w.row[r]);
    const T scale = w.results[r].positive;
    if (j < w.first || j >= w.last || scale == 0) continue;
    const T* query = p_.query + w.row[r] * d;
    for (int64_t k = 0; dc != nullptr && k < d; ++k) dc[j * d + k] += scale * query[k];
    if (d_log_q != nullptr) d_log_q[j] -= scale * w.rows[r].tau;
  }
}

// The losses and gradients by row, of the rows of a block that fall to this worker.
template <typename T>
void Kernel<T>::write_rows(Part& w, int64_t round) {
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
    const T *query = p_.query + i * d, *positive = p_.positive_of(i);
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
template <typename T>
void Kernel<T>::finish_candidates(int64_t j0, int64_t j1) {
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

}  // namespace

template <typename T>
void sampled_softmax_cpu(const Problem<T>& problem, const Gradients<T>& gradients, int threads) {
  Kernel<T>(problem, gradients, threads).run();
}

template void sampled_softmax_cpu<float>(const Problem<float>&, const Gradients<float>&, int);
template void sampled_softmax_cpu<double>(const Problem<double>&, const Gradients<double>&, int);

}  // namespace dwl
