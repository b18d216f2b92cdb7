// Ranks on a CPU. A thread takes a tile of items and streams the rows past it in blocks: one
// product, whose scores stay in the core's cache while they are compared with the target's and
// counted. Nothing else is written, so the count is all that the threads share.
//
//   S    = q c^T + b                   through the BLAS that PyTorch ships
//   rank += #{v: not s_v < s_target}   without the target and what the row has seen
//
// What is left out is made -inf before the count. Where that is not below the target's score, every
// item is ahead of it, and those left out are told apart.

#include "../rank_targets.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ahead.h"
#include "blas.h"
#include "team.h"

namespace dwl {
namespace {

constexpr int64_t kTile = 512;  // items
constexpr int64_t kRows = 128;  // of a block

// A thread's memory.
template <typename T>
struct Scratch {
  Buffer<T> items;         // [kTile, D], where the table is stored otherwise
  Buffer<T> query;         // [kRows, D]
  Buffer<T> scores;        // [kRows, kTile + 16], see kTile
  std::vector<bool> gone;  // [kTile]
};

template <typename T, typename S>
class Ranks {
 public:
  Ranks(const RankProblem<T, S>& p, int64_t* rank, int threads)
      : p_(p), rank_(rank), sorted_(p.offsets != nullptr ? p.rows : 0) {
    for (int64_t i = 0; i < p.rows; ++i) {
      rank[i] = !p.padded[i];
      if (!p.padded[i]) rows_.push_back(i);
    }
    const int64_t tiles = (p.items + kTile - 1) / kTile, most = rows_.size() / kRows;
    // Few tiles are shared out by ranges of rows too.
    groups_ = std::clamp<int64_t>(4 * threads / tiles, 1, std::max<int64_t>(most, 1));
    units_ = rows_.empty() ? 0 : tiles * groups_;
    tile_ = ((p.items + tiles - 1) / tiles + 15) / 16 * 16;
    threads_ = static_cast<int>(std::clamp<int64_t>(units_, 1, threads));
    score_.resize(p.rows);
    length_.resize(p.rows);
    scratch_.resize(threads_);
    for (Scratch<T>& own : scratch_) {
      if constexpr (!std::is_same_v<T, S>) own.items = buffer<T>(kTile * p.dim);
      own.query = buffer<T>(kRows * p.dim);
      own.scores = buffer<T>(kRows * (kTile + 16));
      own.gone.resize(kTile);
    }
  }

  void run() {
#pragma omp parallel for num_threads(threads_) schedule(static, 1)
    for (int k = 0; k < threads_; ++k) {
      const FlushToZero flush;
      const int64_t count = rows_.size();
      for (int64_t r = count * k / threads_; r < count * (k + 1) / threads_; ++r) {
        prepare(rows_[r], scratch_[k]);
      }
    }
    std::atomic<int64_t> next = 0;
#pragma omp parallel for num_threads(threads_) schedule(static, 1)
    for (int k = 0; k < threads_; ++k) {
      const FlushToZero flush;
      for (int64_t unit; (unit = next++) < units_;) rank_rows(unit, scratch_[k]);
    }
  }

 private:
  static const T* converted(const S* from, int64_t n, T* to) {
    if constexpr (std::is_same_v<T, S>) {
      return from;
    } else {
      for (int64_t k = 0; k < n; ++k) to[k] = static_cast<T>(from[k]);
      return to;
    }
  }

  // The target's score, what bounds its rounding, and the order of what the row has seen.
  void prepare(int64_t i, Scratch<T>& own) {
    const T* query = p_.query + i * p_.dim;
    length_[i] = finite_length(query, p_.dim);
    if (p_.offsets != nullptr) {
      sorted_[i] = std::is_sorted(p_.seen + p_.offsets[i], p_.seen + p_.offsets[i + 1]);
    }
    if (p_.nowhere[i]) {
      score_[i] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const int64_t y = p_.target[i];
    const T* item = converted(p_.table + y * p_.dim, p_.dim, own.items.get());
    score_[i] = exact_dot(query, item, p_.dim) + bias(y);
  }

  double bias(int64_t v) const { return p_.bias != nullptr ? double(p_.bias[v]) : 0; }

  void rank_rows(int64_t unit, Scratch<T>& own) {
    const int64_t j0 = unit / groups_ * tile_, j1 = std::min(j0 + tile_, p_.items), d = p_.dim;
    if (j0 >= j1) return;
    const int dim = static_cast<int>(d), width = static_cast<int>(j1 - j0), stride = kTile + 16;
    const T* items = converted(p_.table + j0 * d, (j1 - j0) * d, own.items.get());
    double longest = 0, most = 0;
    for (int64_t j = 0; j < width; ++j) {
      longest = std::max(longest, finite_length(items + j * d, d));
      const double b = std::abs(bias(j0 + j));
      if (std::isfinite(b)) most = std::max(most, b);
    }
    const int64_t group = unit % groups_, count = rows_.size();
    const int64_t end = count * (group + 1) / groups_;
    for (int64_t r0 = count * group / groups_; r0 < end; r0 += kRows) {
      const int64_t rows = std::min(kRows, end - r0);
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(p_.query + rows_[r0 + r] * d, d, own.query.get() + r * d);
      }
      gemm('T', 'N', width, static_cast<int>(rows), dim, items, dim, own.query.get(), dim, T(0),
           own.scores.get(), stride);
      for (int64_t r = 0; r < rows; ++r) {
        T* s = own.scores.get() + r * stride;
        if (p_.bias != nullptr) {
          const T* b = p_.bias + j0;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) s[j] += b[j];
        }
        const int64_t i = rows_[r0 + r];
        const auto bounds = bounds_of<T>(score_[i], length_[i] * longest + most, d);
        const int64_t ahead = score_[i] > -kInfinity<double>
                                  ? known(i, j0, width, s, bounds, items)
                                  : width - left_out(i, j0, width, own.gone);
        if (ahead != 0) std::atomic_ref<int64_t>(rank_[i]).fetch_add(ahead);
      }
    }
  }

  // How many items of a tile are ahead of a target whose score is above -inf.
  int64_t known(int64_t i, int64_t j0, int64_t width, T* s, Bounds<T> bounds, const T* items) {
    visit(i, j0, width, [&](int64_t j) { s[j] = -kInfinity<T>; });
    const T* query = p_.query + i * p_.dim;
    return count_ahead(s, width, bounds, [&](int64_t j) {
      return exact_dot(query, items + j * p_.dim, p_.dim) + bias(j0 + j) < score_[i];
    });
  }

  // How many items of a tile do not compete with the target.
  int64_t left_out(int64_t i, int64_t j0, int64_t width, std::vector<bool>& gone) {
    std::fill(gone.begin(), gone.end(), false);
    visit(i, j0, width, [&](int64_t j) { gone[j] = true; });
    return std::count(gone.begin(), gone.end(), true);
  }

  // Calls take(item - j0) for the target and the seen items in [j0, j0 + width).
  template <typename Take>
  void visit(int64_t i, int64_t j0, int64_t width, Take take) {
    const auto inside = [&](int64_t v) { return uint64_t(v - j0) < uint64_t(width); };
    if (!p_.nowhere[i] && inside(p_.target[i])) take(p_.target[i] - j0);
    if (p_.offsets == nullptr) return;
    const int64_t *v = p_.seen + p_.offsets[i], *last = p_.seen + p_.offsets[i + 1];
    if (sorted_[i]) {
      for (v = std::lower_bound(v, last, j0); v != last && *v < j0 + width; ++v) take(*v - j0);
      return;
    }
    for (; v != last; ++v) {
      if (inside(*v)) take(*v - j0);
    }
  }

  const RankProblem<T, S>& p_;
  int64_t* rank_;
  std::vector<int64_t> rows_;   // those that are no padding
  std::vector<char> sorted_;    // [B] whether what a row has seen ascends
  std::vector<double> score_;   // [B] of the target; NaN where it is no item
  std::vector<double> length_;  // [B] |q|
  int64_t groups_, units_, tile_;
  int threads_;
  std::vector<Scratch<T>> scratch_;  // [threads]
};

}  // namespace

template <typename T, typename S>
void rank_targets_cpu(const RankProblem<T, S>& problem, int64_t* rank, int threads) {
  Ranks<T, S>(problem, rank, threads).run();
}

template void rank_targets_cpu(const RankProblem<float, float>&, int64_t*, int);
template void rank_targets_cpu(const RankProblem<float, BFloat16>&, int64_t*, int);
template void rank_targets_cpu(const RankProblem<float, Float16>&, int64_t*, int);
template void rank_targets_cpu(const RankProblem<double, double>&, int64_t*, int);

}  // namespace dwl
