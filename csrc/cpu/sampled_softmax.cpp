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
#include "block_kernel.h"

namespace dwl {
namespace {

// Measured for N = 8,192 and 65,536 at D = 64 and 128 on two AVX-512 cores: tiles of 256 to 2,048
// candidates and blocks of 64 to 256 rows are within 5% of these. A stride that is a power of two
// would send a column of a tile to few sets of the cache: product 3 reads columns and ran at 75
// instead of 98 GFLOP/s a core at D = 64, at 87 instead of 101 at 128.
constexpr Cut kCut{.tile = 512, .most_rows = 128, .least_rows = 64, .blocks = 32, .grain = 16};
constexpr int64_t kSegment = 128;  // candidates whose gradients are left out together

template <typename T>
struct BlasWorker : Worker<T> {
  int64_t stride;              // numbers between the rows of a tile
  std::vector<T> factor;       // [b] from the references of a tile to m
  Buffer<T> query, scaled;     // [b, D] what scores; q times the scale of the row
  Buffer<T> e;                 // [tiles, b, stride], or of one tile
  std::vector<T> segment_top;  // [tiles, segments, b] largest e, or empty
};

template <typename T>
class BlasKernel : public BlockKernel<T, T, BlasWorker<T>> {
  using Part = BlasWorker<T>;
  using Base = BlockKernel<T, T, Part>;
  using Base::bias_;
  using Base::candidate_gradient_;
  using Base::late_;
  using Base::out_;
  using Base::p_;
  using Base::team_;

 public:
  BlasKernel(const Problem<T>& p, const Gradients<T>& out, int threads)
      : Base(p, out, threads, kCut), rank_(p, out.rank != nullptr) {
    late_ = p.skip_below != nullptr;
    keeps_e_ = candidate_gradient_ || late_;
    const int64_t block = team_.block();
    for (Part& w : team_.workers()) {
      w.stride = w.tile % 32 == 0 ? w.tile + 16 : w.tile;  // see kCut
      w.e = buffer<T>((keeps_e_ ? w.tiles : std::min<int64_t>(w.tiles, 1)) * block * w.stride);
      if (late_) w.segment_top.resize(w.tiles * (kCut.tile / kSegment) * block);
      w.query = buffer<T>(block * p.dim);
      w.scaled = buffer<T>(block * p.dim);
      w.factor.resize(block);
    }
  }

 private:
  void exponentials(Part& w, int64_t round) override;
  void products(Part& w, int64_t round) override;
  void logits(Part& w, int64_t j0, int64_t j1, T* s);
  void carry_dq(Part& w, int64_t round, int64_t tile);
  void add_dq(Part& w, int64_t round, int64_t j0, int64_t columns, const T* e);
  bool counts(Part& w, int64_t tile, int64_t segment);

  T shift(int64_t i) const { return p_.shift != nullptr ? p_.shift[i] : T(0); }
  T* e_of(Part& w, int64_t tile) {  // [b, width]
    return w.e.get() + (keeps_e_ ? tile * team_.block() * w.stride : 0);
  }
  // [b] the largest e of each row in a segment of a tile.
  T* segment_top(Part& w, int64_t tile, int64_t segment) {
    return w.segment_top.data() + (tile * (kCut.tile / kSegment) + segment) * team_.block();
  }

  const PositiveRank<T> rank_;
  bool keeps_e_;  // of a block; else of one tile
};

// tile = the logits of the block with candidates [j0, j1), -inf where one is excluded.
template <typename T>
void BlasKernel<T>::logits(Part& w, int64_t j0, int64_t j1, T* tile) {
  const int width = static_cast<int>(j1 - j0), dim = static_cast<int>(p_.dim);
  gemm('T', 'N', width, static_cast<int>(w.row.size()), dim, p_.candidate + j0 * dim, dim,
       w.query.get(), dim, T(0), tile, static_cast<int>(w.stride));
  const T* bias = bias_.empty() ? nullptr : bias_.data() + j0;
  for (size_t r = 0; r < w.row.size(); ++r) {
    row_logits(tile + r * w.stride, w.rows[r].inverse, bias, shift(w.row[r]), width);
  }
  Base::exclude_pairs(w, j0, j1,
                      [&](size_t r, int64_t j) { tile[r * w.stride + j - j0] = -kInfinity<T>; });
}

// e of the block, its sums and, unless that waits for the totals, product 2.
template <typename T>
void BlasKernel<T>::exponentials(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size());
  Report<T>& report = w.report(round);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = w.row[r];
    std::copy_n((p_.score != nullptr ? p_.score : p_.query) + i * p_.dim, p_.dim,
                w.query.get() + r * p_.dim);
    if (out_.rank != nullptr) w.marks[r] = rank_.mark(i);
    report.m[r] = p_.refined ? -kInfinity<T> : w.rows[r].z_positive;
    report.sum[r] = 0;
    report.ahead[r] = 0;
  }
  if (out_.query != nullptr) std::fill_n(report.dq.get(), rows * p_.dim, T(0));
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile) {
    T* e = e_of(w, tile);
    const int64_t width = j1 - j0;
    T* m = team_.reference(w, tile);
    logits(w, j0, j1, e);
    for (int64_t r = 0; r < rows; ++r) {
      T* own = e + r * w.stride;
      T top = row_max(own, width);
      if (top != top && !bias_.empty()) {
        // What does not compete stays out: an infinite product and its -inf made NaN.
        for (int64_t k = 0; k < width; ++k) {
          if (bias_[j0 + k] == -kInfinity<T>) own[k] = -kInfinity<T>;
        }
        top = row_max(own, width);
      }
      if (out_.rank != nullptr)
        report.ahead[r] += rank_.ahead(w.row[r], w.marks[r], j0, own, width);
      m[r] = larger(report.m[r], top);
      report.sum[r] *= between(report.m[r], m[r]);
      report.sum[r] += row_exp(own, m[r], width);
      report.m[r] = m[r];
      for (int64_t k = 0; late_ && k < width; k += kSegment) {
        const T top = row_max(own + k, std::min(kSegment, width - k));
        segment_top(w, tile, k / kSegment)[r] = top;
      }
    }
    if (out_.query == nullptr || late_) return;
    carry_dq(w, round, tile);
    add_dq(w, round, j0, width, e);
  });
}

// Moves dq from the references of the tile before to those of this one.
template <typename T>
void BlasKernel<T>::carry_dq(Part& w, int64_t round, int64_t tile) {
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
void BlasKernel<T>::add_dq(Part& w, int64_t round, int64_t j0, int64_t columns, const T* e) {
  const int dim = static_cast<int>(p_.dim);
  gemm('N', 'N', dim, static_cast<int>(w.row.size()), static_cast<int>(columns),
       p_.candidate + j0 * dim, dim, e, static_cast<int>(w.stride), T(1), w.report(round).dq.get(),
       dim);
}

// Whether some probability of a segment reaches the threshold of its row.
template <typename T>
bool BlasKernel<T>::counts(Part& w, int64_t tile, int64_t segment) {
  const T* top = segment_top(w, tile, segment);
  for (size_t r = 0; r < w.row.size(); ++r) {
    // Not below, rather than at least: NaN counts.
    if (!(top[r] * w.factor[r] < p_.skip_below[w.row[r]] * w.results[r].total)) return true;
  }
  return false;
}

// Product 3 and the gradient of log-Q, over all tiles or what the threshold leaves of them.
template <typename T>
void BlasKernel<T>::products(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim;
  const int dim = static_cast<int>(d), height = static_cast<int>(rows);
  T *dc = Base::dc_of(w.group), *d_log_q = Base::d_log_q_of(w.group);
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile) {
    T* e = e_of(w, tile);
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
}

}  // namespace

template <typename T>
void sampled_softmax_cpu(const Problem<T>& problem, const Gradients<T>& gradients, int threads) {
  BlasKernel<T>(problem, gradients, threads).run();
}

template void sampled_softmax_cpu<float>(const Problem<float>&, const Gradients<float>&, int);
template void sampled_softmax_cpu<double>(const Problem<double>&, const Gradients<double>&, int);

}  // namespace dwl
